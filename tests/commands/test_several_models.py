"""`whisper-meft predict` by several models: one pass, and the answers of each."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from modelling_fixtures import randomise
from recogniser_fixtures import make_recogniser
from training_fixtures import RATE, make_audio_folder, make_backbone, tone
from transformers import WhisperForAudioClassification
from whisper_meft import MeftConfig, UserError, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.encoder.frozen import FrozenEncoder
from whisper_meft.evaluation.several import names_of
from whisper_meft.model.backbone import set_labels

MODELS = {
    "accents": ("lst", ["northern", "southern", "western"]),
    "languages": ("unipt", ["de", "nl"]),
    "speakers": ("sherl", ["child", "grown-up"]),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    make_backbone(folder / "backbone")
    make_backbone(folder / "other", init_std=0.2)
    make_audio_folder(folder / "audio", per_class=2)
    for seed, (name, (method, labels)) in enumerate(MODELS.items()):
        make_model(folder, name, method, labels, seed)
    make_model(folder, "elsewhere", "lst", ["a", "b"], backbone="other")
    make_model(folder, "trimmed", "lst", ["a", "b"], max_frames="longest")
    make_model(folder, "inside", "lora", ["a", "b"])
    make_recogniser(folder / "whisper")
    return folder


def make_model(folder, name, method, labels, seed=0, backbone="backbone", **options):
    base = WhisperForAudioClassification.from_pretrained(folder / backbone)
    set_labels(base, labels)
    config = MeftConfig.from_dict({"method": method, **options})
    model = randomise(get_meft_model(base, config), seed)
    model.save_pretrained(folder / name)
    shutil.copy(folder / backbone / "preprocessor_config.json", folder / name)


def answers(work, tmp_path, *arguments, suffix="json"):
    output = tmp_path / f"out.{suffix}"
    assert main(["predict", *map(str, arguments), str(work / "audio"), f"--output={output}"]) == 0
    return json.loads(output.read_text()) if suffix == "json" else list(csv.reader(output.open()))


def named(work, *names):
    return [part for name in names for part in ("--model", work / name)]


def test_the_answers_are_those_of_each_from_one_pass(work, tmp_path, monkeypatch, capsys):
    alone = {name: answers(work, tmp_path, work / name) for name in MODELS}
    layers, finish = [], FrozenEncoder._states

    def counted(self, *given):
        for state in finish(self, *given):
            layers.append(len(state[0] if isinstance(state, tuple) else state))
            yield state

    monkeypatch.setattr(FrozenEncoder, "_states", counted)
    together = answers(work, tmp_path, *named(work, *MODELS), "--batch_size", "6")
    assert layers == [6, 6, 6]  # h_0 to h_2 of all clips, once
    monkeypatch.undo()
    files = [row["file"] for row in alone["accents"]]
    assert [row["file"] for row in together] == files and len(files) == 6
    for name, rows in alone.items():
        for row, other in zip(rows, together):
            assert other["models"][name] == {key: row[key] for key in ("label", "probabilities")}
    table = answers(work, tmp_path, *named(work, *MODELS), suffix="csv")
    header = [f"{name}:{column}" for name, (_, labels) in MODELS.items() for column in ("label", *labels)]
    assert table[0] == ["file", *header]
    for line, row in zip(table[1:], together, strict=True):
        cells = [row["file"]]
        for answer in row["models"].values():
            cells += [answer["label"], *(f"{p:.6f}" for p in answer["probabilities"].values())]
        assert line == cells
    capsys.readouterr()
    assert main(["predict", *map(str, named(work, *MODELS)), files[0]]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", *MODELS]
    for answer in together[0]["models"].values():
        assert f"{answer['label']} {max(answer['probabilities'].values()):.1%}" in line


def test_a_long_recording_is_heard_in_windows_by_each(work, tmp_path, capsys):
    sound = np.concatenate([tone(f, 1.7, np.random.default_rng(f)) for f in (300, 900)])  # a window is 2 s
    soundfile.write(tmp_path / "long.wav", sound, RATE)
    short = sorted((work / "audio").rglob("*.wav"))[0]
    output = tmp_path / "out.json"

    def told(*arguments):
        files = [str(tmp_path / "long.wav"), str(short), "--output", str(output)]
        assert main(["predict", *map(str, arguments), *files]) == 0
        return json.loads(output.read_text())

    alone = {name: told(work / name) for name in MODELS}
    assert len(alone["accents"][0]["segments"]) > 1
    for options in ((), ("--window", "1"), ("--window", "first")):
        together = told(*named(work, *MODELS), *options)
        for name in MODELS:
            for row, other in zip(told(work / name, *options), together, strict=True):
                assert other["models"][name] == {key: row[key] for key in ("label", "probabilities")}
    for option in ("--plot", "--segments"):
        command = ["predict", *map(str, named(work, *MODELS)), str(short), option, str(tmp_path / "x.json")]
        command[-1] = str(tmp_path / ("x.png" if option == "--plot" else "x.json"))
        assert main(command) != 0
        assert f"{option} is of one model, and 3 are named" in capsys.readouterr().err


def test_one_model_by_its_option_is_the_model(work, tmp_path):
    expected = answers(work, tmp_path, work / "accents")
    assert answers(work, tmp_path, "--model", work / "accents") == expected


def test_each_has_its_own_calibration_and_threshold(work, tmp_path, capsys):
    for name, values in (
        ("accents", {"rejection_threshold": 0.9999, "calibration_temperature": 3.0}),
        ("languages", {"rejection_threshold": 0.0}),
    ):
        shutil.copytree(work / name, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    models = named(tmp_path, "accents", "languages")
    for threshold in ("saved", "0.7"):
        options = (f"--reject_below={threshold}", "--reject_label=none of these")
        found = answers(work, tmp_path, *models, *options)
        for name in ("accents", "languages"):
            alone = answers(work, tmp_path, tmp_path / name, *options)
            assert [row["models"][name] for row in found] == [
                {key: row[key] for key in ("label", "probabilities", "rejected")} for row in alone
            ]
            rejected = [row["rejected"] for row in alone]
            assert threshold != "saved" or set(rejected) == {name == "accents"}
    models += named(work, "speakers")
    for label, message in (("de", "'de' is a class of languages"), ("none", "speakers has no threshold")):
        arguments = ["predict", *models, work / "audio", "--reject_below=saved", f"--reject_label={label}"]
        assert main(list(map(str, arguments))) == 1
        assert message in capsys.readouterr().err


def test_what_cannot_be_answered_is_named_and_the_rest_is_answered(work, tmp_path, capsys):
    files = [str(path) for path in sorted((work / "audio").rglob("*.wav"))][:2]
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    models = list(map(str, named(work, "accents", "languages")))
    assert main(["predict", *models, *files, str(tmp_path / "broken.wav")]) == 1
    captured = capsys.readouterr()
    assert "broken.wav" in captured.err and all(file in captured.out for file in files)
    shutil.copytree(work / "languages", tmp_path / "languages")
    model = get_meft_model(
        WhisperForAudioClassification.from_pretrained(work / "backbone"),
        MeftConfig.from_dict({"method": "lst"}),
    )
    model.classifier.bias.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "broken")
    shutil.copy(work / "accents" / "preprocessor_config.json", tmp_path / "broken")
    models = list(map(str, [*named(work, "accents"), *named(tmp_path, "broken")]))
    assert main(["predict", *models, *files]) == 1
    assert "broken: the model's output for it is NaN or infinite" in capsys.readouterr().err


def test_a_json_file_can_name_several(work, tmp_path, capsys):
    files = [str(path) for path in sorted((work / "audio").rglob("*.wav"))][:2]
    output = tmp_path / "out.json"
    options = {"model": [str(work / "accents"), str(work / "languages")], "audio": files}
    (tmp_path / "options.json").write_text(json.dumps(options | {"output": str(output)}))
    assert main(["predict", str(tmp_path / "options.json")]) == 0
    assert [list(row["models"]) for row in json.loads(output.read_text())] == [["accents", "languages"]] * 2


@pytest.mark.parametrize(
    ("models", "more", "status", "message"),
    [
        (["accents"], [], 2, "required: AUDIO_OR_DIR"),
        ([], [], 2, "required: MODEL_DIR, AUDIO_OR_DIR"),
        (["accents"], ["languages"], 2, "languages is a model, name it by --model"),
        (["accents", "elsewhere"], ["audio"], 1, "they were trained on different backbones"),
        (
            ["accents", "trimmed"],
            ["audio"],
            1,
            "max_frames is fidelity for the one and longest for the other",
        ),
        (["accents", "inside"], ["audio"], 1, "inside cannot share a pass: lora trains inside the encoder"),
        (["accents", "whisper"], ["audio"], 1, "whisper transcribes, and several models can only classify"),
        (["accents", "accents"], ["audio"], 1, "accents is named twice"),
        (["accents", "nowhere/at/all"], ["audio"], 1, "there is no folder"),
        (["accents", "languages"], ["audio", "--output=out.txt"], 2, "--output must end in .csv or .json"),
        (["accents", "languages"], ["audio", "--attention=linear"], 1, "attention must be None for a model"),
        (["accents", "languages"], ["audio", "--return_timestamps"], 1, "return_timestamps"),
    ],
)
def test_mistakes_give_one_line(models, more, status, message, work, capsys):
    more = [each if each.startswith("--") else str(work / each) for each in more]
    got = main(["predict", *map(str, named(work, *models)), *more])
    err = capsys.readouterr().err
    assert err.startswith("whisper-meft: error: ") and err.count("\n") == 1 and message in err, err
    assert got == status


def test_feature_extractors_that_differ_are_refused(work, tmp_path, capsys):
    shutil.copytree(work / "languages", tmp_path / "languages")
    path = tmp_path / "languages" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dither": 0.5}))
    arguments = [*named(work, "accents"), *named(tmp_path, "languages"), work / "audio"]
    assert main(["predict", *map(str, arguments)]) == 1
    assert "dither of the feature extractor is 0.0 for the one and 0.5" in capsys.readouterr().err


def test_names_tell_models_apart(tmp_path, monkeypatch):
    assert names_of(["out/a", "out/b/"]) == ["a", "b"]
    assert names_of(["one/final", "two/final"]) == ["one/final", "two/final"]
    assert names_of(["x", "user/x"]) == ["x", "user/x"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert names_of([".", "a"]) == [str(tmp_path), str(tmp_path / "a")]
    with pytest.raises(UserError, match="./a is named twice"):
        names_of(["a", "./a"])
