"""What must be as it was where a run is gone on with, beside its steps: what its weights, its scores and its
record would otherwise be only partly of."""

import hashlib
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers.trainer_utils import SaveStrategy, SchedulerType

from ..data.digest import digest_of
from ..data.streaming import Stream
from ..options.skew import COMPUTED_WEIGHTS
from ..options.training import TrainArguments
from .data import RunData
from .settings import Settings
from .tasks.base import Task

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
_OF_LOSS = ("loss", "label_smoothing_factor")
# Of the scores of checkpoints.
_OF_CHOICE = ("metric_for_best_model", "greater_is_better")
_OF_TRANSCRIPTS = ("generation_max_length", "generation_num_beams")
_OF_EVALUATION = " of eval_data"


def terms_of(settings: Settings, examples: RunData, training_set: Dataset) -> dict[str, Any]:
    """The terms of a run, by the names of the options that they come from; plain JSON values.

    Of the clips what is listed of them counts, wherever they lie, and nothing is heard. Those of a stream
    are not listed; its own place in a checkpoint has the names of the shards.

    Args:
        settings: of the run, its task knowing the classes. examples: of it. training_set: what it trains on.
    """
    arguments, task = settings.training, settings.task
    terms = _given(arguments, (*_OF_OPTIMIZER, *_OF_LOSS))
    terms["focal_gamma"] = arguments.gamma()
    terms["class_weights"] = task.weights and f"{_kind(arguments.class_weights)} {_digest(task.weights)}"
    if not isinstance(examples.training, Stream):
        terms[f"{_listed(task)} of train_data"] = digest_of(examples.training)
    if examples.evaluation is not None and arguments.eval_strategy != "no":
        terms |= _of_choice(arguments, task)
        terms[f"{_listed(task)}{_OF_EVALUATION}"] = digest_of(examples.evaluation)
    augment = settings.augment
    for name, found in (("noise_dir", augment and augment.noises), ("room_dir", augment and augment.rooms)):
        terms[f"recordings in {name}"] = found and digest_of(found)
    # States that are kept as they were computed are those that would be computed.
    cache = getattr(training_set, "cache", None)
    terms["cache_features"] = None if cache is None or cache.storage == "exact" else cache.storage
    terms["cache_copies"] = None if settings.augment is None else arguments.cache_copies
    return terms


def free_terms(arguments: TrainArguments, terms: dict[str, Any]) -> frozenset[str]:
    """The names of those ``terms`` of a run that may change, since nothing comes of the scores: no checkpoint
    is chosen by them, nor the learning rate."""
    of_scores = arguments.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
    if of_scores or arguments.load_best_model_at_end or arguments.save_strategy == SaveStrategy.BEST:
        return frozenset()
    names = (*_OF_CHOICE, *_OF_TRANSCRIPTS)
    return frozenset(name for name in terms if name in names or name.endswith(_OF_EVALUATION))


def _of_choice(arguments: TrainArguments, task: Task) -> dict[str, Any]:
    """What the best checkpoint so far was chosen by."""
    generated = not task.labelled and arguments.metric_for_best_model != "loss"
    return _given(arguments, (*_OF_CHOICE, *(_OF_TRANSCRIPTS if generated else ())))


def _given(arguments: TrainArguments, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in names}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: None if value in ("", {}) else value for name, value in values.items()}


def _listed(task: Task) -> str:
    return "names and labels" if task.labelled else "names and transcripts"


def _kind(class_weights: str) -> str:
    return class_weights if class_weights in COMPUTED_WEIGHTS else "of a file"


def _digest(numbers: Sequence[float]) -> str:
    return hashlib.sha256(repr(list(numbers)).encode()).hexdigest()[:8]
