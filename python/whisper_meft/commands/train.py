"""`whisper-meft train`: see :func:`whisper_meft.training.run.train` for what it does."""

from collections.abc import Sequence

from ..options.parser import Parser, hide_options
from ..options.training import COMMON_TRAINING_OPTIONS, GROUPS, PRESETS, TrainArguments
from ..training.run import train


def make_parser(all_options: bool = False) -> Parser:
    """The parser of `whisper-meft train`."""
    parser = Parser(
        "train",
        GROUPS,
        usage="--model_name_or_path NAME_OR_DIR --train_data PATH_OR_NAME --output_dir DIR ...\n"
        "       whisper-meft train CONFIG.json ...",
        description="Trains a classification head on a Whisper encoder, or with --task transcribe a Whisper "
        "that writes what is said, with a side network beside it or by one of the methods that those are "
        "compared with.",
    )
    parser.presets = PRESETS
    parser.add_argument(
        "--help_all",
        action="help",
        help="also describe the other options of transformers.TrainingArguments",
    )
    if not all_options:
        hidden = hide_options(parser, TrainArguments._argument_group_name, COMMON_TRAINING_OPTIONS)
        parser.epilog += (
            " Every other option of transformers.TrainingArguments is accepted too, described by --help_all: "
            + " ".join(hidden)
        )
    return parser


def run(argv: Sequence[str]) -> int:
    """`whisper-meft train`; returns the exit status."""
    arguments = make_parser("--help_all" in argv).parse(argv)
    train(*arguments)
    return 0
