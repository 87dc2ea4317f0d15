"""``python -m meft_kernels.tune``: check the table of block sizes with no GPU, or measure better ones on one.

--check      compile every row for every architecture and fail on spills, missing wgmma or too much memory
--dry-run    list the candidates of a search with what the static check says; needs no GPU
--rows FILE  print what a search wrote as lines for the table in tuning.py; needs no GPU
(none)       time them on the GPU at hand and write the best to a file that the library picks up
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import torch

from . import ops, static_check, tuning
from .testing import Case

_MEBIBYTE = 2**20


def candidates(row: tuning.Row) -> Iterator[tuning.Row]:
    """The row itself, then its neighbours: each block size halved, kept or doubled, other warps, stages."""
    yield row
    names = list(row.blocks)
    sizes = [sorted({max(16, size // 2), size, size * 2}) for size in row.blocks.values()]
    for blocks in itertools.product(*sizes):
        for warps, stages in itertools.product((4, 8), (1, 2, 3)):
            neighbour = replace(row, blocks=dict(zip(names, blocks)), num_warps=warps, num_stages=stages)
            if neighbour != row:
                yield neighbour


def checked(row: tuning.Row, sm: int, width: int, dtype: str) -> Iterator[tuple[tuning.Row, str]]:
    """The candidates of a row as they are compiled for an architecture, each with its problem or ""."""
    for candidate in candidates(row):
        results = list(static_check.check_row(candidate, sm, width, dtype))
        spills = max((r.spill_stores + r.spill_loads for r in results), default=0)
        problems = [r.problem for r in results if r.problem]
        yield candidate, problems[0] if problems else f"spills {spills} bytes" if spills > 32 else ""


def passing(row: tuning.Row, sm: int, width: int, dtype: str) -> Iterator[tuning.Row]:
    """The candidates of a row that compile on an architecture without spilling."""
    return (candidate for candidate, problem in checked(row, sm, width, dtype) if not problem)


def input_sets(case: Case, dtype: torch.dtype, backward: bool) -> list[dict]:
    """Inputs of an op on the current CUDA device, as many sets as it takes to leave the L2 cache."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    size = max(1, case.batch * case.frames * case.width * torch.finfo(dtype).bits // 8)
    sets = [case.inputs(dtype, "cuda", seed) for seed in range(min(8, 2 + 2 * l2 // size))]
    for inputs in sets:
        for value in inputs.values():
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.requires_grad_(backward)
    return sets


def time_case(case: Case, sets: list[dict], backward: bool, repeats: int = 20) -> float:
    """Median milliseconds of an op on the current CUDA device, going round its :func:`input_sets`."""
    upstream = torch.randn_like(case.function()(**sets[0]))

    def run(inputs: dict) -> float:
        out = case.function()(**inputs) if backward else None
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if backward:
            out.backward(upstream)
        else:
            case.function()(**inputs)
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    for inputs in sets:
        run(inputs)
    return statistics.median(run(sets[i % len(sets)]) for i in range(repeats))


def case_for(row: tuning.Row, width: int, batch: int, frames: int) -> Case:
    """A case of the shared table that runs a row's kernel at a width, in the sense that the row gives it."""
    shape = {"batch": batch, "frames": frames, "adapter_dim": 256, "layers": 12}
    if row.kernel == "row_statistics":  # its width is the backbone's, and norm_linear calls it
        return Case(op="norm_linear", width=width, side=max(1, width // 8), **shape)
    if row.kernel.startswith("eight_bit"):  # of a hidden state, too
        return Case(op="eight_bit", width=width, **shape)
    if row.kernel == "adapter_bwd_hidden":  # its width is the adapter's, and wide sides call it
        return Case(op="adapter", side=256, **{**shape, "adapter_dim": width})
    return Case(op=static_check.module_name(row.kernel), width=8 * width, side=width, **shape)


def search(
    row: tuning.Row, width: int, dtype: str, batch: int, frames: int, seconds: float = float("inf")
) -> tuning.Row:
    """The fastest passing candidate of a row at one width on the current CUDA device, of those tried within
    so many seconds; the row itself is tried first."""
    capability = torch.cuda.get_device_capability()
    case, backward = case_for(row, width, batch, frames), "bwd" in row.kernel
    sets = input_sets(case, getattr(torch, _TORCH_TYPES[dtype]), backward)
    best, best_time, start, before = None, float("inf"), time.monotonic(), ""
    for candidate in passing(row, tuning.sm_of(capability), width, dtype):
        if best is not None and time.monotonic() - start > seconds:
            print(f"  stopped after {seconds:g} s", flush=True)
            break
        with tuning.trial(candidate), ops.use_backend("triton"):
            try:
                elapsed = time_case(case, sets, backward)
            except RuntimeError as error:  # out of resources on this device: not a candidate here
                print(f"  {candidate.blocks}: {str(error).splitlines()[0]}", flush=True)
                continue
        launch = f"{candidate.num_warps}w {candidate.num_stages}s"
        print(f"  {elapsed:9.3f} ms  {candidate.blocks} {launch}", flush=True)
        if candidate == row:
            before = f", {elapsed:.3f} before"
        if elapsed < best_time:
            best, best_time = candidate, elapsed
    if best is None:
        return row
    reason = f"{best_time:.3f} ms at batch {batch}, {frames} frames, {dtype}{before}"
    return replace(best, widths=(width, width), family="any", reason=reason)


_TORCH_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system into an OSError that says in one line what could not be written."""
    try:
        yield
    except OSError as error:
        is_file = isinstance(error, FileExistsError)
        reason = f"{path.parent} is not a folder" if is_file else error.strerror or error
        hint = "MEFT_KERNELS_TUNING_DIR names the folder"
        raise OSError(f"cannot write {path}: {reason} ({hint})") from error


def _measured_before() -> tuple[tuning.Row, ...]:
    """The current device's rows; none from a damaged file, which is set aside for a new one to replace it."""
    name = torch.cuda.get_device_name()
    try:
        return tuning.device_rows(name)
    except ValueError as error:
        path = tuning.device_file(name)
        aside = path.with_suffix(".damaged")
        with _writing(path):
            os.replace(path, aside)
        print(f"replacing {path}, which is now {aside.name}: {error.__cause__}", flush=True)
        return ()


def prepare_file() -> None:
    """Finds out before a search that the current device's file can be written, and sets a damaged one aside.

    Raises:
        OSError: it cannot be written; the message names the file and the reason.
    """
    path = tuning.device_file(torch.cuda.get_device_name())
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise OSError("it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(2**16))  # more than a search writes
    _measured_before()


def write_rows(rows: Sequence[tuning.Row]) -> Path:
    """Merges rows into the current device's file, which is replaced in one step.

    Raises:
        OSError: it cannot be written; the old file is as it was and nothing is left beside it.
    """
    name = torch.cuda.get_device_name()
    path = tuning.device_file(name)
    keys = {(row.kernel, row.widths) for row in rows}
    kept = [row for row in _measured_before() if (row.kernel, row.widths) not in keys]
    content = {
        "device": name,
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "date": datetime.date.today().isoformat(),
        "rows": [asdict(row) for row in (*kept, *rows)],
    }
    temporary = None
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
                temporary = Path(file.name)
                json.dump(content, file, indent=2)
            os.replace(temporary, path)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
    tuning.device_rows.cache_clear()
    return path


def table_lines(path: Path) -> list[str]:
    """The rows of a file that :func:`write_rows` wrote, as Python for the table in ``tuning.py``.

    Raises:
        ValueError: the file cannot be read or is of another kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        family = tuning.FAMILIES[tuning.sm_of(tuple(content["capability"]))]
        changed = ({**row, "widths": tuple(row["widths"]), "family": family} for row in content["rows"])
        rows, name = [tuning.Row(**row) for row in changed], content["device"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no rows that a search wrote: {error}") from error
    lines = []
    for row in rows:
        sizes = f"{row.widths}, {row.blocks}, {row.num_warps}, {row.num_stages}"
        reason = f"{name}: {row.reason}"
        lines.append(f"Row({row.kernel!r}, {sizes}, {reason!r}, {row.family!r}, {row.mma!r}),")
    return lines


def _rows(wanted: Sequence[str], width: int | None, sm: int) -> list[tuple[tuning.Row, int]]:
    """Rows and widths that the options ask for, in the order of the ops: one width, or those of Whisper."""
    found = []
    for op, row in itertools.product(wanted, tuning.TABLE):
        if static_check.module_name(row.kernel) != op:
            continue
        if width is None:
            found += [(row, each) for each in static_check.serving_widths(row, sm)]
        elif tuning.best_of(tuning.TABLE, row.kernel, width, tuning.FAMILIES[sm]) is row:
            found.append((row, width))
    return found


def _complain(message: object) -> None:
    print(f"meft_kernels.tune: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Reports a command line that makes no sense in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{' '.join(message.split())} (see --help)")
        self.exit(2)


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m meft_kernels.tune", description=__doc__.split("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compile every row for every architecture")
    mode.add_argument("--dry-run", action="store_true", help="list the candidates and whether they pass")
    mode.add_argument("--rows", type=Path, metavar="FILE", help="print its rows as lines for tuning.py")
    parser.add_argument(
        "--op", choices=static_check.MODULES, nargs="+", help="only these ops, in this order (default: all)"
    )
    parser.add_argument("--width", type=_positive, help="only this side width (default: all of Whisper's)")
    parser.add_argument("--sm", type=int, choices=sorted(tuning.SHARED_MEMORY), help="only this architecture")
    parser.add_argument("--dtype", choices=sorted(_TORCH_TYPES), default="bf16", help="default: bf16")
    parser.add_argument("--batch", type=_positive, default=32, help="batch of the timed case (default: 32)")
    parser.add_argument("--frames", type=_positive, default=1500, help="frames of it (default: 1500)")
    parser.add_argument("--seconds", type=_seconds, default=float("inf"), help="most for one row and width")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.rows:
        try:
            print("\n".join(table_lines(options.rows)))
        except ValueError as error:
            _complain(error)
            return 1
        return 0
    try:
        import triton  # noqa: F401
    except ImportError:
        _complain("triton is not installed (pip install triton)")
        return 1
    wanted, has_gpu = options.op or static_check.MODULES, torch.cuda.is_available()
    if options.check:
        sms = (options.sm,) if options.sm else tuple(tuning.SHARED_MEMORY)
    else:
        sms = (options.sm or (tuning.sm_of(torch.cuda.get_device_capability()) if has_gpu else 90),)
    rows = [(row, width, sm) for sm in sms for row, width in _rows(wanted, options.width, sm)]
    if not rows:
        ops_named = f"op {' '.join(options.op)} at " if options.op else ""
        _complain(f"no row of the table serves {ops_named}width {options.width}; the reference does")
        return 1
    try:
        if options.check:
            return _check(rows, options.dtype)
        if options.dry_run:
            return _dry_run(rows, options.dtype)
        if not has_gpu:
            _complain("a CUDA device is needed; --check and --dry-run do without")
            return 1
        return _search(rows, options)
    except KeyboardInterrupt:
        _complain("interrupted; a search keeps the rows that it has written")
        return 130


def _check(rows: Sequence[tuple[tuning.Row, int, int]], dtype: str) -> int:
    print(static_check.HEADER)
    count, bad = 0, 0
    for row, width, sm in rows:
        for result in static_check.check_row(row, sm, width, dtype):
            print(static_check.line(result), flush=True)
            count, bad = count + 1, bad + bool(result.problem)
    print(f"{count} kernels compiled, {bad} with problems")
    return 1 if bad or not count else 0


def _dry_run(rows: Sequence[tuple[tuning.Row, int, int]], dtype: str) -> int:
    for row, width, sm in rows:
        print(f"{row.kernel} width {width} sm_{sm}:", flush=True)
        count = 0
        for candidate, problem in checked(row, sm, width, dtype):
            launch = f"{candidate.num_warps} warps {candidate.num_stages} stages"
            print(f"  {candidate.blocks} {launch}  {problem or 'ok'}", flush=True)
            count += not problem
        print(f"  {count} candidates pass", flush=True)
    return 0


def _search(rows: Sequence[tuple[tuning.Row, int, int]], options: argparse.Namespace) -> int:
    best = []
    try:
        prepare_file()
    except OSError as error:
        _complain(error)
        return 1
    for row, width, _ in rows:
        print(f"{row.kernel} width {width}", flush=True)
        best.append(search(row, width, options.dtype, options.batch, options.frames, options.seconds))
        try:
            print(f"wrote {write_rows(best)}", flush=True)
        except OSError as error:
            _complain(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
