"""``python -m benchmarks.memory``: what a training step of each method takes of a card, counted without one.

The published structures run as published (float32 weights under fp16 autocast), with the paper's figures
beside them; our methods hold the frozen weights in half precision. "in use" is what is alive at once,
"reserved" what torch's allocator takes from the card for it. A CUDA context adds about half a GiB.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from whisper_meft import MeftConfig
from whisper_meft.encoder.sizes import WHISPER_SIZES, whisper_config
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable
from whisper_meft.memory.counting import MemoryCount, count_step, estimate

from . import published, record

OURS = ("lst", "unipt", "sherl")
SAVED = ("exact", "fp8")
CLASSES = 6
CAPABILITY = (9, 0)
BACKENDS = ("auto", "reference", "triton")  # those of a GPU


def count_published(method: str, model: str, batch: int) -> MemoryCount:
    """A published structure in float32 under fp16 autocast, as its training scripts run it."""
    config = whisper_config(model, num_labels=CLASSES)

    def build() -> nn.Module:
        return published.METHODS[method](config)

    def inputs() -> dict[str, torch.Tensor]:
        shape = batch, config.num_mel_bins, 2 * config.max_source_positions
        return {"input_features": torch.zeros(shape), "labels": torch.zeros(batch, dtype=torch.long)}

    return count_step(build, inputs, hidden_size=config.d_model, autocast=torch.float16)


def cases(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """(name, function of model and batch that counts) of every row."""
    rows = []
    for method in options.published:
        rows.append((f"published {method}", lambda batch, m=method: count_published(m, options.model, batch)))
    for method in options.methods:
        config = MeftConfig.methods()[method]
        keeps = "saved_activations" in config.__dataclass_fields__
        for saved in options.saved if keeps else (None,):
            chosen = {} if saved is None else {"saved_activations": saved}
            if keeps and options.chunk is not None:
                chosen["chunk_size"] = options.chunk
            if "reduction_factor" in config.__dataclass_fields__:
                chosen["reduction_factor"] = options.reduction_factor
            autocast = options.dtype if not config.frozen_encoder else None

            def count(batch: int, method=method, autocast=autocast, chosen=chosen) -> MemoryCount:
                return estimate(
                    options.model,
                    method,
                    batch,
                    dtype=options.dtype,
                    autocast=autocast if autocast != "float32" else None,
                    num_labels=CLASSES,
                    capability=CAPABILITY,
                    backend=options.backend,
                    **chosen,
                )

            rows.append((f"{method} {saved}" if saved else method, count))
    return rows


def measure(name: str, count: Any, batch: int, paper: bool) -> dict[str, Any]:
    """One figure of the record."""
    start = time.perf_counter()
    counted = count(batch)
    row = {"method": name, "batch": batch, **counted.to_dict(), "seconds": time.perf_counter() - start}
    row["paper_gib"] = published.PAPER_GIB.get(name.removeprefix("published ")) if paper else None
    return row


def _lines(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    pad = [str.ljust] + [str.rjust] * (len(header) - 1)
    return "\n".join(
        "  ".join(f(cell, width) for f, cell, width in zip(pad, row, widths)).rstrip()
        for row in [header, *rows]
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The full batch: what is in use and why, in GiB, and the paper's figure where it gives one."""
    kept = ("hidden states", "side states and other saved activations", "transients and workspace")
    header = [
        "method",
        "in use",
        "reserved",
        "paper",
        "in use / paper",
        "hidden",
        "saved",
        "transient",
        "phase",
    ]
    lines = []
    for row in rows:
        paper = row["paper_gib"]
        shares = [f"{row['contributors_gib'][name]:.2f}" for name in kept]
        compared = ["", ""] if paper is None else [f"{paper:.2f}", f"{row['peak_gib'] / paper - 1:+.1%}"]
        figures = [f"{row['peak_gib']:.2f}", f"{row['reserved_gib']:.2f}", *compared]
        lines.append([row["method"], *figures, *shares, row["peak_phase"]])
    return _lines(header, lines)


def micro_table(rows: list[dict[str, Any]], batches: Sequence[int]) -> str:
    """What is in use at equal micro-batches, in GiB: accumulating them is exact for every method."""
    by_name: dict[str, dict[int, float]] = {}
    for row in rows:
        by_name.setdefault(row["method"], {})[row["batch"]] = row["peak_gib"]
    header = ["in use, GiB, at micro-batch", *map(str, batches)]
    return _lines(header, [[name, *(f"{of[b]:.2f}" for b in batches)] for name, of in by_name.items()])


def _names(text: str, known: Sequence[str], option: str) -> list[str]:
    names = list(known) if text == "all" else [name for name in text.split(",") if name and text != "none"]
    for name in names:
        if name not in known:
            raise UserError(f"{option} must be all, none or some of {', '.join(known)}, got {name!r}")
    return names


def _batches(text: str, option: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise UserError(f"{option} must be positive integers with commas between, got {text!r}")
    return batches


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", default="small", help=f"one of {', '.join(WHISPER_SIZES)}")
    parser.add_argument("--batch", default="128", help="clips per step")
    parser.add_argument("--methods", default=",".join(OURS), help="all, none, or names with commas between")
    parser.add_argument("--published", default="full,lora,lst,unipt,sherl", help="as --methods")
    parser.add_argument("--saved", default="exact,fp8", help="ways to keep hidden states")
    parser.add_argument("--dtype", default="bfloat16", help="of the frozen weights of our methods")
    parser.add_argument("--chunk", type=int, help="clips at a time within the step (default: chosen)")
    parser.add_argument("--reduction_factor", type=int, default=8, help="of our side networks")
    parser.add_argument(
        "--backend", default="auto", help=f"kernels of our side networks: {', '.join(BACKENDS)}"
    )
    parser.add_argument("--micro-batches", help="such as 128,64,16,4: a second table")
    parser.add_argument("--output", help="folder of the record (default: benchmarks/results)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    try:
        batch, *more = _batches(options.batch, "--batch")
        if more:
            raise UserError(
                f"--batch must be one number, got {options.batch!r}; --micro-batches takes several"
            )
        micro = _batches(options.micro_batches, "--micro-batches") if options.micro_batches else []
        options.methods = _names(options.methods, list(MeftConfig.methods()), "--methods")
        options.published = _names(options.published, list(published.METHODS), "--published")
        options.saved = _names(options.saved, SAVED, "--saved")
        whisper_config(options.model)
        if options.backend not in BACKENDS:
            raise UserError(f"--backend must be one of {', '.join(BACKENDS)}, got {options.backend!r}")
        is_papers = options.model == "small" and batch == 128
        todo = cases(options)
        if not todo:
            raise UserError("--methods, --published and --saved leave nothing to count")
        if not options.no_record:
            check_writable(Path(options.output or record.RESULTS) / "memory.json")
        figures = [measure(name, count, batch, is_papers) for name, count in todo]
        print(f"whisper-{options.model}, batch {batch}, 1500 frames, CUDA, Adam; GiB")
        print(table(figures))
        if micro:
            more = [measure(name, count, b, False) for b in micro if b != batch for name, count in todo]
            figures += more
            print("\n" + micro_table(figures, micro))
        if not options.no_record:
            shapes = {"model": options.model, "batch": batch, "frames": 1500, "dtype": options.dtype}
            shapes |= {"chunk": options.chunk}
            path = record.write(
                "memory",
                figures,
                command=" ".join(["python -m benchmarks.memory", *argv]),
                shapes=shapes | {"reduction_factor": options.reduction_factor, "backend": options.backend},
                directory=options.output,
                device="cpu",
            )
            print(f"wrote {os.path.relpath(path)}")
    except UserError as error:
        print(f"benchmarks.memory: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
