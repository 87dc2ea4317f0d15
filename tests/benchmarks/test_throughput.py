"""``python -m benchmarks.throughput``: every way trains, and the table says what was measured."""

import json

import pytest
from training_fixtures import make_audio_folder, make_backbone

from benchmarks import summary, tables, throughput
from meft_kernels import native


def test_lengths_are_like_kespeechs():
    lengths = throughput.clip_lengths(2000, 6.0)
    assert sum(lengths) / len(lengths) == pytest.approx(6, rel=0.05)
    assert sum(2 <= each <= 10 for each in lengths) > 0.9 * len(lengths) and max(lengths) <= 30


def test_every_way_is_measured_and_shown(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchao")
    compiled = []
    monkeypatch.setattr(
        "whisper_meft.encoder.frozen.FrozenEncoder.compile_layers", lambda self: compiled.append(self)
    )
    argv = ["--model", "toy", "--clips", "4", "--batch", "2", "--padded_clips", "1", "--rounds", "1"]
    argv += ["--mean_seconds", "1.5", "--output", str(tmp_path)]
    assert throughput.main(argv) == 0
    printed = capsys.readouterr().out
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    rows = found["figures"]["rows"]
    assert [row["way"] for row in rows] == list(throughput.ways("lst")) and len(compiled) == 2
    assert all(row["seconds"]["median"] > 0 for row in rows)
    by = {row["way"]: row for row in rows}
    assert by["lst, trimmed, int8"]["backbone_bytes"] < by["lst, trimmed"]["backbone_bytes"]
    assert [row["way"] for row in rows if row["fill_seconds"]] == [name for name in by if "cache" in name]
    found["shapes"]["model"] = "tiny"
    found["environment"]["dirty"] = False
    for row, seconds in zip(rows, (8.0, 4.0, 1.0, 1.0, 1.0, 0.5, 0.1, 0.2)):
        row["seconds"]["median"] = seconds
    (block,) = tables.speeds([found])
    assert "Whisper-tiny, LST, 4 clips of" in block
    backend = "native" if native.LOADED else "reference"
    assert f"float32, {backend} backend. " in block
    assert "| lst, from cache, 16 bits | 100.0 | 10.00 | 80.00 | 40.00 | 10.00 |" in block
    assert "| full, padded | 8000.0 | 0.12 | 1.00 | 0.50 | 0.12 |" in block and "clips/s" in printed


def test_a_pretrained_model_and_recordings(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr("whisper_meft.encoder.frozen.FrozenEncoder.compile_layers", lambda self: None)
    # torchao's 8-bit products want widths that are multiples of 16
    model = make_backbone(tmp_path / "whisper-own", d_model=64, encoder_ffn_dim=128)
    audio = make_audio_folder(tmp_path / "tones", per_class=4)
    argv = ["--model_name_or_path", str(model), "--audio", str(audio), "--clips", "6", "--batch", "2"]
    argv += ["--padded_clips", "1", "--rounds", "1", "--output", str(tmp_path / "results")]
    assert throughput.main(argv) == 0
    found = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    assert str(tmp_path) not in json.dumps(found)
    assert (found["shapes"]["model"], found["shapes"]["audio"]) == ("own", "tones")
    assert 0.4 <= found["figures"]["mean_seconds"] <= 0.9
    (block,) = tables.speeds([found])
    assert block.startswith("Whisper-own, pretrained, LST, 6 recordings of 0.")
    synthetic = json.loads(json.dumps(found))
    del synthetic["shapes"]["audio"]
    line = summary._epoch([synthetic, found])
    assert "Whisper-own, recordings of people" in line[0]
    argv[argv.index("6")] = "60"
    assert throughput.main(argv) == 1
    assert "clips must be at most 12, those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--clips", "0"], "clips must be a positive integer, got 0"),
        (["--mean_seconds", "60"], "mean_seconds must lie between 1 and 30, got 60.0"),
        (["--model", "huge"], "model must be one of tiny"),
    ],
)
def test_wrong_input_gets_one_line(argv, message, tmp_path, capsys):
    assert throughput.main([*argv, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
