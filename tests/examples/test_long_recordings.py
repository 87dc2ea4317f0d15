"""The example of long recordings: that it joins what it says, and runs."""

import csv
import json
import runpy
from pathlib import Path

import pytest
from training_fixtures import make_audio_folder, make_backbone, make_manifest, train_command
from whisper_meft.commands.cli import main

soundfile = pytest.importorskip("soundfile")

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())


def test_it_runs(tmp_path, capsys):
    example = runpy.run_path(str(ROOT / "examples" / "long_recordings.py"))
    backbone = make_backbone(tmp_path / "backbone")
    corpus = make_audio_folder(tmp_path / "corpus", per_class=8)
    table = make_manifest(tmp_path / "table.csv", corpus, 2)
    options = {"num_train_epochs": 12, "eval_strategy": "no", "save_strategy": "no"}
    assert main(train_command(backbone, table, tmp_path / "out", **options)) == 0
    work = ["--work", str(tmp_path / "work"), "--seconds", "2", "--window", "0.5", "--hop", "0.25"]
    capsys.readouterr()
    example["main"]([str(tmp_path / "out"), str(table), *work])
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert results["recordings"] >= 3 and results["mean of probabilities"] == results["of them right"] == 1
    assert results["error of shares"] < 0.1
    assert len(capsys.readouterr().out.splitlines()) == len(results)
    with open(tmp_path / "work" / "mixed.csv", newline="") as file:
        parts = list(csv.DictReader(file))
    assert [part["label"] for part in parts] == ["high", "low", "middle"]
    wave, rate = soundfile.read(tmp_path / "work" / "mixed.flac")
    assert float(parts[-1]["end"]) == len(wave) / rate
    assert (tmp_path / "work" / "mixed.svg").read_bytes().startswith(b"<?xml")
