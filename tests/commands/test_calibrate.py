"""`whisper-meft calibrate`, and what predict, evaluate, the pipeline and merging make of what it saved."""

import csv
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from modelling_fixtures import batch, tiny_whisper
from recogniser_fixtures import make_recogniser
from safetensors.torch import load_file
from training_fixtures import RATE, TONES, make_audio_folder, make_backbone, tone, train_command
from transformers import WhisperForAudioClassification, pipeline
from whisper_meft import HeadConfig, LSTConfig, MeftModel, UserError, get_meft_model
from whisper_meft.commands.cli import main
from whisper_meft.model.published import convert, to_published


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """out/: a model of the tones; dev/: clips with which it has trouble; other/: noise, of no class."""
    folder = tmp_path_factory.mktemp("calibrate")
    make_backbone(folder / "backbone")
    make_audio_folder(folder / "train", per_class=10)
    options = {"num_train_epochs": 20, "eval_strategy": "no", "save_strategy": "no"}
    assert main(train_command(folder / "backbone", folder / "train", folder / "out", **options)) == 0
    rng = np.random.default_rng(3)
    for label, frequency in TONES.items():
        (folder / "dev" / label).mkdir(parents=True)
        for number in range(12):
            wave = tone(frequency * rng.uniform(0.6, 1.7), 0.6, rng)
            soundfile.write(folder / "dev" / label / f"{number}.wav", wave, RATE)
    (folder / "other" / "noise").mkdir(parents=True)
    for number in range(5):
        wave = 0.2 * rng.standard_normal(RATE // 2)
        soundfile.write(folder / "other" / "noise" / f"{number}.wav", wave, RATE)
    return folder


@pytest.fixture
def model(work, tmp_path):
    """A copy of out/ that a test may calibrate."""
    return shutil.copytree(work / "out", tmp_path / "model")


def predictions(model, folder, tmp_path, *more):
    assert main(["predict", str(model), str(folder), "--output", str(tmp_path / "p.json"), *more]) == 0
    return json.loads((tmp_path / "p.json").read_text())


def evaluated(model, data, tmp_path, *more):
    folder = tmp_path / "evaluation"
    assert main(["evaluate", str(model), "--data", str(data), "--output_dir", str(folder), *more]) == 0
    return json.loads((folder / "eval_results.json").read_text())


def test_calibrating_mends_the_probabilities_and_moves_no_label(work, model, tmp_path, capsys):
    before = predictions(model, work / "dev", tmp_path)
    scores = evaluated(model, work / "dev", tmp_path)
    assert scores["calibration_temperature"] is None and 0.4 < scores["accuracy"] < 0.95
    weights, values = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    assert values.pop("calibration_temperature") is values.pop("rejection_threshold") is None
    capsys.readouterr()
    assert main(["calibrate", str(model), "--data", str(work / "dev")]) == 0
    out = capsys.readouterr().out
    now = json.loads((model / "config.json").read_text())
    temperature, threshold = now.pop("calibration_temperature"), now.pop("rejection_threshold")
    assert now == values and f"temperature {temperature:.4g}, from 36 examples" in out
    assert f"reject_below {threshold:.6g} keeps" in out
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.equal(tensor, weights[name])
    after = predictions(model, work / "dev", tmp_path)
    assert [row["label"] for row in after] == [row["label"] for row in before]
    for row, old in zip(after, before):
        p, q = (np.array(list(each["probabilities"].values())) for each in (row, old))
        expected = q ** (1 / temperature)
        np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-4, atol=1e-6)
    mended = evaluated(model, work / "dev", tmp_path)
    assert mended["log_loss"] < scores["log_loss"] and mended["accuracy"] == scores["accuracy"]
    assert mended["calibration_temperature"] == temperature
    assert f"{scores['log_loss']:.4f} before, {mended['log_loss']:.4f} after" in out
    assert f"{scores['ece']:.2%} before" in out and f"{mended['ece']:.2%} after" in out
    kept = np.mean([max(row["probabilities"].values()) >= threshold for row in after])
    assert kept >= 0.95
    # Once more it begins from what the model itself says.
    assert main(["calibrate", str(model), "--data", str(work / "dev"), "--keep", "0.5"]) == 0
    again = json.loads((model / "config.json").read_text())
    assert again["calibration_temperature"] == temperature and again["rejection_threshold"] > threshold


def test_transformers_pipeline_answers_as_predict_does(work, model, tmp_path):
    assert main(["calibrate", str(model), "--data", str(work / "dev")]) == 0
    rows = predictions(model, work / "dev" / "low", tmp_path)
    pipe = pipeline("audio-classification", str(model), device="cpu")
    for row in rows[:4]:
        found = {
            each["label"]: each["score"] for each in pipe(soundfile.read(row["file"], dtype="float32")[0])
        }
        assert found == pytest.approx(row["probabilities"], abs=1e-5)


def test_training_mode_knows_no_temperature():
    model = get_meft_model(tiny_whisper(dropout=0.0, attention_dropout=0.0), LSTConfig(reduction_factor=4))
    features, labels = batch()
    with torch.no_grad():
        plain, trained = model.eval()(features).logits, model.train()(features, labels=labels)
        model.config.calibration_temperature = 2.5
        again = model.train()(features, labels=labels)
        assert torch.equal(again.logits, trained.logits) and torch.equal(again.loss, trained.loss)
        scaled = model.eval()(features, labels=labels)
    torch.testing.assert_close(scaled.logits, plain / 2.5, rtol=0, atol=0)
    torch.testing.assert_close(scaled.loss, torch.nn.functional.cross_entropy(plain / 2.5, labels))


def test_it_is_saved_loaded_merged_and_published(tmp_path):
    features, _ = batch()
    model = get_meft_model(tiny_whisper(), HeadConfig()).eval()
    model.config.calibration_temperature, model.config.rejection_threshold = 0.7, 0.4
    model.save_pretrained(tmp_path / "head", save_backbone=True)
    again = MeftModel.from_pretrained(tmp_path / "head")
    assert (again.config.calibration_temperature, again.config.rejection_threshold) == (0.7, 0.4)
    with torch.no_grad():
        expected = model(features).logits
        assert torch.equal(again(features).logits, expected)
        plain = model.merge_and_unload()
        assert isinstance(plain, WhisperForAudioClassification)
        torch.testing.assert_close(plain.eval()(features).logits, expected, rtol=1e-4, atol=1e-4)
    side = get_meft_model(tiny_whisper(), LSTConfig(reduction_factor=4)).eval()
    side.config.calibration_temperature = 3.0
    side.save_pretrained(tmp_path / "side", save_backbone=True)
    to_published(tmp_path / "side", tmp_path / "published")
    back = convert(tmp_path / "published", tmp_path / "back")
    assert back.config.calibration_temperature is None
    with torch.no_grad():
        torch.testing.assert_close(back(features).logits, side(features).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("calibration_temperature", 0, "a number above 0 and finite, got 0"),
        ("calibration_temperature", "2", "a number above 0 and finite, got '2'"),
        ("calibration_temperature", True, "a number above 0 and finite, got True"),
        ("calibration_temperature", float("nan"), "a number above 0 and finite, got nan"),
        ("rejection_threshold", 1.5, "a number from 0 to 1, got 1.5"),
        ("rejection_threshold", [0.5], r"a number from 0 to 1, got \[0.5\]"),
    ],
)
def test_what_was_meddled_with_is_refused(name, value, accepted, model):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, name: value}))
    with pytest.raises(UserError, match=f"{name} must be {accepted}"):
        MeftModel.from_pretrained(model)


# --- rejecting --------------------------------------------------------------------------------------------


def test_clips_below_the_threshold_are_rejected(work, model, tmp_path, capsys):
    plain = predictions(model, work / "dev", tmp_path)
    assert all(set(row) == {"file", "label", "probabilities"} for row in plain)
    best = sorted(max(row["probabilities"].values()) for row in plain)
    middle = str(best[18])
    rows = predictions(model, work / "dev", tmp_path, "--reject_below", middle)
    rejected = [row for row in rows if row["rejected"]]
    assert len(rejected) == 18
    for row, old in zip(rows, plain):
        assert row["probabilities"] == old["probabilities"]
        assert row["label"] == ("unknown" if row["rejected"] else old["label"])
        assert row["rejected"] == (max(row["probabilities"].values()) < best[18])
    table = tmp_path / "p.csv"
    options = ["--reject_below", middle, "--reject_label", "none of these"]
    assert main(["predict", str(model), str(work / "dev"), "--output", str(table), *options]) == 0
    with open(table, newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)].count("none of these") == 18
    name = rejected[0]["file"]
    capsys.readouterr()
    assert main(["predict", str(model), name, "--reject_below", middle]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    ranked = sorted(rejected[0]["probabilities"].items(), key=lambda item: -item[1])
    assert "unknown" in line and line.endswith(f"{ranked[0][0]} {ranked[0][1]:.1%}")
    nothing = predictions(model, work / "dev", tmp_path, "--reject_below", "0")
    assert not any(row["rejected"] for row in nothing)


def test_the_saved_threshold(work, model, tmp_path, capsys):
    assert main(["predict", str(model), str(work / "dev"), "--reject_below", "saved"]) == 1
    assert "has no threshold; give a number, or let `whisper-meft calibrate`" in capsys.readouterr().err
    assert main(["calibrate", str(model), "--data", str(work / "dev"), "--keep", "0.8"]) == 0
    threshold = json.loads((model / "config.json").read_text())["rejection_threshold"]
    rows = predictions(model, work / "dev", tmp_path, "--reject_below", "saved")
    assert rows == predictions(model, work / "dev", tmp_path, "--reject_below", repr(threshold))
    assert 0.8 <= np.mean([not row["rejected"] for row in rows]) < 0.9
    # Without being asked for it nothing is rejected.
    assert all("rejected" not in row for row in predictions(model, work / "dev", tmp_path))
    scores = evaluated(model, work / "dev", tmp_path, "--reject_below", "saved")["open_set"]
    assert scores["origin"] == "saved with the model" and scores["threshold"] == threshold
    assert scores["kept"] == pytest.approx(np.mean([not row["rejected"] for row in rows]))


def test_false_acceptance_is_of_unknown_classes(work, model, tmp_path, capsys):
    data = shutil.copytree(work / "dev", tmp_path / "data")
    shutil.copytree(work / "other", data, dirs_exist_ok=True)
    assert main(["evaluate", str(model), "--data", str(data)]) == 1
    assert "noise" in capsys.readouterr().err
    known = evaluated(model, work / "dev", tmp_path)
    for name in ("noise", "all"):
        found = evaluated(model, data, tmp_path, "--unknown_labels", name, "--reject_below", "0.6")
        assert {k: v for k, v in found.items() if k not in ("open_set", "data")} == {
            k: v for k, v in known.items() if k not in ("open_set", "data")
        }
        outside = predictions(model, work / "other", tmp_path, "--reject_below", "0.6")
        accepted = np.mean([not row["rejected"] for row in outside])
        assert found["open_set"]["false_acceptance"] == pytest.approx(accepted)
        assert found["open_set"]["unknown"] == 5 and found["open_set"]["known"] == 36
    by_itself = evaluated(model, data, tmp_path, "--unknown_labels", "noise")["open_set"]
    assert by_itself["origin"].startswith("keeps 95 %") and by_itself["kept"] >= 0.95
    assert "unknown classes" in (tmp_path / "evaluation" / "evaluation.txt").read_text()


def test_reliability_is_drawn(work, model, tmp_path):
    evaluated(model, work / "dev", tmp_path)
    assert (tmp_path / "evaluation" / "reliability.png").read_bytes()[:4] == b"\x89PNG"


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "more", "status", "message"),
    [
        (
            "predict",
            ["--reject_below", "1.5"],
            2,
            "--reject_below must be a number from 0 to 1, or saved, got",
        ),
        ("predict", ["--reject_below", "nan"], 2, "must be a number from 0 to 1, or saved, got 'nan'"),
        ("predict", ["--reject_below", "save"], 2, "must be a number from 0 to 1, or saved, got 'save'"),
        ("predict", ["--reject_below", "0.5", "--reject_label", "low"], 1, "'low' is a class of the model"),
        ("predict", ["--reject_label", "none"], 2, "--reject_label none is for --reject_below, which is not"),
        ("evaluate", ["--unknown_labels", "e\u0301"], 1, "has no examples of \u00e9, only of high"),
        ("evaluate", ["--reject_below", "-1"], 2, "--reject_below must be a number from 0 to 1"),
        ("evaluate", ["--unknown_labels", "low"], 1, "unknown_labels: low is a class of the model"),
        ("evaluate", ["--unknown_labels", "birds"], 1, "has no examples of birds, only of high, low, middle"),
        ("evaluate", ["--unknown_labels", "all"], 1, "unknown_labels: the model knows all classes of"),
        ("calibrate", ["--keep", "0"], 2, "--keep must be above 0 and at most 1, got 0.0"),
        ("calibrate", ["--keep", "1.2"], 2, "--keep must be above 0 and at most 1, got 1.2"),
        ("calibrate", ["--max_eval_samples", "0"], 2, "--max_eval_samples must be at least 1"),
        ("calibrate", ["--data", "nowhere"], 1, "nowhere"),
    ],
)
def test_mistakes_are_one_line(command, more, status, message, work, model, capsys):
    where = [str(work / "dev")] if command == "predict" else ["--data", str(work / "dev")]
    assert main([command, str(model), *where, *more]) == status
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and not any("Traceback" in line for line in error)
    assert json.loads((model / "config.json").read_text())["calibration_temperature"] is None


def test_what_cannot_be_calibrated(work, model, tmp_path, capsys):
    assert main(["calibrate", str(model)]) == 2
    assert "--data is needed" in capsys.readouterr().err
    assert main(["calibrate", "someone/model", "--data", str(work / "dev")]) == 1
    assert "MODEL_DIR must be a folder, in which the temperature is saved" in capsys.readouterr().err
    shutil.copytree(work / "other", tmp_path / "unknown")
    assert main(["calibrate", str(model), "--data", str(tmp_path / "unknown")]) == 1
    assert "noise" in capsys.readouterr().err
    right = [r for r in predictions(model, work / "dev", tmp_path) if f"/{r['label']}/" in r["file"]]
    for number, row in enumerate(right):
        (tmp_path / "easy" / row["label"]).mkdir(parents=True, exist_ok=True)
        shutil.copy(row["file"], tmp_path / "easy" / row["label"] / f"{number}.wav")
    capsys.readouterr()
    assert main(["calibrate", str(model), "--data", str(tmp_path / "easy")]) == 1
    assert "are recognised, so the sharper the better" in capsys.readouterr().err
    assert json.loads((model / "config.json").read_text())["calibration_temperature"] is None


def test_a_card_that_cannot_be_written_leaves_the_model_as_it_was(work, model, capsys):
    card = model / "README.md"
    card.write_text(card.read_text() + "\n<!-- calibration -->\n")
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    assert main(["calibrate", str(model), "--data", str(work / "dev")]) == 1
    assert "it has no one place for them, between <!-- calibration -->" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "predict"])
def test_recognisers_have_no_classes_to_reject(command, tmp_path, capsys):
    make_recogniser(tmp_path / "whisper")
    make_audio_folder(tmp_path / "audio", per_class=1)
    audio = str(tmp_path / "audio")
    where = [audio] if command == "predict" else ["--data", audio]
    more = [] if command == "calibrate" else ["--reject_below", "0.5"]
    assert main([command, str(tmp_path / "whisper"), *where, *more]) in (1, 2)
    assert "for models that classify, and" in capsys.readouterr().err
