"""Batches of clips of like length, so that little padding is computed."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ..errors import UserError

# Clips count as of like length within this share of the longest: which of them go together is drawn anew in
# each epoch, while the number of batches and their sizes stay.
_STEPS = 50


class BalancedDraw:
    """Which clips an epoch has where each class is to come equally often.

    An epoch has n clips, as many as there are. Over the first e epochs each of K classes comes e n / K times,
    rounded up or down, and of a class no clip comes again before all others of it have come. It is decided by
    the seed and the number of the epoch alone.

    Args:
        classes: of each clip. seed: of the order.
    """

    def __init__(self, classes: Sequence[Any], seed: int = 0):
        if not len(classes):
            raise UserError("there are no clips to draw from")
        _, numbers = np.unique(np.asarray(classes), return_inverse=True)
        sizes = np.bincount(numbers)
        self._members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(sizes)[:-1])
        # The sum over r = 0 ... K - 1 of floor((m + r) / K) is m (Hermite).
        self.size, self.seed = len(numbers), seed % 2**64  # numpy takes no negative one
        self._shift = np.random.default_rng([self.seed]).permutation(len(sizes))

    def __call__(self, epoch: int) -> np.ndarray:
        """int64 (n,), the positions of an epoch's clips, class by class."""
        number, drawn = len(self._members), []
        for index, (members, shift) in enumerate(zip(self._members, self._shift.tolist())):
            first, last = ((each * self.size + shift) // number for each in (epoch, epoch + 1))
            drawn.append(members[self._of_class(index, first, last)])
        return np.concatenate(drawn)

    def _of_class(self, index: int, first: int, last: int) -> np.ndarray:
        """Of the endless row of a class's clips, one random order of all behind the other, a part."""
        size = len(self._members[index])
        orders = max(1, 2**16 // size)  # that are drawn at a time
        block, found = orders * size, [np.zeros(0, np.int64)]
        for number in range(first // block, -(-last // block)):
            rng = np.random.default_rng([self.seed, index, number])
            row = rng.permuted(np.tile(np.arange(size), (orders, 1)), axis=1).reshape(-1)
            begin = number * block
            found.append(row[max(first - begin, 0) : last - begin])
        return np.concatenate(found)


class LengthBatches(Sampler[list[int]]):
    """A batch sampler of clips of like length, in random order; the same in every process.

    Several processes take the batches in turn, as accelerate deals them out: batches that are computed at the
    same time follow each other by length, and their number is a multiple of the number of processes, for
    which a batch is halved where needed (and the last one repeated, where none can be).

    Args:
        lengths: encoder frames of each clip.
        batch_size: clips per batch of one process.
        max_frames: instead, the most encoder frames per batch of one process, padding included.
        processes: how many take batches in turn.
        seed: with the epoch (:meth:`set_epoch`) it decides the order.
        draw: gives the positions of as many clips as there are for an epoch, such as :class:`BalancedDraw`,
            instead of each once; with ``batch_size``.

    Attributes:
        numbered: a clip that comes again in an epoch is given as (position, how often it came before); as it
            is made, it is not.

    Raises:
        UserError: neither or both of ``batch_size`` and ``max_frames``; a clip is longer than ``max_frames``.
    """

    drop_last = True  # for accelerate: the number of batches is right already

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int | None = None,
        max_frames: int | None = None,
        processes: int = 1,
        seed: int = 0,
        draw: Callable[[int], np.ndarray] | None = None,
    ):
        if (batch_size is None) == (max_frames is None):
            raise UserError("one of batch_size and max_frames is needed, and not both")
        if draw is not None and max_frames is not None:
            raise UserError("draw needs batch_size: by max_frames every epoch would have other batches")
        if max_frames is not None and max(lengths) > max_frames:
            raise UserError(
                f"max_frames_per_batch must be at least {max(lengths)}, the encoder frames of the longest "
                f"clip, got {max_frames}"
            )
        self.lengths = torch.tensor(lengths)
        step = math.ceil(max(lengths) / _STEPS)
        self._rounded = torch.minimum((self.lengths + step - 1) // step * step, self.lengths.max())
        self.processes, self.seed, self.epoch, self.draw = processes, seed, 0, draw
        self.numbered = False
        self._ranges = self._divide(batch_size, max_frames)

    def _divide(self, batch_size: int | None, max_frames: int | None) -> list[tuple[int, int]]:
        """Where batches begin and end among the clips in falling order of their rounded lengths."""
        frames = self._rounded.sort(descending=True).values.tolist()
        ranges, start = [], 0
        while start < len(frames):
            size = batch_size or max(1, max_frames // frames[start])
            ranges.append((start, min(start + size, len(frames))))
            start += size
        while len(ranges) % self.processes:
            widest = max(range(len(ranges)), key=lambda i: ranges[i][1] - ranges[i][0])
            start, stop = ranges[widest]
            middle = (start + stop + 1) // 2
            if middle == stop:
                ranges.append(ranges[-1])
            else:
                ranges[widest : widest + 1] = [(start, middle), (middle, stop)]
        return ranges

    @property
    def by_length(self) -> bool:
        """Whether the clips differ in length."""
        return bool((self.lengths != self.lengths[0]).any())

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next pass has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._ranges)

    def __iter__(self) -> Iterator[list[int | tuple[int, int]]]:
        came = Counter()
        for batch in self._batches():
            if not self.numbered:
                yield batch
                continue
            keys = []
            for position in batch:
                keys.append((position, came[position]) if came[position] else position)
                came[position] += 1
            yield keys

    def _batches(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        if self.draw is not None:
            order = torch.from_numpy(self.draw(self.epoch))[order]
        order = order[self._rounded[order].argsort(descending=True, stable=True)].tolist()
        turns = len(self._ranges) // self.processes
        shuffled = torch.randperm(turns, generator=generator).tolist()
        if self.epoch == 0:  # what does not fit the memory shows in the first step
            shuffled.insert(0, shuffled.pop(shuffled.index(self._dearest_turn(order))))
        for turn in shuffled:
            for start, stop in self._ranges[turn * self.processes : (turn + 1) * self.processes]:
                yield order[start:stop]

    def _dearest_turn(self, order: Sequence[int]) -> int:
        frames = self._rounded[order].tolist()
        costs = [(stop - start) * frames[start] for start, stop in self._ranges]
        return max(range(len(costs)), key=costs.__getitem__) // self.processes

    def padding(self) -> float:
        """Share of the frames of this epoch's batches that is padding."""
        batches = [self.lengths[batch] for batch in self._batches()]
        computed = sum(len(each) * int(each.max()) for each in batches)
        return 1 - sum(int(each.sum()) for each in batches) / computed


def batches_by_length(
    lengths: Sequence[int] | None,
    max_frames: int | str,
    arguments: Any,
    clips: int = 0,
    classes: Sequence[Any] | None = None,
) -> LengthBatches | None:
    """The batches that a training run asks for; None means any clips together, drawn by the Trainer.

    Args:
        lengths: encoder frames of each clip, or None where some are not known.
        max_frames: as in :class:`whisper_meft.MeftConfig`.
        arguments: :class:`whisper_meft.options.training.TrainArguments` of the run.
        clips: their number, known also where lengths are not.
        classes: of each clip, where each class is to come equally often.

    Raises:
        UserError: they are asked for, and the lengths are all alike or not known.
    """
    budget, asked = arguments.max_frames_per_batch, arguments.bucket_by_length
    other_order = arguments.dataloader_drop_last or arguments.train_sampling_strategy != "random"
    if not asked and budget is None and other_order:
        return None
    alike = max_frames == "fidelity"
    if (asked or budget is not None) and (alike or lengths is None):
        reason = "max_frames is fidelity, so that all are alike" if alike else "some are not known"
        name = "bucket_by_length" if budget is None else "max_frames_per_batch"
        raise UserError(f"{name} makes batches by the lengths of the clips, but {reason}")
    if asked is False or alike or lengths is None:
        if classes is None and (arguments.world_size == 1 or not clips):
            return None
        # Any clips together, but the last ones are shared out, where accelerate would repeat clips.
        lengths = [1] * (clips or len(classes))
    size = arguments.train_batch_size if budget is None else None
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    draw = None if classes is None else BalancedDraw(classes, seed)
    return LengthBatches(lengths, size, budget, arguments.world_size, seed, draw)


class LongestFirst(Sampler[int]):
    """All clips once, the longest first: for evaluation, where the order is free.

    Args:
        lengths: encoder frames of each clip.
    """

    def __init__(self, lengths: Sequence[int]):
        self.order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)
