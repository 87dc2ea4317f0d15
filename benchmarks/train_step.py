"""``python -m benchmarks.train_step``: a training step of every method, against the encoder's inference.

Each step is timed in turn with the frozen encoder's inference forward at the same precision, in one process,
and with that of Hugging Face's code: the figures that count are their ratios, which other load and clocks
hardly move. A CPU is timed by process-CPU time, with freed memory kept for the next step as in training; a
GPU by its own events. Peak memory is everything of the step: model, batch, gradients, optimizer, activations.
On a GPU it is the allocator's; on a CPU the growth of the resident set of a fresh process whose large blocks
are mapped (glibc keeps freed blocks otherwise).
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from whisper_meft.encoder.dtypes import parse_dtype
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable
from whisper_meft.memory.counting import count_step
from whisper_meft.training.heap import freed_memory_kept

from meft_kernels.ops import self_check

from . import record
from .published import PAPER_GIB
from .steps import (
    MODELS,
    InferenceForward,
    Setting,
    build,
    check_backend,
    config_of,
    methods,
    options_of,
    recognisers,
    training_step,
)
from .timing import summary

GIBIBYTE = 2**30
PAPER_NOTE = (
    "paper: whisper-small, batch 128, fp16, H100 94 GB; its MEFT methods are up to 2.1 x as fast as full "
    "fine-tuning and need up to 73.25 % less memory"
)


# --- measuring ----------------------------------------------------------------------------------------------


def _resident(field: str) -> int | None:
    """VmRSS or VmHWM (its peak) of this process in bytes, None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


def _forget_peak() -> None:
    """Lowers VmHWM to what is resident now; where that is forbidden the peak of the past stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _step_of_a_toy(method: str, setting: Setting) -> None:
    toy = replace(setting, model="toy", batch=1, frames=8, reduction_factor=4, tokens=4)
    try:
        training_step(method, toy)()
    except UserError:  # its options fit the encoder, not the toy
        training_step(method.partition(":")[0], toy)()


def _load_libraries(setting: Setting) -> None:
    """Products in both types of a step, forward and backward, each of which has a workspace of its own. A
    toy's step would compile kernels of a width that nobody times."""
    for dtype in {torch.float32, setting.dtype}:
        x = torch.randn(64, 64, device=setting.device, dtype=dtype, requires_grad=True)
        (x @ x).sum().backward()


def probe(method: str, setting: Setting) -> dict:
    """Memory, gradients and parameters of a method; on a CPU the peak is only right in a fresh process.

    Returns:
        ``peak_bytes`` (None where it cannot be read), ``trainable`` and ``parameters`` (numbers of elements),
        and what :meth:`steps.TrainingStep.gradient_norms` returns.
    """
    on_gpu = torch.device(setting.device).type == "cuda"
    # What a first step loads and keeps (libraries, code pages, workspaces) is no memory of the method.
    if on_gpu:
        _load_libraries(setting)
    else:
        _step_of_a_toy(method, setting)
    _release()
    before = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS")
    step = training_step(method, setting)
    norms = step.gradient_norms()  # also makes the optimizer's state: from now on a step is like the next
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    step()
    after = torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")
    return {
        "peak_bytes": None if after is None else after - before,
        "trainable": sum(p.numel() for p in step.trained.values()),
        "parameters": sum(p.numel() for p in step.model.parameters()),
        **norms,
    }


def probe_in_fresh_process(method: str, setting: Setting) -> dict:
    """:func:`probe` on a CPU, in a process of its own.

    Raises:
        UserError: the process failed; the message is its own. MemoryError: it was killed.
    """
    # Fixed, or else glibc raises the threshold with every large block freed and keeps such blocks.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    values = vars(setting) | {"dtype": str(setting.dtype).removeprefix("torch.")}
    command = [sys.executable, "-m", "benchmarks.train_step", "--probe", method]
    command += ["--cuda_graphs"] * values.pop("cuda_graphs")
    command += [f"--{name}={value}" for name, value in values.items()]
    done = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == -9:
        raise MemoryError
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(said[-1].removeprefix("benchmarks.train_step: "))
    return json.loads(done.stdout.splitlines()[-1])


def counted(method: str, setting: Setting) -> int | None:
    """The peak that :func:`whisper_meft.memory.counting.count_step` gives for the same step without running
    it, in bytes; None where it cannot be counted, as for MeZO, whose step is another one."""
    if options_of(method)["method"] == "mezo":
        return None
    kind, place = torch.device(setting.device).type, replace(setting, device="cpu")
    config = setting.config()

    def inputs() -> dict[str, torch.Tensor]:
        features = torch.empty(setting.batch, config.num_mel_bins, 2 * setting.frames)
        labels = (setting.batch, setting.tokens) if setting.transcribes else (setting.batch,)
        given = {"input_features": features, "labels": torch.zeros(labels, dtype=torch.long)}
        return given | {"decoder_input_ids": given["labels"].clone()} if setting.transcribes else given

    try:
        return count_step(
            lambda: build(method, place),
            inputs,
            hidden_size=config.d_model,
            device_type=kind,
            capability=torch.cuda.get_device_capability() if kind == "cuda" else None,
            backend=setting.backend,
            autocast=None if setting.dtype == torch.float32 else setting.dtype,
        ).peak
    except Exception as error:  # the measured peak stands without it
        print(f"the memory of {method} is not counted: {one_line(error)}", file=sys.stderr)
        return None


def _seconds(run: Callable[[], None], device: str) -> float:
    """Seconds of one call: events on a GPU, process-CPU time on a CPU."""
    if torch.device(device).type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def clock(
    step: Callable[[], None],
    forward: Callable[[], None],
    hugging_face: Callable[[], None],
    device: str,
    repeats: int,
) -> dict:
    """Times a step and two forwards of the encoder in turn, after two of each to warm up (one on a CPU).

    Returns:
        ``step_ms``, ``encoder_ms`` and ``hugging_face_ms``, each ``median``, ``p20`` and ``p80``, and the
        step's medians over the others': ``ratio`` and ``ratio_to_hugging_face``.
    """
    turns = hugging_face, forward, step
    on_cpu = torch.device(device).type == "cpu"
    with freed_memory_kept() if on_cpu else contextlib.nullcontext():  # as training does
        for _ in range(1 if on_cpu else 2):
            for run in turns:
                run()
        rounds = [[1e3 * _seconds(run, device) for run in turns] for _ in range(repeats)]
    theirs, ours, steps = (summary(column) for column in zip(*rounds))
    return {
        "step_ms": steps,
        "encoder_ms": ours,
        "hugging_face_ms": theirs,
        "ratio": steps["median"] / ours["median"],
        "ratio_to_hugging_face": steps["median"] / theirs["median"],
    }


def verdict(figures: dict) -> str:
    """``"ok"``, or why the figures of a row mean nothing: it did not train."""
    for name in ("loss", "head_gradient_norm", "gradient_norm"):
        value = figures[name]
        if value is not None and not abs(value) < float("inf"):
            return f"invalid: {name} is {value}"
        if name != "loss" and value == 0:
            return f"invalid: {name} is zero"
    return "ok"


def _out_of_memory(error: BaseException) -> bool:
    told = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(t in str(error) for t in told)


def measure(method: str, setting: Setting, repeats: int, count: bool = True) -> dict:
    """One row of the table. Whatever goes wrong with the method is said in ``status``.

    Args:
        repeats: timed steps; with 0 nothing is timed. count: whether the memory is counted too.

    Returns:
        ``method``, ``status`` (``"ok"``, ``"invalid: ..."``, ``"out of memory"``, ``"failed: ..."``),
        ``counted_bytes`` (see :func:`counted`), ``refused_kernels`` (those that failed their check so far in
        this process, so that the reference took their place), and as far as it came what :func:`probe` and
        :func:`clock` return.
    """
    row = {"method": method, "status": "ok", "counted_bytes": counted(method, setting) if count else None}
    on_cpu = torch.device(setting.device).type == "cpu"
    try:
        row |= probe_in_fresh_process(method, setting) if on_cpu else probe(method, setting)
        row["status"] = verdict(row)
        _release()
        if repeats:
            forwards = InferenceForward(setting), InferenceForward(setting, hugging_face=True)
            row |= clock(training_step(method, setting), *forwards, setting.device, repeats)
    except Exception as error:  # one method must not cost the others their rows
        row["status"] = "out of memory" if _out_of_memory(error) else f"failed: {one_line(error)}"
    _release()  # after the except clause: the error's frames hold tensors
    row["refused_kernels"] = self_check.refused()
    return row


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the table ----------------------------------------------------------------------------------------------


HEADER = ("method", "step ms", "20-80 %", "/ encoder", "/ HF encoder", "x full", "peak GiB", "counted")
HEADER += ("less than full", "paper GiB", "trainable", "%", "grad norm")


def compared(rows: list[dict]) -> Iterator[tuple[dict, float | None, float | None]]:
    """Each row with how many times as fast as full fine-tuning it is, and by which share of its memory it is
    below; None where that was not measured."""
    wholly = ("full", "full:target=both")
    full = next((row for row in rows if row["method"] in wholly and row["status"] == "ok"), {})
    for row in rows:
        faster = full["ratio"] / row["ratio"] if "ratio" in full and "ratio" in row else None
        known = row.get("peak_bytes") and full.get("peak_bytes")
        yield row, faster, 1 - row["peak_bytes"] / full["peak_bytes"] if known else None


def cells(row: dict, faster: float | None, less: float | None) -> tuple[str, ...]:
    """A row of :func:`compared` as text under ``HEADER``; two cells if it failed."""
    if row["status"] != "ok":
        return row["method"], row["status"]
    ms, norm = row.get("step_ms"), row["gradient_norm"]
    paper = PAPER_GIB.get(row["method"].removeprefix("published_"))

    def size(nbytes: int | None) -> str:
        return "-" if nbytes is None else f"{nbytes / GIBIBYTE:.2f}"

    return (
        row["method"],
        f"{ms['median']:.1f}" if ms else "-",
        f"{ms['p20']:.1f}-{ms['p80']:.1f}" if ms else "-",
        f"{row['ratio']:.2f}" if ms else "-",
        f"{row['ratio_to_hugging_face']:.2f}" if "ratio_to_hugging_face" in row else "-",
        "-" if faster is None else f"{faster:.2f}",
        size(row["peak_bytes"]),
        size(row["counted_bytes"]),
        "-" if less is None else f"{less:.0%}",
        "-" if paper is None else f"{paper:.2f}",
        f"{row['trainable']:,d}",
        f"{100 * row['trainable'] / row['parameters']:.2f}",
        f"{row['head_gradient_norm'] if norm is None else norm:.1e}",
    )


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [HEADER, *(cells(*row) for row in compared(rows))]
    first = max(len(line[0]) for line in lines)
    widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(1, len(HEADER))]
    text = []
    for line in lines:
        rest = line[1:] if len(line) == 2 else [f"{cell:>{width}}" for cell, width in zip(line[1:], widths)]
        text.append("  ".join([f"{line[0]:<{first}}", *rest]))
    return "\n".join(text)


# --- the command --------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="A whole training step of every method against the frozen encoder's inference forward.",
    )
    parser.add_argument("--model", default="small", help=f"sizes of the encoder: {', '.join(MODELS)}")
    parser.add_argument("--batch", type=int, default=None, help="clips (default: 128 on a GPU, 2 on a CPU)")
    parser.add_argument("--frames", type=int, help="encoder frames of a clip (default: 1500, see --quick)")
    parser.add_argument(
        "--methods",
        default="all",
        help=f"all, or some of {','.join(methods())}; with options as in lst:saved_activations=fp8",
    )
    parser.add_argument(
        "--task",
        choices=("classify", "transcribe"),
        default="classify",
        help="what is trained: a classifier, or a recogniser, against the frozen encoder's and decoder's "
        "forward; all methods are then the side networks in every placement, full and lora",
    )
    parser.add_argument("--tokens", type=int, default=64, help="of each transcript (default: 64)")
    parser.add_argument("--reduction_factor", type=int, default=8, help="of the side networks (default: 8)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on a GPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--backend", choices=("auto", "reference", "native", "triton"), default="auto")
    parser.add_argument("--cuda_graphs", action="store_true", help="capture the steps (on a GPU)")
    parser.add_argument(
        "--repeats", type=int, help="timed steps, 0: memory alone (default: 10 on a GPU, 3 on a CPU)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 timed steps, on a CPU 300 frames if no other number is given; recorded in results/quick",
    )
    parser.add_argument("--no-count", action="store_true", help="measure the memory, do not count it too")
    parser.add_argument("--output", type=Path, help="folder of the record (default: benchmarks/results)")
    parser.add_argument("--probe", metavar="METHOD", help=argparse.SUPPRESS)
    return parser


def _setting(options: argparse.Namespace) -> Setting:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, this machine has none: use --device cpu")
    on_cpu = device == "cpu"
    if options.cuda_graphs and on_cpu:
        raise UserError("cuda_graphs needs --device cuda, got cpu")
    check_backend(options.backend, device)
    return Setting(
        model=options.model,
        batch=(2 if on_cpu else 128) if options.batch is None else options.batch,
        frames=(300 if options.quick and on_cpu else 1500) if options.frames is None else options.frames,
        reduction_factor=options.reduction_factor,
        dtype=parse_dtype(options.dtype) or (torch.float32 if on_cpu else torch.bfloat16),
        device=device,
        backend=options.backend,
        cuda_graphs=options.cuda_graphs,
        task=options.task,
        tokens=options.tokens,
    )


def described(setting: Setting) -> str:
    """The setting in one line."""
    dtype = str(setting.dtype).removeprefix("torch.")
    return (
        f"whisper-{setting.model}, batch {setting.batch}, {setting.frames} frames, "
        f"{f'{setting.tokens} tokens, ' * setting.transcribes}{dtype}, reduction factor "
        f"{setting.reduction_factor}, backend {setting.backend}{', CUDA graphs' * setting.cuda_graphs}"
    )


def _chosen(names: str, setting: Setting) -> list[str]:
    every = recognisers() if setting.transcribes else methods()
    chosen = every if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        config_of(name, setting)
    return chosen


def run(setting: Setting, names: Sequence[str], repeats: int, count: bool = True) -> Iterator[dict]:
    """The rows of the methods, one by one as they are measured."""
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        yield measure(name, setting, repeats, count)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 1 if a row is invalid or failed, or none can be used.

    Rows of which none can be used are printed, not recorded.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    rows, path, interrupted = [], None, False
    try:
        setting = _setting(options)
        if options.probe:
            print(json.dumps(probe(options.probe, setting)))
            return 0
        names = _chosen(options.methods, setting)
        repeats = options.repeats
        if repeats is None:
            repeats = 2 if options.quick else 3 if setting.device == "cpu" else 10
        if repeats < 0:
            raise UserError(f"repeats must be 0 (memory alone) or more, got {repeats}")
        shapes = vars(setting) | {"repeats": repeats}
        command = " ".join(["python -m benchmarks.train_step", *argv])
        output = options.output or (record.RESULTS / "quick" if options.quick else record.RESULTS)
        check_writable(output / "train_step.json")
        for row in run(setting, names, repeats, not options.no_count):
            rows.append(row)
            if all(row["status"] != "ok" for row in rows):
                continue
            path = record.write(  # after each row: a run cut short keeps its rows
                "train_step_transcribe" if setting.transcribes else "train_step",
                rows,
                command=command,
                shapes=shapes,
                directory=output,
                device=setting.device,
                path=path,
            )
    except UserError as error:
        print(f"benchmarks.train_step: {one_line(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        if not options.probe or not _out_of_memory(error):
            raise
        print("benchmarks.train_step: out of memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        interrupted = True
        print("benchmarks.train_step: interrupted", file=sys.stderr)
        if not rows:
            return 130
    print(f"{record.environment(setting.device)['device']}: {described(setting)}")
    print(table(rows))
    print(PAPER_NOTE)
    if path is None:
        print("benchmarks.train_step: no method could be measured, nothing is recorded", file=sys.stderr)
    else:
        print(f"wrote {os.path.relpath(path)}")
    if interrupted:
        return 130
    return 1 if path is None or any(row["status"].startswith(("invalid", "failed")) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
