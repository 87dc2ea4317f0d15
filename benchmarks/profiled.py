"""``python -m benchmarks.profiled``: one training step of each method under the profiler.

Beside the kernels that really ran stand those that ``benchmarks.launches`` counts without a GPU. "kernels" is
the time in which at least one kernel, copy or fill ran, "wall" that of the same step without the profiler,
the median of several; what lies between them is the host's. "host" is what the host took to hand the step
over. A kernel that fails its check on the device is named in the record and the reference takes its place.

On a CPU, where it serves for trying the benchmark, operators stand for kernels.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable

from meft_kernels.ops import self_check
from meft_kernels.ops.backends import HAS_TRITON

from . import launches, record
from .steps import Setting, TrainingStep, config_of, options_of, training_step
from .timing import summary

WARM_UP, TIMED = 2, 5
SHOWN = 25  # kernels in the record, by time
NAME = 120  # characters of a kernel's name


def _busy(spans: Iterable[tuple[float, float]]) -> float:
    """How much the spans (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarise(events: Iterable[Any], on_gpu: bool) -> dict[str, Any]:
    """What a profile says of one step.

    Args:
        events: of torch's profiler. on_gpu: take those of the device, else operators that call no others.

    Returns:
        ``kernels``, their number without copies and fills; ``kernel_seconds``, see the module; ``top``, the
        dearest by name with ``count`` and ``seconds``.
    """
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    found = [e for e in events if e.device_type == wanted and not getattr(e, "is_user_annotation", False)]
    if not on_gpu:
        found = [e for e in found if not e.cpu_children]
    by_name: dict[str, list[float]] = {}
    for event in found:
        by_name.setdefault(event.name, []).append((event.time_range.end - event.time_range.start) / 1e6)
    dearest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    return {
        "kernels": sum(not event.name.startswith(("Memcpy", "Memset")) for event in found),
        "kernel_seconds": _busy((e.time_range.start, e.time_range.end) for e in found) / 1e6,
        "top": [{"name": n[:NAME], "count": len(s), "seconds": sum(s)} for n, s in dearest],
    }


def _timed(step: TrainingStep) -> tuple[float, float]:
    """Wall seconds of a step, and those until the host had handed it over."""
    on_gpu = torch.device(step.setting.device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    handed_over = time.perf_counter() - start
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, handed_over


def profile(method: str, setting: Setting) -> dict[str, Any]:
    """Times a method's step, then profiles one.

    Returns:
        ``wall`` and ``host`` (seconds: ``median``, ``p20``, ``p80``), and what :func:`summarise` does.
    """
    on_gpu = torch.device(setting.device).type == "cuda"
    step = training_step(method, setting)
    for _ in range(WARM_UP):  # kernels are compiled and checked
        step()
    wall, host = zip(*(_timed(step) for _ in range(TIMED)))
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CUDA if on_gpu else kind.CPU]) as profiler:
        _timed(step)
    return {"wall": summary(wall), "host": summary(host), **summarise(profiler.events(), on_gpu)}


def counted(method: str, setting: Setting) -> dict[str, Any] | None:
    """What ``benchmarks.launches`` counts for the same step on a GPU; None where it cannot."""
    if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    options = {k: v for k, v in vars(config_of(method, setting)).items() if k != "backbone_dtype"}
    name = options_of(method)["method"]
    sizes = setting.config()
    found = launches.count_launches(sizes, name, setting.batch, dtype=setting.dtype, repeats=0, **options)
    return {"phases": found.to_dict(), "triton": found.triton_launches}


def measure(method: str, setting: Setting) -> dict[str, Any]:
    """One row. Whatever goes wrong with the method is said in ``status``."""
    row: dict[str, Any] = {"method": method, "status": "ok", "counted": None}
    try:
        row |= profile(method, setting)
    except Exception as error:  # one method must not cost the others their rows
        row["status"] = f"failed: {one_line(error)}"
    row["refused_kernels"] = self_check.refused()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def kernels_counted(row: dict[str, Any]) -> int | None:
    """The kernels of a row's step by ``benchmarks.launches``."""
    phases = row["counted"] and row["counted"]["phases"]
    return phases and sum(phase["kernels"] for phase in phases.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each method, and under it its dearest kernels."""
    lines = [f"{'method':<16}{'wall ms':>9}{'kernels ms':>12}{'host ms':>9}{'kernels':>9}{'counted':>9}"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['method']:<16}{row['status']}")
            continue
        times = row["wall"]["median"], row["kernel_seconds"], row["host"]["median"]
        wall, kernels, host = (f"{1e3 * value:.1f}" for value in times)
        count = kernels_counted(row)
        shown = "-" if count is None else count
        lines.append(f"{row['method']:<16}{wall:>9}{kernels:>12}{host:>9}{row['kernels']:>9}{shown:>9}")
        for each in row["top"][:8]:
            lines.append(f"  {1e3 * each['seconds']:9.2f} ms {each['count']:>5} x {each['name'][:80]}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profiled", description=__doc__.partition("\n\nBeside")[0]
    )
    parser.add_argument("--model", default="small", help="sizes of the encoder, see benchmarks.train_step")
    parser.add_argument("--batch", type=int, default=128, help="clips per step")
    parser.add_argument("--frames", type=int, default=1500, help="encoder frames of a clip")
    parser.add_argument("--methods", default="lst,unipt,sherl", help="names as for benchmarks.train_step")
    parser.add_argument("--reduction_factor", type=int, default=8, help="of the side networks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", help="folder of the record (default: benchmarks/results)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 1 if a method failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    try:
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device cuda was asked for, this machine has none: use --device cpu")
        setting = Setting(
            model=options.model,
            batch=options.batch,
            frames=options.frames,
            reduction_factor=options.reduction_factor,
            dtype=torch.bfloat16,
            device=options.device,
        )
        methods = options.methods.split(",")
        for name in methods:
            if config_of(name, setting) is None:
                raise UserError(f"methods must be some of whisper_meft's own, got {name!r}")
        directory = Path(options.output or record.RESULTS)
        check_writable(directory / "profiled.json")
        command = " ".join(["python -m benchmarks.profiled", *argv])
        place = {
            "command": command,
            "shapes": vars(setting),
            "directory": directory,
            "device": options.device,
        }
        rows, path = [], None
        for name in methods:
            rows.append(measure(name, setting))
            path = record.write("profiled", rows, **place, path=path)
        for row in rows:  # what needs no device comes last
            row["counted"] = counted(row["method"], setting)
            record.write("profiled", rows, **place, path=path)
    except UserError as error:
        print(f"benchmarks.profiled: {one_line(error)}", file=sys.stderr)
        return 1
    print(table(rows))
    print(f"wrote {os.path.relpath(path)}")
    return 1 if any(row["status"] != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
