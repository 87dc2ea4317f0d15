"""`whisper-meft evaluate`: scores of a trained model, on labelled audio or on transcripts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import data
from ..data.examples import ExampleSet
from ..data.splits import split_kinds
from ..errors import UserError, printable
from ..evaluation.classifier import Classifier
from ..evaluation.recognition import evaluate_transcripts, write_recognition
from ..evaluation.scoring import evaluate, write_scores
from ..evaluation.transcriber import Transcriber
from ..files import check_writable
from ..model.kinds import kind_of
from ..options.common import DataFormatArguments
from ..options.generation import GenerationArguments
from ..options.inference import InferenceArguments
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
    output_dir: str | None = field(
        default=None, metadata={"help": "folder for the results (default: MODEL_DIR/evaluation)"}
    )

    def __post_init__(self):
        if not self.data:
            raise UsageError("--data is needed")
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise UsageError(f"--max_eval_samples must be at least 1, got {self.max_eval_samples}")


def make_parser() -> Parser:
    """The parser of `whisper-meft evaluate`."""
    parser = Parser(
        "evaluate",
        (InferenceArguments, GenerationArguments, EvaluateArguments),
        usage="MODEL_DIR --data PATH_OR_NAME [options]",
        description="Scores a trained model. One that classifies: overall accuracy, accuracy per class and "
        "their unweighted mean, macro-F1 and the confusion matrix, as text, JSON and PNG. One that "
        "transcribes, or a plain Whisper: word and character error rates beside those of the backbone alone, "
        "per speaker, as text and JSON, and the transcripts as CSV.",
    )
    parser.add_argument(
        "model_dir",
        metavar="MODEL_DIR",
        help="folder (or hub name) of a trained model, or of a plain Whisper",
    )
    return parser


def load_scored(arguments: EvaluateArguments, transcribes: bool) -> ExampleSet:
    """The examples that the arguments describe, before their audio is checked."""
    options = {**arguments.reader_options(), "require_text": transcribes}
    splits = data.list_splits(arguments.data, **options)
    has_test = "test" in split_kinds(splits).values()
    split = arguments.split or ("test" if has_test else None)
    examples = data.load_examples(arguments.data, split=split, **options)
    if arguments.max_eval_samples is not None and arguments.max_eval_samples < len(examples):
        chosen = np.random.default_rng(0).permutation(len(examples))[: arguments.max_eval_samples]
        examples = examples.select(sorted(chosen.tolist()))
    return examples


def run(argv: Sequence[str]) -> int:
    """`whisper-meft evaluate`; returns the exit status."""
    inference, generation, arguments, where = make_parser().parse(argv)
    transcribes = kind_of(where.model_dir) != "classification"
    if not transcribes:
        generation.refuse_for_classes()
    folder = Path(arguments.output_dir or Path(where.model_dir) / "evaluation")
    if Path(where.model_dir, "config.json").is_file() or arguments.output_dir:
        check_writable(folder / "eval_results.json")
    examples = load_scored(arguments, transcribes)
    total, progress = len(examples), sys.stderr.isatty()
    if transcribes:
        model = Transcriber.load(where.model_dir, inference, generation, progress)
        zero_shot = model.zero_shot() if arguments.zero_shot and model.adapted else None
    else:
        model = Classifier.load(where.model_dir, inference, progress)
    if arguments.output_dir is None and not Path(where.model_dir).is_dir():
        raise UserError("--output_dir is needed for a model that is not in a local folder")
    examples, bad = model.check(examples, arguments.strict)
    if transcribes:
        scores = evaluate_transcripts(model, examples, zero_shot)
        bad = [*bad, *scores.left_out]
    else:
        scores, _ = evaluate(model, examples)
    left_out = [{"file": name, "reason": reason} for name, reason in bad]
    more = {"model": str(where.model_dir), "left_out": left_out}
    if transcribes:
        write_recognition(scores, folder, examples.description, **more, generation=model.options)
    else:
        write_scores(scores, folder, examples.description, **more)
    scored = f"{printable(where.model_dir)} on {printable(examples.description)}"
    print(f"{scored}\n{scores.as_text()}\nresults are in {folder}")
    if bad:
        print(data.describe_bad(bad, total), file=sys.stderr)
    return 0
