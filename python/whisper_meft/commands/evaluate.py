"""`whisper-meft evaluate`: the paper's scores of a trained model on labelled audio."""

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
from ..evaluation.scoring import evaluate, write_scores
from ..files import check_writable
from ..options.common import DataFormatArguments
from ..options.inference import InferenceArguments
from ..options.parser import Parser, UsageError


@dataclass
class EvaluateArguments(DataFormatArguments):
    """What to score on."""

    _argument_group_name = "data"

    data: str | None = field(
        default=None, metadata={"help": "labelled audio, in any layout that train reads, or a hub name"}
    )
    split: str | None = field(
        default=None, metadata={"help": "split to score (default: test, where there are several)"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "score at most this many examples, chosen at random"}
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
        (InferenceArguments, EvaluateArguments),
        usage="MODEL_DIR --data PATH_OR_NAME [options]",
        description="Scores a trained model: overall accuracy, accuracy per class and their unweighted mean, "
        "macro-F1 and the confusion matrix, as text, JSON and PNG.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder (or hub name) of a trained model")
    return parser


def load_labelled(arguments: EvaluateArguments) -> ExampleSet:
    """The examples that the arguments describe, before their audio is checked."""
    splits = data.list_splits(arguments.data, **arguments.reader_options())
    has_test = "test" in split_kinds(splits).values()
    split = arguments.split or ("test" if has_test else None)
    examples = data.load_examples(arguments.data, split=split, **arguments.reader_options())
    if arguments.max_eval_samples is not None and arguments.max_eval_samples < len(examples):
        chosen = np.random.default_rng(0).permutation(len(examples))[: arguments.max_eval_samples]
        examples = examples.select(sorted(chosen.tolist()))
    return examples


def run(argv: Sequence[str]) -> int:
    """`whisper-meft evaluate`; returns the exit status."""
    inference, arguments, where = make_parser().parse(argv)
    folder = Path(arguments.output_dir or Path(where.model_dir) / "evaluation")
    if Path(where.model_dir, "config.json").is_file() or arguments.output_dir:
        check_writable(folder / "eval_results.json")
    examples = load_labelled(arguments)
    total = len(examples)
    classifier = Classifier.load(where.model_dir, inference, progress=sys.stderr.isatty())
    if arguments.output_dir is None and not Path(where.model_dir).is_dir():
        raise UserError("--output_dir is needed for a model that is not in a local folder")
    examples, bad = classifier.check(examples, arguments.strict)
    scores, _ = evaluate(classifier, examples)
    left_out = [{"file": name, "reason": reason} for name, reason in bad]
    write_scores(scores, folder, examples.description, model=str(where.model_dir), left_out=left_out)
    scored = f"{printable(where.model_dir)} on {printable(examples.description)}"
    print(f"{scored}\n{scores.as_text()}\nresults are in {folder}")
    if bad:
        print(data.describe_bad(bad, total), file=sys.stderr)
    return 0
