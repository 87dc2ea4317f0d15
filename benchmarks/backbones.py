"""``python -m benchmarks.backbones``: the frozen backbone in other number formats, and compiled.

Speed and bytes are those of a Whisper with random weights on clips of 6 seconds, by process-CPU time on one
thread, all kinds taking turns. How far the features move and what that does to the accuracy is measured on
the demo's task (synthetic accents, the shipped backbone): a side network is trained on each kind's hidden
states from the same starts on the same batches, for several seeds.

With ``--model_name_or_path`` and ``--audio`` errors are those of pretrained weights on recordings, padded to
the window and trimmed, and ``--train_data`` and ``--test_data`` give the accuracy of a logistic regression on
the mean of the last state. ``torchao's int8`` stands beside ours there: all layers, inputs without a zero
point. ``--by_part`` tells instead where the error comes from: that of the last state of the trimmed
recordings where one layer alone is rounded, or one projection of all layers.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForAudioClassification
from whisper_meft import FrozenEncoder, LSTConfig, get_meft_model
from whisper_meft.encoder.quantization import nbytes
from whisper_meft.encoder.sizes import WHISPER_SIZES, whisper_config
from whisper_meft.errors import UserError, one_line
from whisper_meft.evaluation.logistic import LogisticRegression
from whisper_meft.files import check_writable
from whisper_meft.memory.counting import estimate
from whisper_meft.model.backbone import load_backbone
from whisper_meft.synthetic.shipped import shipped_backbone
from whisper_meft.synthetic.speech import make_accent_corpus

from . import record, recordings
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
    "nf4": ("float32", "nf4", False),
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


# On recordings; compiled layers compute the same.
PEER = "torchao's int8"
REAL_KINDS = ("float32", "bfloat16", PEER, "int8", "fp8", "nf4")


def real_encoder(model: str, kind: str) -> FrozenEncoder:
    """The encoder of a checkpoint as ``kind`` says."""
    base = load_backbone(model, dtype=torch.float32, argument="model_name_or_path")
    if kind != PEER:
        return encoder_of(base, kind)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    encoder = FrozenEncoder(base.encoder)
    quantize_(encoder.layers, Int8DynamicActivationInt8WeightConfig())
    return encoder


def pooled(encoder: FrozenEncoder, features: Tensor, lengths: Tensor) -> Tensor:
    """The mean of the normed last state over each clip's own frames, (N, D)."""
    return torch.stack([normed.mean(0) for _, normed in recordings.last_states(encoder, features, lengths)])


def on_recordings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind: ``padded`` and ``trimmed`` errors (:func:`benchmarks.recordings.errors`),
    ``seconds`` of a forward of one padded clip, ``backbone_bytes``, and where there are labels ``accuracy``
    and ``changed``: the share of test clips that get another class than from float32."""
    model = options.model_name_or_path
    features, lengths = recordings.log_mel(model, recordings.choose(options.audio, options.audio_clips))
    task = None
    if options.train_data:
        sets = [
            [recordings.choose(each) for each in given] for given in (options.train_data, options.test_data)
        ]
        names = sorted({example.label for part in sets[0] for example in part})
        if None in names or len(names) < 2:
            raise UserError(f"train_data must have labels of two classes or more, got {names}")
        task = []
        for parts in sets:
            labels = [example.label for part in parts for example in part]
            if unknown := sorted(set(map(str, labels)) - set(names)):
                raise UserError(f"test_data has classes that train_data lacks: {', '.join(unknown)}")
            mels = [recordings.log_mel(model, part) for part in parts]
            inputs = (torch.cat([mel[which] for mel in mels]) for which in (0, 1))
            task.append((*inputs, torch.tensor([names.index(label) for label in labels])))
    rows, exact, predicted, encoders = [], None, None, {}
    for kind in REAL_KINDS:
        encoders[kind] = encoder = real_encoder(model, kind)
        states = {
            "padded": list(recordings.last_states(encoder, features, None)),
            "trimmed": list(recordings.last_states(encoder, features, lengths)),
        }
        exact = exact or states
        row: dict[str, Any] = {"kind": kind, "backbone_bytes": nbytes(encoder), "seconds": []}
        row |= {name: recordings.errors(states[name], exact[name]) for name in states}
        if task:
            train, test = ((pooled(encoder, *part[:2]), part[2]) for part in task)
            classes = LogisticRegression(len(names), 0.01).fit(*train).predict(test[0])
            predicted = classes if predicted is None else predicted
            row["accuracy"] = (classes == test[1]).double().mean().item()
            row["changed"] = (classes != predicted).double().mean().item()
        rows.append(row)
        print(f"{kind}: " + ", ".join(f"{name} {row[name]['normed']:.2%}" for name in states), flush=True)
    for number in range(options.rounds + 1):
        for row in rows:
            start = time.process_time()
            for _ in encoders[row["kind"]].stream(features[:1]):
                pass
            if number:
                row["seconds"].append(time.process_time() - start)
    return [row | {"seconds": summary(row["seconds"])} for row in rows]


PROJECTIONS = {
    "queries": "self_attn.q_proj",
    "keys": "self_attn.k_proj",
    "values": "self_attn.v_proj",
    "output of the attention": "self_attn.out_proj",
    "first of the feed-forward": "fc1",
    "second of the feed-forward": "fc2",
}
ROUNDED = ("int8", "fp8", "nf4")


@contextlib.contextmanager
def replaced(encoder: FrozenEncoder, other: FrozenEncoder, names: Sequence[str]) -> Iterator[None]:
    """While it is open the layers of ``encoder`` have the modules of that name of ``other``."""
    kept = {name: encoder.layers.get_submodule(name) for name in names}
    try:
        for name in names:
            encoder.layers.set_submodule(name, other.layers.get_submodule(name))
        yield
    finally:
        for name, module in kept.items():
            encoder.layers.set_submodule(name, module)


def parts_of(layers: int) -> dict[str, list[str]]:
    """By part of an encoder its linear layers, as they are called in ``FrozenEncoder.layers``; without those
    of the first layer, which is not rounded."""
    numbers = range(1, layers)
    every = {(index, kind): f"{index}.{name}" for index in numbers for kind, name in PROJECTIONS.items()}
    parts = {kind: [every[index, kind] for index in numbers] for kind in PROJECTIONS}
    parts |= {f"layer {index + 1}": [every[index, kind] for kind in PROJECTIONS] for index in numbers}
    return {**parts, "all": list(every.values())}


def by_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each part of the encoder, and for each of ``ROUNDED`` the normed error of the last state of
    the trimmed recordings where that part alone is."""
    model = options.model_name_or_path
    features, lengths = recordings.log_mel(model, recordings.choose(options.audio, options.audio_clips))
    encoder = real_encoder(model, "float32")
    exact = list(recordings.last_states(encoder, features, lengths))
    rows: dict[str, dict[str, Any]] = {part: {"part": part} for part in parts_of(len(encoder.layers))}
    for kind in ROUNDED:
        rounded = real_encoder(model, kind)
        for part, names in parts_of(len(encoder.layers)).items():
            with replaced(encoder, rounded, names):
                states = list(recordings.last_states(encoder, features, lengths))
            rows[part][kind] = recordings.errors(states, exact)["normed"]
            print(f"{kind}, {part}: {rows[part][kind]:.2%}", flush=True)
    return list(rows.values())


PARTS_HEADER = ("rounded", *ROUNDED)


def parts_cells(rows: list[dict]) -> list[list[str]]:
    """The rows as text under ``PARTS_HEADER``."""
    return [[row["part"], *(f"{row[kind]:.2%}" for kind in ROUNDED)] for row in rows]


REAL_HEADER = (
    *("", "× float32", "backbone, MiB", "error padded: raw", "normed", "median frame", "worst", "pooled"),
    *("trimmed: raw", "normed", "median frame", "worst", "pooled", "accuracy", "other class"),
)


def real_cells(rows: list[dict]) -> list[list[str]]:
    """The rows as text under ``REAL_HEADER``."""
    text = []
    for row in rows:
        ratio = rows[0]["seconds"]["median"] / row["seconds"]["median"]
        line = [row["kind"], f"{ratio:.2f}", f"{row['backbone_bytes'] / 2**20:.0f}"]
        for name in ("padded", "trimmed"):
            line += [f"{row[name][key]:.2%}" for key in ("raw", "normed", "median", "worst", "pooled")]
        text.append(line + [f"{row[key]:.1%}" if key in row else "" for key in ("accuracy", "changed")])
    return text


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
    defaults = {
        "batch": 4,
        "rounds": 5,
        "seeds": 3,
        "steps": 200,
        "clips": 150,
        "test_clips": 100,
        "audio_clips": 8,
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    parser.add_argument(
        "--model_name_or_path", help="pretrained weights in place of the demo's and random ones"
    )
    parser.add_argument("--audio", help="recordings to measure errors on: folder, manifest or data set")
    parser.add_argument("--by_part", action="store_true", help="errors where one part alone is rounded")
    parser.add_argument("--train_data", nargs="+", help="labelled recordings that a regression is fitted to")
    parser.add_argument("--test_data", nargs="+", help="those that it is scored on")
    parser.add_argument("--corpus", help="folder to keep the corpus in (default: a temporary one)")
    parser.add_argument("--output", help="folder of the record (default: benchmarks/results)")
    options = parser.parse_args(argv)
    try:
        for name in defaults:
            if getattr(options, name) < 1:
                raise UserError(f"{name} must be a positive integer, got {getattr(options, name)}")
        if bool(options.model_name_or_path) != bool(options.audio):
            raise UserError("model_name_or_path and audio go together: give both or none")
        if bool(options.train_data) != bool(options.test_data) or (options.train_data and not options.audio):
            raise UserError("train_data, test_data and audio go together: give all or audio alone")
        if options.by_part and (not options.audio or options.train_data):
            raise UserError("by_part goes with model_name_or_path and audio, and with no train_data")
        if options.model not in ("toy", *WHISPER_SIZES):
            raise UserError(f"model must be one of {', '.join(WHISPER_SIZES)}, got {options.model!r}")
        check_writable((Path(options.output) if options.output else record.RESULTS) / "backbones.json")
        torch.set_num_threads(1)
        if options.audio:
            return _report_recordings(options, argv)
        learned = on_the_demo(options)
        rows = [{"kind": kind} | row | learned[kind] for kind, row in speeds(options).items()]
    except UserError as error:
        print(f"benchmarks.backbones: {one_line(error)}", file=sys.stderr)
        return 1
    for line in [HEADER, *cells(rows)]:
        print(f"{line[0]:<20}" + "".join(f"{cell:>18}" for cell in line[1:]))
    shapes = {key: getattr(options, key) for key in ("model", *defaults) if key != "audio_clips"}
    path = record.write(
        "backbones",
        {"rows": rows},
        command=" ".join(["python -m benchmarks.backbones", *argv]),
        shapes=shapes,
        directory=options.output,
        device="cpu",
    )
    print(path)
    return 0


def _report_recordings(options: argparse.Namespace, argv: list[str]) -> int:
    shapes = {"model": Path(options.model_name_or_path).name, "clips": options.audio_clips}
    if options.by_part:
        name, rows = "backbones_parts", by_part(options)
        lines = [PARTS_HEADER, *parts_cells(rows)]
    else:
        name, rows = "backbones_real", on_recordings(options)
        lines = [REAL_HEADER, *real_cells(rows)]
        shapes["rounds"] = options.rounds
    for line in lines:
        print(f"{line[0]:<26}" + "".join(f"{cell:>18}" for cell in line[1:]))
    path = record.write(
        name,
        {"rows": rows, "load": os.getloadavg()[0]},
        command=" ".join(["python -m benchmarks.backbones", *argv]),
        shapes=shapes,
        directory=options.output,
        device="cpu",
    )
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
