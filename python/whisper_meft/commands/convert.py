"""`whisper-meft convert`: checkpoints of the published code into saved models of this library, and back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import UserError, printable
from ..options.parser import Parser, UsageError


@dataclass
class ConvertArguments:
    """How to convert."""

    _argument_group_name = "conversion"

    method: Literal["lst", "unipt", "sherl"] | None = field(
        default=None, metadata={"help": "method of the checkpoint (default: recognised from its tensors)"}
    )
    backbone: str | None = field(
        default=None,
        metadata={
            "help": "backbone that DST shall refer to, a hub name or a folder (default: the one inside SRC, "
            "which makes DST self-contained)"
        },
    )
    to_published: bool = field(
        default=False,
        metadata={"help": "go the other way: from a model of this library to the published form"},
    )
    overwrite: bool = field(default=False, metadata={"help": "write into DST even if it holds something"})

    def __post_init__(self):
        if self.to_published and self.method is not None:
            raise UsageError("--method is read from the model and cannot be given with --to_published")


def make_parser() -> Parser:
    """The parser of `whisper-meft convert`."""
    parser = Parser(
        "convert",
        (ConvertArguments,),
        usage="SRC DST [options]",
        description="Converts a checkpoint folder trained with the paper's published code (config.json and "
        "model.safetensors or pytorch_model.bin) into a model of this library, or back.",
    )
    parser.add_argument("src", metavar="SRC", help="folder to read")
    parser.add_argument("dst", metavar="DST", help="folder to write")
    return parser


def run(argv: Sequence[str]) -> int:
    """`whisper-meft convert`; returns the exit status."""
    arguments, where = make_parser().parse(argv)
    destination = Path(where.dst)
    if destination.is_dir() and any(destination.iterdir()) and not arguments.overwrite:
        raise UserError(f"DST: {destination} is not empty; name another folder, or add --overwrite")

    from ..model.backbone import quiet_transformers
    from ..model.published import convert, to_published

    with quiet_transformers():
        if arguments.to_published:
            to_published(where.src, destination, backbone=arguments.backbone)
            print(f"wrote {destination}, a checkpoint for the published code")
            return 0
        model = convert(where.src, destination, method=arguments.method, backbone=arguments.backbone)
    config = model.meft_config
    sizes = f"reduction factor {config.reduction_factor}"
    if hasattr(config, "adapter_dim"):
        sizes += f", adapter width {config.adapter_dim}"
    labels = ", ".join(printable(model.config.id2label[index]) for index in range(model.config.num_labels))
    print(f"wrote {destination}: {config.method.upper()}, {sizes}, classes {labels}")
    return 0
