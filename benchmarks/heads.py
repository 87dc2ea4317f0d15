"""``python -m benchmarks.heads``: what several trained heads cost on one pass of the encoder.

All ways take turns in one process, by process-CPU time on one thread, log-mel not included: one model by
itself, ``MultiHead`` of that model and others, and the models one after the other. Side networks are new
ones: what they cost does not depend on what they have learnt.
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

SETS = ("lst+unipt", "lst+lst+unipt", "lst+weighted_sum+head", "lst+sherl")


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way: its name and ``seconds`` of a forward (median, p20, p80)."""
    if options.model_name_or_path:
        base = load_backbone(options.model_name_or_path, dtype=torch.float32)
    else:
        toy = WhisperConfig(**TOY) if options.model == "toy" else options.model
        base = WhisperForAudioClassification._from_config(whisper_config(toy, num_labels=6))
    sizes = base.config
    features = torch.randn(options.batch, sizes.num_mel_bins, 2 * sizes.max_source_positions)

    def made(name: str) -> MeftModel:
        return get_meft_model(base, MeftConfig.from_dict({"method": name})).eval()

    def calls(*models: Callable[[torch.Tensor], Any]) -> Callable[[], Any]:
        return lambda: [model(features) for model in models]

    ways: dict[str, Callable[[], Any]] = {}
    for names in options.sets:
        models = [made(name) for name in names.split("+")]
        first = names.partition("+")[0]
        ways.setdefault(first, calls(models[0]))
        ways[names] = calls(MultiHead(models))
        if names == options.sets[0]:
            ways[f"{names}, one after the other"] = calls(*models)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        for number in range(options.rounds + 1):
            for way, run in ways.items():
                start = time.process_time()
                run()
                if number:  # the first warms up
                    seconds[way].append(time.process_time() - start)
    return [{"way": way, "seconds": summary(taken)} for way, taken in seconds.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.heads", description=__doc__)
    parser.add_argument("--model", default="base", choices=["toy", *WHISPER_SIZES])
    parser.add_argument(
        "--model_name_or_path", help="folder or hub name of a Whisper, in the place of --model"
    )
    parser.add_argument("--sets", nargs="+", default=SETS, help="methods, joined by a +")
    parser.add_argument("--batch", type=int, default=2, help="clips, of the whole window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="folder for the record (default: benchmarks/results)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    try:
        check_writable(f"{options.output or record.RESULTS}/record.json")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        rows = measured(options)
        for row in rows:
            ratio = row["seconds"]["median"] / rows[0]["seconds"]["median"]
            print(f"{row['way']:<40} {row['seconds']['median']:8.3f} s  {ratio:.3f}")
        command = " ".join(["python -m benchmarks.heads", *argv])
        shapes = {"model": options.model_name_or_path or options.model, "batch": options.batch}
        shapes["model"] = str(shapes["model"]).rstrip("/").rpartition("/")[2]
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
