"""``python -m benchmarks.throughput``: what an epoch costs per clip, from audio file to optimizer.

Ways to train on the same short clips: padded to 30 seconds, trimmed and batched by length, with the frozen
backbone in 8 bits or compiled, and from a feature cache; full fine-tuning on padded clips is the yardstick.
All take turns in one process, measured by process-CPU time on one thread, reading and log-mel included. Audio
is synthetic and weights are random, unless ``--audio`` and ``--model_name_or_path`` give others. Padded clips
cost the same whatever they hold, so of those a few are measured in each round, of the others the whole set.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification
from whisper_meft import MeftConfig, get_meft_model
from whisper_meft.data import Collator, SpeechDataset, check_audio, load_examples
from whisper_meft.data.batching import LengthBatches
from whisper_meft.data.examples import ExampleSet, label_inventory
from whisper_meft.encoder.quantization import nbytes
from whisper_meft.encoder.sizes import WHISPER_SIZES, whisper_config
from whisper_meft.errors import UserError, one_line
from whisper_meft.feature_cache.dataset import CachedCollator, CachedDataset
from whisper_meft.feature_cache.filling import prepare_cache
from whisper_meft.files import check_writable
from whisper_meft.model.backbone import set_labels
from whisper_meft.model.pretrained import load_feature_extractor, load_whisper
from whisper_meft.options.common import ModelArguments

from meft_kernels import ops

from . import record
from .steps import TOY
from .timing import summary

_MAIN_OP = {"lst": "ladder", "unipt": "relu_attention", "sherl": "guidance"}  # where the time goes
LABELS = ("a", "b", "c", "d", "e", "f")
RATE = 16_000


@dataclass(frozen=True)
class Way:
    """How clips are trained on.

    Attributes:
        method: "full" or a side network. trimmed: computed as long as they are, else padded.
        backbone: options of the frozen backbone. compiled: its layers are.
        cache: storage of the feature cache, or None.
    """

    method: str
    trimmed: bool = False
    backbone: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    cache: str | None = None


def ways(method: str) -> dict[str, Way]:
    """All of them by name; ``method`` is the side network."""
    int8 = {"backbone_quantization": "int8"}
    return {
        "full, padded": Way("full"),
        f"{method}, padded": Way(method),
        f"{method}, trimmed": Way(method, trimmed=True),
        f"{method}, trimmed, compiled": Way(method, trimmed=True, compiled=True),
        f"{method}, trimmed, int8": Way(method, trimmed=True, backbone=int8),
        f"{method}, trimmed, int8, compiled": Way(method, trimmed=True, backbone=int8, compiled=True),
        f"{method}, from cache, 16 bits": Way(method, trimmed=True, cache="bfloat16"),
        f"{method}, from cache, 8 bits": Way(method, trimmed=True, cache="int8"),
    }


def clip_lengths(number: int, mean: float, seed: int = 0) -> list[float]:
    """Lengths in seconds like KeSpeech's: log-normal about ``mean``, from 1 to 30 s."""
    generator = random.Random(seed)
    centre = math.log(mean) - 0.4**2 / 2
    return [min(max(generator.lognormvariate(centre, 0.4), 1.0), 30.0) for _ in range(number)]


def write_clips(folder: Path, lengths: Sequence[float]) -> None:
    """folder/<label>/<n>.wav: noise of these lengths whose loudness changes, 16 bits at 16 kHz."""
    generator = np.random.default_rng(0)
    for number, seconds in enumerate(lengths):
        place = folder / LABELS[number % len(LABELS)]
        place.mkdir(parents=True, exist_ok=True)
        samples = int(seconds * RATE)
        loudness = np.sin(np.arange(samples) * (2 * np.pi * 3 / RATE)) ** 2
        wave = 0.1 * loudness * generator.standard_normal(samples)
        soundfile.write(place / f"{number:04d}.wav", wave, RATE, subtype="PCM_16")


def backbone(options: argparse.Namespace, labels: int) -> tuple[Any, WhisperForAudioClassification]:
    """Feature extractor and Whisper: of ``--model_name_or_path``, or of the sizes with drawn weights."""
    torch.manual_seed(0)
    if options.model_name_or_path is not None:
        base = load_whisper(ModelArguments(options.model_name_or_path), "float32")
        return load_feature_extractor(options.model_name_or_path), base
    whole = WhisperConfig(**TOY) if options.model == "toy" else options.model
    sizes = whisper_config(whole, num_labels=labels)
    extractor = WhisperFeatureExtractor(feature_size=sizes.num_mel_bins)
    return extractor, WhisperForAudioClassification._from_config(sizes, attn_implementation="sdpa")


def check_clips(options: argparse.Namespace, folder: Path) -> ExampleSet:
    """``--clips`` clips evenly from all of ``--audio``, or the synthetic ones; decoded once.

    Raises:
        UserError: the audio cannot be read, or is not so many clips of two classes.
    """
    if options.audio is None:
        return check_audio(load_examples(str(folder / "audio")), progress=False)[0]
    examples = load_examples(options.audio)
    if len(examples) < options.clips:
        most = f"{len(examples)}, those of {options.audio}"
        raise UserError(f"clips must be at most {most}, got {options.clips}")
    chosen = [number * len(examples) // options.clips for number in range(options.clips)]
    examples, _ = check_audio(examples.select(chosen), progress=False)
    if len(label_inventory(examples)) < 2:
        raise UserError(f"audio must hold clips of at least 2 classes, got {options.audio}")
    return examples


class Run:
    """A way, ready to be run: model, optimizer, and the batches of its rounds.

    Args:
        way: how. options: of the command. folder: of the audio and the caches.
    """

    def __init__(self, way: Way, options: argparse.Namespace, folder: Path):
        examples = check_clips(options, folder)
        labels = label_inventory(examples)
        extractor, base = backbone(options, len(labels))
        max_frames = "longest" if way.trimmed else "fidelity"
        chosen = {"method": way.method, "max_frames": max_frames, **way.backbone}
        if way.method != "full":
            chosen["reduction_factor"] = options.reduction_factor
        set_labels(base, labels)
        self.model = get_meft_model(base, MeftConfig.from_dict(chosen))
        if way.compiled:
            self.model.encoder.compile_layers()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        label2id = {label: i for i, label in enumerate(labels)}
        self.fill_seconds = None
        if way.cache is None:
            self.dataset = SpeechDataset(examples, extractor, label2id, max_frames)
            self.collator = Collator(extractor, max_frames)
        else:
            place = str(folder / f"cache-{way.cache}")
            start = time.process_time()
            cache = prepare_cache(place, self.model, extractor, [examples], way.cache, progress=False)
            self.fill_seconds = (time.process_time() - start) / len(examples)
            self.dataset = CachedDataset(examples, cache, self.model, label2id)
            self.collator = CachedCollator()
        lengths = self.dataset.lengths if way.trimmed else None
        self.batches = self._batches(lengths, options)
        self.seconds: list[float] = []

    def _batches(self, lengths: Sequence[int] | None, options: argparse.Namespace) -> Iterator[list]:
        """The batches of each round."""
        if lengths is None:
            number, start = min(options.padded_clips, len(self.dataset)), 0
            while True:
                chosen = [(start + i) % len(self.dataset) for i in range(number)]
                yield [chosen[i : i + options.batch] for i in range(0, number, options.batch)]
                start += number
        made = LengthBatches(lengths, options.batch)
        for epoch in range(sys.maxsize):
            made.set_epoch(epoch)
            yield list(made)

    def round(self) -> float:
        """Seconds of process-CPU time per clip of one round.

        Raises:
            UserError: the loss is not finite, or nothing has a gradient.
        """
        batches = next(self.batches)
        start = time.process_time()
        for batch in batches:
            inputs = self.collator([self.dataset[i] for i in batch])
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model(**inputs).loss
            loss.backward()
            self.optimizer.step()
        seconds = (time.process_time() - start) / sum(map(len, batches))
        if not torch.isfinite(loss) or not self.model.classifier.weight.grad.any():
            raise UserError(f"the loss is {loss.item()}, the model was not trained")
        return seconds


def measure(options: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for each way: ``seconds`` per clip (median, p20, p80), ``backbone_bytes``, ``fill_seconds`` per
    clip of a cache that this way filled, ``first_seconds`` per clip of the round before it, compiling too.
    """
    runs = {}
    for name, way in ways(options.method).items():
        runs[name] = Run(way, options, folder)
        runs[name].first = runs[name].round()
        print(f"{name}: ready, {runs[name].first:.3f} s per clip in the first round", flush=True)
    for _ in range(options.rounds):
        for run in runs.values():
            run.seconds.append(run.round())
    return [
        {
            "way": name,
            "seconds": summary(run.seconds),
            "backbone_bytes": nbytes(run.model.encoder),
            "fill_seconds": run.fill_seconds,
            "first_seconds": run.first,
        }
        for name, run in runs.items()
    ]


HEADER = ("", "ms per clip", "clips/s", "× full, padded", "× padded", "× trimmed", "backbone, MiB")


def cells(rows: list[dict]) -> list[list[str]]:
    """The rows as text under ``HEADER``: ratios say how many times as fast each is."""
    by_name = {row["way"]: row["seconds"]["median"] for row in rows}
    full, padded, trimmed, *_ = by_name.values()  # in the order of `ways`
    text = []
    for row in rows:
        seconds = row["seconds"]["median"]
        ratios = [f"{other / seconds:.2f}" for other in (full, padded, trimmed)]
        size = f"{row['backbone_bytes'] / 2**20:.0f}"
        text.append([row["way"], f"{1e3 * seconds:.1f}", f"{1 / seconds:.2f}", *ratios, size])
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", default="tiny", help=f"sizes of the encoder: {', '.join(WHISPER_SIZES)}")
    parser.add_argument(
        "--model_name_or_path", help="pretrained Whisper in its place, a folder or a hub name"
    )
    parser.add_argument("--audio", help="recordings in place of synthetic ones: whatever train_data may be")
    parser.add_argument("--method", default="lst", choices=("lst", "unipt", "sherl"))
    parser.add_argument("--reduction_factor", type=int, default=8)
    parser.add_argument("--clips", type=int, default=48, help="clips of the epoch (default: 48)")
    parser.add_argument("--mean_seconds", type=float, default=6.0, help="mean length (default: 6)")
    parser.add_argument("--batch", type=int, default=8, help="clips per batch (default: 8)")
    parser.add_argument("--padded_clips", type=int, default=2, help="padded clips per round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--output", help="folder of the record (default: benchmarks/results)")
    options = parser.parse_args(argv)
    try:
        for name in ("reduction_factor", "clips", "batch", "padded_clips", "rounds"):
            if getattr(options, name) < 1:
                raise UserError(f"{name} must be a positive integer, got {getattr(options, name)}")
        if not 1 <= options.mean_seconds <= 30:
            raise UserError(f"mean_seconds must lie between 1 and 30, got {options.mean_seconds}")
        if options.model not in ("toy", *WHISPER_SIZES):
            raise UserError(f"model must be one of {', '.join(WHISPER_SIZES)}, got {options.model!r}")
        check_writable((Path(options.output) if options.output else record.RESULTS) / "throughput.json")
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            if options.audio is None:
                lengths = clip_lengths(options.clips, options.mean_seconds)
                write_clips(Path(folder) / "audio", lengths)
            else:
                lengths = [example.seconds for example in check_clips(options, Path(folder))]
            rows = measure(options, Path(folder))
    except UserError as error:
        print(f"benchmarks.throughput: {one_line(error)}", file=sys.stderr)
        return 1
    for line in [HEADER, *cells(rows)]:
        print(f"{line[0]:<32}" + "".join(f"{cell:>16}" for cell in line[1:]))
    given = ("output", "model_name_or_path", "audio")
    shapes = {k: v for k, v in vars(options).items() if k not in given}
    if options.model_name_or_path is not None:
        shapes |= {
            "model": Path(options.model_name_or_path).name.removeprefix("whisper-"),
            "pretrained": True,
        }
    if options.audio is not None:
        shapes["audio"] = Path(options.audio).name
    shapes["backend"] = ops.backend_status()[_MAIN_OP[options.method]][0]
    path = record.write(
        "throughput",
        {"mean_seconds": sum(lengths) / len(lengths), "rows": rows},
        command=" ".join(["python -m benchmarks.throughput", *argv]),
        shapes=shapes,
        directory=options.output,
        device="cpu",
    )
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
