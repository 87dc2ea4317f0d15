"""Going on from a checkpoint: what must be as it was, what is carried over, whether anything is left."""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from ..errors import UserError
from ..files import read_json
from ..options.training import TrainArguments

# What there was before it could be chosen, of checkpoints that do not say.
_OLDER = {"sampling": "natural", "windows": None, "augmentation": None}

# Names of the same optimizer, by the one that stands for both.
_SAME_OPTIMIZER = {"adamw_torch_fused": "adamw_torch"}


@dataclass
class Batches:
    """What decides which clips come in which step: progress is counted in steps.

    Attributes:
        train_examples, steps_per_epoch: counts.
        clips_per_step: of all processes together; None where batches are made by frames.
        processes: how many train side by side.
        by_length: whether the batches are made by :class:`whisper_meft.data.batching.LengthBatches`.
        sampling: which clips an epoch has. windows: how longer clips are cut, in words.
        augmentation: how clips are changed.
        order_of_clips: tells theirs from another; None of a stream, and where it is not known.
        others: the options of these names.
    """

    seed: int
    data_seed: int | None
    train_examples: int
    steps_per_epoch: int
    clips_per_step: int | None
    max_frames_per_batch: int | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    processes: int
    by_length: bool
    sampling: str = "natural"
    windows: str | None = None
    augmentation: dict[str, Any] | None = None
    order_of_clips: str | None = None

    @classmethod
    def of(
        cls,
        arguments: TrainArguments,
        examples: int,
        batches: int,
        by_length: bool,
        windows: str | None = None,
        augmentation: dict[str, Any] | None = None,
    ) -> "Batches":
        """Of a run with these arguments, ``examples`` clips in ``batches`` batches an epoch and process."""
        accumulated = arguments.gradient_accumulation_steps
        budget = getattr(arguments, "max_frames_per_batch", None)
        clips = arguments.train_batch_size * accumulated * arguments.world_size
        return cls(
            seed=arguments.seed,
            data_seed=arguments.data_seed,
            train_examples=examples,
            steps_per_epoch=max(math.ceil(batches / accumulated), 1),
            clips_per_step=clips if budget is None else None,
            max_frames_per_batch=budget,
            per_device_train_batch_size=arguments.per_device_train_batch_size,
            gradient_accumulation_steps=accumulated,
            processes=arguments.world_size,
            by_length=by_length,
            sampling=getattr(arguments, "sampling", "natural"),
            windows=windows,
            augmentation=augmentation,
        )

    def changes_since(self, before: dict[str, Any], step: int) -> list[str]:
        """The names of what has changed so that a run cannot go on at ``step``, as ``before`` counts it."""
        before = _OLDER | before
        if None in (before.get("order_of_clips"), self.order_of_clips):
            before["order_of_clips"] = self.order_of_clips
        changed = [name for name, value in asdict(self).items() if name in before and before[name] != value]
        dealt = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes", "by_length")
        if set(changed) - {*dealt, "order_of_clips"}:
            return changed
        # The same clips, as many in a step, dealt out otherwise: that does not matter between epochs, nor
        # where one process takes them in the same random order.
        alone = self.processes == 1 and not self.by_length
        if step % self.steps_per_epoch == 0 or (alone and not {*dealt[2:], "order_of_clips"} & set(changed)):
            return []
        return changed


class RunRecord(TrainerCallback, ExportableState):
    """What a checkpoint says about its run beside the Trainer's own state.

    Attributes:
        batches: a :class:`Batches` as a dictionary.
        terms: of :func:`whisper_meft.training.terms.terms_of`. free: names of those that may change.
        loss_sum: of all steps' losses since the run's beginning, or None where that is not known.
        stream: where a stream that is trained on goes on, or None.
    """

    def __init__(self, batches: dict[str, Any] | None = None):
        self.batches = batches
        self.terms: dict[str, Any] = {}
        self.free: frozenset[str] = frozenset()
        self.loss_sum: float | None = 0.0
        self.stream: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        streamed = {} if self.stream is None else {"stream": self.stream}
        told = {"batches": self.batches, "terms": self.terms, "loss_sum": self.loss_sum}
        return {"args": {}, "attributes": {**told, **streamed}}

    @classmethod
    def loss_sum_of(cls, state: TrainerState) -> float | None:
        """The sum that was saved with a state."""
        before = _attributes(state.stateful_callbacks, cls.__name__)
        return before.get("loss_sum", 0.0 if state.global_step == 0 else None)

    def forget_other_choice(self, state: TrainerState) -> None:
        """Forgets the best checkpoint of a state that goes on where it was found by other scores: those of
        now could not be compared with its own."""
        before = _attributes(state.stateful_callbacks, type(self).__name__).get("terms") or {}
        if changed_terms(before, self.terms):  # one of the free ones: others are refused
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.loss_sum = self.loss_sum_of(state)
        self.forget_other_choice(state)
        # The Trainer goes on with the intervals of the checkpoint, also where others are asked for now.
        state.compute_steps(args, state.max_steps)


class EarlyStopping(EarlyStoppingCallback):
    """``transformers.EarlyStoppingCallback`` that goes on counting where a resumed run was."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        before = _attributes(state.stateful_callbacks, type(self).__name__)
        self.early_stopping_patience_counter = before.get("early_stopping_patience_counter", 0)


def _attributes(callbacks: dict[str, Any], name: str) -> dict[str, Any]:
    entry = callbacks.get(name) or {}
    return (entry[0] if isinstance(entry, list) else entry).get("attributes", {})


def stream_of(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of the stream that was trained on, or None."""
    state = read_json(checkpoint / "trainer_state.json")
    return _attributes(state.get("stateful_callbacks") or {}, "RunRecord").get("stream")


def changed_terms(
    before: dict[str, Any], now: dict[str, Any], free: Collection[str] = frozenset()
) -> list[str]:
    """The names of what differs, without the ``free``. What one of them does not say is no change:
    checkpoints of earlier versions say less."""
    both = [name for name in now if name in before and name not in free]
    return [name for name in both if _as_compared(name, before[name]) != _as_compared(name, now[name])]


def _as_compared(name: str, value: Any) -> Any:
    return _SAME_OPTIMIZER.get(value, value) if name == "optim" else value


def check_goes_on(checkpoint: Path, batches: Batches, record: RunRecord) -> dict[str, Any]:
    """The terms of a run that goes on from a checkpoint: those it had and those of now.

    Raises:
        UserError: the steps of the checkpoint are not those that ``batches`` counts, or some of the terms of
            the ``record`` have changed that are not free.
    """
    state = read_json(checkpoint / "trainer_state.json")
    step, epoch = state["global_step"], state.get("epoch")
    saved = _attributes(state.get("stateful_callbacks") or {}, "RunRecord")
    before, before_terms = saved.get("batches"), saved.get("terms") or {}
    if before is None:  # of another Trainer
        before = {"steps_per_epoch": round(step / epoch)} if epoch else {}
    _check_unchanged(checkpoint, before, before_terms, batches, record, step)
    kept = {name: before_terms[name] for name in ("optim",) if name in before_terms}
    return before_terms | record.terms | kept


def check_finished_goes_on(folder: Path, batches: Batches, record: RunRecord) -> None:
    """As :func:`check_goes_on`, of a finished run that left no checkpoint: it would be trained anew, and what
    it left written over."""
    results = read_json(folder / "train_results.json")
    before, before_terms = results.get("batches") or {}, results.get("terms") or {}
    _check_unchanged(folder, before, before_terms, batches, record, results.get("steps") or 0)


def _check_unchanged(
    trained: Path,
    before: dict[str, Any],
    before_terms: dict[str, Any],
    batches: Batches,
    record: RunRecord,
    step: int,
) -> None:
    """Raises UserError, with what has changed of the steps and terms by which ``trained`` was trained up to
    ``step``."""
    others = changed_terms(before_terms, record.terms, record.free)
    steps = batches.changes_since(before, step)
    if len(steps + others) > 1:  # other clips come in another order too
        steps = [name for name in steps if name != "order_of_clips"]
    if not steps and not others:
        return
    then, now = _OLDER | before | before_terms, asdict(batches) | record.terms
    named = ", ".join(f"{name} {then[name]} (now {now[name]})" for name in steps + others)
    reason = (
        "; progress is counted in steps, so clips would be left out or come twice"
        if steps
        else ", and a run goes on as it began"
    )
    raise UserError(
        f"resume_from_checkpoint: {trained} was trained with {named}{reason}: give what it was, or start "
        "anew in another output_dir"
    )


def is_at_end(checkpoint: Path, total_steps: int, patience: int | None) -> bool:
    """Whether training was over at a checkpoint: at the last step, or stopped early with this patience."""
    state = read_json(checkpoint / "trainer_state.json")
    waited = _attributes(state.get("stateful_callbacks") or {}, "EarlyStopping")
    early = patience is not None and waited.get("early_stopping_patience_counter", 0) >= patience
    return early or state["global_step"] >= total_steps


def finished_results(
    folder: Path,
    evaluated: bool,
    batches: Batches,
    record: RunRecord,
    total_steps: int,
    patience: int | None,
    step: int,
) -> dict[str, Any] | None:
    """The train_results.json of a run that has nothing left to do; None if something is.

    Args:
        folder: of the run. evaluated: whether it leaves evaluation results. batches: of its steps.
        record: of the run as it is asked for.
        total_steps, patience: what is asked for now. step: of the newest checkpoint, 0 without one.
    """
    names = ["config.json", "model.safetensors", "preprocessor_config.json", "train_results.json"]
    names += ["eval_results.json", "evaluation.txt"] if evaluated else []
    if not all((folder / name).is_file() for name in names):
        return None
    results = read_json(folder / "train_results.json")
    done = results.get("steps") or 0
    if batches.changes_since(results.get("batches") or {}, done):
        return None
    if changed_terms(results.get("terms") or {}, record.terms, record.free):
        return None
    same = results.get("planned_steps") == total_steps and results.get("early_stopping_patience") == patience
    return results if done >= step and (done >= total_steps or same) else None
