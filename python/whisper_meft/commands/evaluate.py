"""`whisper-meft evaluate`: scores of a trained model, on labelled audio or on transcripts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import data
from ..data.examples import ExampleSet, listing
from ..data.names import composed
from ..data.splits import split_kinds
from ..data.streaming import ShardedExamples
from ..errors import UserError, printable
from ..evaluation.assessment import assess, write_assessment
from ..evaluation.classifier import Classifier
from ..evaluation.recognition import evaluate_transcripts, write_recognition
from ..evaluation.streamed import hear
from ..evaluation.transcriber import Transcriber
from ..files import check_writable
from ..model.card import check_card, results_of, write_results_into_card
from ..model.kinds import kind_of
from ..model.loading import read_config
from ..options.common import DataFormatArguments
from ..options.generation import GenerationArguments
from ..options.inference import SAVED, InferenceArguments, check_threshold, threshold_of
from ..options.parser import Parser, UsageError


@dataclass
class EvaluateArguments(DataFormatArguments):
    """What to score on."""

    _argument_group_name = "data"

    data: str | None = field(
        default=None,
        metadata={
            "help": "labelled audio or, for models that transcribe, audio with transcripts, in any layout "
            "that train reads, or a hub name"
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "split to score (default: test, where there are several)"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "score at most this many examples, chosen at random"}
    )
    zero_shot: bool = field(
        default=True,
        metadata={
            "help": "of a model that transcribes, score its backbone alone too, which takes as long again"
        },
    )
    reject_below: str | None = field(
        default=None,
        metadata={
            "help": "also score what happens where clips are rejected whose most probable class has a lower "
            "probability: a number from 0 to 1, or saved, what `whisper-meft calibrate` chose (default: with "
            "--unknown_labels what keeps 0.95 of the other clips); of models that classify"
        },
    )
    unknown_labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "labels in the data of classes that the model does not know, or all of those: how many "
            "of their clips are not rejected is scored (default: such a label is an error); of models that "
            "classify"
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "hear tar files, Lhotse cuts or a Hugging Face dataset as they come, and hold no sound; "
            "of models that classify"
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder for the results (default: MODEL_DIR/evaluation)"}
    )

    card: bool = field(
        default=False,
        metadata={
            "help": "also write the scores into the model's README.md, header and page; of a trained model "
            "in a local folder"
        },
    )

    def __post_init__(self):
        if not self.data:
            raise UsageError("--data is needed")
        check_threshold(self.reject_below)
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise UsageError(f"--max_eval_samples must be at least 1, got {self.max_eval_samples}")
        if self.streaming and self.max_eval_samples is not None:
            raise UsageError("--max_eval_samples cannot be used with --streaming: all examples are heard")


def make_parser() -> Parser:
    """The parser of `whisper-meft evaluate`."""
    parser = Parser(
        "evaluate",
        (InferenceArguments, GenerationArguments, EvaluateArguments),
        usage="MODEL_DIR --data PATH_OR_NAME [options]",
        description="Scores a trained model. One that classifies: overall accuracy, accuracy per class and "
        "their unweighted mean, macro-F1, the confusion matrix, EER and C_avg, calibration error and "
        "reliability, for each speaker and length, with intervals, as text, JSON and PNG. One that "
        "transcribes, or a plain Whisper: word and character error rates beside those of the backbone alone, "
        "per speaker, as text and JSON, and the transcripts as CSV.",
    )
    parser.add_argument(
        "model_dir",
        metavar="MODEL_DIR",
        help="folder (or hub name) of a trained model, or of a plain Whisper",
    )
    return parser


def load_scored(arguments: EvaluateArguments, transcribes: bool, usual: str = "test") -> ExampleSet:
    """The examples that the arguments describe, before their audio is checked; ``usual``: the split that is
    taken where there are several."""
    options = {**arguments.reader_options(), "require_text": transcribes}
    splits = data.list_splits(arguments.data, **options)
    has_usual = usual in split_kinds(splits).values()
    split = arguments.split or (usual if has_usual else None)
    examples = data.load_examples(arguments.data, split=split, **options)
    if arguments.max_eval_samples is not None and arguments.max_eval_samples < len(examples):
        chosen = np.random.default_rng(0).permutation(len(examples))[: arguments.max_eval_samples]
        examples = examples.select(sorted(chosen.tolist()))
    return examples


def load_streamed(arguments: EvaluateArguments) -> tuple[ShardedExamples, set[str] | None]:
    """The source in shards that the arguments describe, and the labels that are kept; None: all."""
    options = arguments.reader_options()
    splits = data.list_splits(arguments.data, streaming=True, **options)
    has_test = "test" in split_kinds(splits).values()
    shards = data.load_shards(
        arguments.data, split=arguments.split or ("test" if has_test else None), **options
    )
    labels = options["labels"]
    return shards, None if labels in (None, "all") else {composed(label) for label in labels}


def apart(
    examples: ExampleSet, known: Sequence[str], unknown: Sequence[str] | None
) -> tuple[ExampleSet, ExampleSet | None]:
    """The examples of classes that a model knows, and those of the others; None where none are asked for.

    Args:
        known: the model's classes. unknown: labels of others, or ``["all"]`` of them, or None.

    Raises:
        UserError: one of them is a class of the model, or there are no examples of one or of any other.
    """
    if unknown is None:
        return examples, None
    unknown = [composed(label) for label in unknown]
    there = set(examples.label_counts())
    if unknown == ["all"]:
        unknown = sorted(there - set(known))
        if not unknown:
            raise UserError(f"unknown_labels: the model knows all classes of {examples.description}")
    check_unknown(unknown, known)
    for label in unknown:
        if label not in there:
            raise UserError(
                f"unknown_labels: {examples.description} has no examples of {label}, only of "
                f"{listing(sorted(there))}"
            )
    others = [index for index, example in enumerate(examples) if example.label in unknown]
    own = [index for index, example in enumerate(examples) if example.label not in unknown]
    if not own:
        raise UserError(f"unknown_labels: {examples.description} has no examples of the model's classes")
    return examples.select(own), examples.select(others)


def check_has_folder(arguments: EvaluateArguments, model_dir: str) -> None:
    """Raises UserError where it is not known which folder the scores go to."""
    if arguments.output_dir is None and not Path(model_dir).is_dir():
        raise UserError("--output_dir is needed for a model that is not in a local folder")


def check_unknown(unknown: Sequence[str] | None, known: Sequence[str]) -> None:
    """Raises UserError where a label that is to be unknown is a class of the model."""
    for label in unknown or ():
        if composed(label) in known:
            raise UserError(f"unknown_labels: {label} is a class of the model")


def check_has_card(model_dir: str) -> None:
    """Raises UserError unless there is a trained model in a local folder, whose card can take scores."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"--card: {model_dir} is not a local folder; only the card of one can be written")
    check_card(folder, read_config(folder))


def run(argv: Sequence[str]) -> int:
    """`whisper-meft evaluate`; returns the exit status."""
    inference, generation, arguments, where = make_parser().parse(argv)
    if arguments.card:
        check_has_card(where.model_dir)
    transcribes = kind_of(where.model_dir) != "classification"
    inference.check_kind(transcribes)
    if not transcribes:
        generation.refuse_for_classes()
    elif given := next((n for n in ("reject_below", "unknown_labels") if getattr(arguments, n)), None):
        raise UserError(f"--{given} is for models that classify, and this one transcribes")
    folder = Path(arguments.output_dir or Path(where.model_dir) / "evaluation")
    if Path(where.model_dir, "config.json").is_file() or arguments.output_dir:
        check_writable(folder / "eval_results.json")
    progress, bad = sys.stderr.isatty(), []
    if arguments.streaming and transcribes:
        raise UserError(
            f"streaming: {where.model_dir} transcribes, and that needs the list of clips: leave it out"
        )
    if arguments.streaming:
        shards, labels = load_streamed(arguments)
        model = Classifier.load(where.model_dir, inference, progress)
        threshold_of(arguments.reject_below, model.model.config, where.model_dir)  # what it says, it says now
        check_unknown(arguments.unknown_labels, model.labels)
        check_has_folder(arguments, where.model_dir)
        named = [composed(label) for label in arguments.unknown_labels or ()]
        others = None if named == ["all"] else named
        model, examples, bad = hear(model, shards, arguments.strict, labels, others)
    else:
        examples = load_scored(arguments, transcribes)
    total = len(examples) + len(bad)
    if transcribes:
        model = Transcriber.load(where.model_dir, inference, generation, progress)
        zero_shot = model.zero_shot() if arguments.zero_shot and model.adapted else None
    else:
        if not arguments.streaming:
            model = Classifier.load(where.model_dir, inference, progress)
        threshold = threshold_of(arguments.reject_below, model.model.config, where.model_dir)
        examples, unknown = apart(examples, model.labels, arguments.unknown_labels)
    check_has_folder(arguments, where.model_dir)
    if not arguments.streaming:
        examples, bad = model.check(examples, arguments.strict)
    if transcribes:
        scores = evaluate_transcripts(model, examples, zero_shot)
        bad = [*bad, *scores.left_out]
    else:
        if unknown is not None and not arguments.streaming:
            unknown, more_bad = model.check(unknown, arguments.strict)
            bad = [*bad, *more_bad]
        origin = "saved with the model" if arguments.reject_below == SAVED else "given"
        scores = assess(model, examples, unknown, threshold, origin)
        windows = model.windows
    left_out = [{"file": name, "reason": reason} for name, reason in bad]
    more = {"model": str(where.model_dir), "left_out": left_out}
    if transcribes:
        write_recognition(scores, folder, examples.description, **more, generation=model.options)
    else:
        how = {"window": windows and windows.length, "hop": windows and windows.hop}
        write_assessment(scores, folder, examples.description, **more, **how)
    if arguments.card:
        config = read_config(Path(where.model_dir))
        write_results_into_card(Path(where.model_dir), config, results_of(config, examples, scores.as_dict()))
    scored = f"{printable(where.model_dir)} on {printable(examples.description)}"
    print(f"{scored}\n{scores.as_text()}\nresults are in {folder}")
    if bad:
        print(data.describe_bad(bad, total), file=sys.stderr)
    return 0
