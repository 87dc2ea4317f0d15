"""Recorded hidden states, and errors on recordings: written, read, in place of random inputs, and shown."""

import json

import pytest
import torch
from training_fixtures import make_audio_folder, make_backbone
from whisper_meft import FrozenEncoder
from whisper_meft.errors import UserError
from whisper_meft.model.backbone import load_backbone

from benchmarks import backbones, recordings, run, summary, tables
from meft_kernels.reference.common import row_statistics
from meft_kernels.testing import flat_tensors, real_case


@pytest.fixture
def recorded(tmp_path):
    """A model, its recordings, and a file of hidden states."""
    model, audio = (
        make_backbone(tmp_path / "model", encoder_layers=3),
        make_audio_folder(tmp_path / "audio", 3),
    )
    given = [f"--model_name_or_path={model}", f"--audio={audio}", "--clips=3"]
    assert recordings.main([*given, str(tmp_path / "states.safetensors")]) == 0
    return model, audio, tmp_path / "states.safetensors"


def test_recorded_states_are_the_encoders(recorded):
    model, audio, path = recorded
    states, lengths = recordings.read_states(path)
    features, expected_lengths = recordings.log_mel(str(model), recordings.choose(str(audio), 3))
    assert torch.equal(lengths, expected_lengths) and len(states) == 4
    encoder = FrozenEncoder(load_backbone(model).encoder)
    for state, expected in zip(states, encoder.stream(recordings.trimmed(features, lengths), lengths)):
        assert torch.equal(state, expected)
    valid = recordings.valid_states(states, lengths)
    assert {state.shape[1] for state in valid} == {int(lengths.min())}


def test_what_reads_no_state_of_the_encoder_is_not_timed_on_one(recorded):
    assert run.parse(["--states", str(recorded[2])]).op == [
        op for op in run.EVERYTHING if op != "linear_cross_entropy"
    ]
    with pytest.raises(UserError, match="--op linear_cross_entropy does not go with --states"):
        run.parse(["--states", str(recorded[2]), "--op", "ladder", "linear_cross_entropy"])


@pytest.mark.parametrize("op", [op for op in run.EVERYTHING if op not in recordings.OF_THE_DECODER])
def test_every_op_takes_recorded_states(recorded, op):
    states = recordings.valid_states(*recordings.read_states(recorded[2]))
    batch, frames, width = states[0].shape
    case = real_case(op, batch, frames, width, width // 4, len(states) - 1)
    drawn = case.inputs(torch.float32)
    for seed in range(len(states)):
        changed = recordings.on_states(case, states, drawn, seed)
        before, after = flat_tensors(drawn), flat_tensors(changed)
        assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
        differ = {name.split("[")[0] for name in before if not torch.equal(before[name], after[name])}
        assert differ and differ <= {"x", "state", "y", "anchor", "features", "hidden_states"}
        assert case.function()(**changed).isfinite().all()
        if case.frozen == {"x"}:
            assert any(torch.equal(changed["x"], state) for state in states)


def test_ops_are_timed_on_both(recorded, tmp_path, capsys):
    command = ["--states", str(recorded[2]), "--op", "guidance", "--reduction_factor", "4", "--backend"]
    command += [
        "reference",
        "--peers",
        "eager",
        "--repeats",
        "1",
        "--quick",
        "--output",
        str(tmp_path / "out"),
    ]
    assert run.main(command) == 0
    (path,) = (tmp_path / "out").glob("run_states-*.json")
    found = json.loads(path.read_text())
    assert {row["inputs"] for row in found["figures"]["rows"]} == {"random", "real"}
    for row in found["figures"]["rows"]:
        row["peer"] = row["peer"].replace("reference", "native")
        row["ratio_to_eager"] = 1.5 if row["inputs"] == "real" and row["peer"] != "eager" else 0.5
    (block,) = tables.real_states([found])
    assert "| guidance | " in block and "Behind eager PyTorch: guidance on real inputs 1.50." in block
    capsys.readouterr()
    assert run.main([*command, "--width", "64"]) == 1
    assert "--width does not go with --states" in capsys.readouterr().err
    (tmp_path / "other").write_bytes(b"none")
    assert run.main(["--states", str(tmp_path / "other")]) == 1
    assert "--states: cannot read" in capsys.readouterr().err


def test_errors_are_what_they_say():
    torch.manual_seed(0)
    exact = [(torch.randn(5, 4), torch.randn(5, 4)) for _ in range(3)]
    found = [(1.1 * raw, normed.clone()) for raw, normed in exact]
    found[1][1][2] += 3 * exact[1][1][2]
    error = recordings.errors(found, exact)
    assert error["raw"] == pytest.approx(0.1, rel=1e-4) and error["median"] == 0
    assert error["worst"] == pytest.approx(3, rel=1e-4)
    moved = 3 * exact[1][1][2]
    whole = torch.cat([normed for _, normed in exact])
    assert error["normed"] == pytest.approx((moved.norm() / whole.norm()).item(), rel=1e-4)
    means = torch.stack([normed.mean(0) for _, normed in exact])
    apart = (means - means.mean(0)).norm()
    assert error["pooled"] == pytest.approx(((moved / 5).norm() / apart).item(), rel=1e-4)


def test_backbones_on_recordings(recorded, tmp_path, capsys):
    pytest.importorskip("torchao")
    model, audio, _ = recorded
    command = [f"--model_name_or_path={model}", f"--audio={audio}", "--audio_clips=3", "--rounds=1"]
    command += [f"--train_data={audio}", f"--test_data={audio}", f"--output={tmp_path / 'out'}"]
    assert backbones.main(command) == 0
    (path,) = (tmp_path / "out").glob("backbones_real-*.json")
    found = json.loads(path.read_text())
    rows = found["figures"]["rows"]
    assert [row["kind"] for row in rows] == list(backbones.REAL_KINDS)
    assert rows[0]["padded"]["normed"] == rows[0]["changed"] == 0 < rows[3]["padded"]["normed"] < 0.1
    (block,) = tables.real_backbones([found])
    assert block.count("\n| ") == 2 + len(rows) and "model, 3 recordings; load" in block
    (line,) = summary.summary([found])[0].split("\n")[2:]
    assert "points of accuracy" in line and "int8" in line
    capsys.readouterr()
    assert backbones.main(command[:1]) == 1
    assert "model_name_or_path and audio go together" in capsys.readouterr().err
    assert backbones.main([*command[:2], command[4]]) == 1
    assert "train_data, test_data and audio go together" in capsys.readouterr().err


def test_error_by_part(recorded, tmp_path, capsys):
    pytest.importorskip("torchao")
    model, audio, _ = recorded
    command = [f"--model_name_or_path={model}", f"--audio={audio}", "--audio_clips=2", "--by_part"]
    assert backbones.main([*command, f"--output={tmp_path / 'out'}"]) == 0
    (path,) = (tmp_path / "out").glob("backbones_parts-*.json")
    found = json.loads(path.read_text())
    rows = {row["part"]: row for row in found["figures"]["rows"]}
    assert list(rows) == [*backbones.PROJECTIONS, "layer 2", "layer 3", "all"]
    for kind in backbones.ROUNDED:
        alone = [row[kind] for part, row in rows.items() if part != "all"]
        assert min(alone) > 0 and max(alone) < 1.5 * rows["all"][kind] < 1
    # Whole, it is the encoder of that kind itself.
    features, lengths = recordings.log_mel(str(model), recordings.choose(str(audio), 2))
    exact, rounded = (
        list(recordings.last_states(backbones.real_encoder(str(model), kind), features, lengths))
        for kind in ("float32", "nf4")
    )
    assert rows["all"]["nf4"] == pytest.approx(recordings.errors(rounded, exact)["normed"], rel=1e-5)
    (block,) = tables.backbone_parts([found])
    assert block.count("\n| ") == 2 + len(rows) and "model, 2 trimmed recordings" in block
    capsys.readouterr()
    assert backbones.main(["--by_part"]) == 1
    assert "by_part goes with model_name_or_path and audio" in capsys.readouterr().err


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(UserError, match="--states: cannot read .*none"):
        recordings.read_states(tmp_path / "none")
    recordings.write_states(tmp_path / "one", [torch.zeros(1, 2, 4)], torch.ones(1))
    with pytest.raises(UserError, match="must be a file that benchmarks.recordings wrote"):
        recordings.read_states(tmp_path / "one")
    states, lengths = torch.zeros(2, 3, 4), torch.tensor([3, 2])
    assert row_statistics(states)[0].shape == (2, 3)
    recordings.write_states(tmp_path / "two", [states, states + 1], lengths)
    assert recordings.read_states(tmp_path / "two")[0][1].eq(1).all()
