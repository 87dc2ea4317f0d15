"""Runs with many classes: what is kept of the outputs, and what is printed."""

import json

import pytest
import torch
from training_fixtures import make_audio_folder, make_backbone, train_command
from whisper_meft.commands import cli
from whisper_meft.training.many_classes import counts_text, predicted_classes


def test_only_the_classes_are_kept_of_the_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, float("nan"), 9.0], [5.0, 1.0, 1.0], [float("inf"), 0, 0]])
    assert predicted_classes(logits).tolist() == [1, -1, 0, -1]
    assert predicted_classes((logits[:1], logits)).tolist() == [1]


def test_the_line_of_counts_stays_short():
    few = {f"c{i}": i for i in range(30)}
    assert counts_text(few, list(few)).count(", ") == 29
    many = {f"c{i}": 5000 - i for i in range(5000)}
    text = counts_text(many, list(many))
    assert text.startswith("1 to 5000 of each, the fewest of c4999: 1, c4998: 2,") and len(text) < 200


def test_training_and_evaluating_100_classes(tmp_path, capsys):
    backbone = make_backbone(tmp_path / "backbone")
    make_audio_folder(tmp_path / "tones", 34)
    lines = ["path,label"]
    for number, path in enumerate(sorted((tmp_path / "tones").rglob("*.wav"))):
        lines.append(f"{path},class {number:03d}")
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    data = tmp_path / "data.csv"
    command = train_command(backbone, data, tmp_path / "out", num_train_epochs=1, eval_data=data)
    assert cli.main([str(each) for each in command]) == 0
    out = capsys.readouterr().out
    assert "1 to 1 of each, the fewest of class 000: 1, " in out and "<- predicted" not in out
    assert "accuracy of the worst 20 of 102 classes" in out
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["count"] == 102 and len(results["per_class_accuracy"]) == 102
    assert results["accuracy"] == pytest.approx(
        sum(row[i] for i, row in enumerate(results["confusion_matrix"])) / 102
    )
    assert (tmp_path / "out" / "evaluation.txt").read_text().count("(1 examples)") == 102
    assert cli.main(["evaluate", str(tmp_path / "out"), "--data", str(data)]) == 0
    scored = tmp_path / "out" / "evaluation"
    assert json.loads((scored / "eval_results.json").read_text())["accuracy"] == results["accuracy"]
    assert (scored / "evaluation.txt").read_text().count("(1 examples)") == 102
