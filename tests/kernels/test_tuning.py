"""The table of block sizes, rows measured on a device, and the static gate that compiles without a GPU."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from meft_kernels.testing import flat_tensors
from meft_kernels.tune import __main__ as command
from meft_kernels.tune import choice, device_file, search, static_check
from meft_kernels.tune.row import FAMILIES, Row, architecture, architecture_of, once_per_row
from meft_kernels.tune.table import TABLE

ROOT = Path(__file__).parents[2]
GENERAL = Row("toy_fwd", (1, 100), {"BLOCK": 64}, 4, 2, "general")
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
    monkeypatch.setattr(choice, "TABLE", (GENERAL, EXACT))
    assert choice.choose("toy_fwd", 96) is GENERAL
    assert choice.choose("toy_fwd", 96, 90) is GENERAL
    assert choice.choose("toy_fwd", 96, 89) is EXACT
    assert choice.choose("toy_fwd", 101) is None
    assert choice.choose("other", 96) is None
    monkeypatch.setattr(choice, "TABLE", (EXACT, GENERAL))
    assert choice.choose("toy_fwd", 96, 90) is GENERAL
    monkeypatch.setattr(choice, "TABLE", (EXACT,))
    assert choice.choose("toy_fwd", 96, 90) is None


def test_trial_rows_come_first_and_go_again(monkeypatch):
    monkeypatch.setattr(choice, "TABLE", (GENERAL,))
    with choice.trial(EXACT), pytest.raises(KeyError):
        assert choice.choose("toy_fwd", 96, 86) is EXACT
        assert choice.choose("toy_fwd", 96, 90) is GENERAL
        raise KeyError
    assert choice.choose("toy_fwd", 96, 86) is GENERAL


@pytest.mark.parametrize(
    ("capability", "known"),
    [
        (None, 90),
        ((7, 5), 80),
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 7), 86),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 3), 100),
        ((12, 1), 120),
    ],
)
def test_architectures(capability, known):
    assert architecture(capability) == known


@pytest.mark.parametrize(
    ("name", "known"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950:sramecc+:xnack-", "gfx950"), ("gfx90a", "gfx942")],
)
def test_amd_is_told_by_rocm_and_not_by_the_capability(name, known, monkeypatch):
    """An MI300 says (9, 4), as if it were a Hopper."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    properties = SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    assert architecture_of() == known and FAMILIES[known] == "amd"


def test_amd_products_have_a_precision_that_its_compiler_accepts():
    for row in TABLE:
        assert row.precision == ("ieee" if row.family == "amd" else "tf32x3") or "guidance" not in row.kernel
    assert choice.choose("guidance_bwd", 96, "gfx942").precision == "ieee"
    assert choice.choose("guidance_bwd", 96, 90).precision == "tf32x3"


def test_device_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MEFT_KERNELS_TUNING_DIR", str(tmp_path))
    device_file.read.cache_clear()
    path = device_file.path_of("NVIDIA GeForce RTX 4090")
    assert path == tmp_path / "nvidia-geforce-rtx-4090.json"
    assert device_file.read("NVIDIA GeForce RTX 4090") == ()
    device_file.read.cache_clear()
    content = {"rows": [vars(EXACT)], "triton": "3.6.0"}
    path.write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(device_file, "_triton_version", lambda: "3.6.0")
    assert device_file.read("NVIDIA GeForce RTX 4090") == (EXACT,)
    device_file.read.cache_clear()
    monkeypatch.setattr(device_file, "_triton_version", lambda: "3.9.0")
    with pytest.warns(UserWarning, match="measured with Triton 3.6.0 and is not used with 3.9.0"):
        assert device_file.read("NVIDIA GeForce RTX 4090") == ()
    device_file.read.cache_clear()
    for damaged in ("{", "[]", '{"rows": [{"kernel": "x"}]}'):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match="rtx-4090.json holds no usable block sizes"):
            device_file.read("NVIDIA GeForce RTX 4090")
    device_file.read.cache_clear()


def test_every_row_has_a_reason_and_a_module():
    pytest.importorskip("triton")
    assert TABLE
    for row in TABLE:
        assert len(row.reason) > 10, row
        assert row.family in {*FAMILIES.values(), "any"}
        assert row.widths[0] <= row.widths[1]
        assert row.num_warps in (1, 2, 4, 8)
        assert static_check.module_name(row.kernel)


def test_rows_are_written_in_one_form():
    """Sizes on one line, the reason on the next, and by name, in order, what is not the usual."""
    tree = ast.parse((ROOT / "meft_kernels/tune/table.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if getattr(getattr(node, "func", None), "id", "") == "Row"]
    assert len(calls) == len(TABLE)
    names = [each.name for each in fields(Row)]
    for call in calls:
        lines = [argument.lineno - call.lineno for argument in call.args]
        assert lines == [0, 0, 0, 0, 0, 1], f"line {call.lineno} of table.py"
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert sorted(given, key=names.index) == list(given), f"line {call.lineno} of table.py"
        assert all(value != getattr(Row, name) for name, value in given.items()), f"line {call.lineno}"


def test_every_row_can_be_searched():
    """Each kernel of the table has a case that its op accepts, so that no search stops half-way."""
    for row in {row.kernel: row for row in TABLE}.values():
        case = search.case_for(row, max(16, row.widths[0]), batch=1, frames=2)
        assert case.function()(**case.inputs(torch.float32)).shape[0] == 1


def test_static_gate_rejects():
    """The rules themselves, on results made up for the purpose."""
    row = replace(GENERAL, kernel="ladder_fwd")
    fine = static_check.Compiled(row, "ladder_fwd_kernel", 96, "bf16", 90, 128, 16, 16, 50000, 8, 0, 2)
    assert static_check.problem(fine) == ""
    assert "spills 40 bytes" in static_check.problem(replace(fine, spill_loads=24))
    assert static_check.problem(replace(fine, spill_loads=24, width=384)) == ""
    assert static_check.problem(replace(fine, spill_loads=24, arch=80)) == ""
    assert "do not use wgmma" in static_check.problem(replace(fine, wgmma=0, mma=4))
    assert static_check.problem(replace(fine, wgmma=0, mma=4, row=replace(row, mma="hmma"))) == ""
    assert "shared memory" in static_check.problem(replace(fine, arch=86, shared=120000))
    assert "gfx942 has 65536" in static_check.problem(replace(fine, arch="gfx942", shared=65537))
    assert static_check.problem(replace(fine, arch="gfx950", shared=65537, wgmma=0, mma=4)) == ""
    assert "one at a time" in static_check.problem(replace(fine, serialised=True))
    wide = replace(fine, serialised=True, width=384)
    assert static_check.problem(wide) == "" and "one at a time" in static_check.line(wide)


@pytest.mark.parametrize(
    "said", ["info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized", ""]
)
def test_static_gate_reads_what_the_assembler_says_of_wgmma(said, monkeypatch):
    pytest.importorskip("triton.compiler")
    report = f"{said}\nUsed 168 registers\n8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads"
    binary = SimpleNamespace(asm={"ptx": "wgmma.mma_async"}, metadata=SimpleNamespace(shared=1024))
    monkeypatch.setattr("triton.compiler.compile", lambda *_, **__: binary)
    monkeypatch.setattr(static_check, "_assembler_report", lambda *_: report)
    row = choice.best_of(TABLE, "norm_linear_fwd", 96, "hopper")
    [result] = static_check.check_row(row, 90, 96)
    assert (result.registers, result.spill_stores, result.spill_loads, result.wgmma) == (168, 12, 16, 1)
    assert result.serialised == bool(said) and bool(result.problem) == bool(said)


@pytest.mark.parametrize("arch", ["--sm 90", "--sm 86", "--arch gfx942"])
def test_static_gate_on_representative_rows(arch):
    """Width 96 (whisper-small at reduction factor 8) of every kernel; `tune --check` does the whole table."""
    pytest.importorskip("triton")
    result = run_tune("--check", *arch.split(), "--width", "96")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in {row.kernel for row in TABLE if row.widths[0] <= 96 <= row.widths[1]}:
        assert f"{name}_kernel" in result.stdout


def test_rows_of_a_search_become_lines_of_the_table(tmp_path, capsys):
    found = replace(
        GENERAL, kernel="ladder_fwd", widths=(96, 96), reason="0.5 ms", mma="hmma", descriptors=True
    )
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"device": "Card", "architecture": 89, "rows": [vars(found)]}))
    assert command.main(["--rows", str(path)]) == 0
    row = eval(f"[{capsys.readouterr().out}]", {"Row": Row})[0]
    assert row == replace(found, family="consumer", reason="Card: 0.5 ms")
    path.write_text("{}")
    assert command.main(["--rows", str(path)]) == 1
    assert "holds no rows that a search wrote" in capsys.readouterr().err


def test_a_search_tries_the_row_itself_first():
    row = replace(GENERAL, blocks={"BLOCK_M": 32}, num_warps=4, num_stages=2)
    found = list(search.candidates(row))
    assert found[0] == row and len(found) == len({str(c) for c in found}) == 18


@pytest.fixture
def timed(monkeypatch):
    """A search on the CPU, in the interpreter, whose times are made up: those of the candidates in turn, or
    the error that one ends with."""
    pytest.importorskip("triton")
    times = []

    def time_case(case, sets, backward):
        [inputs] = sets
        out = case.function()(**inputs)
        if backward:
            out.backward(torch.zeros_like(out))
        found = times.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def input_sets(case, dtype, backward):
        inputs = replace(case, layers=2).inputs(dtype, "cpu", 0)
        for tensor in flat_tensors(inputs).values():
            tensor.requires_grad_(backward)
        return [inputs]

    monkeypatch.setattr(search, "time_case", time_case)
    monkeypatch.setattr(search, "input_sets", input_sets)
    monkeypatch.setattr(search, "architecture_of", lambda: 90)
    monkeypatch.setattr(search, "passing", lambda row, *_: (replace(row, num_stages=n) for n in (1, 2, 3)))
    return times


def test_a_search_goes_on_behind_what_a_card_cannot_run(timed, capsys):
    from triton.runtime.errors import OutOfResources

    timed += [OutOfResources(99, 1, "shared memory"), 2.0, 1.5]
    row = choice.best_of(TABLE, "row_statistics", 384, "hopper")
    found = search.fastest(row, 384, "fp16", 1, 4)
    assert not timed and found.num_stages == 3 and found.widths == (384, 384) and "1.500 ms" in found.reason
    assert "out of resource: shared memory" in capsys.readouterr().out


def test_a_search_gives_no_row_that_it_did_not_measure(timed, monkeypatch, capsys):
    timed += [1.0, 1.0, 1.0]
    wide = choice.best_of(TABLE, "adapter_bwd_normed", 96, "hopper")
    assert search.fastest(wide, 96, "bf16", 1, 4) is None  # another kernel does it at 96
    assert "never runs at this width" in capsys.readouterr().out and len(timed) == 2
    monkeypatch.setattr(search, "passing", lambda *_: iter(()))
    assert search.fastest(wide, 384, "bf16", 1, 4) is None
    assert "no candidate passes" in capsys.readouterr().out


def test_widths_of_a_search_are_those_that_kernels_read():
    for row in TABLE:
        found = static_check.serving_widths(row, 90, ends=False)
        if row.kernel.startswith(("row_statistics", "eight_bit")):
            assert set(found) <= {384, 512, 768, 1024, 1280}
        else:
            assert set(found) <= set(static_check.WIDTHS)
    served = [
        w
        for row in TABLE
        if row.kernel == "row_statistics"
        for w in static_check.serving_widths(row, 90, False)
    ]
    assert sorted(served) == [384, 512, 768, 1024, 1280]


CARD = "NVIDIA Card"


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A made-up GPU with an empty folder for its rows, and a search that finds at once; notes its calls."""
    pytest.importorskip("triton")
    calls = []

    def fastest(row, *_):
        calls.append(row)
        return replace(row, reason="found")

    monkeypatch.setenv("MEFT_KERNELS_TUNING_DIR", str(tmp_path / "rows"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(search, "fastest", fastest)
    device_file.read.cache_clear()
    yield calls
    device_file.read.cache_clear()


SEARCH = ["--op", "ladder", "--width", "96"]


def complaint(capsys):
    """The one line that a command wrote to standard error."""
    text = capsys.readouterr().err
    assert text.startswith("meft_kernels.tune: ") and text.count("\n") == 1, text
    return text


def test_rows_of_another_triton_are_replaced_and_not_kept(card, monkeypatch):
    monkeypatch.setattr(device_file, "_triton_version", lambda: "3.6.0")
    device_file.write([GENERAL])
    monkeypatch.setattr(device_file, "_triton_version", lambda: "3.9.0")
    device_file.read.cache_clear()
    with pytest.warns(UserWarning, match="Triton 3.6.0"):
        device_file.write([EXACT])
    content = json.loads(device_file.path_of(CARD).read_text())
    assert content["triton"] == "3.9.0" and len(content["rows"]) == 1
    assert device_file.read(CARD) == (EXACT,)


def test_a_row_is_that_of_the_tensors_device_and_not_of_the_current_one(card, monkeypatch):
    from meft_kernels.triton_kernels import host

    names, capabilities = ("Card", "Other"), ((9, 0), (8, 6))
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda device=None: names[device.index if device else 0]
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: capabilities[device.index if device else 0]
    )
    monkeypatch.setattr(choice, "TABLE", (GENERAL, EXACT))
    host.place.cache_clear()
    measured = replace(GENERAL, blocks={"BLOCK": 128})
    device_file.write([measured])  # of the current device, the first
    for index, row in enumerate((measured, EXACT)):
        x = SimpleNamespace(dtype=torch.float16, device=torch.device("cuda", index))
        assert host.row_for("toy_fwd", x, 96) == row
    host.place.cache_clear()


def test_a_measured_row_loads_as_it_was_timed(card, monkeypatch):
    """Descriptors are the row's, whatever family it is written for."""
    pytest.importorskip("triton")
    from meft_kernels.triton_kernels import relu_attention

    row = choice.best_of(TABLE, "relu_attention_fwd", 96, "hopper")
    assert row.descriptors
    device_file.write([replace(row, widths=(96, 96), family="any")])
    found = choice.choose("relu_attention_fwd", 96, 90, CARD)
    types = {}
    for each in (row, found):
        [launch] = relu_attention.static_launches(each, "bf16", 96)
        types[each.family] = launch[1]
    assert types["any"] == types["hopper"] and "tensordesc" in types["any"]["keys0"]


def test_a_measured_row_serves_half_precision_alone(card, monkeypatch, capsys):
    from meft_kernels.triton_kernels import host

    host.place.cache_clear()
    monkeypatch.setattr(choice, "TABLE", (GENERAL,))
    measured = replace(GENERAL, blocks={"BLOCK": 128})
    device_file.write([measured])
    for dtype, row in ((torch.float16, measured), (torch.bfloat16, measured), (torch.float32, GENERAL)):
        assert (
            host.row_for("toy_fwd", SimpleNamespace(dtype=dtype, device=torch.device("cuda", 0)), 96) == row
        )
    host.place.cache_clear()
    assert command.main([*SEARCH, "--dtype", "fp32"]) == 1 and not card
    assert "--dtype fp32 goes with --check and --dry-run" in complaint(capsys)


def test_a_search_that_finds_nothing_writes_nothing(card, monkeypatch, tmp_path):
    monkeypatch.setattr(search, "fastest", lambda *_: None)
    assert command.main(SEARCH) == 0
    assert list((tmp_path / "rows").iterdir()) == []


def test_a_search_is_written_and_picked_up(card, tmp_path):
    assert command.main(SEARCH) == 0
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["nvidia-card.json"]
    assert device_file.read(CARD) == tuple(replace(row, reason="found") for row in card)


@pytest.mark.parametrize("under", ["file", "file/below", "folder"])
def test_a_file_that_cannot_be_written_is_found_before_the_search(card, under, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder" / "nvidia-card.json").mkdir(parents=True)
    monkeypatch.setenv("MEFT_KERNELS_TUNING_DIR", str(tmp_path / under))
    assert command.main(SEARCH) == 1 and not card
    message = complaint(capsys)
    assert f"cannot write {tmp_path / under / 'nvidia-card.json'}: " in message
    assert "MEFT_KERNELS_TUNING_DIR" in message


@pytest.mark.parametrize("damaged", ["{", "[]", '{"rows": [{"kernel": "x"}]}'])
def test_tuning_again_replaces_a_damaged_file(card, damaged, tmp_path, capsys):
    path = device_file.path_of(CARD)
    path.parent.mkdir()
    path.write_text(damaged)
    assert command.main(SEARCH) == 0
    assert f"replacing {path}, which is now nvidia-card.damaged" in capsys.readouterr().out
    assert len(device_file.read(CARD)) == len(card) > 0
    assert path.with_suffix(".damaged").read_text() == damaged


def test_a_full_disk_leaves_the_old_rows_and_nothing_beside_them(card, monkeypatch, capsys):
    resource = pytest.importorskip("resource")
    assert command.main(SEARCH) == 0
    path, before = device_file.path_of(CARD), resource.getrlimit(resource.RLIMIT_FSIZE)
    content = path.read_bytes()

    def fill(row, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        return replace(row, widths=(96, 96))

    monkeypatch.setattr(search, "fastest", fill)
    try:
        status = command.main(SEARCH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1 and f"cannot write {path}: File too large" in complaint(capsys)
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "--batch: must be a positive integer, got '0'"),
        (["--batch", "-4"], "--batch: must be a positive integer, got '-4'"),
        (["--frames", "0"], "--frames: must be a positive integer, got '0'"),
        (["--check", "--width", "0"], "--width: must be a positive integer, got '0'"),
        (["--check", "--width", "-96"], "--width: must be a positive integer, got '-96'"),
        (["--seconds", "-1"], "--seconds: must be a number of seconds, 0 or more, got '-1'"),
        (["--seconds", "nan"], "--seconds: must be a number of seconds, 0 or more, got 'nan'"),
        (["--op", "nothing"], "--op: invalid choice: 'nothing'"),
        (["--sm", "7"], "--sm: invalid choice: 7"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_a_command_line_that_makes_no_sense_takes_one_line(card, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and not card
    assert message in complaint(capsys)


@pytest.mark.parametrize("mode", [["--check"], ["--dry-run"], []])
def test_a_width_that_no_row_serves_takes_one_line(card, mode, capsys):
    assert command.main([*mode, "--op", "ladder", "--width", "100000"]) == 1 and not card
    assert "no row of the table serves op ladder at width 100000; the reference does" in complaint(capsys)


def test_check_compiles_any_width_that_a_row_serves(card, monkeypatch, capsys):
    """7 is no width of Whisper's, and the library would use the row there."""
    asked = []

    def compiled(row, arch, width, dtype):
        asked.append(row.kernel)
        yield static_check.Compiled(row, row.kernel, width, dtype, arch)

    monkeypatch.setattr(static_check, "check_row", compiled)
    assert command.main(["--check", "--sm", "90", "--width", "7"]) == 0
    assert sorted(asked) == sorted({r.kernel for r in TABLE if choice.choose(r.kernel, 7)})
    assert f"{len(asked)} kernels compiled, 0 with problems" in capsys.readouterr().out


def test_dry_run_prints_each_candidate_as_it_is_compiled(card, monkeypatch, capsys):
    shown = []

    def compiled(row, arch, width, dtype):
        shown.append(capsys.readouterr().out)
        spills = 40 if row.num_warps == 4 else 0
        yield static_check.Compiled(row, row.kernel, width, dtype, arch, spill_loads=spills)

    monkeypatch.setattr(static_check, "check_row", compiled)
    assert command.main(["--dry-run", "--op", "eight_bit", "--width", "384", "--sm", "90"]) == 0
    assert "eight_bit_channels width 384 sm_90:" in shown[0]
    assert "8 warps 1 stages  ok" in shown[1] and "4 warps 1 stages  spills 40 bytes" in shown[2]
    assert all("stages  " in text for text in shown[1:])
    row = choice.choose("eight_bit_decode", 384)
    good = sum(each.num_warps != 4 for each in search.candidates(row))
    assert f"  {good} candidates pass" in capsys.readouterr().out
    assert len(list(search.passing(row, 90, 384, "bf16"))) == good


def test_tune_command_needs_a_gpu_to_search():
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        result = run_tune(*SEARCH)
        assert result.returncode == 1 and "a CUDA device is needed" in result.stderr
        assert result.stderr.count("meft_kernels.tune") == 1 and "Traceback" not in result.stderr


def test_what_is_made_of_a_row_is_made_once_and_stays_as_it_is():
    made = []

    @once_per_row
    def constants(row, width):
        made.append(width)
        return {"R": width, **row.blocks}

    row = replace(GENERAL)
    assert constants(row, 8) == {"R": 8, "BLOCK": 64} and constants(row, 9)["R"] == 9
    assert constants(row, 8) is constants(row, 8) and made == [8, 9]
    with pytest.raises(TypeError):
        constants(row, 8)["R"] = 7
    assert constants(replace(row, blocks={"BLOCK": 32}), 8)["BLOCK"] == 32
