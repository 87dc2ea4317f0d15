"""`whisper-meft predict`, `evaluate` and `calibrate` on recordings that are longer than a model hears."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from training_fixtures import RATE, TONES, make_audio_folder, make_backbone, tone, train_command
from transformers import WhisperFeatureExtractor
from whisper_meft import LSTConfig, UserError, get_meft_model
from whisper_meft.commands import predict
from whisper_meft.commands.cli import main
from whisper_meft.evaluation.classifier import Classifier
from whisper_meft.model.backbone import load_backbone, set_labels
from whisper_meft.options.inference import InferenceArguments
from whisper_meft.options.parser import UsageError

soundfile = pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """out/: a model of the tones with a window of 1 s; long/: a low tone of 4 s and then a high one of 2 s,
    and a short middle one."""
    folder = tmp_path_factory.mktemp("long")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=10)
    options = {"num_train_epochs": 20, "eval_strategy": "no", "save_strategy": "no"}
    assert main(train_command(folder / "backbone", folder / "train", folder / "out", **options)) == 0
    rng = np.random.default_rng(3)
    (folder / "long").mkdir()
    wave = np.concatenate([tone(TONES["low"], 4.0, rng), tone(TONES["high"], 2.0, rng)])
    soundfile.write(folder / "long" / "both.flac", wave, RATE)
    soundfile.write(folder / "long" / "short.wav", tone(TONES["middle"], 0.8, rng), RATE)
    return folder


def predicted(work, capsys, *arguments):
    assert main(["predict", str(work / "out"), *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_long_recording_is_told_over_time(work, tmp_path, capsys):
    out = predicted(work, capsys, work / "long" / "both.flac")
    table, segments = out.rstrip("\n").split("\n\n")
    assert table.splitlines()[0].split() == ["file", "label", "probability", "next"]
    assert table.splitlines()[1].split()[1] == "low"
    lines = [line.split() for line in segments.splitlines()]
    assert lines[0] == ["start", "end", "label", "probability", "next"]
    assert [line[:2] for line in lines[1:]] == [[f"{i / 2:.2f}", f"{i / 2 + 1:.2f}"] for i in range(11)]
    labels = [line[2] for line in lines[1:]]
    assert set(labels[:7]) == {"low"} and set(labels[8:]) == {"high"}

    arguments = [work / "long", "--output", tmp_path / "p.json", "--segments", tmp_path / "s.csv"]
    assert predicted(work, capsys, *arguments) == ""
    rows = json.loads((tmp_path / "p.json").read_text())
    with open(tmp_path / "s.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["file", "start", "end", "label", "high", "low", "middle"]
    assert len(found) == 12 and len(rows) == 2  # each file has a row at least
    assert [row["label"] for row in found[:11]] == labels and found[11]["label"] == "middle"
    assert [row["label"] for row in rows[0]["segments"]] == labels and "segments" not in rows[1]
    for row, each in zip(found, rows[0]["segments"]):
        for name in TONES:
            assert float(row[name]) == pytest.approx(each["probabilities"][name], abs=1e-6)
    # Four seconds of six: of two windows of three there is no doubt.
    assert rows[0]["probabilities"]["low"] == pytest.approx(4 / 6, abs=0.08)

    # The table of files is the one of short files.
    predicted(work, capsys, work / "long", "--output", tmp_path / "p.csv", "--segments", tmp_path / "s.json")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0] == "file,label,high,low,middle" and len(lines) == 3
    parts = json.loads((tmp_path / "s.json").read_text())
    assert [len(each["segments"]) for each in parts] == [11, 1]
    assert parts[0]["segments"] == rows[0]["segments"]
    # Of several recordings the windows are not printed, nor of one within a window.
    assert "\n\n" not in predicted(work, capsys, work / "long")
    assert "\n\n" not in predicted(work, capsys, work / "long" / "short.wav")


def test_windows_that_are_asked_for(work, tmp_path, capsys):
    file = work / "long" / "both.flac"
    out = predicted(work, capsys, file, "--window", "0.5", "--hop", "0.5")
    assert len(out.splitlines()) == 2 + 1 + 1 + 12
    first = predicted(work, capsys, file, "--window", "first")
    assert "\n\n" not in first and first.splitlines()[1].split()[1] == "low"


def test_windows_without_a_sure_class(work, tmp_path, capsys):
    file = work / "long" / "both.flac"
    threshold = ["--reject_below", "0.7", "--reject_label", "none"]
    predicted(work, capsys, file, "--output", tmp_path / "p.json", *threshold)
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert (row["label"], row["rejected"]) == ("none", True)  # the whole is two thirds low
    labels = [each["label"] for each in row["segments"]]
    assert labels[0] == "low" and labels[-1] == "high"
    for each in row["segments"]:
        assert each["rejected"] == (max(each["probabilities"].values()) < 0.7) == (each["label"] == "none")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_figure(work, tmp_path, capsys, suffix):
    pytest.importorskip("matplotlib")
    for name in ("both.flac", "short.wav"):
        path = tmp_path / f"{name}{suffix}"
        predicted(work, capsys, work / "long" / name, "--plot", path, "--reject_below", "0.5")
        begin = path.read_bytes()[:8]
        assert begin == b"\x89PNG\r\n\x1a\n" if suffix == ".png" else begin.startswith(b"<?xml")
    predicted(work, capsys, work / "long", "--plot", tmp_path / "figures")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["both.png", "short.png"]


def test_a_figure_of_a_file_whose_name_is_no_text(work, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    name = os.fsdecode(b"latin-\xe9.wav")
    try:
        shutil.copy(work / "long" / "short.wav", tmp_path / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    for suffix in (".png", ".svg"):
        path = tmp_path / f"figure{suffix}"
        assert "latin-\\udce9.wav" in predicted(work, capsys, tmp_path / name, "--plot", path)
        assert path.stat().st_size > 1000
    assert "latin-\\udce9.wav" in (tmp_path / "figure.svg").read_text()


def test_a_figure_that_fails_leaves_the_tables(work, tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise UserError("no figure")

    monkeypatch.setattr(predict, "plot_timeline", fail)
    arguments = [
        "--output",
        tmp_path / "p.csv",
        "--segments",
        tmp_path / "s.csv",
        "--plot",
        tmp_path / "figures",
    ]
    assert main(["predict", *map(str, (work / "out", work / "long", *arguments))]) == 1
    assert [len((tmp_path / name).read_text().splitlines()) for name in ("p.csv", "s.csv")] == [3, 13]
    assert "no figure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "40"], "--window must be at most the 30 seconds that the model hears, got 40"),
        (["--window", "0"], "--window must be at least 0.1 seconds, got 0"),
        (["--window", "long"], "--window must be a number of seconds, or first, got 'long'"),
        (["--window", "5"], "window must be at most the 1 seconds that the model hears, got 5"),
        (["--hop", "-1"], "--hop must be at least 0.1 seconds, got -1"),
        (
            ["--window", "2", "--hop", "3"],
            "--hop must be above 0 and at most the window's 2 seconds, got 3",
        ),
        (["--window", "first", "--hop", "3"], "--hop 3 is from window to window, and --window first"),
        (["--segments", "x.txt"], "--segments must end in .csv or .json, got x.txt"),
        (["--plot", "x.pdf"], "--plot must end in .png or .svg, or name a folder, got 'x.pdf'"),
        (["--plot", ""], "--plot must end in .png or .svg, or name a folder, got ''"),
        (["--plot", "x.png"], "--plot x.png holds one recording, and there are 2: name a folder"),
        (["--segments", "a.csv", "--output", "./a.csv"], "--segments and --output are both a.csv"),
        (["--segments", "b/../a.csv", "--output", "a.csv"], "--segments and --output are both b/../a.csv"),
    ],
)
def test_what_cannot_be(work, capsys, arguments, message):
    assert main(["predict", str(work / "out"), str(work / "long"), *arguments]) != 0
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"whisper-meft: error: {message}") and "\n" not in error


def test_scores_are_those_of_the_answers_that_predict_gives(work, tmp_path, capsys):
    (tmp_path / "data" / "low").mkdir(parents=True)
    (tmp_path / "data" / "middle").mkdir()
    (tmp_path / "data" / "low" / "x.flac").write_bytes((work / "long" / "both.flac").read_bytes())
    (tmp_path / "data" / "middle" / "x.wav").write_bytes((work / "long" / "short.wav").read_bytes())
    predicted(work, capsys, tmp_path / "data", "--output", tmp_path / "p.json")
    rows = json.loads((tmp_path / "p.json").read_text())
    expected = -np.mean(np.log([rows[0]["probabilities"]["low"], rows[1]["probabilities"]["middle"]]))
    where = ["evaluate", str(work / "out"), "--data", str(tmp_path / "data"), "--output_dir"]
    assert main([*where, str(tmp_path / "scores")]) == 0
    results = json.loads((tmp_path / "scores" / "eval_results.json").read_text())
    assert results["log_loss"] == pytest.approx(expected, rel=1e-5)
    assert (results["window"], results["hop"]) == (1.0, 0.5)
    assert main([*where, str(tmp_path / "first"), "--window", "first"]) == 0
    results = json.loads((tmp_path / "first" / "eval_results.json").read_text())
    assert results["window"] is None and results["log_loss"] < 0.5 * expected


def test_calibrating_on_long_recordings(work, tmp_path, capsys):
    model = shutil.copytree(work / "out", tmp_path / "model")
    rng = np.random.default_rng(4)
    for label, frequency in TONES.items():
        (tmp_path / "dev" / label).mkdir(parents=True)
        for number in range(8):
            parts = [tone(frequency * rng.uniform(0.6, 1.7), 0.5, rng) for _ in range(1 + number % 4)]
            soundfile.write(tmp_path / "dev" / label / f"{number}.wav", np.concatenate(parts), RATE)
    assert main(["calibrate", str(model), "--data", str(tmp_path / "dev")]) == 0
    said = capsys.readouterr().out
    config = json.loads((model / "config.json").read_text())
    # What it says of the calibrated answers is what the calibrated model gives.
    where = [
        "evaluate",
        str(model),
        "--data",
        str(tmp_path / "dev"),
        "--output_dir",
        str(tmp_path / "scores"),
    ]
    assert main([*where, "--reject_below", "saved"]) == 0
    results = json.loads((tmp_path / "scores" / "eval_results.json").read_text())
    assert f"{results['log_loss']:.4f} after" in said and f"{results['ece']:7.2%} after" in said
    assert results["open_set"]["kept"] >= 0.95
    # The temperature is the best one of the windows, each recording counting once.
    classifier = Classifier.load(work / "out", InferenceArguments(), progress=False)
    rows = []
    for label in TONES:
        for path in sorted((tmp_path / "dev" / label).iterdir()):
            timeline = classifier.segments(path)
            seconds = [segment.end - segment.start for segment in timeline.segments]
            # Windows of 1 s every half: those at the ends have a half of their own.
            shares = [0.75 if i in (0, len(seconds) - 1) else 0.5 for i in range(len(seconds))]
            for segment, share in zip(timeline.segments, shares):
                p = segment.probabilities.astype(np.float64)
                rows.append((np.log(p), classifier.labels.index(label), share / sum(shares)))
    logs, index, weight = (np.array(column) for column in zip(*rows))

    def loss(temperature):
        scaled = logs / temperature
        norm = np.log(np.exp(scaled - scaled.max(1, keepdims=True)).sum(1)) + scaled.max(1)
        return float((weight * (norm - scaled[np.arange(len(index)), index])).sum())

    best = config["calibration_temperature"]
    assert loss(best) <= min(loss(best * 1.01), loss(best / 1.01))


def test_models_that_transcribe_have_windows_of_their_own():
    for given in ({"window": "10"}, {"window": "first"}, {"hop": 5.0}):
        with pytest.raises(UsageError, match="is for models that classify, and this one transcribes"):
            InferenceArguments(**given).check_kind(transcribes=True)
        InferenceArguments(**given).check_kind(transcribes=False)


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "tones", "audio"],
        ["predict", "--model=tones", "--model=tones", "audio"],
        ["evaluate", "tones", "--data=audio"],
        ["calibrate", "tones", "--data=audio"],
    ],
)
def test_models_that_classify_have_no_tokenizer(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = load_backbone(make_backbone(tmp_path / "backbone"))
    get_meft_model(base, LSTConfig(reduction_factor=2)).save_pretrained("tones")
    assert main([*command, "--tokenizer_name=whisper"]) == 2
    said = "--tokenizer_name whisper is for models that transcribe, and this one classifies"
    assert said in capsys.readouterr().err
    InferenceArguments(tokenizer_name="whisper").check_kind(transcribes=True)


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_ten_minutes(tmp_path):
    """Resident memory of processes with a tiny encoder of Whisper's window, so that the sound would show."""
    backbone = make_backbone(tmp_path / "backbone", max_source_positions=1500)
    base = load_backbone(backbone)
    set_labels(base, sorted(TONES))
    get_meft_model(base, LSTConfig(reduction_factor=2)).save_pretrained(tmp_path / "out")
    WhisperFeatureExtractor.from_pretrained(backbone).save_pretrained(tmp_path / "out")
    program = (
        "import resource, sys\n"
        "from whisper_meft.commands.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(status)\n"
    )
    minute = 0.1 * np.random.default_rng(0).standard_normal(60 * RATE).astype(np.float32)
    peaks = []
    for minutes in (10, 60):
        path = tmp_path / f"{minutes}.flac"
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        arguments = ["predict", tmp_path / "out", path, "--segments", tmp_path / "s.csv", "--batch_size", "4"]
        command = [sys.executable, "-c", program, *map(str, arguments)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(found.stdout.splitlines()[-1]) / 1024)
        assert len((tmp_path / "s.csv").read_text().splitlines()) == 4 * minutes  # a header, and all but one
    print(f"{peaks[0]:.0f} MiB for 10 minutes, {peaks[1]:.0f} MiB for 60")
    assert peaks[1] < 1.05 * peaks[0]
