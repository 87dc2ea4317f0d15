"""The example of skewed classes: its table, and that it runs."""

import csv
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(ROOT / "examples" / "skewed_classes.py"))


def test_classes_fall_to_a_twentieth_and_keep_their_speakers(example, tmp_path):
    rows = [f"{label}/{n}.wav,{label},speaker{n % 5}" for label in "abcd" for n in range(100)]
    (tmp_path / "train.csv").write_text("\n".join(["path,label,speaker", *rows]) + "\n")
    with open(example["skew"](tmp_path, 20), newline="") as file:
        found = list(csv.DictReader(file))
    assert Counter(row["label"] for row in found) == {"a": 100, "b": 37, "c": 14, "d": 5}
    assert len({row["path"] for row in found}) == len(found)
    assert len({row["speaker"] for row in found if row["label"] == "c"}) > 2


def test_it_runs(example, tmp_path, capsys):
    options = {"plain": {}, "both": {"class_weights": "balanced", "sampling": "balanced"}}
    example["main"].__globals__["OPTIONS"] = options
    example["main"](
        ["--work", str(tmp_path), "--clips", "20", "--seeds", "1", "--epochs", "1", "--test_clips", "3"]
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"settings", *options}
    assert all(len(results[name]["recalls"][0]) == 4 for name in options)
    assert capsys.readouterr().out.count("mean recall") == 2
