"""What must be as it was where a run is gone on with, beside its steps: what its weights, its scores and its
record would otherwise be only partly of."""

from typing import Any

from ..options.training import TrainArguments
from .settings import Settings

# Of the optimizer and the form of its schedule. They are saved with a checkpoint and restored from there,
# whatever is asked for, or cannot be. The length and the warm-up of the schedule may change.
_OF_OPTIMIZER = (
    "learning_rate",
    "head_learning_rate",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
)


def terms_of(settings: Settings) -> dict[str, Any]:
    """The terms of a run, by the names of the options that they come from; plain JSON values."""
    return _given(settings.training, _OF_OPTIMIZER)


def _given(arguments: TrainArguments, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in names}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: None if value in ("", {}) else value for name, value in values.items()}
