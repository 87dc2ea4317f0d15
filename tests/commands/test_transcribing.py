"""`whisper-meft predict` of models that transcribe: tables, text, subtitles, and what is refused first."""

import csv
import json
import os

import pytest
from modelling_fixtures import randomise
from recogniser_fixtures import make_recogniser, noise
from transformers import WhisperForConditionalGeneration
from whisper_meft import LSTConfig, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.evaluation.transcriber import Transcriber


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """whisper/, lst/, a/x.wav, b/x.wav (2 s, longer than the window) and bad.wav."""
    folder = tmp_path_factory.mktemp("transcribing")
    whisper = WhisperForConditionalGeneration.from_pretrained(make_recogniser(folder / "whisper"))
    model = randomise(get_meft_model(whisper, LSTConfig(reduction_factor=4)), std=0.05)
    model.save_pretrained(folder / "lst")
    for number, (name, seconds) in enumerate({"a": 0.6, "b": 2.0}.items()):
        (folder / name).mkdir()
        noise(folder / name / "x.wav", seconds, seed=number)
    (folder / "bad.wav").write_text("no audio")
    return folder


def predict(work, *arguments, model="lst"):
    options = ["--language", "nl", "--device", "cpu"]
    return main(["predict", str(work / model), *map(str, arguments), *options])


def test_a_table_and_files_of_all(work, tmp_path, capsys):
    files = [work / "b/x.wav", work / "bad.wav", work / "a/x.wav"]
    assert predict(work, *files) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["file", "text"] and [line.split()[0] for line in lines[1:]] == [
        str(files[0]),
        str(files[2]),
    ]
    assert "cannot read" in err and "bad.wav" in err
    assert predict(work, *files, "--output", tmp_path / "out.json") == 1
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["file"] for row in rows] == [str(files[0]), str(files[2])]
    assert all(row["text"] and isinstance(row["complete"], bool) and "segments" not in row for row in rows)
    assert lines[1].split(maxsplit=1)[1] == rows[0]["text"]
    assert predict(work, *files, "--output", tmp_path / "out.csv", "--return_timestamps") == 1
    with open(tmp_path / "out.csv", newline="") as file:
        timed = list(csv.DictReader(file))
    assert list(timed[0]) == ["file", "start", "end", "text"] and len(timed) > 2
    assert all(0 <= float(row["start"]) < float(row["end"]) <= 2 for row in timed)


def test_a_folder_of_subtitles(work, tmp_path, capsys):
    assert predict(work, work / "a", work / "b", "--output_dir", tmp_path / "out") == 0
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert written == [f"{folder}/x.{form}" for folder in "ab" for form in ("srt", "txt", "vtt")]
    assert (tmp_path / "out/b/x.srt").read_text().startswith("1\n00:00:0")
    assert (tmp_path / "out/b/x.vtt").read_text().startswith("WEBVTT\n\n00:00:0")
    assert capsys.readouterr().out == f"2 transcripts are in {tmp_path / 'out'}\n"
    kept = (tmp_path / "out/a/x.srt").read_text()
    (tmp_path / "out/a/x.vtt").unlink()
    (tmp_path / "out/a/x.srt").write_text("mine")
    again = [work / "a", "--output_dir", tmp_path / "out/a", "--output_format", "srt"]
    assert predict(work, *again) == 1 and (tmp_path / "out/a/x.srt").read_text() == "mine"
    assert "x.srt is there already: --overwrite replaces it" in capsys.readouterr().err
    assert predict(work, *again, "--overwrite") == 0
    assert (tmp_path / "out/a/x.srt").read_text() == kept and not (tmp_path / "out/a/x.vtt").exists()


def test_one_recording_to_one_file(work, tmp_path):
    for form in ("srt", "vtt", "txt"):
        assert predict(work, work / "b/x.wav", "--output", tmp_path / f"x.{form}") == 0
    assert predict(work, work / "b/x.wav", "--output_dir", tmp_path / "dir", "--format", "vtt") == 0
    assert (tmp_path / "dir/x.vtt").read_text() == (tmp_path / "x.vtt").read_text()
    assert os.listdir(tmp_path / "dir") == ["x.vtt"]


def test_those_that_can_be_heard_are_written(work, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(work, work / "bad.wav", work / "a/x.wav", "--output_dir", out, "--format", "txt") == 1
    assert os.listdir(out) == ["x.txt"] and "bad.wav" in capsys.readouterr().err
    assert predict(work, work / "bad.wav", "--output", tmp_path / "bad.srt") == 1
    assert not (tmp_path / "bad.srt").exists()


def test_a_plain_whisper_transcribes(work, capsys):
    assert predict(work, work / "a/x.wav", model="whisper") == 0
    assert "x.wav" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--output", "{tmp}/x.srt"], 1, "holds one transcript, and there are 2 recordings"),
        (["--output", "{tmp}/x.doc"], 2, "must end in .csv, .json, .txt, .srt or .vtt"),
        (["--output", "{tmp}/there.csv"], 1, "there.csv is there already"),
        (["--output", "{tmp}/file/x.csv"], 1, "cannot write {tmp}/file/x.csv"),
        (["--output_dir", "{tmp}/file"], 1, "cannot write {tmp}/file/"),
        (["--output_dir", "{tmp}/taken", "--overwrite"], 1, "x.srt: it is a folder"),
        (["--output_dir", "{tmp}/o", "--output", "{tmp}/x.csv"], 2, "give one of them"),
        (["--output_format", "srt"], 2, "--output_format srt is for --output_dir"),
        (["--output_dir", "{tmp}/o", "--output_format", "doc"], 2, "--output_format"),
    ],
)
def test_what_cannot_be_written_is_known_before_work(
    options, status, message, work, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "taken/a/x.srt").mkdir(parents=True)
    monkeypatch.setattr(Transcriber, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    before = sorted(tmp_path.rglob("*"))
    options = [option.format(tmp=tmp_path) for option in options]
    assert predict(work, work / "a/x.wav", work / "b/x.wav", *options) == status
    err = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "there.csv").read_text() == "mine"


def test_a_recording_is_not_written_over(work, tmp_path, capsys):
    (tmp_path / "x.srt").write_bytes((work / "a/x.wav").read_bytes())
    assert predict(work, tmp_path / "x.srt", "--output_dir", tmp_path, "--overwrite") == 1
    assert "x.srt: it is one of the recordings" in capsys.readouterr().err
    assert (tmp_path / "x.srt").read_bytes() == (work / "a/x.wav").read_bytes()
