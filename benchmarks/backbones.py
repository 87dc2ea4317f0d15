"""``python -m benchmarks.backbones``: the frozen backbone in other number formats, and compiled.

Speed and bytes are those of a Whisper with random weights on clips of 6 seconds, by process-CPU time on one
thread, all kinds taking turns. How far the features move and what that does to the accuracy is measured on
the demo's task (synthetic accents, the shipped backbone): a side network is trained on each kind's hidden
states from the same starts on the same batches, for several seeds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForAudioClassification
from whisper_meft import FrozenEncoder, LSTConfig, get_meft_model
from whisper_meft.encoder.quantization import nbytes
from whisper_meft.encoder.sizes import WHISPER_SIZES, whisper_config
from whisper_meft.errors import UserError, one_line
from whisper_meft.files import check_writable
from whisper_meft.memory.counting import estimate
from whisper_meft.model.backbone import load_backbone
from whisper_meft.synthetic.shipped import shipped_backbone
from whisper_meft.synthetic.speech import make_accent_corpus

from . import record
from .saved_activations import features_and_labels
from .steps import TOY
from .timing import summary

# By name: dtype, quantisation, and whether the layers are compiled. The first is what others are compared to.
KINDS: dict[str, tuple[str, str | None, bool]] = {
    "float32": ("float32", None, False),
    "float32, compiled": ("float32", None, True),
    "bfloat16": ("bfloat16", None, False),
    "int8": ("float32", "int8", False),
    "int8, compiled": ("float32", "int8", True),
    "fp8": ("float32", "fp8", False),
}
FRAMES = 300  # 6 seconds


def encoder_of(base: WhisperForAudioClassification, kind: str) -> FrozenEncoder:
    """The encoder of ``base`` as ``kind`` says; ``base`` is changed."""
    dtype, quantization, compiled = KINDS[kind]
    encoder = FrozenEncoder(base.encoder, dtype, quantization)
    if compiled:
        encoder.compile_layers()
    return encoder


def speeds(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By kind: ``seconds`` of a forward (median, p20, p80), ``backbone_bytes``, and ``counted_bytes``: the
    peak of a training step of LST, batch 16, padded clips, counted for a CPU."""
    toy = WhisperConfig(**TOY) if options.model == "toy" else options.model
    encoders, found = {}, {}
    for kind, (dtype, quantization, _) in KINDS.items():
        torch.manual_seed(0)
        sizes = whisper_config(toy, num_labels=2)
        encoders[kind] = encoder_of(WhisperForAudioClassification._from_config(sizes), kind)
        how = {"dtype": dtype, "device_type": "cpu", "backbone_quantization": quantization}
        counted = estimate(toy, "lst", 16, **how).peak
        found[kind] = {"backbone_bytes": nbytes(encoders[kind]), "counted_bytes": counted, "seconds": []}
    features = torch.randn(options.batch, sizes.num_mel_bins, 2 * FRAMES)
    lengths = torch.full((options.batch,), FRAMES)
    for number in range(options.rounds + 1):
        for kind, encoder in encoders.items():
            start = time.process_time()
            for _ in encoder.stream(features, lengths):
                pass
            if number:  # the first warms up and compiles
                found[kind]["seconds"].append(time.process_time() - start)
    return {kind: row | {"seconds": summary(row["seconds"])} for kind, row in found.items()}


@torch.no_grad()
def hidden_states(encoder: FrozenEncoder, features: Tensor) -> Tensor:
    """(N, L + 1, T, D) in float32."""
    parts = [torch.stack(list(encoder.stream(part)), 1).float() for part in features.split(32)]
    return torch.cat(parts)


def trained_accuracy(states: dict[str, Tensor], labels: dict[str, Tensor], seed: int, options: Any) -> float:
    """Accuracy on the test set of LST and a head that were trained on these hidden states."""
    base = load_backbone(shipped_backbone(), dtype=torch.float32)
    torch.manual_seed(seed)
    base.classifier = nn.Linear(base.classifier.in_features, int(labels["train"].max()) + 1)
    base.config.num_labels = base.classifier.out_features
    for linear in (base.projector, base.classifier):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    model = get_meft_model(base, LSTConfig(reduction_factor=4))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(options.steps):
        chosen = torch.randint(len(labels["train"]), (32,), generator=generator)
        optimizer.zero_grad()
        model(hidden_states=states["train"][chosen], labels=labels["train"][chosen]).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(hidden_states=part).logits for part in states["test"].split(64)])
    return (logits.argmax(-1) == labels["test"]).float().mean().item()


def on_the_demo(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By kind: ``feature_error``, of the last hidden state on the test set relative to float32's root mean
    square, and the ``accuracies`` of the seeds."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_accent_corpus(
            Path(options.corpus or folder) / "corpus",
            train_clips_per_class=options.clips,
            test_clips_per_class=options.test_clips,
            seed=0,
        )
        data = {split: features_and_labels(corpus, split)[:2] for split in ("train", "test")}
    labels, found, exact = {split: pair[1] for split, pair in data.items()}, {}, None
    for kind in KINDS:
        encoder = encoder_of(load_backbone(shipped_backbone(), dtype=torch.float32), kind)
        states = {split: hidden_states(encoder, features) for split, (features, _) in data.items()}
        last = states["test"][:, -1]
        exact = last if exact is None else exact
        error = ((last - exact).norm() / exact.norm()).item()
        accuracies = [trained_accuracy(states, labels, seed, options) for seed in range(options.seeds)]
        found[kind] = {"feature_error": error, "accuracies": accuracies}
        print(f"{kind}: features off by {error:.2%}, accuracy {statistics.mean(accuracies):.1%}", flush=True)
    return found


HEADER = ("", "forward, ms", "× float32", "backbone, MiB", "counted step, GiB", "feature error", "accuracy")


def cells(rows: list[dict]) -> list[list[str]]:
    """The rows as text under ``HEADER``; ± is half the range over seeds."""
    text = []
    for row in rows:
        seconds, first = row["seconds"]["median"], rows[0]["seconds"]["median"]
        mean, spread = statistics.mean(row["accuracies"]), max(row["accuracies"]) - min(row["accuracies"])
        text.append(
            [
                row["kind"],
                f"{1e3 * seconds:.0f}",
                f"{first / seconds:.2f}",
                f"{row['backbone_bytes'] / 2**20:.0f}",
                f"{row['counted_bytes'] / 2**30:.2f}",
                f"{row['feature_error']:.2%}",
                f"{mean:.1%} ± {spread / 2:.1%}",
            ]
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backbones", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", default="small", help=f"sizes for the speed: {', '.join(WHISPER_SIZES)}")
    defaults = {"batch": 4, "rounds": 5, "seeds": 3, "steps": 200, "clips": 150, "test_clips": 100}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--corpus", help="folder to keep the corpus in (default: a temporary one)")
    parser.add_argument("--output", help="folder of the record (default: benchmarks/results)")
    options = parser.parse_args(argv)
    try:
        for name in defaults:
            if getattr(options, name) < 1:
                raise UserError(f"{name} must be a positive integer, got {getattr(options, name)}")
        if options.model not in ("toy", *WHISPER_SIZES):
            raise UserError(f"model must be one of {', '.join(WHISPER_SIZES)}, got {options.model!r}")
        check_writable((Path(options.output) if options.output else record.RESULTS) / "backbones.json")
        torch.set_num_threads(1)
        learned = on_the_demo(options)
        rows = [{"kind": kind} | row | learned[kind] for kind, row in speeds(options).items()]
    except UserError as error:
        print(f"benchmarks.backbones: {one_line(error)}", file=sys.stderr)
        return 1
    for line in [HEADER, *cells(rows)]:
        print(f"{line[0]:<20}" + "".join(f"{cell:>18}" for cell in line[1:]))
    path = record.write(
        "backbones",
        {"rows": rows},
        command=" ".join(["python -m benchmarks.backbones", *argv]),
        shapes={k: v for k, v in vars(options).items() if k not in ("corpus", "output")},
        directory=options.output,
        device="cpu",
    )
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
