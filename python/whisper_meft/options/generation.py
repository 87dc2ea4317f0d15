"""How a model that transcribes writes its text: the options of predicting and scoring."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..errors import UserError
from .parser import UsageError


@dataclass
class GenerationArguments:
    """How text is generated, by models that transcribe; of Hugging Face's ``generate``."""

    _argument_group_name = "transcription"

    language: str | None = field(
        default=None,
        metadata={
            "help": "language that is spoken, a code (nl) or a name (dutch) (default: the one that the model "
            "was saved with, or guessed clip by clip)"
        },
    )
    task: Literal["transcribe", "translate"] | None = field(
        default=None,
        metadata={"help": "transcribe, or translate into English (default: as the model was saved)"},
    )
    num_beams: int | None = field(
        default=None, metadata={"help": "beams of the search (default: as the model was saved, mostly 1)"}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "most tokens for 30 s of sound (default: what the decoder holds, mostly 444)"},
    )
    return_timestamps: bool = field(
        default=False,
        metadata={
            "help": "predict when each part is said too; always for clips longer than the window of 30 s"
        },
    )

    def __post_init__(self):
        for name in ("num_beams", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")

    def chosen(self) -> dict[str, Any]:
        """The options that were given, by name."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in given.items() if value not in (None, False)}

    def refuse_for_classes(self) -> None:
        """Raises UserError where one of them is given for a model that classifies."""
        for name in self.chosen():
            raise UserError(f"--{name} is for models that transcribe, and this one classifies")
