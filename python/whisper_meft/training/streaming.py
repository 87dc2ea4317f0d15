"""Training from a stream: its batches, clips that cannot be used, and its place in a checkpoint."""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, seed_worker

from ..data.dataset import SpeechDataset
from ..data.examples import Example, ExampleSet
from ..data.streaming import Dealing, Source, Stream, StreamedBatches
from ..errors import UserError
from ..options.training import TrainArguments
from .resuming import stream_of

logger = logging.getLogger(__name__)

_NAMES = 10_000  # of clips that are remembered, for messages about the last steps

_MOST_LEFT_OUT = 1000  # clips that are named at the end

_MOST_WARNINGS = 5


def settle_length(arguments: TrainArguments, stream: Stream) -> None:
    """Makes epochs of a run steps, since its batches have no end: ``max_steps`` from the number of examples,
    and what comes after each epoch comes after so many steps (changes ``arguments``)."""
    steps = steps_per_pass(arguments, stream)
    if arguments.max_steps < 0:
        arguments.max_steps = math.ceil(arguments.num_train_epochs * steps)
    every = arguments.save_steps if steps is None else steps
    if arguments.save_strategy == SaveStrategy.EPOCH:
        arguments.save_strategy, arguments.save_steps = SaveStrategy.STEPS, every
    if arguments.eval_strategy == IntervalStrategy.EPOCH:
        arguments.eval_strategy, arguments.eval_steps = IntervalStrategy.STEPS, every
    arguments.ignore_data_skip = True  # the stream itself goes on in the right place


def steps_per_pass(arguments: TrainArguments, stream: Stream) -> int | None:
    """How many steps have as many clips as the stream, rounded up; None where these are not counted."""
    clips = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return None if stream.size is None else max(1, math.ceil(stream.size / clips))


class OneByOne:
    """Gives the model's inputs of one example after the other, by a dataset that is made for a set of them;
    where that augments, anew in each pass.

    Args:
        make: the dataset of an ExampleSet. example: one that it takes, of which nothing is read.
    """

    def __init__(self, make: Callable[[ExampleSet], SpeechDataset], example: Example):
        self.dataset = make(ExampleSet([example], "a stream"))

    def __call__(self, example: Example, number: int) -> dict[str, Any]:
        """Of an example in the pass of this number."""
        self.dataset.examples = ExampleSet([example], "a stream")
        return self.dataset.item(0, None if self.dataset.augment is None else f"{number}")


class RecentNames(Sequence):
    """Names by the order in which they came, of which the last ones are remembered."""

    def __init__(self):
        self._names, self._count = deque(maxlen=_NAMES), 0

    def add(self, names: Sequence[str]) -> range:
        """Adds names and gives their numbers."""
        self._names.extend(names)
        self._count += len(names)
        return range(self._count - len(names), self._count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        forgotten = self._count - len(self._names)
        return self._names[index - forgotten] if index >= forgotten else f"clip {index + 1} of the stream"


def _same(batch: Any) -> Any:
    return batch


class StreamedTraining(TrainerCallback):
    """The endless training batches of a process, and where in them a run is.

    Args:
        batches: of this process, with one reader for each of its workers.
        arguments: of the run. augmentation: how its clips are changed.

    Attributes:
        names: of the clips, by the "index" that batches carry.
        left_out: reasons by the name of a clip that could not be used, of the first thousand.
        steps_per_pass: see :func:`steps_per_pass`.
    """

    def __init__(
        self, batches: StreamedBatches, arguments: TrainArguments, augmentation: dict[str, Any] | None = None
    ):
        self.batches, self.arguments, self.augmentation = batches, arguments, augmentation
        self.names, self.left_out = RecentNames(), {}
        self._taken, self._places = 0, {}
        self.steps_per_pass = steps_per_pass(arguments, batches.stream)

    @classmethod
    def dealing(cls, arguments: TrainArguments, shuffle_buffer: int) -> Dealing:
        """How a new run deals its examples out."""
        return Dealing(
            arguments.train_batch_size,
            max(1, arguments.dataloader_num_workers),
            arguments.process_index,
            arguments.world_size,
            arguments.seed if arguments.data_seed is None else arguments.data_seed,
            shuffle_buffer,
        )

    def loader(self) -> DataLoader:
        """The batches, in an order that does not depend on how many workers read them."""
        arguments, readers = self.arguments, self.batches.dealing.readers
        workers = arguments.dataloader_num_workers
        # After resuming on another machine there may be more or fewer of them than readers.
        workers = max((each for each in range(1, workers + 1) if readers % each == 0), default=0)
        return DataLoader(
            self.batches,
            batch_size=None,
            collate_fn=_same,
            num_workers=workers,
            pin_memory=arguments.dataloader_pin_memory,
            prefetch_factor=arguments.dataloader_prefetch_factor if workers else None,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=arguments.process_index),
            # Else a resumed run would draw a number more from the generator that dropout draws from.
            generator=torch.Generator().manual_seed(self.batches.dealing.seed % 2**63),
        )

    def take(self, batches: Sequence[dict[str, Any]]) -> None:
        """Notes that these are trained on now, and gives each the numbers of its clips as "index"."""
        for batch in batches:
            source: Source = batch.pop("source")
            batch["index"] = torch.tensor(self.names.add(source.names))
            self._taken += 1
            self._places[source.reader] = source.place
            for name, reason in source.left_out:
                self._leave_out(name, reason)

    def _leave_out(self, name: str, reason: str) -> None:
        if name in self.left_out or len(self.left_out) >= _MOST_LEFT_OUT:
            return
        self.left_out[name] = reason
        if len(self.left_out) <= _MOST_WARNINGS:
            more = "; more such clips are named at the end" if len(self.left_out) == _MOST_WARNINGS else ""
            logger.warning("%s is left out: %s%s", name, reason, more)

    def everything_left_out(self) -> list[tuple[str, str]]:
        """(name, reason) of the clips that could not be used, in all processes; all of them must call it."""
        found = list(self.left_out.items())
        return found if self.arguments.world_size == 1 else sorted(set(gather_object(found)))

    def on_step_end(self, args, state, control, **kwargs):
        # The Trainer counts the whole run as one epoch.
        state.epoch = state.global_step / (self.steps_per_pass or state.max_steps)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, JSON-ready; all processes must call it."""
        own = {"taken": self._taken, "places": {str(key): list(v) for key, v in self._places.items()}}
        each = [own] if self.arguments.world_size == 1 else gather_object([own])
        return {"about": self._about(), "readers": self.batches.dealing.readers, "processes": each}

    def _about(self) -> dict[str, Any]:
        dealing, stream = self.batches.dealing, self.batches.stream
        return {
            "shards": len(stream.shards),
            "names of shards": stream.shards.fingerprint(),
            "counted examples": stream.size,
            "clips per batch": dealing.batch_size,
            "processes": dealing.processes,
            "seed": dealing.seed,
            "shuffle_buffer": dealing.shuffle_buffer,
            "augmentation": self.augmentation,
        }

    def go_on_from(self, checkpoint: Path) -> None:
        """Goes on behind the last batch that was trained on before a checkpoint.

        Raises:
            UserError: it is of no stream, or of one that has another order.
        """
        before = stream_of(checkpoint)
        if before is None:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} was not trained with --streaming, whose clips come in "
                "another order: leave it out, or start anew in another output_dir"
            )
        now, old = self._about(), before["about"]
        if changed := [
            f"{name} {old.get(name)} (now {now[name]})" for name in now if old.get(name) != now[name]
        ]:
            raise UserError(
                f"resume_from_checkpoint: {checkpoint} was trained from a stream with {', '.join(changed)}, "
                "so clips would be left out or come twice: give what it was, or another output_dir"
            )
        own = before["processes"][self.arguments.process_index]
        self._taken = own["taken"]
        self._places = {int(reader): tuple(place) for reader, place in own["places"].items()}
        self.batches.dealing = replace(self.batches.dealing, readers=before["readers"])
        self.batches.go_on_from(self._taken, self._places)
