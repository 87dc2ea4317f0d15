"""``python -m benchmarks.backbones``: every kind of backbone is what it is called, as is the table."""

import pytest
import torch
from modelling_fixtures import tiny_whisper

from benchmarks import backbones, tables


def test_kinds_are_what_they_are_called(monkeypatch):
    pytest.importorskip("torchao")
    compiled = []
    monkeypatch.setattr(
        "whisper_meft.encoder.frozen.FrozenEncoder.compile_layers", lambda self: compiled.append(self)
    )
    encoders = {
        kind: backbones.encoder_of(tiny_whisper(encoder_ffn_dim=64), kind) for kind in backbones.KINDS
    }
    assert encoders["bfloat16"].dtype == torch.bfloat16 and encoders["int8"].quantization[:4] == "int8"
    assert encoders["fp8"].quantization == "fp8 weights" and encoders["float32"].quantization is None
    assert compiled == [encoders["float32, compiled"], encoders["int8, compiled"]]


def test_the_table_compares_with_the_first_kind():
    rows = [
        {
            "kind": kind,
            "seconds": {"median": seconds},
            "backbone_bytes": 3 * 2**20,
            "counted_bytes": 2**29,
            "feature_error": error,
            "accuracies": [0.8, 0.9],
        }
        for kind, seconds, error in (("float32", 2.0, 0.0), ("int8", 1.6, 0.015))
    ]
    found = {
        "name": "backbones",
        "command": "python -m benchmarks.backbones",
        "shapes": {"model": "small", "batch": 4, "seeds": 2},
        "figures": {"rows": rows},
        "environment": {
            "device": "a CPU",
            "device_type": "cpu",
            "threads": 1,
            "torch": "2.13",
            "commit": "abc",
            "dirty": False,
            "date": "2026-11-21",
        },
    }
    (block,) = tables.other_backbones([found])
    assert "| float32 | 2000 | 1.00 | 3 | 0.50 | 0.00% | 85.0% ± 5.0% |" in block
    assert "| int8 | 1600 | 1.25 | 3 | 0.50 | 1.50% | 85.0% ± 5.0% |" in block


def test_wrong_input_gets_one_line(tmp_path, capsys):
    assert backbones.main(["--seeds", "0", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "benchmarks.backbones: seeds must be a positive integer, got 0\n"
