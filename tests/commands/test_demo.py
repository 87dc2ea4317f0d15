"""The demo and its baseline."""

import json

import numpy as np
import pytest
import torch
from transformers import WhisperForAudioClassification
from whisper_meft import LSTConfig, get_meft_model
from whisper_meft.commands import demo
from whisper_meft.commands.cli import main
from whisper_meft.errors import UserError
from whisper_meft.evaluation.logistic import LogisticRegression, fit_best, mel_statistics
from whisper_meft.model.backbone import set_labels
from whisper_meft.synthetic.shipped import shipped_backbone
from whisper_meft.synthetic.speech import ACCENTS


@pytest.fixture
def engine():
    pytest.importorskip("espeakng_loader", reason="the demo synthesises its corpus with espeakng-loader")


def blobs(seed: int, count: int = 200, classes: int = 4, width: int = 12):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    features = centres[labels] + 1.5 * torch.randn(count, width, generator=generator)
    return features * torch.linspace(0.01, 100, width) + 7, labels  # scales that need standardising


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_logistic_regression_agrees_with_scikit_learn(strength):
    linear_model = pytest.importorskip("sklearn.linear_model")
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    features, labels = blobs(0)
    ours = LogisticRegression(4, strength).fit(features, labels)
    scaler = preprocessing.StandardScaler().fit(features.double().numpy())
    theirs = linear_model.LogisticRegression(C=strength, max_iter=10_000, tol=1e-10)
    theirs.fit(scaler.transform(features.double().numpy()), labels.numpy())
    # Both minimise the same convex objective; softmax leaves a common shift of the biases free.
    np.testing.assert_allclose(ours.weight.numpy().T, theirs.coef_, atol=2e-4)
    shift = ours.bias.numpy() - theirs.intercept_
    np.testing.assert_allclose(shift - shift.mean(), 0, atol=2e-4)
    unseen, _ = blobs(1)
    expected = theirs.predict(scaler.transform(unseen.double().numpy()))
    assert (ours.predict(unseen).numpy() == expected).mean() > 0.99


def test_a_constant_feature_is_no_problem():
    features, labels = blobs(0)
    features[:, 3] = 5.0
    model = LogisticRegression(4).fit(features, labels)
    assert torch.isfinite(model.weight).all()
    assert (model.predict(features) == labels).double().mean() > 0.6


def test_the_strength_is_the_one_that_is_best_on_validation_data():
    training, validation = blobs(0, count=60), blobs(1)
    _, chosen = fit_best(training, validation, 4, strengths=(1e-6, 0.1))
    assert chosen["strength"] == 0.1
    assert chosen["validation_accuracy"] > 0.5
    with pytest.raises(UserError, match="positive strength"):
        LogisticRegression(4, 0.0)


def test_statistics_are_over_the_frames_that_hold_sound():
    features = torch.randn(80, 10)
    mask = (torch.arange(10) < 6).long()
    rows, labels = mel_statistics([{"input_features": features, "attention_mask": mask, "labels": 2}])
    sound = features[:, :6].double()
    torch.testing.assert_close(rows[0, :80], sound.mean(1))
    torch.testing.assert_close(rows[0, 80:], sound.var(1, correction=0).sqrt())
    assert labels.tolist() == [2]


def test_chance_is_what_guessing_gives():
    reference = np.repeat(np.arange(4), 50)
    assert demo.chance(reference, list("abcd")) == pytest.approx((0.25, 0.25, 0.25), abs=0.01)


@pytest.mark.slow
def test_a_short_demo_beats_chance_and_the_baseline(engine, tmp_path, capsys):
    arguments = ["--train_clips_per_class", "150", "--test_clips_per_class", "50", "--num_train_epochs", "4"]
    status = main(["demo", "--output_dir", str(tmp_path / "demo"), *arguments])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "small synthetic task" in out
    systems = json.loads((tmp_path / "demo" / "demo_results.json").read_text())["systems"]
    chance, simple, lst = (each["accuracy"] for each in systems.values())
    assert chance == pytest.approx(0.25, abs=0.02)
    assert 0.3 < simple < lst - 0.08
    model = tmp_path / "demo" / "model"
    for path in (
        model / "model.safetensors",
        model / "learning_curve.png",
        tmp_path / "demo" / "evaluation" / "confusion_matrix.png",
    ):
        assert path.stat().st_size > 1000
    # What is printed is what `whisper-meft evaluate` finds for the saved model.
    corpus = tmp_path / "demo" / "corpus_seed0"
    assert main(["evaluate", str(model), "--data", str(corpus)]) == 0
    again = json.loads((model / "evaluation" / "eval_results.json").read_text())
    assert again["accuracy"] == pytest.approx(lst)
    assert again["count"] == 200


def test_a_demo_that_learns_nothing_fails(engine, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(demo.TRAINING, "learning_rate", 1e-9)
    arguments = ["--train_clips_per_class", "20", "--test_clips_per_class", "10", "--num_train_epochs", "1"]
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), *arguments]) == 1
    assert "LST did not beat both" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--num_train_epochs=0", "--num_train_epochs=-1", "--seed=-1"])
def test_a_wrong_option_is_found_before_the_corpus_is_made(wrong, tmp_path, capsys):
    assert main(["demo", "--output_dir", str(tmp_path / "demo"), wrong]) == 2
    assert f"error: {wrong.partition('=')[0]} must" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "found, labels",
    [
        ("model/config.json", ["northern", "southern"]),
        ("model/checkpoint-8/config.json", [*ACCENTS, "northern"]),
        ("evaluation/eval_results.json", ACCENTS),
    ],
)
def test_what_no_demo_made_is_not_replaced(found, labels, tmp_path, capsys):
    base = WhisperForAudioClassification.from_pretrained(shipped_backbone())
    set_labels(base, labels)
    get_meft_model(base, LSTConfig()).save_pretrained((tmp_path / found).parent)
    if found.startswith("evaluation"):
        (tmp_path / found).write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["demo", "--output_dir", str(tmp_path)]) == 1
    assert f"holds {found}, which no demo made" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_a_demo_made_is_replaced(tmp_path, monkeypatch):
    class Begun(Exception):
        pass

    def begin(*_, **__):
        raise Begun

    monkeypatch.setenv("WHISPER_MEFT_DEBUG", "1")
    monkeypatch.setattr(demo, "make_accent_corpus", begin)
    base = WhisperForAudioClassification.from_pretrained(shipped_backbone())
    set_labels(base, ACCENTS)
    for folder in ("model", "model/checkpoint-8"):
        get_meft_model(base, LSTConfig()).save_pretrained(tmp_path / folder)
    with pytest.raises(Begun):
        main(["demo", "--output_dir", str(tmp_path)])
