"""How a trained model is run: the options of predicting and scoring."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from ..audio.windows import WHISPER_SECONDS, Windows
from ..errors import UserError
from .parser import UsageError


@dataclass
class InferenceArguments:
    """How a trained model is run."""

    _argument_group_name = "model"

    backbone: str | None = field(
        default=None, metadata={"help": "backbone to use instead of the one that the model names"}
    )
    feature_extractor_name: str | None = field(
        default=None, metadata={"help": "feature extractor, if not the one saved with the model"}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "tokenizer, if not the one saved with the model; of models that transcribe"},
    )
    backbone_dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None, metadata={"help": "type to hold the frozen weights in (default: as in training)"}
    )
    backbone_quantization: Literal["int8", "fp8", "nf4", "none"] | None = field(
        default=None,
        metadata={"help": "hold the frozen linear layers in 8 or 4 bits (default: as in training)"},
    )
    attention: str | None = field(
        default=None,
        metadata={
            "help": "run a unipt model with another attention: exact, pooled:p, linear or summary (default: "
            "as in training)"
        },
    )
    backbone_compile: bool = field(
        default=False,
        metadata={"help": "compile one encoder layer and run all by it; pays for many clips"},
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1 ... (default: a GPU if there is one)"}
    )
    batch_size: int = field(default=8, metadata={"help": "clips per batch"})
    num_workers: int = field(default=0, metadata={"help": "processes that read audio"})
    window: str | None = field(
        default=None,
        metadata={
            "help": "seconds of the windows that longer recordings are heard in, or first, which hears their "
            "beginning alone (default: as many as the model hears, 30 with max_frames fidelity); of models "
            "that classify"
        },
    )
    hop: float | None = field(
        default=None,
        metadata={
            "help": "seconds from the beginning of a window to that of the next (default: half a window)"
        },
    )

    def __post_init__(self):
        self.window = window_of(self.window, self.hop)
        if self.batch_size < 1:
            raise UsageError(f"--batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers < 0:
            raise UsageError(f"--num_workers must be 0 or more, got {self.num_workers}")

    def check_kind(self, transcribes: bool) -> None:
        """Raises UsageError where options are given that models of this kind do not have."""
        for name in ("window", "hop"):
            if transcribes and getattr(self, name) is not None:
                raise UsageError(
                    f"--{name} is for models that classify, and this one transcribes, by windows of its own"
                )
        if not transcribes and self.tokenizer_name is not None:
            raise UsageError(
                f"--tokenizer_name {self.tokenizer_name} is for models that transcribe, and this one "
                "classifies"
            )


SAVED = "saved"
FIRST = "first"


def window_of(window: str | float | None, hop: float | None) -> float | str | None:
    """The seconds of a --window, or the word for the first one alone.

    Raises:
        UsageError: neither, or a --hop that does not go with it.
    """
    if window == FIRST and hop is not None:
        raise UsageError(f"--hop {hop:g} is from window to window, and --window {FIRST} hears one alone")
    if window not in (None, FIRST):
        try:
            window = float(window)
        except ValueError:
            raise UsageError(f"--window must be a number of seconds, or {FIRST}, got {window!r}") from None
    if window != FIRST:
        check_windows(window, hop)
    return window


def check_windows(window: float | None, hop: float | None) -> None:
    """Raises UsageError where a --window and a --hop in seconds cannot be used with any model."""
    try:
        Windows.within(WHISPER_SECONDS, window, hop)
    except UserError as error:
        raise UsageError(f"--{error}") from None


def check_threshold(value: str | None) -> None:
    """Raises UsageError for a --reject_below that is neither a probability nor the word for the model's."""
    if value in (None, SAVED):
        return
    try:
        fits = 0 <= float(value) <= 1
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(f"--reject_below must be a number from 0 to 1, or {SAVED}, got {value!r}")


def threshold_of(value: str | None, config: Any, model_dir: str | os.PathLike) -> float | None:
    """The probability that a checked --reject_below stands for; ``config``: the model's.

    Raises:
        UserError: the saved one is asked for, and there is none.
    """
    if value != SAVED:
        return None if value is None else float(value)
    if config.rejection_threshold is None:
        raise UserError(
            f"--reject_below {SAVED}: {model_dir} has no threshold; give a number, or let `whisper-meft "
            "calibrate` choose one"
        )
    return config.rejection_threshold
