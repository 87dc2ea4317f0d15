"""``python -m benchmarks.gpu_pack``: everything worth knowing about a rented GPU, in one command.

The stages run one after another as processes of their own, the most valuable first. Each has a share of the
time that no other can take; what one leaves over the next may use. A stage that fails or is cut short costs
the others nothing. The folder holds three files: ``gpu_pack-*.json`` with the state of all stages and their
records, written anew when a stage ends, ``log.txt``, and the block sizes that tuning found. For
``benchmarks.plot`` the first is as good as the records that are in it.

``--resume DIR`` goes on after the last stage that ended, on the same device with the same code and versions;
with ``--parts`` it runs the stages named once more.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from whisper_meft import MeftConfig
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable
from whisper_meft.methods.side_networks import SideNetworkConfig

from . import ceilings, profiled, record
from .steps import PUBLISHED

MINUTES, DRY_RUN_MINUTES = 8, 20  # a dry run tries the path, on a CPU that others may use too
GRACE_SECONDS = 10  # for a stage that was told to stop, within its time
LEAST_SECONDS = 5  # a stage that would get less is not started
SMALL_BYTES = 2**26  # peaks below this are mostly what the interpreter and libraries take
# Where a training step of LST, UniPT and SHERL spends most of its time beside the encoder.
HOT_OPS = ("ladder", "relu_attention", "guidance", "gated_down")
OTHER_OPS = ("adapter", "norm_linear", "gated_up")
# The one block of eager code that is compiled too. Definitions that loop over 12 layers would take minutes.
COMPILED_OP = "ladder"
# The tests for a GPU without which no other figure means anything: Whisper-small at reduction factor 8.
CORE_TESTS = (
    "test_error_at_real_shapes and -768-8-torch.bfloat16",
    "test_auto_takes_the_fused_kernels and -8-torch.bfloat16",
    "test_same_bits_on_every_run",
    "than_int32_counts",
    "test_eight_bit_copies and 768-torch.bfloat16",
    "test_loss_curve_follows_eager",
    "test_graphs_give_what_eager_steps_give and exact and bfloat16",
)
# What a stage that has ended once need not run again for; the others are run when a pack is resumed.
ENDED = ("ok", "failed", "time limit")


@dataclass(frozen=True)
class Part:
    """One stage: a child process.

    Attributes:
        name: what the tables call it. arguments: of the Python interpreter. share: of the whole time, which
            it may take in any case. headline: one line from its output and from the records it wrote.
        needs: packages without which it is left out.
        interpret: run Triton's kernels in the interpreter. tunes: look for block sizes in the pack's folder,
            and write them there; the other stages use those of the table.
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    headline: Callable[[str, list[dict]], str]
    needs: tuple[str, ...] = ()
    interpret: bool = False
    tunes: bool = False


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


def _refused(rows: list[dict]) -> list[str]:
    """The kernels that failed their check, by op and direction."""
    names = dict.fromkeys(line.split(" (")[0] for row in rows for line in row.get("refused_kernels", ()))
    return [f"kernels that failed their check: {', '.join(names)}"] if names else []


def _profiled(output: str, records: list[dict]) -> str:
    """Of ``benchmarks.profiled``: milliseconds of kernels of those of the step, and launches."""
    rows, said = [row for record_ in records for row in record_["figures"]], []
    for row in rows:
        if row["status"] != "ok":
            said.append(f"{row['method']}: {row['status']}")
            continue
        kernels, wall = 1e3 * row["kernel_seconds"], 1e3 * row["wall"]["median"]
        count = profiled.kernels_counted(row)
        launched = f"{row['kernels']} kernels" + ("" if count is None else f", {count} counted")
        said.append(f"{row['method']} {kernels:.1f} of {wall:.1f} ms ({launched})")
    return "; ".join(said + _refused(rows))


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
    said += [f"{row['method']}: {row['status']}" for row in rows if row["status"] != "ok"]
    return "; ".join(said + _refused(rows))


def _ops(output: str, records: list[dict]) -> str:
    """Of ``benchmarks.run``: the time of forward and backward over that of the eager reference."""
    rows = [row for record_ in records for row in record_["figures"]["rows"]]
    both = [row for row in rows if row["direction"] == "both" and row["ratio_to_eager"]]
    last = {row["op"]: row["ratio_to_eager"] for row in both if row["peer"].startswith("ops:")}
    said = ", ".join(f"{op} {ratio:.2f}" for op, ratio in last.items())
    compiled = [f"compiled {r['op']} {r['ratio_to_eager']:.2f}" for r in both if r["peer"] == "compiled"]
    wrong = len(re.findall(r" is not measured: ", output))
    return "; ".join([f"op / eager: {said}", *compiled, *([f"{wrong} not measured"] if wrong else [])])


def _tuning(output: str, records: list[dict]) -> str:
    rows = len(re.findall(r"^wrote ", output, re.MULTILINE))
    return f"{rows} rows searched" if rows else _last_line(output, records)


# --- the stages ---------------------------------------------------------------------------------------------


def gpu_test_files() -> list[str]:
    """The test files that hold a test for a GPU, as paths from the root."""
    files = sorted((record.ROOT / "tests").rglob("test_*.py"))
    marked = (file for file in files if "mark.gpu" in file.read_text(encoding="utf-8"))
    return [str(file.relative_to(record.ROOT)) for file in marked]


def parts(out: Path, dry_run: bool, backend: str) -> list[Part]:
    """All stages, by value. A dry run does the same on a CPU at toy sizes.

    Args:
        out: where they write their records. backend: of the ops in training steps.
    """
    pytest = ["-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    pytest += ["--continue-on-collection-errors", *gpu_test_files()]
    if importlib.util.find_spec("xdist") and not dry_run:
        pytest += ["-n", "8"]  # most of the time goes into compiling kernels, on the CPU
    core = " or ".join(f"({name})" for name in CORE_TESTS)
    profile = ["-m", "benchmarks.profiled", "--output", str(out)]
    step = ["-m", "benchmarks.train_step", "--output", str(out)]
    ops = ["-m", "benchmarks.run", "--output", str(out)]
    tune = ["-m", "meft_kernels.tune"]
    kinds = MeftConfig.methods().items()
    side_networks = [name for name, kind in kinds if issubclass(kind, SideNetworkConfig)]
    if dry_run:
        toy = ["--model", "toy", "--batch", "2", "--frames", "20", "--device", "cpu"]
        profile += [*toy, "--reduction_factor", "4"]
        steps = [*toy, "--repeats", "1", "--no-count", "--methods", "lst,full,published_lst"]
        memory = [*toy, "--repeats", "0", "--methods", "lst"]
        eager = [*toy, "--repeats", "1", "--no-count", "--methods", "lst", "--backend", "reference"]
        graphs = [*toy, "--repeats", "1", "--no-count", "--methods", "unipt"]  # there are none on a CPU
        interpreted = "triton" if importlib.util.find_spec("triton") else "reference"
        steps += ["--backend", interpreted]
        small = ["--quick", "--device", "cpu", "--frames", "20"]
        hot = [*small, "--op", "norm_linear", "--peers", "eager"]
        others = [*small, "--op", "gated_up", "--peers", "eager"]
        tune += ["--check", "--op", "row_statistics", "--sm", "90", "--width", "96"]
    else:
        real = ["--model", "small", "--batch", "128", "--device", "cuda"]
        profile += [*real, "--methods", ",".join(side_networks)]
        # Counting takes seconds of a CPU for each method: the times come first.
        everything = [*side_networks, "head", "full", *PUBLISHED]
        steps = [*real, "--repeats", "5", "--no-count", "--methods", ",".join(everything)]
        steps += ["--backend", backend]
        eight_bit = [f"{name}:saved_activations=fp8" for name in side_networks]
        memory = [*real, "--repeats", "0", "--backend", backend]
        memory += ["--methods", ",".join([*eight_bit, *side_networks, "published_lst", "lora"])]
        eager = [*real, "--repeats", "3", "--no-count", "--methods", ",".join(side_networks)]
        eager += ["--backend", "reference"]
        graphs = [*real, "--repeats", "5", "--no-count", "--cuda_graphs", "--backend", backend]
        graphs += ["--methods", ",".join(side_networks)]
        fused = ["--device", "cuda", "--repeats", "10", "--backend", "triton"]
        hot = [*fused, "--op", *HOT_OPS, "--compile", COMPILED_OP, "--peers", "eager", "compiled"]
        others = [*fused, "--op", *OTHER_OPS, "--peers", "eager"]
        tune += ["--width", "96", "--seconds", "10", "--op", *HOT_OPS, *OTHER_OPS]
    top = ["-m", "benchmarks.gpu_pack", "--out", str(out), "--ceilings", *(["--dry-run"] if dry_run else [])]
    return [
        Part("environment", ("-m", "meft_kernels"), 0.03, _device),
        Part("ceilings", tuple(top), 0.04, _ceilings),
        Part("core_tests", (*pytest, "-k", core), 0.21, _tests, ("pytest",)),
        Part("profile", tuple(profile), 0.15, _profiled),
        Part("train_step", (*step, *steps), 0.22, _train_step, interpret=dry_run),
        Part("ops", (*ops, *hot), 0.11, _ops),
        Part("train_step_graphs", (*step, *graphs), 0.05, _train_step),
        Part("tuning", tuple(tune), 0.08, _tuning, ("triton",), tunes=True),
        Part("memory", (*step, *memory), 0.04, _train_step),
        Part("train_step_eager", (*step, *eager), 0.03, _train_step),
        Part("other_ops", (*ops, *others), 0.02, _ops),
        Part("other_tests", (*pytest, "-k", f"not ({core})"), 0.02, _tests, ("pytest",)),
    ]


def measure_ceilings(out: Path, device: str, command: str) -> None:
    """Writes the record of the machine's copy bandwidth and bf16 matrix-product rate."""
    found = ceilings.measure(torch.bfloat16, torch.device(device), quick=device == "cpu").as_dict()
    record.write("ceilings", [found], command=command, shapes={}, directory=out, device=device)


# --- running ------------------------------------------------------------------------------------------------


def _stop(process: subprocess.Popen, grace: float) -> None:
    """Interrupts a stage and all it started, so that it can still report; kills it if that does not help."""
    for sign, seconds in ((signal.SIGINT, grace), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def run_part(part: Part, out: Path, seconds: float, records: Path | None = None) -> dict:
    """Runs a stage for at most so many seconds, the time to stop it included.

    Args:
        out: the pack's folder. records: where the stage writes its records, which are taken away from there;
            default ``out``.

    Returns:
        ``part``, ``status`` (``"ok"``, ``"failed: ..."``, ``"time limit"``, ``"interrupted"``, ``"skipped:
        ..."``), ``seconds``, ``headline``, ``command`` and ``records``.
    """
    records = records or out
    row = _row(part)
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
        "MEFT_KERNELS_TUNING_DIR": str((out if part.tunes else records) / "tuning"),
    }
    environment.pop("TRITON_INTERPRET", None)
    if part.interpret:
        environment["TRITON_INTERPRET"] = "1"
    before = {path.name for path in records.glob("*.json")}
    log = out / "log.txt"
    start, grace = time.monotonic(), min(GRACE_SECONDS, seconds / 4)
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
            process.wait(seconds - grace)
        except subprocess.TimeoutExpired:
            row["status"] = "time limit"
        except KeyboardInterrupt:
            row["status"] = "interrupted"
        finally:
            if process.poll() is None:
                _stop(process, grace)
    row["seconds"] = round(time.monotonic() - start, 1)
    with log.open("rb") as file:
        file.seek(offset)
        output = file.read().decode("utf-8", errors="replace")
    if row["status"] == "ok" and process.returncode not in (0, _NOTHING_TO_TEST):
        row["status"] = f"failed: exit status {process.returncode}"
    for path in sorted(path for path in records.glob("*.json") if path.name not in before):
        with contextlib.suppress(UserError):  # what a stage was writing when it was killed
            row["records"].append(record.read(path))
        path.unlink()
    try:
        row["headline"] = _plain(part.headline(output, row["records"]))
    except Exception:  # what a stage has written when it is cut short is anyone's guess
        row["headline"] = _plain(_last_line(output, []))
    return row


def _row(part: Part) -> dict:
    row = {"part": part.name, "status": "ok", "seconds": 0.0, "headline": "", "records": []}
    return row | {"command": _plain(shlex.join(["python", *part.arguments]))}


def _plain(text: str) -> str:
    """``text`` without folders, as records want it."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)*(?=[\w.+-])", "", text)


_NOTHING_TO_TEST = 5  # pytest's exit status where no test was collected


def table(rows: list[dict]) -> str:
    """Stage, status, seconds and headline of each."""
    widths = [max(len(str(row[key])) for row in rows) for key in ("part", "status", "seconds")]
    lines = []
    for row in rows:
        cells = f"{row['part']:<{widths[0]}}  {row['status']:<{widths[1]}}  {row['seconds']:>{widths[2]}}"
        lines.append(f"{cells}  {row['headline'][:240]}".rstrip())
    return "\n".join(lines)


@dataclass
class State:
    """What a pack's folder holds.

    Attributes:
        out: the folder. shapes: what the pack's record says of all stages. command: of this run.
        device: ``"cpu"`` or ``"cuda"``. rows: of the stages so far. path: of the record, None before it.
    """

    out: Path
    shapes: dict
    command: str
    device: str
    rows: list[dict]
    path: Path | None = None

    def put(self, row: dict) -> None:
        """Records a stage's row in the place of an earlier one; the file on disk is whole at any time."""
        names = [each["part"] for each in self.rows]
        if row["part"] in names:
            self.rows[names.index(row["part"])] = row
        else:
            self.rows.append(row)
        self.path = record.write(
            record.PACK,
            self.rows,
            command=self.command,
            shapes=self.shapes,
            directory=self.out,
            device=self.device,
            path=self.path,
        )


def run(todo: Sequence[Part], state: State, minutes: float) -> list[dict]:
    """Runs the stages in order within so many minutes, and writes the record after each.

    A stage has its share of the time (shares are scaled to those that are to run) and what the ones before it
    left over, so that the later ones' is safe from it.

    Returns:
        The row of each, see :func:`run_part`.
    """
    total, start = 60 * minutes, time.monotonic()
    whole = sum(part.share for part in todo)
    ends, rows = 0.0, []
    for part in todo:
        ends += total * part.share / whole
        with tempfile.TemporaryDirectory() as folder:
            # A stage's folder of records is its own: the pack's folder holds none of their files.
            records = Path(folder) / "records"
            records.mkdir()
            arguments = (str(records) if each == str(state.out) else each for each in part.arguments)
            here = replace(part, arguments=tuple(arguments))
            try:
                row = run_part(here, state.out, start + ends - time.monotonic(), records)
            except KeyboardInterrupt:
                row = _row(part) | {"status": "interrupted"}
            except Exception as error:  # no stage may end the run
                row = _row(part) | {"status": _plain(f"failed: {one_line(error)}")}
        rows.append(row)
        print(table([row]), flush=True)
        state.put(row)
        if row["status"] == "interrupted":
            break
    return rows


# --- going on with a pack -----------------------------------------------------------------------------------


def source_digest() -> str:
    """What tells one state of the code that is measured from another, committed or not."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "meft_kernels", "python"):
        for path in sorted((record.ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(record.ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_SAME = ("device", "python", "torch", "cuda", "triton", "transformers", "commit")


def _packs(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{record.PACK}-*.json")) if folder.is_dir() else []


def load(folder: Path, device: str, shapes: dict, command: str) -> State:
    """The state of a pack that is gone on with.

    Raises:
        UserError: there is none, or it was measured on another device, with other code, versions or options.
    """
    found = _packs(folder)
    if not found:
        raise UserError(f"--resume needs the folder of a pack, {folder} holds no {record.PACK}-*.json")
    content = record.read(found[-1])
    now, then = record.environment(device), content["environment"]
    pairs = [(name, then.get(name), now[name]) for name in _SAME]
    pairs += [(name, content["shapes"].get(name), shapes[name]) for name in ("backend", "dry_run")]
    if then.get("commit") == now["commit"]:
        pairs.append(("source files", content["shapes"].get("source"), shapes["source"]))
    other = [f"{name} {before} (now {here})" for name, before, here in pairs if before != here]
    if other:
        raise UserError(
            f"the pack in {folder} was measured with {', '.join(other)}: its figures and new ones would not "
            "compare, begin a new one with --out"
        )
    return State(folder, content["shapes"] | shapes, command, device, content["figures"], found[-1])


# --- the command --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _terminating_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the stage that runs, as Ctrl-C does, and what is known is still recorded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_pack", description=__doc__.partition("\n\n")[0]
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="folder for a new pack")
    where.add_argument("--resume", type=Path, metavar="DIR", help="go on with the pack in this folder")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"for everything that is to run (default: {MINUTES}; a dry run: {DRY_RUN_MINUTES})",
    )
    parser.add_argument("--parts", help="only these stages, separated by commas")
    parser.add_argument(
        "--backend",
        choices=("auto", "triton", "reference"),
        default="auto",
        help="of the ops in training steps (default: auto, where a kernel that fails its check on the device "
        "is left out and named)",
    )
    parser.add_argument("--ceilings", action="store_true", help=argparse.SUPPRESS)  # the stage of that name
    parser.add_argument("--dry-run", action="store_true", help="the whole path on a CPU at toy sizes")
    return parser


def _chosen(names: str | None, state: State, todo: list[Part]) -> list[Part]:
    """The stages that are to run: those named, else those that have not ended yet."""
    if names is None:
        ended = {row["part"] for row in state.rows if row["status"].split(":")[0] in ENDED}
        return [part for part in todo if part.name not in ended]
    known = [part.name for part in todo]
    for name in names.split(","):
        if name not in known:
            raise UserError(f"parts must be some of {', '.join(known)}, got {name!r}")
    return [part for part in todo if part.name in names.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 1 if a stage failed, 130 if it was interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.gpu_pack", *argv])
    device = "cpu" if options.dry_run else "cuda"
    minutes = options.minutes
    if minutes is None:
        minutes = DRY_RUN_MINUTES if options.dry_run else MINUTES
    try:
        if not options.dry_run and not torch.cuda.is_available():
            raise UserError("a CUDA device is needed; --dry-run does without")
        if not 0 < minutes < float("inf"):
            raise UserError(f"minutes must be a positive number, got {options.minutes}")
        out = (options.out or options.resume).resolve()
        check_writable(out / "log.txt")
        if options.ceilings:
            measure_ceilings(out, device, command)
            return 0
        shapes = {"minutes": minutes, "backend": options.backend, "dry_run": options.dry_run}
        shapes["source"] = source_digest()
        if options.resume:
            state = load(out, device, shapes, command)
        elif _packs(out):
            raise UserError(f"{out} holds a pack already: --resume goes on with it")
        else:
            state = State(out, shapes, command, device, [])
        todo = _chosen(options.parts, state, parts(out, options.dry_run, options.backend))
        out.mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"benchmarks.gpu_pack: {one_line(error)}", file=sys.stderr)
        return 1
    if not todo:
        print(f"{table(state.rows)}\nall stages of the pack in {out} have ended")
        return 0
    with _terminating_as_interrupted():
        rows = run(todo, state, minutes)
    print(f"\n{table(state.rows)}\nwrote {out}")
    if rows[-1]["status"] == "interrupted":
        return 130
    return 1 if any(row["status"].startswith("failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
