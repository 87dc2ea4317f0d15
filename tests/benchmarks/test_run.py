"""The microbenchmarks: what a case costs, what is measured, what is refused, and the record that is left."""

import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from whisper_meft.errors import UserError

from benchmarks import ceilings, contenders, peers, record, revisions, run, timing, worker
from meft_kernels import ops, reference
from meft_kernels.testing import SIDE_NETWORKS, Case, NetworkCase, assert_as_good_as_torch, real_case, small

CPU = torch.device("cpu")
TINY = ["--batch", "1", "--frames", "12", "--width", "64", "--layers", "4", "--repeats", "2", "--quick"]
OURS = [f"ops:{backend}" for backend in peers.backends(torch.device("cpu"))]
PLAIN = ["--backend", "reference"]  # whether the C++ kernels are built or not
HAS_GIT = shutil.which("git") is not None and (record.ROOT / ".git").exists()


# --- what a case costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op",
    ["norm_linear", "adapter", "ladder", "relu_attention", "linear_attention", "gated_down", "gated_up"],
)
def test_flops_of_the_forward_are_those_of_its_definition(op):
    case = Case(op=op, batch=2, frames=50, width=64, side=16, adapter_dim=24, layers=3)
    with FlopCounterMode(display=False) as counter:
        case.definition()(**case.inputs(torch.float32))
    counted, claimed = counter.get_total_flops(), case.cost(torch.float32).flops
    # Row sums, and the gates' sum over layers, are elementwise work that the definition writes as products.
    slack = 1.05 if op == "relu_attention" else 1.2 if op == "linear_attention" else 1
    assert claimed <= counted <= slack * claimed


@pytest.mark.parametrize("op", ["norm_linear", "adapter", "ladder", "gated_down", "gated_up"])
def test_flops_of_the_backward_are_those_of_the_derived_gradient(op):
    case = Case(op=op, batch=2, frames=50, width=64, side=16, adapter_dim=24, layers=3)
    inputs = case.inputs(torch.float32)
    out = case.definition()(**inputs)
    arguments = list(inputs.values())
    if op in ("norm_linear", "ladder"):
        kept = 1 if op == "norm_linear" else 2
        folded = reference.norm_linear.fold(*arguments[kept : kept + 4])
        statistics = reference.row_statistics(inputs["x"])
        arguments = [*arguments[:kept], *folded, *statistics, *arguments[kept + 4 :]]
    need_x = op == "adapter"
    with FlopCounterMode(display=False) as counter:
        getattr(reference, op).backward(torch.randn_like(out), *arguments, need_x)
    assert counter.get_total_flops() == case.cost(torch.float32, backward=True).flops


def test_bytes_count_each_input_and_result_once():
    case = Case(op="norm_linear", batch=2, frames=10, width=64, side=16)
    hidden, side = 2 * 10 * 64 * 2, 2 * 10 * 16 * 2  # bf16
    parameters = (2 * 64 + 16 * 64 + 16) * 4  # fp32 masters
    assert case.cost(torch.bfloat16).bytes == hidden + parameters + side
    # x is a frozen hidden state: it is read again and gets no gradient.
    assert case.cost(torch.bfloat16, backward=True).bytes == side + hidden + 2 * parameters


@pytest.mark.parametrize("op", ops.OP_NAMES)
def test_every_op_has_a_real_case_and_its_cost(op):
    case = real_case(op, 2, 20, 64, 16, 3)
    forward, backward = case.cost(torch.bfloat16), case.cost(torch.bfloat16, backward=True)
    assert forward.bytes > 2 * 20 * 16 * 2
    assert (backward.bytes > 0) == bool(
        peers.ours(case, "reference").step(case.inputs(torch.float32), case.frozen).leaves
    )


def test_a_side_network_costs_what_its_ops_do():
    case = real_case("LST", 2, 30, 64, 8, 3)
    assert [part.op for part in case.parts()] == ["norm_linear"] + ["ladder"] * 3 + ["pooled_upsample"]
    single = [real_case(op, 2, 30, 64, 8, 3).cost(torch.float32).flops for op in ("norm_linear", "ladder")]
    pool = real_case("pooled_upsample", 2, 30, 64, 8, 3).cost(torch.float32).flops
    assert case.cost(torch.float32).flops == single[0] + 3 * single[1] + pool


def test_real_cases_have_the_sizes_of_whisper():
    case = real_case("relu_attention", 128)
    assert (case.frames, case.width, case.side, case.layers) == (1500, 768, 96, 12)
    assert real_case("adapter", 1).adapter_dim == 768  # UniPT's
    assert real_case("UniPT", 1, width=1280, side=80).reduction_factor == 16
    with pytest.raises(ValueError, match="op must be one of .*'LST'.*got 'rung'"):
        real_case("rung", 1)
    with pytest.raises(ValueError, match="side must be width // reduction_factor"):
        real_case("LST", 1, width=384, side=50)


@pytest.mark.parametrize("op", SIDE_NETWORKS)
def test_side_networks_of_the_table_agree_with_their_reference(op):
    assert_as_good_as_torch(real_case(op, 2, 20, 64, 16, 3), torch.float32)


def test_a_wrong_side_network_is_noticed(monkeypatch):
    right = NetworkCase.function
    monkeypatch.setattr(NetworkCase, "function", lambda case: lambda **inputs: 1.01 * right(case)(**inputs))
    with pytest.raises(AssertionError, match="out: error"):
        assert_as_good_as_torch(real_case("SHERL", 2, 20, 64, 16, 3), torch.float32)


# --- what is measured ---------------------------------------------------------------------------------------


def test_memory_of_a_step_is_counted_to_the_byte():
    x = torch.randn(1000, requires_grad=True)
    step = timing.Step(lambda: x.sin().exp(), [x], torch.ones(1000))
    memory = timing.measure_memory(step, CPU, [x])
    assert memory["kept"] == 4000  # exp keeps its result
    assert memory["forward_peak"] == 8000  # and the sine while it computes
    assert memory["peak"] >= 12000  # result, gradient of exp, gradient of x


def test_memory_inside_an_op_is_seen():
    case = Case(op="relu_attention", batch=1, frames=200, side=16, layers=2)
    inputs = case.inputs(torch.float32)
    known = list(contenders.flat_tensors(inputs).values())
    device = torch.device("cpu")
    fast = timing.measure_memory(peers.ours(case, "reference").step(inputs, case.frozen), device, known)
    eager = timing.measure_memory(
        peers.eager(case, torch.float32, device).step(inputs, case.frozen), device, known
    )
    scores = 200 * 200 * 4
    assert eager["kept"] > 2 * scores > fast["kept"]
    assert fast["peak"] > 0


def test_percentiles_and_rotation():
    assert timing.summary([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert timing.summary([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert timing.rotations(2**30, CPU) == 2 and timing.rotations(1, CPU) == 8


def test_the_nearer_ceiling_bounds():
    top = ceilings.Ceilings(1e9, 1, 1e12, 1, "float32")
    assert top.floor(10**9, 10**9) == (1.0, "memory")
    assert top.floor(10**6, 2 * 10**12) == (2.0, "compute")
    measured = ceilings.measure(torch.float32, CPU, quick=True)
    assert measured.copy_bandwidth > 0 and measured.matmul_rate > 0


@pytest.mark.parametrize("op", sorted(peers._BLOCKS))
def test_building_blocks_compute_what_the_op_does(op):
    """But for attention, which is said to be another function, and statistics, whose output is the rows."""
    case = small(real_case(op, 2, 30, 48, 12, 3))
    inputs = case.inputs(torch.float32)
    block = peers.block(case, torch.float32)
    with torch.no_grad():
        out, expected = block.call(**block.prepare(inputs)), case.definition()(**inputs)
    if op == "row_statistics":
        assert out.shape == inputs["x"].shape
    else:
        assert out.shape == expected.shape
        assert op == "relu_attention" or torch.allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_steps_differentiate_what_trains_and_nothing_else():
    case = Case(op="ladder", batch=1, frames=5, width=16, side=4, adapter_dim=6)
    inputs = case.inputs(torch.float32)
    step = peers.ours(case, "reference").step(inputs, case.frozen)
    assert len(step.leaves) == len(inputs) - 1
    assert all(leaf.requires_grad for leaf in step.leaves)
    assert not any(t.requires_grad for t in inputs.values())
    assert not any(leaf.shape == inputs["x"].shape for leaf in step.leaves)


# --- the command --------------------------------------------------------------------------------------------


def rows_of(folder) -> tuple[dict, list[dict]]:
    (content,) = record.load_all(folder)
    return content, content["figures"]["rows"]


def test_a_run_leaves_every_figure_in_its_record(tmp_path, capsys):
    wanted = ["row_statistics", "ladder", "guidance", "UniPT"]
    options = [*TINY, "--op", *wanted, "--peers", "eager", "block", "--output", str(tmp_path)]
    assert run.main(options) == 0
    content, rows = rows_of(tmp_path)
    assert {row["op"] for row in rows} == set(wanted)
    ladder = [row for row in rows if row["op"] == "ladder"]
    assert {(row["peer"], row["direction"]) for row in ladder} == {
        (peer, direction)
        for peer in ("eager", "block", *OURS)
        for direction in ("forward", "backward", "both")
    }
    assert {row["direction"] for row in rows if row["op"] == "row_statistics"} == {"forward"}
    assert "block" not in {row["peer"] for row in rows if row["op"] == "guidance"}  # none is published
    top = content["figures"]["ceilings"]
    for row in rows:
        assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["rounds"] == 2
        assert row["bandwidth_share"] == pytest.approx(row["bytes"] / top["copy_bandwidth"] / row["median"])
        assert row["matmul_share"] == pytest.approx(row["flops"] / top["matmul_rate"] / row["median"])
        if row["peer"] == "eager":
            assert row["ratio_to_eager"] == 1
        if row["direction"] == "both":
            assert row["peak"] > row["kept"] >= 0
    kept = {row["peer"]: row["kept"] for row in rows if (row["op"], row["direction"]) == ("UniPT", "both")}
    assert kept["ops:reference"] < kept["eager"]
    printed = capsys.readouterr().out
    assert all(f"{op}-B1-T12" in printed for op in wanted)
    assert content["shapes"] == {"batch": 1, "frames": 12, "layers": 4, "dtype": "float32"}
    assert str(tmp_path) not in next(tmp_path.iterdir()).read_text()


def test_what_is_wrong_is_not_measured(tmp_path, capsys, monkeypatch):
    right = ops.gated_up
    monkeypatch.setattr(ops, "gated_up", lambda *a, **k: 1.001 * right(*a, **k))
    contenders._check.cache_clear()
    options = [*TINY, *PLAIN, "--op", "gated_up", "gated_down", "--peers", "eager", "--output", str(tmp_path)]
    assert run.main(options) == 1
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert "gated_up in backend reference is not measured: it is wrong" in captured.err
    _, rows = rows_of(tmp_path)
    assert {row["op"] for row in rows} == {"gated_down"}
    contenders._check.cache_clear()


def test_other_forms_of_attention_stand_beside_the_exact_one(tmp_path):
    options = [*TINY, *PLAIN, "--op", "relu_attention", "--peers", "forms", "--output", str(tmp_path)]
    assert run.main(options) == 0
    rows = {row["peer"]: row for row in rows_of(tmp_path)[1] if row["direction"] == "both"}
    forms = ["pooled:4:reference", "pooled:8:reference", "linear:reference", "summary:reference"]
    assert {*rows} == {"ops:reference", *forms}
    flops = {name: row["flops"] for name, row in rows.items()}
    assert flops["ops:reference"] == 4 * flops["pooled:4:reference"] > 0 == flops["summary:reference"]
    assert peers.forms(real_case("adapter", 1)) == {}


def test_a_peer_that_fails_leaves_a_note(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(peers, "eager", fail)
    assert run.main([*TINY, *PLAIN, "--op", "adapter", "--peers", "eager", "--output", str(tmp_path)]) == 0
    content, rows = rows_of(tmp_path)
    assert {row["peer"] for row in rows} == {"ops:reference"}
    assert all(row["ratio_to_eager"] is None for row in rows)
    assert "out of memory" in content["figures"]["notes"].values()


def test_no_compiler_is_said_and_not_failed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run.main([*TINY, *PLAIN, "--op", "adapter", "--peers", "compiled", "--output", str(tmp_path)]) == 0
    content, rows = rows_of(tmp_path)
    assert "C++ compiler" in content["figures"]["notes"]["compiled"]
    assert {row["peer"] for row in rows} == {"ops:reference"}


@pytest.mark.skipif(not HAS_GIT, reason="needs the repository")
def test_another_revision_is_measured_in_the_same_run(tmp_path):
    def worktrees() -> list[str]:
        command = ["git", "-C", str(record.ROOT), "worktree", "list", "--porcelain"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [line for line in lines if line.startswith("worktree ") and "meft-base-" in line]

    before = worktrees()
    options = [*TINY, *PLAIN, "--op", "gated_down", "--peers", "--base", "HEAD", "--output", str(tmp_path)]
    assert run.main(options) == 0
    content, rows = rows_of(tmp_path)
    assert {row["peer"] for row in rows} == {"ops:reference", "ops:reference@HEAD"}, content["figures"][
        "notes"
    ]
    assert len(content["figures"]["base"]) == 40
    both = {row["peer"]: row for row in rows if row["direction"] == "both"}
    assert both["ops:reference@HEAD"]["peak"] > 0
    assert worktrees() == before


def test_another_revision_gets_its_own_kernels(tmp_path):
    (tmp_path / "meft_kernels").mkdir()
    script = tmp_path / "setup.py"
    script.write_text(
        "import pathlib, sys\n"
        "if sys.argv[1:] == ['build_ext', '--inplace']:\n"
        "    pathlib.Path('meft_kernels/_native_default_torch_1_2_3.so').touch()\n"
    )
    revisions.build(tmp_path)
    (built,) = (tmp_path / "meft_kernels").iterdir()
    built.unlink()
    script.write_text("import sys\nprint('one\\nno compiler', file=sys.stderr)")
    with pytest.raises(UserError, match="kernels of --base cannot be built: no compiler"):
        revisions.build(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "rung"], "argument --op: invalid choice: 'rung'"),
        (["--width", "-3"], "--width: must be a positive whole number, got '-3'"),
        (["--width", "4"], "--reduction_factor must be at most --width"),
        (["--side", "50", "--op", "LST"], "side must be width // reduction_factor for LST"),
        (["--base", "no-such-revision"], "--base must name a commit of this repository"),
        (["--output", "/dev/null/x"], "cannot write /dev/null/x/run.json"),
        (["--backend", "triton", "--device", "cpu"], "--backend on cpu must be one of reference"),
    ],
)
def test_bad_options_get_one_line(options, message, capsys):
    if "--base" in options and not HAS_GIT:
        pytest.skip("needs the repository")
    assert run.main([*TINY, *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1


# --- the record ---------------------------------------------------------------------------------------------


def test_records_are_read_as_written_and_never_overwritten(tmp_path):
    note = "g++ /tmp/of_somebody/x/main.cpp failed at 3 GB/s"
    figures = [{"seconds": 0.5, "bad": float("nan"), "dtype": torch.bfloat16, "note": note}]
    command = "python -m benchmarks.x --output /home/somebody/out --config=/home/somebody/c.json 'a b'"
    paths = [
        record.write("trial", figures, command=command, shapes={"batch": 2}, directory=tmp_path)
        for _ in range(3)
    ]
    assert len(set(paths)) == 3
    content = record.read(paths[0])
    note = "g++ main.cpp failed at 3 GB/s"
    assert content["figures"] == [{"seconds": 0.5, "bad": None, "dtype": "bfloat16", "note": note}]
    assert content["command"] == "python -m benchmarks.x --output out --config=c.json 'a b'"
    assert len(content["environment"]["date"]) == len("2026-01-01T00:00:00+00:00")
    assert content["environment"]["torch"] == torch.__version__
    replaced = record.write("trial", {}, command="x", shapes={}, directory=tmp_path, path=paths[0])
    assert replaced == paths[0] and record.read(replaced)["figures"] == {}
    assert len(record.load_all(tmp_path)) == 3


def test_a_record_says_who_measured_nothing(tmp_path):
    path = record.write("trial", {}, command="x", shapes={}, directory=tmp_path)
    environment = record.read(path)["environment"]
    assert not {"host", "hostname", "node", "user"} & environment.keys()


def test_bad_records_are_named(tmp_path):
    with pytest.raises(ValueError, match="name must be"):
        record.write("../x", {}, command="x", shapes={}, directory=tmp_path)
    with pytest.raises(TypeError, match="figure must be a number"):
        record.write("x", {"a": object()}, command="x", shapes={}, directory=tmp_path)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match=r"other\.json is not a benchmark record"):
        record.load_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_copy_without_a_repository_can_name_its_commit(monkeypatch):
    monkeypatch.setenv(record.COMMIT_VARIABLE, "0123abc")
    assert record.environment("cpu")["commit"] == "0123abc"


def test_a_worker_keeps_backends_apart(monkeypatch):
    case = contenders.case_to_dict(real_case("gated_down", 1, 5, 32, 8))
    monkeypatch.setattr(contenders, "check", lambda *_: None)
    monkeypatch.setattr(contenders, "Local", lambda peer, inputs, warm_up: Named(peer.name))
    at_work = worker.Worker()
    for backend in ("reference", "triton"):
        threads = torch.get_num_threads()
        at_work.prepare(case, backend, "float32", "cpu", threads, 1)
    assert at_work.round("reference", 3) == {"ops:reference": 3}
    assert at_work.memory("triton") == {"ops:triton": 0}
    at_work.drop()
    with pytest.raises(KeyError):
        at_work.round("reference", 0)


class Named:
    """A contender that answers with its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def round(self, index: int) -> dict:
        return {self.name: index}

    def memory(self) -> dict:
        return {self.name: 0}


def test_cases_survive_the_way_to_a_worker():
    for case in (replace(real_case("guidance", 3), masked=True), real_case("SHERL", 2)):
        assert contenders.case_from_dict(contenders.case_to_dict(case)) == case


# --- on a GPU -----------------------------------------------------------------------------------------------


def test_the_device_waits_before_it_is_timed(monkeypatch):
    """Without a GPU: the calls that the CUDA timing makes, in order."""
    calls = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("wait for the end")

        def elapsed_time(self, other) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(cycles))
    x = torch.randn(3, requires_grad=True)
    step = timing.Step(lambda: calls.append("call") or x.exp(), [x], torch.ones(3))
    seconds = timing.time_step(step, torch.device("cuda"), wait=0.5)
    assert calls == ["idle", 10**9, "record", "call", "record", "record", "wait for the end"]
    assert seconds["forward"] == seconds["both"] == 2e-3 and seconds["host"] > 0


@pytest.mark.gpu
def test_a_run_on_cuda(tmp_path):
    options = ["--device", "cuda", "--batch", "2", "--repeats", "3", "--output", str(tmp_path)]
    wanted = ["--op", "ladder", "relu_attention", "LST", "--peers", "eager", "block"]
    assert run.main([*options, *wanted]) == 0
    content, rows = rows_of(tmp_path)
    assert {row["peer"] for row in rows} == {"eager", "block", "ops:reference", "ops:triton"}
    assert all(0 < row["median"] < 10 for row in rows)
    assert all(row["peak"] > 0 and row["host_median"] > 0 for row in rows if row["direction"] == "both")
    assert content["environment"]["device_type"] == "cuda" and content["environment"]["driver"]
