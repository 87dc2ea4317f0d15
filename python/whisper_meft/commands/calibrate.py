"""`whisper-meft calibrate`: makes a classifier's probabilities right, and chooses what to reject."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import data
from ..errors import UserError, printable
from ..evaluation.calibration import calibrate
from ..evaluation.classifier import Classifier
from ..files import check_writable, read_json, write_json, write_text
from ..model.card import calibrated_card
from ..model.kinds import kind_of
from ..options.common import DataFormatArguments
from ..options.inference import InferenceArguments
from ..options.parser import Parser, UsageError
from .evaluate import load_scored


@dataclass
class CalibrateArguments(DataFormatArguments):
    """What to calibrate on."""

    _argument_group_name = "data"

    data: str | None = field(
        default=None,
        metadata={
            "help": "labelled audio that the model was neither trained nor will be scored on, in any layout "
            "that train reads, or a hub name"
        },
    )
    split: str | None = field(
        default=None, metadata={"help": "split to take (default: validation, where there are several)"}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "take at most this many examples, chosen at random"}
    )
    keep: float = field(
        default=0.95,
        metadata={"help": "share of these clips that --reject_below saved of predict is not to reject"},
    )

    def __post_init__(self):
        if not self.data:
            raise UsageError("--data is needed")
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise UsageError(f"--max_eval_samples must be at least 1, got {self.max_eval_samples}")
        if not 0 < self.keep <= 1:
            raise UsageError(f"--keep must be above 0 and at most 1, got {self.keep}")


def make_parser() -> Parser:
    """The parser of `whisper-meft calibrate`."""
    parser = Parser(
        "calibrate",
        (InferenceArguments, CalibrateArguments),
        usage="MODEL_DIR --data PATH_OR_NAME [options]",
        description="Finds the temperature that makes a classifier's probabilities fit validation data, and "
        "the probability below which a clip is rejected such that most of these are kept; saves both in the "
        "model's config.json. predict, evaluate and transformers' pipeline then give the calibrated "
        "probabilities. The most probable class of a clip stays the same; that of a recording in windows of "
        "different classes can change.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder of a trained model that classifies")
    return parser


def run(argv: Sequence[str]) -> int:
    """`whisper-meft calibrate`; returns the exit status."""
    inference, arguments, where = make_parser().parse(argv)
    folder = Path(where.model_dir)
    if not folder.is_dir():
        raise UserError(
            f"MODEL_DIR must be a folder, in which the temperature is saved, got {where.model_dir}"
        )
    if kind_of(where.model_dir) != "classification":
        raise UserError(f"calibrate is for models that classify, and {folder} transcribes")
    inference.check_kind(transcribes=False)
    check_writable(folder / "config.json")
    examples = load_scored(arguments, False, "validation")
    total = len(examples)
    classifier = Classifier.load(where.model_dir, inference, sys.stderr.isatty())
    calibrated_card(folder, classifier.model.config)  # whether it can be written, before the work is done
    examples, bad = classifier.check(examples, arguments.strict)
    found = calibrate(classifier, examples, arguments.keep)
    card = calibrated_card(folder, classifier.model.config)
    values = read_json(folder / "config.json")
    values |= {"calibration_temperature": found.temperature, "rejection_threshold": found.reject_below}
    write_json(folder / "config.json", values)
    if card is not None:
        write_text(folder / "README.md", card)
    print(f"{printable(folder)} on {printable(examples.description)}\n{found.as_text()}")
    if bad:
        print(data.describe_bad(bad, total), file=sys.stderr)
    return 0
