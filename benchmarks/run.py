"""``python -m benchmarks.run``: every op and side network, forward, backward and both, beside its peers.

Peers take turns in one run: ``eager`` (the reference's definition; under autocast for half precision),
``compiled`` (torch.compile of it), ``block`` (the nearest published building block), ``ops:BACKEND`` (ours)
and, with ``--base REV``, ``ops:BACKEND@REV`` (ours at another revision, in a process of its own). Beside
``relu_attention`` stand the other forms of UniPT's attention, ``FORM:BACKEND``: they are other functions, and
their ratios are to the exact one's eager too.

With ``--states FILE`` (of ``benchmarks.recordings``) every case has the sizes of recorded hidden states and
is measured twice, on random inputs and on those: how much a kernel leaves out depends on the data.

An op that fails its check against float64 is not measured: one line says so and the exit status is 1. A share
is the least time that the bytes moved ("bw") or the matrix products ("mm") need at the copy bandwidth and the
matrix-product rate measured in this run, over the time taken. Memory is what one forward and backward take
beside their inputs: the peak, and what is kept from the forward for the backward.

The record's figures are ``ceilings``, ``memory_counter``, ``base`` (commit or None), ``notes`` (peer and
what it is, or why it is not there) and ``rows``: op, case, with ``--states`` ``inputs`` ("random" or
"real"), side, width, layers, peer, direction, seconds (``median``, ``p20``, ``p80``), ``host_median``
(CUDA: launching), ``rounds``, ``bytes``, ``flops``, ``bandwidth_share``, ``matmul_share``, ``bound``,
``ratio_to_eager`` (below 1 is faster), and in bytes ``peak`` and ``kept``.
"""

import argparse
import functools
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch
from whisper_meft import files
from whisper_meft.errors import UserError, one_line

from meft_kernels import ops
from meft_kernels.testing import SIDE_NETWORKS, AnyCase, real_case

from . import ceilings, contenders, peers, record, recordings, revisions
from .timing import DIRECTIONS, summary

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# By value, for runs that are cut off: what fusion helps most, then the rest.
_FIRST = ("relu_attention", "ladder", "guidance", "LST")
EVERYTHING = (*_FIRST, *(op for op in (*ops.OP_NAMES, *SIDE_NETWORKS) if op not in _FIRST))
PEERS = ("eager", "compiled", "block", "forms")


@dataclass
class Run:
    """What is measured how, and what came out."""

    device: torch.device
    dtype: torch.dtype
    backends: list[str]
    peers: list[str]
    repeats: int
    warm_up: int
    compiled: set[str]
    ceilings: ceilings.Ceilings
    revision: revisions.Revision | None = None
    rows: list[dict] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def measure(self, case: AnyCase, change: Callable | None = None) -> list[dict]:
        """Rows of one case; peers that cannot run leave a note, wrong ones a line in ``failed``. ``change``:
        of the inputs, see ``contenders.Inputs``."""
        good = [backend for backend in self.backends if self._passes(case, backend)]
        if not good:
            return []
        made = list(self._contenders(case, good, change))
        seconds: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in made}
        for index in range(self.repeats):
            turn = index % max(1, len(made))
            for contender in made[turn:] + made[:turn]:
                try:
                    seconds[contender.name].append(contender.round(index))
                except Exception as error:
                    made = [other for other in made if other is not contender]
                    self._missing(contender.name, case, error)
        rows = []
        for contender in made:
            memory = {}
            try:
                memory = contender.memory()
            except Exception as error:  # the time stands without it
                self._missing(f"memory of {contender.name}", case, error)
            rows += self._rows(case, contender.name, seconds[contender.name], memory)
        if self.revision:
            self.revision.drop()
        eager = {row["direction"]: row["median"] for row in rows if row["peer"] == "eager"}
        for row in rows:
            before = eager.get(row["direction"])
            row["ratio_to_eager"] = row["median"] / before if before else None
        self.rows += rows
        return rows

    def _passes(self, case: AnyCase, backend: str) -> bool:
        try:
            contenders.check(case, backend, self.dtype, self.device)
        except AssertionError as error:
            reason = f"it is wrong, {error}"
        except Exception as error:  # a kernel that does not compile here, say: the other ops go on
            reason = one_line(error)
        else:
            return True
        self._fail(f"{case.op} in backend {backend} is not measured: {reason}")
        return False

    def _fail(self, line: str) -> None:
        self.failed.append(line)
        print(f"benchmarks.run: {line}", file=sys.stderr, flush=True)

    def _contenders(self, case: AnyCase, backends: list[str], change: Callable | None) -> Iterator:
        try:
            inputs = contenders.Inputs(case, self.dtype, self.device, change)
        except torch.OutOfMemoryError as error:
            self._missing("inputs", case, error)
            return
        makers = {}
        if "eager" in self.peers:
            makers["eager"] = lambda: peers.eager(case, self.dtype, self.device)
        if "compiled" in self.peers and case.op in self.compiled:
            makers["compiled"] = lambda: peers.compiled(case, self.dtype, self.device)
        if "block" in self.peers and (found := peers.block(case, self.dtype)):
            makers["block"] = lambda: found
            self.notes[f"block {case.op}"] = found.note
        for backend in backends:
            makers[f"ops:{backend}"] = lambda backend=backend: peers.ours(case, backend)
            for name in peers.forms(case) if "forms" in self.peers else ():
                makers[f"{name}:{backend}"] = functools.partial(peers.other_form, case, name, backend)
        for name, make in makers.items():
            try:
                yield contenders.Local(make(), inputs, self.warm_up)
            except Exception as error:  # a row that says why, and the table goes on
                self._missing(name, case, error)
        for backend in backends if self.revision else ():
            try:
                where = self.dtype, self.device, self.warm_up
                yield revisions.Remote(self.revision, case, backend, *where)
            except UserError as error:
                self._missing(f"ops:{backend}@{self.revision.name}", case, error)

    def _missing(self, name: str, case: AnyCase, error: Exception) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        reason = "out of memory" if out_of_memory else one_line(error)
        if len(reason) > 200:
            reason = f"{reason[:200]}..."
        self.notes[f"{name} {case.name}"] = reason
        if name.startswith("ops") and "@" not in name and not out_of_memory:
            self._fail(f"{name} {case.name}: {reason}")

    def _rows(
        self, case: AnyCase, peer: str, rounds: list[dict[str, float]], memory: dict[str, int]
    ) -> Iterator[dict]:
        _, worked = peers.forms(case).get(peer.rpartition(":")[0], (None, case))
        costs = [(worked or case).cost(self.dtype, backward) for backward in (False, True)]
        if worked is None:
            costs = [replace(cost, flops=0) for cost in costs]
        work = {"forward": costs[:1], "backward": costs[1:], "both": costs}
        for direction in DIRECTIONS:
            if direction not in rounds[0]:
                continue
            times = summary([seconds[direction] for seconds in rounds])
            moved = sum(cost.bytes for cost in work[direction])
            flops = sum(cost.flops for cost in work[direction])
            time = max(times["median"], 1e-12)
            row = {
                "op": case.op,
                "case": case.name,
                "side": case.side,
                "width": case.width,
                "layers": case.layers,
                "peer": peer,
                "direction": direction,
                **times,
                "rounds": len(rounds),
                "bytes": moved,
                "flops": flops,
                "bandwidth_share": moved / self.ceilings.copy_bandwidth / time,
                "matmul_share": flops / self.ceilings.matmul_rate / time,
                "bound": self.ceilings.floor(moved, flops)[1],
            }
            if "host" in rounds[0] and direction == ("both" if "both" in rounds[0] else "forward"):
                row["host_median"] = summary([seconds["host"] for seconds in rounds])["median"]
            if memory and direction != "backward":
                row["peak"] = memory["forward_peak" if direction == "forward" else "peak"]
                row["kept"] = memory["kept"]
            yield row


# --- the table ----------------------------------------------------------------------------------------------

HEADER = (
    f"{'':<24}{'forward':>10}{'backward':>10}{'both ms, 20-80 %':>25}{'vs eager':>9}"
    f"{'share fwd':>10}{'bwd':>8}{'peak MiB':>9}{'kept MiB':>9}"
)


def _milliseconds(seconds: float) -> str:
    """Four significant digits or so."""
    value = seconds * 1e3
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def table(case: AnyCase, rows: list[dict], costs: Sequence) -> list[str]:
    """Lines for one case: a title, then one line for each peer."""
    work = ", ".join(
        f"{name} {cost.flops / 1e9:.3g} GFLOP {cost.bytes / 1e6:.3g} MB"
        for name, cost in zip(("forward", "backward"), costs)
        if cost.bytes
    )
    lines = [f"{case.name}: {work}"]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        by = {row["direction"]: row for row in rows if row["peer"] == peer}
        both = by.get("both", by["forward"])

        def milliseconds(direction: str, by=by) -> str:
            return _milliseconds(by[direction]["median"]) if direction in by else "-"

        def share(direction: str, by=by) -> str:
            if direction not in by:
                return "-"
            row = by[direction]
            kind, name = ("matmul", "mm") if row["bound"] == "compute" else ("bandwidth", "bw")
            return f"{row[f'{kind}_share']:.0%} {name}"

        middle, low, high = (_milliseconds(both[key]) for key in ("median", "p20", "p80"))
        spread = f"{middle} [{low}-{high}]"
        ratio = "-" if both["ratio_to_eager"] is None else f"{both['ratio_to_eager']:.2f}"
        memory = [f"{both[key] / 2**20:.1f}" if key in both else "-" for key in ("peak", "kept")]
        lines.append(
            f"  {peer:<22}{milliseconds('forward'):>10}{milliseconds('backward'):>10}{spread:>25}{ratio:>9}"
            f"{share('forward'):>10}{share('backward'):>8}{memory[0]:>9}{memory[1]:>9}"
        )
    return lines


# --- the command --------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks.run",
        description=__doc__.partition("\n\nThe record's")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", choices=EVERYTHING, metavar="OP", help="default: all of them")
    parser.add_argument("--width", nargs="+", type=_positive, help="the encoder's (default: 768)")
    side = parser.add_mutually_exclusive_group()
    side.add_argument("--reduction_factor", nargs="+", type=_positive, help="width over side (default: 8)")
    side.add_argument("--side", nargs="+", type=_positive, help="the side network's width instead")
    parser.add_argument("--batch", type=_positive, help="default: 128 on CUDA, 2 on a CPU")
    parser.add_argument("--frames", type=_positive, help="of each utterance (default: 1500)")
    parser.add_argument("--layers", type=_positive, help="of the encoder (default: 12)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--backend", nargs="+", choices=ops.BACKENDS[1:], help="default: all that work here")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all, see --quick")
    parser.add_argument(
        "--compile",
        nargs="*",
        choices=EVERYTHING,
        metavar="OP",
        help="the ops whose peer `compiled` is measured (default: all). Compiling the loop over layers of "
        "relu_attention, guidance or a side network takes minutes",
    )
    parser.add_argument(
        "--base", metavar="REV", help="a git revision to measure in the same run; native: it is built first"
    )
    parser.add_argument(
        "--states",
        type=Path,
        help="recorded hidden states to measure on beside random ones, with their sizes",
    )
    parser.add_argument("--repeats", type=_positive, help="rounds (default: 30 on CUDA, 7 on a CPU)")
    parser.add_argument("--threads", type=_positive, default=1, help="on a CPU (default: 1)")
    parser.add_argument("--output", type=Path, help="folder of the record (default: benchmarks/results)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, 3 rounds, no torch.compile of side networks; a try, recorded in results/quick",
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's options, with what was not given filled in for the machine at hand.

    Raises:
        UserError: an unknown option, or a value that is not accepted here.
    """
    options = _parser().parse_args(argv)
    if options.states is not None:
        own = [name for name in ("width", "batch", "frames", "layers", "base") if getattr(options, name)]
        if own:
            raise UserError(f"--{own[0]} does not go with --states, whose sizes are the recorded ones")
        if asked := recordings.OF_THE_DECODER & {*(options.op or ())}:
            raise UserError(f"--op {min(asked)} does not go with --states: it reads no state of the encoder")
        options.op = options.op or [op for op in EVERYTHING if op not in recordings.OF_THE_DECODER]
        options.states = recordings.valid_states(*recordings.read_states(options.states))
        batch, frames, width = options.states[0].shape
        options.width, options.batch, options.frames = [width], batch, frames
        options.layers = len(options.states) - 1
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device must be cpu here, got cuda: there is no CUDA device")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device == "cuda"
    defaults = {
        "op": list(EVERYTHING),
        "width": [768],
        "batch": 128 if on_gpu else 2,
        "frames": 1500,
        "layers": 12,
        "dtype": "bf16" if on_gpu else "fp32",
        "peers": list(PEERS),
        "repeats": 30 if on_gpu else 7,
        "output": record.RESULTS / "quick" if options.quick else record.RESULTS,
    }
    if options.quick:
        defaults |= {"width": [384], "batch": 1, "frames": 300, "layers": 3, "repeats": 3}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.compile is None:
        options.compile = [op for op in EVERYTHING if not (options.quick and op in SIDE_NETWORKS)]
    available = peers.backends(torch.device(options.device))
    for backend in options.backend or ():
        if backend not in available:
            names = ", ".join(available)
            raise UserError(f"--backend on {options.device} must be one of {names} here, got {backend}")
    options.backend = options.backend or available
    return options


def cases(options: argparse.Namespace) -> list[AnyCase]:
    """The cases that the options ask for.

    Raises:
        UserError: a side network at a side that no reduction factor gives.
    """
    found = []
    for width in options.width:
        factors = options.reduction_factor or [8]
        sides = options.side or [width // factor for factor in factors]
        for side in sides:
            if side < 1:
                raise UserError(f"--reduction_factor must be at most --width ({width}), got {max(factors)}")
            for op in options.op:
                try:
                    found.append(real_case(op, options.batch, options.frames, width, side, options.layers))
                except ValueError as error:
                    raise UserError(str(error)) from error
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        options = parse(argv)
        with ExitStack() as stack:
            return _run(options, stack, shlex.join(["python", "-m", "benchmarks.run", *argv]))
    except UserError as error:
        print(f"benchmarks.run: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.run: interrupted; the record holds the cases before", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, stack: ExitStack, command: str) -> int:
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    wanted = cases(options)
    files.check_writable(options.output / "run.json")
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    notes = {}
    chosen = list(options.peers)
    if "compiled" in chosen and (reason := peers.why_no_compiler(device)):
        chosen.remove("compiled")
        notes["compiled"] = reason
    revision = None
    if options.base:
        native = "native" in options.backend
        revision = stack.enter_context(revisions.open_revision(options.base, native))
    run = Run(
        device=device,
        dtype=dtype,
        backends=options.backend,
        peers=chosen,
        repeats=options.repeats,
        warm_up=1 if options.quick else 3,
        compiled=set(options.compile),
        ceilings=ceilings.measure(dtype, device, options.quick),
        revision=revision,
        notes=notes,
    )
    if options.quick and "compiled" in chosen and set(options.op) & set(SIDE_NETWORKS) - run.compiled:
        notes["compiled side networks"] = "not with --quick, it takes minutes"
    top = run.ceilings
    where = record.environment(device)["device"]
    print(
        f"{where}, torch {torch.__version__}, {options.dtype}"
        + (f", {options.threads} threads, process-CPU time" if device.type == "cpu" else "")
        + f"\nmeasured here: copy {top.copy_bandwidth / 1e9:.3g} GB/s, matrix product"
        f" {top.matmul_rate / 1e12:.3g} TFLOP/s\n\n{HEADER}"
    )
    counter = "CUDA allocator" if device.type == "cuda" else "CPU allocations, as torch profiles them"
    path = None
    changes = {"random": None}
    if options.states is not None:
        changes["real"] = lambda case: functools.partial(recordings.on_states, case, options.states)
    for case, (inputs, change) in itertools.product(wanted, changes.items()):
        rows = run.measure(case, change and change(case))
        if not rows:
            continue
        if options.states is not None:
            print(f"{inputs} inputs:")
            for row in rows:
                row["inputs"] = inputs
        print("\n".join(table(case, rows, [case.cost(dtype), case.cost(dtype, True)])), flush=True)
        # After each case, so that a run that is cut off leaves what it has.
        path = record.write(
            "run" if options.states is None else "run_states",
            {
                "ceilings": top.as_dict(),
                "memory_counter": counter,
                "base": revision.commit if revision else None,
                "notes": run.notes,
                "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                "rows": run.rows,
            },
            command=command,
            shapes={
                "batch": options.batch,
                "frames": options.frames,
                "layers": options.layers,
                "dtype": dtype,
            },
            directory=options.output,
            device=device,
            path=path,
        )
    print(f"\nmemory: {counter}")
    if run.notes:
        print("\n".join(f"{name}: {note}" for name, note in run.notes.items()))
    if path:
        print(f"\nwrote {path}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
