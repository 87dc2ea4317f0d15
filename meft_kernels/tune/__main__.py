"""``python -m meft_kernels.tune``: check the table of block sizes with no GPU, or measure better ones on one.

--check      compile every row for every architecture and fail on spills, missing wgmma or too much memory
--dry-run    list the candidates of a search with what the static check says; needs no GPU
--rows FILE  print what a search wrote as lines for the table in tune/table.py; needs no GPU
(none)       time them on the GPU at hand and write the best to a file that the library picks up
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from . import device_file, search, static_check
from .choice import best_of
from .row import FAMILIES, SHARED_MEMORY, TORCH_TYPES, Architecture, Row, architecture_of
from .table import TABLE


def _rows(wanted: Sequence[str], width: int | None, arch: Architecture, ends: bool) -> list[tuple[Row, int]]:
    """Rows and widths that the options ask for, in the order of the ops: one width, or those of Whisper and,
    with ``ends``, of the rows."""
    found = []
    for op, row in itertools.product(wanted, TABLE):
        if static_check.module_name(row.kernel) != op:
            continue
        if width is None:
            found += [(row, each) for each in static_check.serving_widths(row, arch, ends)]
        elif best_of(TABLE, row.kernel, width, FAMILIES[arch]) is row:
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
    mode.add_argument("--rows", type=Path, metavar="FILE", help="print its rows as lines for table.py")
    parser.add_argument(
        "--op", choices=static_check.MODULES, nargs="+", help="only these ops, in this order (default: all)"
    )
    parser.add_argument("--width", type=_positive, help="only this side width (default: all of Whisper's)")
    known = {kind: [a for a in SHARED_MEMORY if isinstance(a, kind)] for kind in (int, str)}
    device = parser.add_mutually_exclusive_group()
    device.add_argument(
        "--sm", dest="arch", type=int, choices=known[int], help="only this NVIDIA architecture"
    )
    device.add_argument("--arch", choices=known[str], help="only this AMD architecture")
    parser.add_argument("--dtype", choices=sorted(TORCH_TYPES), default="bf16", help="default: bf16")
    parser.add_argument("--batch", type=_positive, default=32, help="batch of the timed case (default: 32)")
    parser.add_argument("--frames", type=_positive, default=1500, help="frames of it (default: 1500)")
    parser.add_argument("--seconds", type=_seconds, default=float("inf"), help="most for one row and width")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = _parser().parse_args(argv)
    if options.rows:
        try:
            print("\n".join(device_file.table_lines(options.rows)))
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
        archs = (options.arch,) if options.arch else tuple(SHARED_MEMORY)
    else:
        archs = (options.arch or (architecture_of() if has_gpu else 90),)
    rows = [
        (row, width, arch)
        for arch in archs
        for row, width in _rows(wanted, options.width, arch, ends=options.check)
    ]
    if not rows:
        ops_named = f"op {' '.join(options.op)} at " if options.op else ""
        _complain(f"no row of the table serves {ops_named}width {options.width}; the reference does")
        return 1
    try:
        if options.check:
            return _check(rows, options.dtype)
        if options.dry_run:
            return _dry_run(rows, options.dtype)
        if options.dtype == "fp32":
            _complain(
                "--dtype fp32 goes with --check and --dry-run: measured rows serve half precision alone"
            )
            return 1
        if not has_gpu:
            _complain("a CUDA device is needed; --check and --dry-run do without")
            return 1
        return _search(rows, options)
    except KeyboardInterrupt:
        _complain("interrupted; a search keeps the rows that it has written")
        return 130


def _check(rows: Sequence[tuple[Row, int, Architecture]], dtype: str) -> int:
    print(static_check.HEADER)
    count, bad = 0, 0
    for row, width, arch in rows:
        for result in static_check.check_row(row, arch, width, dtype):
            print(static_check.line(result), flush=True)
            count, bad = count + 1, bad + bool(result.problem)
    print(f"{count} kernels compiled, {bad} with problems")
    return 1 if bad or not count else 0


def _dry_run(rows: Sequence[tuple[Row, int, Architecture]], dtype: str) -> int:
    for row, width, arch in rows:
        print(f"{row.kernel} width {width} {static_check.name_of(arch)}:", flush=True)
        count = 0
        for candidate, problem in search.checked(row, arch, width, dtype):
            launch = f"{candidate.num_warps} warps {candidate.num_stages} stages"
            print(f"  {candidate.blocks} {launch}  {problem or 'ok'}", flush=True)
            count += not problem
        print(f"  {count} candidates pass", flush=True)
    return 0


def _search(rows: Sequence[tuple[Row, int, Architecture]], options: argparse.Namespace) -> int:
    best = []
    try:
        device_file.prepare()
    except OSError as error:
        _complain(error)
        return 1
    for row, width, _ in rows:
        print(f"{row.kernel} width {width}", flush=True)
        found = search.fastest(row, width, options.dtype, options.batch, options.frames, options.seconds)
        if found is None:
            continue
        best.append(found)
        try:
            print(f"wrote {device_file.write(best)}", flush=True)
        except OSError as error:
            _complain(error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
