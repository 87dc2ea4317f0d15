"""``python -m benchmarks.heads``: what several trained heads cost on one pass of the encoder.

All ways take turns in one process, by process-CPU time on one thread, log-mel not included: each model by
itself, ``MultiHead`` of several, and the models of the first set one after the other. A pass of several is
compared with the one of its models that takes longest by itself. Side networks are new ones: what they cost
does not depend on what they have learnt. ``--seconds`` trims: clips of that length, nothing but their sound
computed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import WhisperConfig, WhisperForAudioClassification
from whisper_meft import MeftConfig, MeftModel, MultiHead, get_meft_model
from whisper_meft.encoder.sizes import WHISPER_SIZES, whisper_config
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable
from whisper_meft.model.backbone import load_backbone

from . import record
from .steps import TOY
from .timing import summary

SETS = ("lst+unipt", "lst+lst+unipt", "lst+weighted_sum+head", "lst+sherl", "sherl+sherl")
APART = ", one after the other"


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way: its name, ``seconds`` of a forward (median, p20, p80), and for several models the
    one that is ``dearest`` by itself and the ``ratio`` to that one's time."""
    if options.model_name_or_path:
        base = load_backbone(options.model_name_or_path, dtype=torch.float32)
    else:
        toy = WhisperConfig(**TOY) if options.model == "toy" else options.model
        base = WhisperForAudioClassification._from_config(whisper_config(toy, num_labels=6))
    sizes = base.config
    window = 2 * sizes.max_source_positions
    frames = window if options.seconds is None else round(100 * options.seconds)
    if not 1 <= frames <= window:
        raise UserError(f"--seconds must be above 0 and at most {window / 100:g}, got {options.seconds:g}")
    features = torch.randn(options.batch, sizes.num_mel_bins, frames)
    kept = {} if options.seconds is None else {"max_frames": "longest"}

    def made(name: str) -> MeftModel:
        return get_meft_model(base, MeftConfig.from_dict({"method": name, **kept})).eval()

    def calls(*models: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        return lambda: [model(features) for model in models]

    members = {names: names.split("+") for names in options.sets}
    ways = {name: calls(made(name)) for name in dict.fromkeys(sum(members.values(), []))}
    for names, each in members.items():
        models = [made(name) for name in each]
        ways[names] = calls(MultiHead(models))
        if names == options.sets[0]:
            ways[f"{names}{APART}"] = calls(*models)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for number in range(options.rounds + 1):
            for way, run in ways.items():
                start = time.process_time()
                run()
                if number:  # the first warms up
                    seconds[way].append(time.process_time() - start)
    taken = {way: summary(times) for way, times in seconds.items()}
    rows = []
    for way, found in taken.items():
        row: dict[str, Any] = {"way": way, "seconds": found}
        if (names := way.removesuffix(APART)) in members:
            row["dearest"] = max(members[names], key=lambda name: taken[name]["median"])
            row["ratio"] = found["median"] / taken[row["dearest"]]["median"]
        rows.append(row)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__)
    parser.add_argument("--model", default="base", choices=["toy", *WHISPER_SIZES])
    parser.add_argument(
        "--model_name_or_path", help="folder or hub name of a Whisper, in the place of --model"
    )
    parser.add_argument("--sets", nargs="+", default=SETS, help="methods, joined by a +")
    parser.add_argument("--batch", type=int, default=2, help="clips")
    parser.add_argument(
        "--seconds", type=float, help="of sound in each clip, trimmed (default: the window, padding heard)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="folder for the record (default: benchmarks/results)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    try:
        for name in ("batch", "rounds"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} must be a positive integer, got {getattr(options, name)}")
        check_writable(f"{options.output or record.RESULTS}/record.json")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        rows = measured(options)
        for row in rows:
            over = f"  {row['ratio']:.3f} x {row['dearest']}" if "ratio" in row else ""
            print(f"{row['way']:<40} {row['seconds']['median']:8.3f} s{over}")
        command = " ".join(["python -m benchmarks.heads", *argv])
        shapes = {"model": options.model_name_or_path or options.model, "batch": options.batch}
        shapes["model"] = str(shapes["model"]).rstrip("/").rpartition("/")[2]
        if options.seconds is not None:
            shapes["seconds"] = options.seconds
        written = record.write(
            "heads", {"rows": rows}, command=command, shapes=shapes, directory=options.output, device="cpu"
        )
        print(written)
    except UserError as error:
        print(f"benchmarks.heads: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
