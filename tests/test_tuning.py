"""The table of block sizes, rows measured on a device, and the static gate that compiles without a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meft_kernels import static_check, tune, tuning

ROOT = Path(__file__).parent.parent
GENERAL = tuning.Row("toy_fwd", (1, 100), {"BLOCK": 64}, 4, 2, "general")
EXACT = replace(GENERAL, family="consumer", blocks={"BLOCK": 32}, reason="small shared memory")


def run_tune(*arguments):
    """The command in a process of its own, with the kernels compiled and not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "meft_kernels.tune", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def test_choose_prefers_the_exact_family(monkeypatch):
    monkeypatch.setattr(tuning, "TABLE", (GENERAL, EXACT))
    assert tuning.choose("toy_fwd", 96) is GENERAL
    assert tuning.choose("toy_fwd", 96, (9, 0)) is GENERAL
    assert tuning.choose("toy_fwd", 96, (8, 9)) is EXACT
    assert tuning.choose("toy_fwd", 101) is None
    assert tuning.choose("other", 96) is None
    monkeypatch.setattr(tuning, "TABLE", (EXACT, GENERAL))
    assert tuning.choose("toy_fwd", 96, (9, 0)) is GENERAL
    monkeypatch.setattr(tuning, "TABLE", (EXACT,))
    assert tuning.choose("toy_fwd", 96, (9, 0)) is None


def test_trial_rows_come_first_and_go_again(monkeypatch):
    monkeypatch.setattr(tuning, "TABLE", (GENERAL,))
    with tuning.trial(EXACT), pytest.raises(KeyError):
        assert tuning.choose("toy_fwd", 96, (8, 6)) is EXACT
        assert tuning.choose("toy_fwd", 96, (9, 0)) is GENERAL
        raise KeyError
    assert tuning.choose("toy_fwd", 96, (8, 6)) is GENERAL


@pytest.mark.parametrize(
    ("capability", "sm"),
    [((8, 0), 80), ((8, 6), 86), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
)
def test_architectures(capability, sm):
    assert tuning.sm_of(capability) == sm


def test_device_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MEFT_KERNELS_TUNING_DIR", str(tmp_path))
    tuning.device_rows.cache_clear()
    path = tuning.device_file("NVIDIA GeForce RTX 4090")
    assert path == tmp_path / "nvidia-geforce-rtx-4090.json"
    assert tuning.device_rows("NVIDIA GeForce RTX 4090") == ()
    tuning.device_rows.cache_clear()
    path.write_text(json.dumps({"rows": [vars(EXACT)]}), encoding="utf-8")
    assert tuning.device_rows("NVIDIA GeForce RTX 4090") == (EXACT,)
    tuning.device_rows.cache_clear()
    for damaged in ("{", "[]", '{"rows": [{"kernel": "x"}]}'):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match="rtx-4090.json holds no usable block sizes"):
            tuning.device_rows("NVIDIA GeForce RTX 4090")
    tuning.device_rows.cache_clear()


def test_every_row_has_a_reason_and_a_module():
    pytest.importorskip("triton")
    assert tuning.TABLE
    for row in tuning.TABLE:
        assert len(row.reason) > 10, row
        assert row.family in {*tuning.FAMILIES.values(), "any"}
        assert row.widths[0] <= row.widths[1]
        assert row.num_warps in (1, 2, 4, 8)
        assert static_check.module_name(row.kernel)


def test_every_row_can_be_searched():
    """Each kernel of the table has a case that its op accepts, so that no search stops half-way."""
    for row in {row.kernel: row for row in tuning.TABLE}.values():
        case = tune.case_for(row, max(16, row.widths[0]), batch=1, frames=2)
        assert case.function()(**case.inputs(torch.float32)).shape[0] == 1


def test_static_gate_rejects():
    """The rules themselves, on results made up for the purpose."""
    row = replace(GENERAL, kernel="ladder_fwd")
    fine = static_check.Compiled(row, "ladder_fwd_kernel", 96, "bf16", 90, 128, 16, 16, 50000, 8, 0, 2)
    assert static_check._problem(fine) == ""
    assert "spills 40 bytes" in static_check._problem(replace(fine, spill_loads=24))
    assert static_check._problem(replace(fine, spill_loads=24, width=384)) == ""
    assert static_check._problem(replace(fine, spill_loads=24, sm=80)) == ""
    assert "do not use wgmma" in static_check._problem(replace(fine, wgmma=0, mma=4))
    assert static_check._problem(replace(fine, wgmma=0, mma=4, row=replace(row, mma="hmma"))) == ""
    assert "shared memory" in static_check._problem(replace(fine, sm=86, shared=120000))


@pytest.mark.parametrize("sm", [90, 86])
def test_static_gate_on_representative_rows(sm):
    """Width 96 (whisper-small at reduction factor 8) of every kernel; `tune --check` does the whole table."""
    pytest.importorskip("triton")
    result = run_tune("--check", "--sm", str(sm), "--width", "96")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in {row.kernel for row in tuning.TABLE if row.widths[0] <= 96 <= row.widths[1]}:
        assert f"{name}_kernel" in result.stdout


def test_rows_of_a_search_become_lines_of_the_table(tmp_path):
    found = replace(GENERAL, kernel="ladder_fwd", widths=(96, 96), reason="0.5 ms, 0.6 before", mma="hmma")
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"device": "Card", "capability": [8, 9], "rows": [vars(found)]}))
    result = run_tune("--rows", str(path))
    row = eval(f"[{result.stdout}]", {"Row": tuning.Row})[0]
    assert row == replace(found, family="consumer", reason="Card: 0.5 ms, 0.6 before")
    path.write_text("{}")
    result = run_tune("--rows", str(path))
    assert result.returncode == 1 and "holds no rows that a search wrote" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_search_tries_the_row_itself_first():
    row = replace(GENERAL, blocks={"BLOCK_M": 32}, num_warps=4, num_stages=2)
    found = list(tune.candidates(row))
    assert found[0] == row and len(found) == len({str(c) for c in found}) == 18


def test_tune_command_errors(monkeypatch):
    pytest.importorskip("triton")
    result = run_tune("--dry-run", "--op", "ladder", "--width", "100000")
    assert result.returncode == 1 and "no row serves op ladder, width 100000" in result.stderr
    assert "Traceback" not in result.stderr
    if not torch.cuda.is_available():
        result = run_tune("--op", "ladder", "--width", "96")
        assert result.returncode == 1 and "a CUDA device is needed" in result.stderr
