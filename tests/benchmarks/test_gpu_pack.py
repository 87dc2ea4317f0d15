"""The GPU pack: its whole path at toy sizes, and that no part costs the others anything."""

import json
import sys

import pytest

from benchmarks import gpu_pack, record
from benchmarks.gpu_pack import Part, run, run_part

COPY_THEN_HANG = """
import shutil, sys, time
shutil.copy(sys.argv[1], sys.argv[2])
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


@pytest.mark.slow
def test_dry_run(tmp_path, capsys):
    assert gpu_pack.main(["--dry-run", "--out", str(tmp_path)]) == 0, (tmp_path / "log.txt").read_text()
    records = {}
    for found in record.load_all(tmp_path):
        records.setdefault(found["name"], []).append(found)
    rows = {row["part"]: row for row in records["gpu_pack"][0]["figures"]}
    assert list(rows) == [p.name for p in gpu_pack.parts(tmp_path, True, "triton")]
    assert all(row["status"] == "ok" for row in rows.values())
    assert all(row["headline"] and row["seconds"] > 0 for row in rows.values())
    assert rows["train_step"]["headline"].startswith("step / encoder: lst ")
    assert rows["ops"]["headline"].startswith("op / eager: norm_linear ")
    assert rows["tuning"]["headline"] == "1 kernels compiled, 0 with problems"
    assert len(records["train_step"]) == 3 and len(records["run"]) == 1 and len(records["ceilings"]) == 1
    last = capsys.readouterr().out.split("\n\n")[-1]
    assert all(name in last for name in rows)  # ends with the table
    assert str(tmp_path.parent) not in json.dumps(records)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) <= 8


def test_real_parts_do_the_same_as_the_dry_run(tmp_path):
    """What a dry run tries is what a GPU gets: the same modules in the same order, at other sizes."""
    real, dry = (gpu_pack.parts(tmp_path, dry_run, "triton") for dry_run in (False, True))
    assert [p.name for p in real] == [p.name for p in dry]
    assert [p.arguments[1] for p in real] == [p.arguments[1] for p in dry]
    assert all("cpu" not in p.arguments for p in real)
    step = next(p for p in real if p.name == "train_step").arguments
    assert step[step.index("--batch") + 1] == "128" and step[step.index("--model") + 1] == "small"
    assert "tests/kernels/test_gpu.py" in next(p for p in real if p.name == "tests").arguments


def test_real_arguments_are_understood(tmp_path, monkeypatch, capsys):
    """Each command line of a real run parses, and stops only where it finds no GPU."""
    import torch

    from benchmarks import run as run_ops
    from benchmarks import train_step
    from meft_kernels.tune import __main__ as tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mains = {"benchmarks.train_step": train_step, "benchmarks.run": run_ops, "meft_kernels.tune": tune}
    tried = 0
    for real in gpu_pack.parts(tmp_path, False, "triton"):
        if real.arguments[1] in mains:
            assert mains[real.arguments[1]].main(list(real.arguments[2:])) == 1
            error = capsys.readouterr().err.lower()
            assert "cuda" in error and error.count("\n") == 1
            tried += 1
    assert tried == 5


def test_failing_and_hanging_parts_do_not_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu_pack, "LEAST_SECONDS", 0)
    figures = [{"copy_bandwidth": 2e9, "matmul_rate": 3e12, "dtype": "bfloat16"}]
    made = record.write(
        "ceilings", figures, command="x", shapes={}, directory=tmp_path / "made", device="cpu"
    )
    sleeper = ("-c", COPY_THEN_HANG, str(made), str(tmp_path))
    todo = [
        part("fails", "print('its last words'); raise SystemExit(3)"),
        Part("writes, then hangs", sleeper, 0.2, gpu_pack._ceilings),
        Part("stubborn", ("-c", STUBBORN), 0.1, gpu_pack._last_line),
        part("lacks", "", needs=("no_such_package_at_all",)),
        part("no headline", "print('some line')", headline=lambda output, records: records[0]),
        part("fine", "print('done')"),
    ]
    rows = run(todo, tmp_path, 0.3, "command", "cpu")
    states = {row["part"]: (row["status"], row["headline"]) for row in rows}
    assert states == {
        "fails": ("failed: exit status 3", "its last words"),
        "writes, then hangs": ("time limit", "copy 2 GB/s, bfloat16 matrix product 3 TFLOP/s"),
        "stubborn": ("time limit", "here"),
        "lacks": ("skipped: no_such_package_at_all is not installed", ""),
        "no headline": ("ok", "some line"),
        "fine": ("ok", "done"),
    }
    (pack,) = [found for found in record.load_all(tmp_path) if found["name"] == "gpu_pack"]
    assert [row["part"] for row in pack["figures"]] == list(states)
    log = (tmp_path / "log.txt").read_text()
    assert "its last words" in log and "===== fine" in log


def test_a_part_whose_start_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing" / "python"))
    rows = run([part("a", "1"), part("b", "1")], tmp_path, 1, "command", "cpu")
    assert [row["status"].split(":")[0] for row in rows] == ["failed", "failed"]
    assert str(tmp_path) not in json.dumps(rows)


def test_results_so_far_are_on_disk_while_a_part_runs(tmp_path):
    seen = []

    def look(output, records):
        packs = [found for found in record.load_all(tmp_path) if found["name"] == "gpu_pack"]
        seen.append([row["part"] for pack in packs for row in pack["figures"]])
        return "looked"

    run([part(n, "1", headline=look) for n in ("a", "b", "c")], tmp_path, 1, "command", "cpu")
    assert seen == [[], ["a"], ["a", "b"]]


def test_no_part_starts_without_time(tmp_path):
    row = run_part(part("late", "print('ran')"), tmp_path, gpu_pack.LEAST_SECONDS - 1)
    assert row["status"] == "skipped: no time left"
    assert not (tmp_path / "log.txt").exists()


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
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_pack.main([*options, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert gpu_pack.main(["--dry-run", "--out", str(tmp_path / "file")]) == 1
    assert "is not a folder" in capsys.readouterr().err
