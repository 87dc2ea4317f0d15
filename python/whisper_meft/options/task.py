"""What a model is to do with speech: the options that commands for recognition add to those they share."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TaskArguments:
    """What the model does: say which class a clip is of, or write what is said."""

    _argument_group_name = "task"

    task: Literal["classify", "transcribe"] = field(
        default="classify",
        metadata={"help": "classify clips, or transcribe them (which takes a whole Whisper)"},
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "language of all transcripts: a name or a code that Whisper knows, such as dutch or nl "
            "(transcribe; default: english for an English-only Whisper; else it is needed)"
        },
    )
