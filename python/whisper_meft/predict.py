"""`whisper-meft predict`, and the inference loop that evaluation shares with it."""

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from . import data
from .arguments import Parser, UsageError
from .backbone import quiet_transformers
from .batching import LongestFirst
from .errors import UserError
from .examples import Example, ExampleSet
from .files import check_writable, write_json, write_text
from .modeling import MeftModel
from .pretrained import load_feature_extractor


@dataclass
class InferenceArguments:
    """How a trained model is run."""

    _argument_group_name = "model"

    backbone: str | None = field(
        default=None, metadata={"help": "backbone to use instead of the one that the model names"}
    )
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "feature extractor, if not the one saved with the model"}
    )
    backbone_dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None, metadata={"help": "type to hold the frozen weights in (default: as in training)"}
    )
    backbone_quantization: Literal["int8", "fp8", "none"] | None = field(
        default=None,
        metadata={"help": "hold the frozen linear layers in 8 bits (default: as in training)"},
    )
    backbone_compile: bool = field(
        default=False,
        metadata={"help": "compile one encoder layer and run all by it; pays for many clips"},
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1 ... (default: a GPU if there is one)"}
    )
    batch_size: int = field(default=8, metadata={"help": "clips per batch"})
    num_workers: int = field(default=0, metadata={"help": "processes that read audio"})

    def __post_init__(self):
        if self.batch_size < 1:
            raise UsageError(f"--batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers < 0:
            raise UsageError(f"--num_workers must be 0 or more, got {self.num_workers}")


@dataclass
class PredictArguments:
    """Where predictions go."""

    _argument_group_name = "output"

    output: str | None = field(
        default=None, metadata={"help": "file ending in .csv or .json to write (default: a table on stdout)"}
    )

    def __post_init__(self):
        if self.output is not None and Path(self.output).suffix.lower() not in (".csv", ".json"):
            raise UsageError(f"--output must end in .csv or .json, got {self.output}")


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of this name; None is a GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: cannot use {str(device)!r}: {str(error).splitlines()[0]}") from error


class Classifier:
    """A trained model with its feature extractor, ready to classify examples.

    Args:
        model: trained model; is put into evaluation mode on ``device``.
        feature_extractor: the one it was trained with.
        device: torch device; default a GPU if there is one.
        batch_size: clips per batch.
        num_workers: processes that read audio; 0 reads in this one.
        progress: show progress bars.
    """

    def __init__(
        self,
        model: MeftModel,
        feature_extractor: Any,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        progress: bool = True,
    ):
        self.device = usable_device(device)
        self.model = model.to(self.device).eval()
        self.feature_extractor = feature_extractor
        self.batch_size, self.num_workers, self.progress = batch_size, num_workers, progress
        self.max_frames = model.meft_config.max_frames
        names = model.config.id2label
        self.labels = [names[index] for index in range(model.config.num_labels)]

    @classmethod
    def load(
        cls, model_dir: str | Path, arguments: InferenceArguments, progress: bool = True
    ) -> "Classifier":
        """Loads the model in ``model_dir`` (a folder, or a name on the hub).

        Raises:
            UserError: model, backbone or feature extractor cannot be loaded or do not fit each other.
        """
        device = usable_device(arguments.device)
        with quiet_transformers():
            model = MeftModel.from_pretrained(
                model_dir,
                backbone=arguments.backbone,
                dtype=arguments.backbone_dtype,
                quantization=arguments.backbone_quantization,
                device=device,
            )
        if arguments.backbone_compile:
            model.encoder.compile_layers()
        if arguments.feature_extractor_name is not None:
            extractor = load_feature_extractor(arguments.feature_extractor_name)
        else:
            extractor = load_feature_extractor(str(model_dir), "model_dir")
        data.check_feature_extractor(extractor, model.config, model.meft_config.max_frames)
        return cls(model, extractor, device, arguments.batch_size, arguments.num_workers, progress)

    def check(self, examples: ExampleSet, strict: bool = False) -> tuple[ExampleSet, list[tuple[str, str]]]:
        """:func:`whisper_meft.data.check_audio` with this classifier's workers and progress bar."""
        return data.check_audio(examples, strict, num_workers=self.num_workers, progress=self.progress)

    def probabilities(self, examples: ExampleSet) -> np.ndarray:
        """Class probabilities, float32 (N, K), rows in the order of ``examples``; NaN where the model's
        output was not finite.

        Raises:
            UserError: an example cannot be read.
        """
        dataset = data.SpeechDataset(examples, self.feature_extractor, None, self.max_frames)
        collator = data.Collator(self.feature_extractor, self.max_frames)
        lengths = None if self.max_frames == "fidelity" else dataset.lengths
        order = list(range(len(dataset)) if lengths is None else LongestFirst(lengths))
        loader = DataLoader(
            dataset, self.batch_size, sampler=order, collate_fn=collator, num_workers=self.num_workers
        )
        rows = []
        with torch.inference_mode():
            for batch in tqdm(loader, desc="classifying", unit="batch", disable=not self.progress):
                logits = self.model(**{name: value.to(self.device) for name, value in batch.items()}).logits
                rows.append(logits.float().softmax(dim=-1).cpu().numpy())
        return np.concatenate(rows)[np.argsort(order)]


def find_audio(sources: Sequence[str]) -> list[str]:
    """Files to classify: each file as named, each folder searched for audio, without repeats.

    Raises:
        UserError: nothing is named, a source does not exist, or a folder holds no audio.
    """
    found: dict[str, None] = {}
    for source in sources:
        if not source:
            raise UserError("AUDIO_OR_DIR is empty, the name of a file or folder is needed")
        path = Path(source)
        if path.is_dir():
            inside = data.list_audio_files(path)
            if not inside:
                raise UserError(f"{source} holds no audio files")
            found.update(dict.fromkeys(inside))
        elif path.exists() or not any(character in source for character in "*?"):
            # A file that is missing is reported with the unreadable ones; the others are still answered.
            found[source] = None
        else:
            raise UserError(f"no file matches {source}")
    return list(found)


def as_table(rows: Iterable[dict[str, Any]]) -> str:
    """Predictions as a text table: file, label, its probability, and the runner-up."""
    rows = list(rows)
    widths = [max([len(row[key]) for row in rows] + [len(key)]) for key in ("file", "label")]
    lines = [f"{'file':<{widths[0]}}  {'label':<{widths[1]}}  probability  next"]
    for row in rows:
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        runner_up = f"{ranked[1][0]} {ranked[1][1]:.1%}" if len(ranked) > 1 else ""
        lines.append(
            f"{row['file']:<{widths[0]}}  {row['label']:<{widths[1]}}  {ranked[0][1]:>11.1%}  {runner_up}"
        )
    return "\n".join(lines)


def as_csv(rows: Iterable[dict[str, Any]], labels: Sequence[str]) -> str:
    """Predictions as CSV: file, label, then one probability column per class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "label", *labels])
    for row in rows:
        writer.writerow(
            [row["file"], row["label"], *(f"{row['probabilities'][name]:.6f}" for name in labels)]
        )
    return text.getvalue()


def predict(
    classifier: Classifier, files: Sequence[str]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Classifies audio files; those that cannot be read do not stop the others.

    Returns:
        one {"file", "label", "probabilities": {label: p}} per readable file, in order; and (file, reason) of
        the unreadable ones.

    Raises:
        UserError: not one file is readable.
    """
    examples = ExampleSet([Example(audio=file, name=file) for file in files], "the files to classify")
    # The error of a single file says it all; of several the good ones are answered.
    good, bad = classifier.check(examples, strict=len(examples) == 1)
    probabilities = classifier.probabilities(good)
    rows = []
    for example, row in zip(good, probabilities):
        if not np.isfinite(row).all():
            bad.append((example.name, "the model's output for it is NaN or infinite"))
            continue
        named = {label: float(p) for label, p in zip(classifier.labels, row)}
        rows.append(
            {"file": example.name, "label": classifier.labels[int(row.argmax())], "probabilities": named}
        )
    if not rows:
        raise UserError(f"no file could be classified; {bad[0][0]}: {bad[0][1]}")
    return rows, bad


def make_parser() -> Parser:
    """The parser of `whisper-meft predict`."""
    parser = Parser(
        "predict",
        (InferenceArguments, PredictArguments),
        usage="MODEL_DIR AUDIO_OR_DIR... [--output FILE.csv|FILE.json] [options]",
        description="Classifies audio files; folders are searched for audio. Files that cannot be read are "
        "named on stderr, the others are answered, and the exit status is then 1.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder (or hub name) of a trained model")
    parser.add_argument("audio", metavar="AUDIO_OR_DIR", nargs="+", help="audio files and folders")
    return parser


def run(argv: Sequence[str]) -> int:
    """`whisper-meft predict`; returns the exit status."""
    inference, output, where = make_parser().parse(argv)
    files = find_audio(where.audio)
    if output.output is not None:
        check_writable(output.output)
    classifier = Classifier.load(where.model_dir, inference, progress=sys.stderr.isatty())
    rows, bad = predict(classifier, files)
    if output.output is None:
        print(as_table(rows))
    elif output.output.lower().endswith(".json"):
        write_json(output.output, rows)
    else:
        write_text(output.output, as_csv(rows, classifier.labels))
    for name, reason in bad:
        print(f"whisper-meft: cannot read {name}: {reason}", file=sys.stderr)
    return 1 if bad else 0
