"""`whisper-meft predict`: labels for audio files, as a table, CSV or JSON."""

import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import data
from ..errors import UserError, printable
from ..evaluation.classifier import Classifier, predict
from ..files import check_writable, write_json, write_text
from ..options.inference import InferenceArguments
from ..options.parser import Parser, UsageError


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
    rows = [row | {key: printable(row[key]) for key in ("file", "label")} for row in rows]
    widths = [max([len(row[key]) for row in rows] + [len(key)]) for key in ("file", "label")]
    lines = [f"{'file':<{widths[0]}}  {'label':<{widths[1]}}  probability  next"]
    for row in rows:
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        runner_up = f"{printable(ranked[1][0])} {ranked[1][1]:.1%}" if len(ranked) > 1 else ""
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
        print(f"whisper-meft: cannot read {printable(name)}: {printable(reason)}", file=sys.stderr)
    return 1 if bad else 0
