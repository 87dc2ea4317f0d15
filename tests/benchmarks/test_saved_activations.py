"""The comparison of training on exact and on 8-bit hidden states."""

import json

import pytest

from benchmarks import saved_activations


@pytest.fixture
def measured(monkeypatch):
    """Made-up runs of the trainings that are asked for; holds them."""
    runs = []

    def train(method, kind, seed, data, options):
        runs.append((method, kind, seed))
        row = {"method": method, "saved": kind, "seed": seed, "losses": [1.0, 0.5], "accuracy": 0.75}
        before, after = (
            {"int8": (0.99, "gates"), "fp8": (0.9, "gates")},
            {"int8": (0.98, "gates"), "fp8": (0.8, "x")},
        )
        return row | {"least_cosine_before": before, "least_cosine_after": after}

    monkeypatch.setattr(saved_activations, "train", train)
    monkeypatch.setattr(saved_activations, "make_accent_corpus", lambda *_, **__: None)
    monkeypatch.setattr(saved_activations, "features_and_labels", lambda *_: None)
    return runs


def test_the_record_is_of_the_processor_that_trains(measured, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "NVIDIA Card")
    assert saved_activations.main(["--methods", "lst", "--seeds", "2", "--output", str(tmp_path)]) == 0
    assert measured == [("lst", kind, seed) for seed in range(2) for kind in ("exact", "int8", "fp8")]
    [path] = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert written["environment"]["device"] != "NVIDIA Card" and "NVIDIA" not in path.read_text()
    [entry] = written["figures"]["summary"]
    assert entry["int8_least_cosine"] == 0.98 and entry["fp8_least_cosine"] == 0.8
    assert entry["fp8_least_cosine_of"] == "x"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "lst,full"], "--methods must be out of lst, unipt, sherl, got 'full'"),
        (["--kinds", "fp8,int4"], "--kinds must be out of int8, fp8, got 'int4'"),
        (["--steps", "0"], "--steps must be a positive integer, got 0"),
        (["--seeds", "-1"], "--seeds must be a positive integer, got -1"),
        (["--output", __file__], "is not a folder"),
    ],
)
def test_mistakes_take_one_line_and_no_work(measured, arguments, message, capsys):
    assert saved_activations.main(arguments) == 1 and not measured
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
