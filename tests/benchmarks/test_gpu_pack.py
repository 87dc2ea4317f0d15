"""The GPU pack: its whole path at toy sizes, and that no part costs the others anything."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_pack, profiled, record
from benchmarks.gpu_pack import Part, run, run_part

COPY_THEN_HANG = """
import pathlib, shutil, sys, time
shutil.copy(sys.argv[1], sys.argv[2])
pathlib.Path(sys.argv[2], ".half-written.json").write_text("{")
time.sleep(60)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("here", flush=True)
time.sleep(60)
"""


def part(name, code, *arguments, headline=gpu_pack._last_line, **options):
    return Part(name, ("-c", code, *map(str, arguments)), 1.0, headline, **options)


def state(tmp_path, **shapes):
    return gpu_pack.State(tmp_path, shapes, "command", "cpu", [])


def pack_in(folder):
    (path,) = folder.glob("gpu_pack-*.json")
    return record.read(path)


@pytest.mark.slow
def test_dry_run(tmp_path, capsys):
    assert gpu_pack.main(["--dry-run", "--out", str(tmp_path)]) == 0, (tmp_path / "log.txt").read_text()
    rows = {row["part"]: row for row in pack_in(tmp_path)["figures"]}
    assert list(rows) == [p.name for p in gpu_pack.parts(tmp_path, True, "auto")]
    assert all(row["status"] == "ok" for row in rows.values())
    assert all(row["headline"] and row["seconds"] > 0 for row in rows.values())
    assert rows["train_step"]["headline"].startswith("step / encoder: lst ")
    assert rows["profile"]["headline"].startswith("lst ") and "counted" in rows["profile"]["headline"]
    assert rows["ops"]["headline"].startswith("op / eager: norm_linear ")
    assert rows["tuning"]["headline"] == "1 kernels compiled, 0 with problems"
    inside = {name: [each["name"] for each in row["records"]] for name, row in rows.items()}
    assert {name: found for name, found in inside.items() if found} == {
        "ceilings": ["ceilings"],
        "profile": ["profiled"],
        "train_step": ["train_step"],
        "ops": ["run"],
        "train_step_graphs": ["train_step"],
        "memory": ["train_step"],
        "train_step_eager": ["train_step"],
        "other_ops": ["run"],
    }
    (steps,) = rows["train_step"]["records"]
    assert steps["shapes"]["backend"] == "triton"  # in the interpreter
    assert all(row["refused_kernels"] == [] for row in steps["figures"])
    last = capsys.readouterr().out.split("\n\n")[-1]
    assert all(name in last for name in rows)  # ends with the table
    assert str(tmp_path.parent) not in json.dumps(list(rows.values()))
    assert sum(path.is_file() for path in tmp_path.rglob("*")) <= 6
    assert gpu_pack.main(["--dry-run", "--resume", str(tmp_path)]) == 0
    assert "have ended" in capsys.readouterr().out


def test_real_parts_do_the_same_as_the_dry_run(tmp_path):
    """What a dry run tries is what a GPU gets: the same modules in the same order, at other sizes."""
    real, dry = (gpu_pack.parts(tmp_path, dry_run, "auto") for dry_run in (False, True))
    assert [p.name for p in real] == [p.name for p in dry]
    assert [p.arguments[1] for p in real] == [p.arguments[1] for p in dry]
    assert all("cpu" not in p.arguments and not p.interpret for p in real)
    step = next(p for p in real if p.name == "train_step").arguments
    assert step[step.index("--batch") + 1] == "128" and step[step.index("--model") + 1] == "small"
    assert step[step.index("--backend") + 1] == "auto"
    methods = "lst,unipt,sherl,head,full,published_lst,published_unipt,published_sherl"
    assert step[step.index("--methods") + 1] == methods
    assert "tests/kernels/test_gpu.py" in next(p for p in real if p.name == "core_tests").arguments


def test_shares_are_of_the_whole(tmp_path):
    shares = [p.share for p in gpu_pack.parts(tmp_path, False, "auto")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0


def test_core_tests_are_there(capfd):
    """Each name takes some tests, all of the core at most a few for each op."""
    files = gpu_pack.gpu_test_files()
    expression = " or ".join(f"({name})" for name in gpu_pack.CORE_TESTS)

    def collected(names):
        arguments = [
            "-m",
            "pytest",
            "-q",
            "--collect-only",
            "-p",
            "no:cacheprovider",
            "-m",
            "gpu",
            "-k",
            names,
        ]
        command = [sys.executable, *arguments, *files]
        done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if "::" in line]

    found = collected(expression)
    for name in gpu_pack.CORE_TESTS:
        words = name.split(" and ")
        assert any(all(word in line for word in words) for line in found), name
    assert len(found) < 60
    widths = [line for line in found if "real_shapes" in line or "auto_takes" in line]
    assert widths and all("-8-" in line for line in widths)


def test_real_arguments_are_understood(tmp_path, monkeypatch, capsys):
    """Each command line of a real run parses, and stops only where it finds no GPU."""
    from benchmarks import run as run_ops
    from benchmarks import train_step
    from meft_kernels.tune import __main__ as tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mains = {"benchmarks.train_step": train_step, "benchmarks.run": run_ops, "meft_kernels.tune": tune}
    mains["benchmarks.profiled"] = profiled
    tried = 0
    for real in gpu_pack.parts(tmp_path, False, "auto"):
        if real.arguments[1] in mains:
            assert mains[real.arguments[1]].main(list(real.arguments[2:])) == 1
            error = capsys.readouterr().err.lower()
            assert "cuda" in error and error.count("\n") == 1
            tried += 1
    assert tried == 8


def test_failing_and_hanging_parts_do_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu_pack, "LEAST_SECONDS", 0)
    figures = [{"copy_bandwidth": 2e9, "matmul_rate": 3e12, "dtype": "bfloat16"}]
    made = record.write(
        "ceilings", figures, command="x", shapes={}, directory=tmp_path / "made", device="cpu"
    )
    todo = [
        part("fails", "print('its last words'); raise SystemExit(3)"),
        part("writes, then hangs", COPY_THEN_HANG, made, tmp_path, headline=gpu_pack._ceilings),
        part("stubborn", STUBBORN),
        part("lacks", "", needs=("no_such_package_at_all",)),
        part("no headline", "print('some line')", headline=lambda output, records: records[0]),
        part("fine", "print('done')"),
    ]
    rows = run(todo, state(tmp_path), 0.4)
    states = {row["part"]: (row["status"], row["headline"]) for row in rows}
    assert states == {
        "fails": ("failed: exit status 3", "its last words"),
        "writes, then hangs": ("time limit", "copy 2 GB/s, bfloat16 matrix product 3 TFLOP/s"),
        "stubborn": ("time limit", "here"),
        "lacks": ("skipped: no_such_package_at_all is not installed", ""),
        "no headline": ("ok", "some line"),
        "fine": ("ok", "done"),
    }
    pack = pack_in(tmp_path)
    assert [row["part"] for row in pack["figures"]] == list(states)
    inside = [found for found in record.load_all(tmp_path) if found["name"] == "ceilings"]
    assert [found["figures"] for found in inside] == [figures]
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 2
    log = (tmp_path / "log.txt").read_text()
    assert "its last words" in log and "===== fine" in log


def test_a_slow_stage_takes_nothing_from_the_later_ones(tmp_path, monkeypatch):
    """Its own share and what was left over before it, the time to stop it included."""
    monkeypatch.setattr(gpu_pack, "LEAST_SECONDS", 0)
    given = []

    def fake(part, out, seconds, records):
        given.append(round(seconds))
        clock[0] += seconds if part.name == "slow" else 1
        return gpu_pack._row(part)

    clock = [1000.0]
    monkeypatch.setattr(gpu_pack.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_pack, "run_part", fake)
    todo = [Part(name, ("-c", ""), share, gpu_pack._last_line) for name, share in SHARES]
    run(todo, state(tmp_path), 1)
    # A minute in shares of 6, 24, 12, 18 s; "quick" takes 1 s of its 6.
    assert given == [6, 29, 12, 29]


SHARES = (("quick", 0.1), ("slow", 0.4), ("middle", 0.2), ("last", 0.3))


def test_a_stage_is_stopped_within_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "LEAST_SECONDS", 0)
    row = run_part(part("stubborn", STUBBORN), tmp_path, 4)
    assert row["status"] == "time limit" and row["seconds"] < 4.5


def test_a_part_whose_start_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing" / "python"))
    rows = run([part("a", "1"), part("b", "1")], state(tmp_path), 1)
    assert [row["status"].split(":")[0] for row in rows] == ["failed", "failed"]
    assert str(tmp_path) not in json.dumps(rows)


def test_results_so_far_are_on_disk_while_a_part_runs(tmp_path):
    seen = []

    def look(output, records):
        packs = [found for found in record.load_all(tmp_path) if found["name"] == "gpu_pack"]
        seen.append([row["part"] for pack in packs for row in pack["figures"]])
        return "looked"

    run([part(n, "1", headline=look) for n in ("a", "b", "c")], state(tmp_path), 1)
    assert seen == [[], ["a"], ["a", "b"]]


def test_no_part_starts_without_time(tmp_path):
    row = run_part(part("late", "print('ran')"), tmp_path, gpu_pack.LEAST_SECONDS - 1)
    assert row["status"] == "skipped: no time left"
    assert not (tmp_path / "log.txt").exists()


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.fixture
def few_parts(monkeypatch):
    """Three stages that say what they were run as; the second hangs while there is a file of its name."""
    code = "import pathlib, sys, time\nprint(sys.argv[2])\nwhile pathlib.Path(sys.argv[1]).exists():"
    code += " time.sleep(0.05)"

    def parts(out, dry_run, backend):
        return [
            part("first", "print('first')"),
            part("second", code, out / "hang", "second"),
            part("third", "raise SystemExit(1)"),
        ]

    monkeypatch.setattr(gpu_pack, "parts", parts)


def names_in_log(folder):
    return re.findall("^===== ([a-z]+):", (folder / "log.txt").read_text(), re.MULTILINE)


def test_an_interrupted_pack_is_gone_on_with(tmp_path, few_parts, capsys):
    (tmp_path / "hang").write_text("")
    timer = threading.Timer(0.2, interrupt_when, [lambda: "second" in names_in_log(tmp_path)])
    timer.start()
    assert gpu_pack.main(["--dry-run", "--out", str(tmp_path)]) == 130
    timer.join()
    rows = pack_in(tmp_path)["figures"]
    assert [(row["part"], row["status"]) for row in rows] == [("first", "ok"), ("second", "interrupted")]
    (tmp_path / "hang").unlink()
    assert gpu_pack.main(["--dry-run", "--resume", str(tmp_path)]) == 1
    rows = pack_in(tmp_path)["figures"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed: exit status 1"]
    assert names_in_log(tmp_path) == ["first", "second", "second", "third"]
    # A stage that failed has ended; one that is named runs again.
    assert gpu_pack.main(["--dry-run", "--resume", str(tmp_path)]) == 0
    assert gpu_pack.main(["--dry-run", "--resume", str(tmp_path), "--parts", "first"]) == 0
    assert names_in_log(tmp_path) == ["first", "second", "second", "third", "first"]
    assert [row["part"] for row in pack_in(tmp_path)["figures"]] == ["first", "second", "third"]


def interrupt_when(condition):
    for _ in range(200):
        if condition():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.1)


@pytest.mark.parametrize(
    "place, key, value, sentence",
    [
        ("environment", "device", "NVIDIA H100", "device NVIDIA H100 (now "),
        ("environment", "torch", "2.10.0", "torch 2.10.0 (now "),
        ("environment", "triton", None, "triton None (now "),
        ("environment", "commit", "0123abc", "commit 0123abc (now "),
        ("shapes", "source", "0123abc", "source files 0123abc (now "),
        ("shapes", "backend", "reference", "backend reference (now auto)"),
        ("shapes", "dry_run", False, "dry_run False (now True)"),
    ],
)
def test_what_would_not_compare_is_refused(place, key, value, sentence, tmp_path, few_parts, capsys):
    assert gpu_pack.main(["--dry-run", "--out", str(tmp_path), "--parts", "first"]) == 0
    (path,) = tmp_path.glob("gpu_pack-*.json")
    content = json.loads(path.read_text())
    content[place][key] = value
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    capsys.readouterr()
    assert gpu_pack.main(["--dry-run", "--resume", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and path.read_bytes() == before


def test_a_folder_that_holds_a_pack_or_none(tmp_path, few_parts, capsys):
    assert gpu_pack.main(["--dry-run", "--resume", str(tmp_path)]) == 1
    assert "holds no gpu_pack-*.json" in capsys.readouterr().err
    assert gpu_pack.main(["--dry-run", "--out", str(tmp_path), "--parts", "first"]) == 0
    assert gpu_pack.main(["--dry-run", "--out", str(tmp_path)]) == 1
    assert "holds a pack already" in capsys.readouterr().err


# --- headlines ----------------------------------------------------------------------------------------------


def test_headline_of_tests():
    whole = "tests/test_gpu.py::a PASSED\n===== 2 failed, 310 passed, 1 skipped in 61.20s (0:01:01) =====\n"
    assert gpu_pack._tests(whole, []) == "2 failed, 310 passed, 1 skipped in 61.20s (0:01:01)"
    cut = "tests/test_gpu.py::a PASSED [ 1%]\ntests/test_gpu.py::b FAILED [ 2%]\n"
    assert gpu_pack._tests(cut, []) == "cut short: 1 passed, 1 failed, 0 error"


def test_headline_of_train_steps():
    good = {"method": "lst", "status": "ok", "ratio": 1.2, "counted_bytes": 95 * 2**20}
    bad = {"method": "full", "status": "out of memory", "counted_bytes": None}
    rows = [good | {"peak_bytes": 100 * 2**20}, good | {"method": "unipt", "peak_bytes": 94 * 2**20}, bad]
    assert gpu_pack._train_step("", [{"figures": rows}]) == (
        "step / encoder: lst 1.20, unipt 1.20; counted memory of 2 methods at most -5.0% off (lst); "
        "full: out of memory"
    )
    assert gpu_pack._train_step("lst  out of memory\nnothing is recorded\n", []) == "nothing is recorded"


def test_refused_kernels_are_named():
    good = {"method": "lst", "status": "ok", "ratio": 1.2, "counted_bytes": None, "peak_bytes": None}
    rows = [good | {"refused_kernels": ["ladder_bwd (bfloat16, cuda:0): result 3 is not finite"]}]
    said = gpu_pack._train_step("", [{"figures": rows}])
    assert said == "step / encoder: lst 1.20; kernels that failed their check: ladder_bwd"


def event(name, start, end, kind="CUDA", **more):
    kind = getattr(torch.autograd.DeviceType, kind)
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=kind, time_range=span, cpu_children=[], **more)


def test_a_profile_is_summed_up():
    """Times in microseconds; what overlaps counts once, annotations and the host's events not at all."""
    events = [
        event("gemm", 0, 100),
        event("gemm", 150, 250),
        event("Memcpy DtoD", 240, 300),
        event("Optimizer.step", 0, 1000, is_user_annotation=True),
        event("aten::mm", 0, 900, kind="CPU"),
    ]
    found = profiled.summarise(events, on_gpu=True)
    assert found["kernels"] == 2 and found["kernel_seconds"] == pytest.approx(250e-6)
    assert found["top"][0] == {"name": "gemm", "count": 2, "seconds": pytest.approx(200e-6)}
    assert [each["name"] for each in found["top"]] == ["gemm", "Memcpy DtoD"]


def test_headline_of_profiles():
    row = {"method": "lst", "status": "ok", "kernel_seconds": 0.0712, "wall": {"median": 0.09}}
    row |= {"kernels": 1800, "counted": {"phases": {"encoder": {"kernels": 1000}, "x": {"kernels": 750}}}}
    bad = {"method": "unipt", "status": "failed: OutOfMemoryError"}
    assert gpu_pack._profiled("", [{"figures": [row, bad]}]) == (
        "lst 71.2 of 90.0 ms (1800 kernels, 1750 counted); unipt: failed: OutOfMemoryError"
    )


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--dry-run", "--minutes", "-1"], "minutes must be a positive number, got -1"),
        (
            ["--dry-run", "--minutes", "0", "--parts", "environment"],
            "minutes must be a positive number, got 0",
        ),
        (["--dry-run", "--minutes", "nan"], "minutes must be a positive number, got nan"),
        (["--dry-run", "--parts", "tests,nope"], "parts must be some of environment, "),
        ([], "a CUDA device is needed; --dry-run does without"),
    ],
)
def test_wrong_options_get_one_line(options, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_pack.main([*options, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert gpu_pack.main(["--dry-run", "--out", str(tmp_path / "file")]) == 1
    assert "is not a folder" in capsys.readouterr().err
