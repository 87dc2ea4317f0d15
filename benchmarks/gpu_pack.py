"""``python -m benchmarks.gpu_pack``: everything worth knowing about a rented GPU, in one command.

The parts run one after another as processes of their own, the most valuable first, each with a time limit. A
part that fails or is cut short costs the others nothing. What is known is on disk after every part: the
records of the parts, ``gpu_pack-*.json`` with the state of all parts, and ``log.txt``.
"""

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from whisper_meft import MeftConfig
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable
from whisper_meft.methods.side_networks import SideNetworkConfig

from . import ceilings, record

GRACE_SECONDS = 10  # for a part that was told to stop
LEAST_SECONDS = 5  # a part that would get less is not started
DRY_RUN_MINUTES = 5
SMALL_BYTES = 2**26  # peaks below this are mostly what the interpreter and libraries take
# Side width 96: whisper-small at reduction factor 8. The rows that its training step spends most time in.
HOT_OPS = ("relu_attention", "ladder", "adapter", "norm_linear", "gated_down", "gated_up", "guidance")


@dataclass(frozen=True)
class Part:
    """One child process.

    Attributes:
        name: what the tables call it. arguments: of the Python interpreter. share: of the whole time that it
            may take, at most. headline: one line from its output and from the records it wrote.
        needs: packages without which it is left out.
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    headline: Callable[[str, list[dict]], str]
    needs: tuple[str, ...] = ()


# --- headlines ----------------------------------------------------------------------------------------------


def _last_line(output: str, records: list[dict]) -> str:
    return next((line for line in reversed(output.splitlines()) if line.strip()), "").strip()


def _device(output: str, records: list[dict]) -> str:
    """Of ``python -m meft_kernels``."""
    return next((line for line in output.splitlines() if line.startswith("cuda")), "").strip()


def _ceilings(output: str, records: list[dict]) -> str:
    (found,) = records[0]["figures"]
    bandwidth, rate = found["copy_bandwidth"] / 1e9, found["matmul_rate"] / 1e12
    return f"copy {bandwidth:.4g} GB/s, {found['dtype']} matrix product {rate:.3g} TFLOP/s"


def _tests(output: str, records: list[dict]) -> str:
    """pytest's last line, or what it had done where it was killed."""
    summary = re.findall(r"^=* ?(\d+ [a-z].* in [\d.:hms ()]+)", output, re.MULTILINE)
    if summary:
        return summary[-1].rstrip("= ")
    done = {word: len(re.findall(rf"\b{word}\b", output)) for word in ("PASSED", "FAILED", "ERROR")}
    return "cut short: " + ", ".join(f"{n} {word.lower()}" for word, n in done.items())


def _train_step(output: str, records: list[dict]) -> str:
    rows = [row for record_ in records for row in record_["figures"]]
    good = [row for row in rows if row["status"] == "ok"]
    if not rows:  # none that could be recorded
        return _last_line(output, records)
    said = [f"{row['method']} {row['ratio']:.2f}" for row in good if "ratio" in row]
    said = [f"step / encoder: {', '.join(said)}" if said else f"{len(good)} methods measured"]
    sized = [row for row in good if row["counted_bytes"] and (row["peak_bytes"] or 0) > SMALL_BYTES]
    off = {row["method"]: row["counted_bytes"] / row["peak_bytes"] - 1 for row in sized}
    if off:
        worst = max(off, key=lambda method: abs(off[method]))
        said.append(f"counted memory of {len(off)} methods at most {off[worst]:+.1%} off ({worst})")
    return "; ".join(said + [f"{row['method']}: {row['status']}" for row in rows if row["status"] != "ok"])


def _launches(output: str, records: list[dict]) -> str:
    """Of ``benchmarks.launches``: counted and, where there is a GPU, profiled kernels of a step."""
    rows = [row for record_ in records for row in record_["figures"]]
    counted = {row["method"]: sum(phase["kernels"] for phase in row["phases"].values()) for row in rows}
    ran = {row["method"]: "" if row["profiled"] is None else f" ({row['profiled']} ran)" for row in rows}
    return "kernels of a step: " + ", ".join(f"{name} {n}{ran[name]}" for name, n in counted.items())


def _ops(output: str, records: list[dict]) -> str:
    """Of ``benchmarks.run``: the time of forward and backward over that of the eager reference."""
    rows = [row for record_ in records for row in record_["figures"]["rows"]]
    ours = [row for row in rows if row["peer"].startswith("ops:") and row["direction"] == "both"]
    last = {row["op"]: row["ratio_to_eager"] for row in ours}  # of several backends the last
    said = ", ".join(f"{op} {ratio:.2f}" for op, ratio in last.items() if ratio)
    wrong = len(re.findall(r" is not measured: ", output))
    return f"op / eager: {said}" + (f"; {wrong} not measured" if wrong else "")


def _tuning(output: str, records: list[dict]) -> str:
    rows = len(re.findall(r"^wrote ", output, re.MULTILINE))
    return f"{rows} rows searched" if rows else _last_line(output, records)


# --- the parts ----------------------------------------------------------------------------------------------


def gpu_test_files() -> list[str]:
    """The test files that hold a test for a GPU, as paths from the root."""
    files = sorted((record.ROOT / "tests").rglob("test_*.py"))
    marked = (file for file in files if "mark.gpu" in file.read_text(encoding="utf-8"))
    return [str(file.relative_to(record.ROOT)) for file in marked]


def parts(out: Path, dry_run: bool, backend: str) -> list[Part]:
    """All parts, by value. A dry run does the same on a CPU at toy sizes."""
    pytest = ["-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors", *gpu_test_files()]
    if importlib.util.find_spec("xdist") and not dry_run:
        pytest += ["-n", "8"]  # most of the time goes into compiling kernels, on the CPU
    step = ["-m", "benchmarks.train_step", "--output", str(out)]
    ops = ["-m", "benchmarks.run", "--output", str(out)]
    launches = ["-m", "benchmarks.launches", "--output", str(out)]
    tune = ["-m", "meft_kernels.tune"]
    if dry_run:
        toy = ["--device", "cpu", "--model", "toy", "--batch", "2", "--frames", "20", "--methods", "lst"]
        steps, memory = [*toy, "--repeats", "1", "--no-count"], [*toy, "--repeats", "0"]
        eager = [*steps, "--backend", "reference"]
        launches += ["--model", "tiny", "--batch", "2", "--methods", "lst"]
        ops += ["--quick", "--device", "cpu", "--op", "norm_linear", "--frames", "20", "--peers", "eager"]
        tune += ["--check", "--op", "row_statistics", "--sm", "90", "--width", "96"]
    else:
        kinds = MeftConfig.methods().items()
        side_networks = [name for name, kind in kinds if issubclass(kind, SideNetworkConfig)]
        real = ["--device", "cuda", "--model", "small", "--batch", "128", "--repeats"]
        # Counting takes seconds of a CPU for each method: the times come first.
        steps = [*real, "5", "--no-count", "--backend", backend]
        eager = [*real, "3", "--no-count", "--backend", "reference", "--methods", ",".join(side_networks)]
        eight_bit = [f"{name}:saved_activations=fp8" for name in side_networks]
        sized = [*side_networks, *eight_bit, "published_lst", "lora"]
        memory = [*real, "0", "--backend", backend, "--methods", ",".join(sized)]
        launches += ["--profile"]
        ops += ["--device", "cuda", "--repeats", "10", "--backend", *dict.fromkeys(("reference", backend))]
        tune += ["--width", "96", "--seconds", "15", "--op", *HOT_OPS]
    ceilings = ["-m", "benchmarks.gpu_pack", "--out", str(out), "--ceilings"]
    return [
        Part("environment", ("-m", "meft_kernels"), 0.1, _device),
        Part("ceilings", (*ceilings, *(["--dry-run"] if dry_run else [])), 0.1, _ceilings),
        Part("tests", tuple(pytest), 0.3, _tests, ("pytest",)),
        Part("train_step", (*step, *steps), 0.35, _train_step),
        Part("launches", tuple(launches), 0.15, _launches, ("triton",)),
        Part("ops", tuple(ops), 0.25, _ops),
        Part("memory", (*step, *memory), 0.2, _train_step),
        Part("train_step_eager", (*step, *eager), 0.2, _train_step),
        Part("tuning", tuple(tune), 1.0, _tuning, ("triton",)),
    ]


def measure_ceilings(out: Path, device: str, command: str) -> None:
    """Writes the record of the machine's copy bandwidth and bf16 matrix-product rate."""
    found = ceilings.measure(torch.bfloat16, torch.device(device), quick=device == "cpu").as_dict()
    record.write("ceilings", [found], command=command, shapes={}, directory=out, device=device)


# --- running ------------------------------------------------------------------------------------------------


def _stop(process: subprocess.Popen) -> None:
    """Interrupts a part and all it started, so that it can still report; kills it if that does not help."""
    for sign, seconds in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def run_part(part: Part, out: Path, seconds: float) -> dict:
    """Runs a part for at most so many seconds.

    Returns:
        ``part``, ``status`` (``"ok"``, ``"failed: ..."``, ``"time limit"``, ``"skipped: ..."``), ``seconds``,
        ``headline``, ``command`` and ``records`` (names of the files that it wrote).
    """
    row = {"part": part.name, "status": "ok", "seconds": 0.0, "headline": ""}
    row |= {"command": _plain(shlex.join(["python", *part.arguments])), "records": []}
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return row | {"status": f"skipped: {', '.join(missing)} is not installed"}
    if seconds < LEAST_SECONDS:
        return row | {"status": "skipped: no time left"}
    paths = [str(record.ROOT), str(record.ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "MEFT_KERNELS_TUNING_DIR": str(out / "tuning"),
    }
    environment.pop("TRITON_INTERPRET", None)  # it is the GPU that is measured
    before = {path.name for path in out.glob("*.json")}
    log = out / "log.txt"
    start = time.monotonic()
    with log.open("a", encoding="utf-8", errors="replace") as file:
        file.write(f"\n===== {part.name}: {row['command']}\n")
        file.flush()
        offset = file.tell()
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=record.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            row["status"] = "time limit"
        finally:
            if process.poll() is None:
                _stop(process)
    row["seconds"] = round(time.monotonic() - start, 1)
    with log.open("rb") as file:
        file.seek(offset)
        output = file.read().decode("utf-8", errors="replace")
    if row["status"] == "ok" and process.returncode not in (0, _NOTHING_TO_TEST):
        row["status"] = f"failed: exit status {process.returncode}"
    new = sorted(path for path in out.glob("*.json") if path.name not in before)
    row["records"] = [path.name for path in new]
    try:
        row["headline"] = _plain(part.headline(output, [record.read(path) for path in new]))
    except Exception:  # what a part has written when it is cut short is anyone's guess
        row["headline"] = _plain(_last_line(output, []))
    return row


def _plain(text: str) -> str:
    """``text`` without folders, as records want it."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)*(?=[\w.+-])", "", text)


_NOTHING_TO_TEST = 5  # pytest's exit status where no test was collected


def table(rows: list[dict]) -> str:
    """Part, status, seconds and headline of each."""
    widths = [max(len(str(row[key])) for row in rows) for key in ("part", "status", "seconds")]
    lines = []
    for row in rows:
        cells = f"{row['part']:<{widths[0]}}  {row['status']:<{widths[1]}}  {row['seconds']:>{widths[2]}}"
        lines.append(f"{cells}  {row['headline'][:160]}".rstrip())
    return "\n".join(lines)


def run(todo: Sequence[Part], out: Path, minutes: float, command: str, device: str) -> list[dict]:
    """Runs the parts in order within so many minutes, and writes the record after each.

    Returns:
        One dictionary per part, see :func:`run_part`.
    """
    deadline = time.monotonic() + 60 * minutes
    rows: list[dict] = []
    path = None
    for part in todo:
        left = deadline - time.monotonic()
        try:
            row = run_part(part, out, min(left, 60 * minutes * part.share))
        except KeyboardInterrupt:
            row = {"part": part.name, "status": "interrupted", "seconds": 0.0}
            row |= {"headline": "", "command": "", "records": []}
        except Exception as error:  # no part may end the run
            row = {"part": part.name, "status": _plain(f"failed: {one_line(error)}"), "seconds": 0.0}
            row |= {"headline": "", "command": "", "records": []}
        rows.append(row)
        print(table([row]), flush=True)
        path = record.write(
            "gpu_pack",
            rows,
            command=command,
            shapes={"minutes": minutes},
            directory=out,
            device=device,
            path=path,
        )
        if row["status"] == "interrupted":
            break
    return rows


# --- the command --------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if a part failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_pack",
        description="Tests, times and tunes on the GPU at hand within a few minutes.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for all results")
    parser.add_argument("--minutes", type=float, help="for everything (default: 8; a dry run: 5)")
    parser.add_argument("--parts", help="only these, separated by commas")
    parser.add_argument("--backend", choices=("triton", "reference"), default="triton", help="of the ops")
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)  # the part of that name
    parser.add_argument("--dry-run", action="store_true", help="the whole path on a CPU at toy sizes")
    options = parser.parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.gpu_pack", *argv])
    device = "cpu" if options.dry_run else "cuda"
    minutes = options.minutes
    if minutes is None:
        minutes = DRY_RUN_MINUTES if options.dry_run else 8
    try:
        if not options.dry_run and not torch.cuda.is_available():
            raise UserError("a CUDA device is needed; --dry-run does without")
        if not 0 < minutes < float("inf"):
            raise UserError(f"minutes must be a positive number, got {options.minutes}")
        out = options.out.resolve()
        check_writable(out / "log.txt")
        out.mkdir(parents=True, exist_ok=True)
        if options.ceilings:
            measure_ceilings(out, device, command)
            return 0
        todo = parts(out, options.dry_run, options.backend)
        if options.parts is not None:
            names = [part.name for part in todo]
            for name in options.parts.split(","):
                if name not in names:
                    raise UserError(f"parts must be some of {', '.join(names)}, got {name!r}")
            todo = [part for part in todo if part.name in options.parts.split(",")]
    except UserError as error:
        print(f"benchmarks.gpu_pack: {one_line(error)}", file=sys.stderr)
        return 1
    rows = run(todo, out, minutes, command, device)
    print(f"\n{table(rows)}\nwrote {out}")
    if rows[-1]["status"] == "interrupted":
        return 130
    return 1 if any(row["status"].startswith("failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
