"""`whisper-meft predict`: labels or transcripts of audio files, as a table, CSV, JSON, text or subtitles."""

import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .. import data
from ..errors import UserError, printable
from ..evaluation.classifier import Classifier, predict
from ..evaluation.generating import Transcript
from ..evaluation.plots import plot_timeline
from ..evaluation.several import SeveralClassifiers, predict_several
from ..evaluation.subtitles import WRITERS, output_names
from ..evaluation.timeline import Timeline, answer_of
from ..evaluation.transcriber import Transcriber, transcribe_files
from ..files import check_writable, write_json, write_text
from ..model.kinds import kind_of
from ..options.generation import GenerationArguments
from ..options.inference import InferenceArguments, check_threshold, threshold_of
from ..options.parser import Parser, UsageError


@dataclass
class PredictArguments:
    """Where predictions go."""

    _argument_group_name = "output"

    output: str | None = field(
        default=None,
        metadata={
            "help": "file ending in .csv or .json to write; the transcript of one recording also in .txt, "
            ".srt or .vtt (default: a table on stdout)"
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "folder for a file of text or subtitles for each recording, named as the recording"
        },
    )
    output_format: Literal["txt", "srt", "vtt", "all"] = field(
        default="all",
        metadata={
            "aliases": ["--format"],
            "help": "what is written to --output_dir: text, SubRip, WebVTT or all",
        },
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace transcripts of an earlier run, which is refused otherwise"}
    )

    reject_below: str | None = field(
        default=None,
        metadata={
            "help": "give a clip whose most probable class has a lower probability the label of "
            "--reject_label: a number from 0 to 1, or saved, what `whisper-meft calibrate` chose; of models "
            "that classify"
        },
    )
    reject_label: str | None = field(
        default=None, metadata={"help": "label of clips that are rejected (default: unknown)"}
    )

    def __post_init__(self):
        check_threshold(self.reject_below)
        if self.reject_label is not None and self.reject_below is None:
            raise UsageError(f"--reject_label {self.reject_label} is for --reject_below, which is not given")
        self.reject_label = "unknown" if self.reject_label is None else self.reject_label

    @property
    def suffix(self) -> str:
        """Of ``output``, without the dot."""
        return "" if self.output is None else Path(self.output).suffix.lower().removeprefix(".")

    def formats(self) -> list[str]:
        """Of text and subtitles, what is to be written."""
        if self.output_dir is None:
            return [self.suffix] if self.suffix in WRITERS else []
        return list(WRITERS) if self.output_format == "all" else [self.output_format]

    def check(self, transcribes: bool) -> None:
        """Raises UsageError where a model of this kind does not write such a thing."""
        accepted = ["csv", "json", *(WRITERS if transcribes else ())]
        if self.output is not None and self.suffix not in accepted:
            named = " or ".join(filter(None, [", ".join(f".{s}" for s in accepted[:-1]), f".{accepted[-1]}"]))
            raise UsageError(f"--output must end in {named}, got {self.output}")
        if transcribes and self.reject_below is not None:
            raise UsageError("--reject_below is for models that classify, and this one transcribes")
        if not transcribes:
            for name in ("output_dir", "overwrite"):
                if getattr(self, name):
                    raise UsageError(f"--{name} is for models that transcribe, and this one classifies")
        if self.output is not None and self.output_dir is not None:
            raise UsageError("--output and --output_dir are two ways to write: give one of them")
        if self.output_dir is None and self.output_format != "all":
            raise UsageError(f"--output_format {self.output_format} is for --output_dir, which is not given")


_FIGURES = (".png", ".svg")


@dataclass
class OverTimeArguments:
    """What is told of a recording's windows; of models that classify."""

    _argument_group_name = "over time"

    segments: str | None = field(
        default=None,
        metadata={
            "help": "file ending in .csv or .json to write: label and probabilities of every window of every "
            "recording (default: of a single recording a table on stdout; in --output FILE.json those of "
            "recordings longer than a window)"
        },
    )
    plot: str | None = field(
        default=None,
        metadata={
            "help": "draw the probabilities over time: a file ending in .png or .svg for one recording, else "
            "a folder for a PNG file of each"
        },
    )

    def __post_init__(self):
        if self.segments is not None and Path(self.segments).suffix.lower() not in (".csv", ".json"):
            raise UsageError(f"--segments must end in .csv or .json, got {self.segments}")
        folder = self.plot is None or (self.plot and (Path(self.plot).is_dir() or not Path(self.plot).suffix))
        if not folder and Path(self.plot).suffix.lower() not in _FIGURES:
            raise UsageError(f"--plot must end in .png or .svg, or name a folder, got {self.plot!r}")

    def check(self, output: PredictArguments, transcribes: bool, models: int) -> None:
        """Raises UsageError where a model of this kind, or several, have no such thing, or two go into one
        file."""
        places = [os.path.realpath(each) for each in (self.segments, output.output) if each is not None]
        if len(places) != len(set(places)):
            raise UsageError(f"--segments and --output are both {self.segments}: name two files")
        for name in ("segments", "plot"):
            if transcribes and getattr(self, name) is not None:
                raise UsageError(f"--{name} is for models that classify, and this one transcribes")
            if models > 1 and getattr(self, name) is not None:
                raise UsageError(f"--{name} is of one model, and {models} are named: run it by itself")

    def plots(self, files: Sequence[str]) -> dict[str, Path]:
        """Where the figure of each file goes, all of which can be written.

        Raises:
            UserError: several in one file, or they cannot be written.
        """
        if self.plot is None:
            return {}
        if Path(self.plot).suffix.lower() in _FIGURES and not Path(self.plot).is_dir():
            if len(files) > 1:
                raise UserError(
                    f"--plot {self.plot} holds one recording, and there are {len(files)}: name a folder"
                )
            places = {files[0]: Path(self.plot)}
        else:
            places = {file: Path(self.plot, f"{name}.png") for file, name in zip(files, output_names(files))}
        for path in {path.parent: path for path in places.values()}.values():
            check_writable(path)
        return places


def find_audio(sources: Sequence[str]) -> list[str]:
    """Files to hear: each file as named, each folder searched for audio, without repeats.

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
        following = ranked[0 if row.get("rejected") else 1 :]  # of a rejected clip the best is not its label
        runner_up = f"{printable(following[0][0])} {following[0][1]:.1%}" if following else ""
        lines.append(
            f"{row['file']:<{widths[0]}}  {row['label']:<{widths[1]}}  {ranked[0][1]:>11.1%}  {runner_up}"
        )
    return "\n".join(lines)


def _with_classes(columns: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The names of a table's columns and, behind them, of one for each class: its own, or where another has
    that, with "probability of " before it."""
    found = list(columns)
    for label in labels:
        name = label
        while name in found or (name != label and name in labels):
            name = f"probability of {name}"
        found.append(name)
    return found


def as_csv(rows: Iterable[dict[str, Any]], labels: Sequence[str]) -> str:
    """Predictions as CSV: file, label, then one probability column per class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_with_classes(["file", "label"], labels))
    for row in rows:
        writer.writerow(
            [row["file"], row["label"], *(f"{row['probabilities'][name]:.6f}" for name in labels)]
        )
    return text.getvalue()


def segments_as_table(rows: Iterable[dict[str, Any]]) -> str:
    """Windows of one recording as a text table: start and end in seconds, and as :func:`as_table`."""
    lines = [["start", "end", "label", "probability", "next"]]
    for row in rows:
        cells = [f"{row['start']:.2f}", f"{row['end']:.2f}"]
        if row["label"] is None:
            lines.append([*cells, "", "", "nothing to hear"])
            continue
        ranked = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        following = ranked[0 if row.get("rejected") else 1 :]
        runner_up = f"{printable(following[0][0])} {following[0][1]:.1%}" if following else ""
        lines.append([*cells, printable(row["label"]), f"{ranked[0][1]:.1%}", runner_up])
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = (True, True, False, True, False)
    return "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right)).rstrip()
        for line in lines
    )


def segments_as_csv(found: Iterable[tuple[str, Iterable[dict[str, Any]]]], labels: Sequence[str]) -> str:
    """Windows of (file, rows) as CSV: file, start, end, label, then one probability column per class; the
    last of them empty where there is nothing to hear."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_with_classes(["file", "start", "end", "label"], labels))
    for file, rows in found:
        for row in rows:
            probabilities = row["probabilities"] or {}
            cells = [f"{probabilities[name]:.6f}" if name in probabilities else "" for name in labels]
            place = [file, f"{row['start']:.3f}", f"{row['end']:.3f}"]
            writer.writerow([*place, row["label"] or "", *cells])
    return text.getvalue()


def several_as_table(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> str:
    """Predictions of several models as a text table: file, and each model's label with its probability."""
    lines = [["file", *map(printable, names)]]
    for row in rows:
        found = (row["models"][name] for name in names)
        cells = [f"{printable(each['label'])} {max(each['probabilities'].values()):.1%}" for each in found]
        lines.append([printable(row["file"]), *cells])
    return _in_columns(lines)


def several_as_csv(
    rows: Iterable[dict[str, Any]], names: Sequence[str], labels: Sequence[Sequence[str]]
) -> str:
    """Predictions of several models as CSV: file, then each model's columns of :func:`as_csv`, with its name
    and a colon before theirs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [(name, label) for name, own in zip(names, labels) for label in (None, *own)]
    heads = [f"{name}:{head}" for name, own in zip(names, labels) for head in _with_classes(["label"], own)]
    writer.writerow(["file", *heads])
    for row in rows:
        cells = [
            row["models"][name]["label"]
            if label is None
            else f"{row['models'][name]['probabilities'][label]:.6f}"
            for name, label in columns
        ]
        writer.writerow([row["file"], *cells])
    return text.getvalue()


def _in_columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def transcripts_as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Transcripts as a text table: file and text, and of segments when they are said."""
    timed = any("segments" in row for row in rows)
    lines = [["file", *(["start", "end"] if timed else []), "text"]]
    lines += [[printable(cell) for cell in line] for line in _lines(rows, timed)]
    return _in_columns(lines)


def transcripts_as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Transcripts as CSV: file and text, and of segments when they are said, in seconds."""
    timed = any("segments" in row for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *(["start", "end"] if timed else []), "text"])
    writer.writerows(_lines(rows, timed))
    return text.getvalue()


def _lines(rows: Sequence[dict[str, Any]], timed: bool) -> Iterator[list[str]]:
    for row in rows:
        if not timed:
            yield [row["file"], row["text"]]
        elif not row["segments"]:
            yield [row["file"], "", "", row["text"]]
        for each in row.get("segments", ()):
            yield [row["file"], f"{each['start']:.3f}", f"{each['end']:.3f}", each["text"]]


def make_parser() -> Parser:
    """The parser of `whisper-meft predict`."""
    parser = Parser(
        "predict",
        (InferenceArguments, GenerationArguments, PredictArguments, OverTimeArguments),
        usage="{MODEL_DIR | --model MODEL_DIR ...} AUDIO_OR_DIR... [options]",
        description="Classifies audio files, or transcribes them by a model that was trained for that or a "
        "plain Whisper; folders are searched for audio. Recordings that are longer than a model hears are "
        "heard in windows. Files that cannot be read are named on stderr, the others are answered, and the "
        "exit status is then 1. Several models that classify with the same frozen backbone answer from one "
        "pass of it, each named by a --model.",
    )
    help = "folder (or hub name) of a trained model, or of a plain Whisper"
    parser.add_argument("model_dir", metavar="MODEL_DIR", nargs="?", help=help)
    parser.add_argument("audio", metavar="AUDIO_OR_DIR", nargs="*", help="audio files and folders")
    parser.add_argument(
        "--model",
        action="append",
        metavar="MODEL_DIR",
        help="a trained model in the place of MODEL_DIR; given several times, all of them answer",
    )
    return parser


def _models_and_audio(parser: Parser, where: Any) -> tuple[list[str], list[str]]:
    """The models that are named, and the audio; with --model all other names are audio.

    Raises:
        UsageError: one of the two is missing.
    """
    first = [] if where.model_dir is None else [where.model_dir]
    models, audio = (where.model, [*first, *where.audio]) if where.model else (first, where.audio)
    missing = [name for name, given in (("MODEL_DIR", models), ("AUDIO_OR_DIR", audio)) if not given]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if (
        where.model
        and (Path(audio[0]) / "config.json").is_file()
        and not data.list_audio_files(Path(audio[0]))
    ):
        parser.error(f"with --model all other names are audio: {audio[0]} is a model, name it by --model")
    return models, audio


def run(argv: Sequence[str]) -> int:
    """`whisper-meft predict`; returns the exit status."""
    parser = make_parser()
    inference, generation, output, over_time, where = parser.parse(argv)
    models, audio = _models_and_audio(parser, where)
    transcribing = [model for model in models if kind_of(model) != "classification"]
    if transcribing and len(models) > 1:
        raise UserError(
            f"--model: {transcribing[0]} transcribes, and several models can only classify: run it by itself"
        )
    transcribes = bool(transcribing)
    output.check(transcribes)
    inference.check_kind(transcribes)
    over_time.check(output, transcribes, len(models))
    if not transcribes:
        generation.refuse_for_classes()
    files = find_audio(audio)
    if transcribes:
        bad = _transcribe(models[0], files, inference, generation, output)
    elif len(models) > 1:
        bad = _classify_by_several(models, files, inference, output)
    else:
        bad = _classify(models[0], files, inference, output, over_time)
    for name, reason in bad:
        print(f"whisper-meft: cannot read {printable(name)}: {printable(reason)}", file=sys.stderr)
    return 1 if bad else 0


def _classify(
    model_dir: str,
    files: Sequence[str],
    inference: InferenceArguments,
    output: PredictArguments,
    over_time: OverTimeArguments,
) -> list[tuple[str, str]]:
    """Writes the labels; returns name and reason of the files that have none."""
    for path in (output.output, over_time.segments):
        if path is not None:
            check_writable(path)
    plots = over_time.plots(files)
    classifier = Classifier.load(model_dir, inference, progress=sys.stderr.isatty())
    _check_reject_label(output, classifier.labels, "the model")
    threshold = threshold_of(output.reject_below, classifier.model.config, model_dir)
    kept: dict[str, Timeline] = {}
    drawn: dict[str, Timeline] = {}

    def done(file: str, timeline: Timeline) -> None:
        if file in plots:
            drawn[file] = timeline
        if over_time.segments is not None or len(timeline.segments) > 1:
            kept[file] = timeline

    rows, bad = predict(classifier, files, threshold, output.reject_label, done)
    found = {file: kept[file].rows(threshold, output.reject_label) for file in kept}
    if over_time.segments is not None:
        if over_time.segments.lower().endswith("json"):
            parts = [{"file": file, "segments": list(each)} for file, each in found.items()]
            write_json(over_time.segments, parts)
        else:
            write_text(over_time.segments, segments_as_csv(found.items(), classifier.labels))
    if output.output is None:
        print(as_table(rows))
        if len(files) == 1 and over_time.segments is None:
            for each in found.values():
                print(f"\n{segments_as_table(each)}")
    elif output.suffix == "json":
        for row in rows:
            if row["file"] in kept and len(kept[row["file"]].segments) > 1:
                row["segments"] = list(kept[row["file"]].rows(threshold, output.reject_label))
        write_json(output.output, rows)
    else:
        write_text(output.output, as_csv(rows, classifier.labels))
    for file, timeline in drawn.items():  # last: what is said of the files does not depend on a figure
        whole = answer_of(timeline.probabilities, timeline.labels, threshold, output.reject_label)
        plot_timeline(timeline, plots[file], f"{file}: {whole['label']}", threshold)
    return bad


def _classify_by_several(
    model_dirs: Sequence[str], files: Sequence[str], inference: InferenceArguments, output: PredictArguments
) -> list[tuple[str, str]]:
    """As :func:`_classify`, by several models."""
    if output.output is not None:
        check_writable(output.output)
    models = SeveralClassifiers.load(model_dirs, inference, progress=sys.stderr.isatty())
    for name, labels in zip(models.names, models.labels):
        _check_reject_label(output, labels, name)
    thresholds = [
        threshold_of(output.reject_below, config, model) for config, model in zip(models.configs, model_dirs)
    ]
    rows, bad = predict_several(models, files, thresholds, output.reject_label)
    if output.output is None:
        print(several_as_table(rows, models.names))
    elif output.suffix == "json":
        write_json(output.output, rows)
    else:
        write_text(output.output, several_as_csv(rows, models.names, models.labels))
    return bad


def _check_reject_label(output: PredictArguments, labels: Sequence[str], model: str) -> None:
    """Raises UserError where the label of rejected clips is one of a model's own."""
    if output.reject_below is not None and output.reject_label in labels:
        raise UserError(f"--reject_label: {output.reject_label!r} is a class of {model}: name another")


def _transcribe(
    model_dir: str,
    files: Sequence[str],
    inference: InferenceArguments,
    generation: GenerationArguments,
    output: PredictArguments,
) -> list[tuple[str, str]]:
    """Writes the transcripts; returns name and reason of the files that have none."""
    timed = generation.return_timestamps
    places = _places(files, output)
    if {"srt", "vtt"} & set(output.formats()):
        generation.return_timestamps = True
    transcriber = Transcriber.load(model_dir, inference, generation, progress=sys.stderr.isatty())
    rows: dict[str, dict[str, Any]] = {}

    def done(name: str, transcript: Transcript) -> None:
        for path, form in places.get(name, ()):
            write_text(path, WRITERS[form](transcript))
        rows[name] = {"file": name, "text": transcript.text, "complete": transcript.complete}
        if timed:
            rows[name]["segments"] = [asdict(each) for each in transcript.segments]

    bad = transcribe_files(transcriber, files, done)
    ordered = [rows[name] for name in files if name in rows]
    if output.output_dir is not None:
        several = "transcript is" if len(ordered) == 1 else "transcripts are"
        print(f"{len(ordered)} {several} in {output.output_dir}")
    elif output.output is None:
        print(transcripts_as_table(ordered))
    elif output.suffix == "json":
        write_json(output.output, ordered)
    elif output.suffix == "csv":
        write_text(output.output, transcripts_as_csv(ordered))
    return bad


def _places(files: Sequence[str], output: PredictArguments) -> dict[str, list[tuple[Path, str]]]:
    """Where the transcript of each file goes and in which format, all of which can be written.

    Raises:
        UserError: a file is there already, or cannot be written; several transcripts for one file.
    """
    formats = output.formats()
    if output.output is not None:
        if formats and len(files) > 1:
            raise UserError(
                f"--output {output.output} holds one transcript, and there are {len(files)} recordings: name "
                "a folder with --output_dir, or a .csv or .json file"
            )
        everything = [Path(output.output)]
        places = {files[0]: [(Path(output.output), form) for form in formats]}
    elif output.output_dir is not None:
        folder = Path(output.output_dir)
        names = [folder / name for name in output_names(files)]
        places = {
            file: [(name.with_name(f"{name.name}.{form}"), form) for form in formats]
            for file, name in zip(files, names)
        }
        everything = [path for each in places.values() for path, _ in each]
    else:
        return {}
    heard = {os.path.realpath(file) for file in files}
    if over := next((path for path in everything if os.path.realpath(path) in heard), None):
        raise UserError(f"cannot write {over}: it is one of the recordings")
    if folder := next((path for path in everything if path.is_dir()), None):
        raise UserError(f"cannot write {folder}: it is a folder, a file name is needed")
    there = [path for path in everything if os.path.lexists(path)]
    if there and not output.overwrite:
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise UserError(f"{there[0]}{more} is there already: --overwrite replaces it")
    for path in {path.parent: path for path in everything}.values():
        check_writable(path)
    return places
