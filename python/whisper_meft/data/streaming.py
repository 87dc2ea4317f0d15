"""Examples that are read as they come, for data that does not fit: shards, who reads what, order and place.

A pass over the data is a random order of its shards. That line of examples is cut into one part for each
reader, of which a process has one or several, and a reader reads its own part alone, through a buffer that
mixes it. Pass follows pass without end, so that all processes take equally many steps.

The batches of a run are taken from the readers in turn. Where it is known how many examples there are, n, a
reader's part of a pass is as large as what its batches take of it: of batches of B examples the first n / B
hold each example once, whoever reads them, and so on. Else whole shards are dealt out, each once in a pass,
and who has smaller ones comes to the next pass earlier.

All is decided by the seed, the number of the pass and that of the reader, so a place in a reader's examples
is two numbers, and reading goes on from there.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import UserError
from .examples import Example, listing

# After so many clips in a row that cannot be used, reading ends: there may be no other, and it has no end.
_MOST_BROKEN = 1000


class ShardedExamples:
    """A source in parts that are read one by one, each in its own order, without being held.

    Attributes:
        description: where they come from.
        names: of the shards.
        far: whether the data may have to be fetched, so that no more is read than what was asked for.
    """

    description: str
    names: Sequence[str]
    far: ClassVar[bool] = False

    def examples(self, shard: int) -> Iterator[Example]:
        """The examples of one shard, in order; their audio is not decoded.

        Raises:
            UserError: the shard cannot be read.
        """
        raise NotImplementedError

    def labels(self, shard: int) -> Iterator[tuple[str, str | None]]:
        """(name, label) of the examples of one shard, in order."""
        return ((example.name, example.label) for example in self.examples(shard))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Example]:
        return chain.from_iterable(map(self.examples, range(len(self))))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} shards: {self.description})"

    def fingerprint(self) -> str:
        """Tells other shards, or the same in another order, from these; folders do not count."""
        names = "\n".join(os.path.basename(name) for name in self.names)
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class Stream:
    """What is known of a source in shards before it is trained on.

    Attributes:
        shards: the source.
        labels: the classes, in the order of their indices; None: transcripts are what is wanted.
        sizes: examples of each shard, where a first pass has counted them, else None.
        counts: examples of each class, likewise.
    """

    shards: ShardedExamples
    labels: list[str] | None = None
    sizes: tuple[int, ...] | None = None
    counts: Counter | None = None

    @property
    def description(self) -> str:
        """Where the examples come from."""
        return self.shards.description

    @property
    def size(self) -> int | None:
        """The number of examples, where it is known."""
        return None if self.sizes is None else sum(self.sizes)

    def amount(self) -> str:
        """How much it is, in words."""
        count = "examples that were not counted" if self.size is None else f"{self.size} examples"
        return f"{count} in {len(self.shards)} shards"

    def label_counts(self) -> Counter:
        """Examples per class.

        Raises:
            UserError: they were not counted.
        """
        if self.counts is None:
            raise UserError(f"the examples of {self.description} were not counted, in a first pass")
        return self.counts


def count_labels(
    shards: ShardedExamples, chosen: Iterable[int], labelled: bool = True
) -> tuple[dict[int, int], Counter]:
    """A first pass over some of the shards: how many examples each has, and how many each label.

    Args:
        chosen: the shards' numbers. labelled: whether every example must have a label.

    Raises:
        UserError: a shard cannot be read, or an example has no label.
    """
    sizes, counts = {}, Counter()
    for shard in chosen:
        sizes[shard] = 0
        for name, label in shards.labels(shard):
            if labelled and label is None:
                raise UserError(f"{name} has no label")
            sizes[shard] += 1
            if labelled:
                counts[label] += 1
    return sizes, counts


def stretch_of(order: Sequence[int], sizes: Sequence[int], first: int, last: int) -> list[tuple[int, slice]]:
    """A stretch of the line of examples that the shards of these sizes make in this order: shards, and which
    of their examples."""
    parts, begin = [], 0
    for shard in order:
        inside = slice(max(first - begin, 0), min(last - begin, sizes[shard]), 1)
        if inside.start < inside.stop:
            parts.append((shard, inside))
        begin += sizes[shard]
    return parts


def whole_shards_of(order: Sequence[int], reader: int, readers: int) -> list[tuple[int, slice]]:
    """The shards of one of several readers, where sizes are not known. Where there are fewer shards than
    readers each is dealt to several, that read every k-th of its examples."""
    share = -(-readers // len(order))
    pieces = [(shard, slice(first, None, share)) for shard in order for first in range(share)]
    first, last = (each * len(pieces) // readers for each in (reader, reader + 1))
    return pieces[first:last]


def mixed(examples: Iterable[Any], size: int, generator: np.random.Generator) -> Iterator[Any]:
    """The examples in an order that is random within a buffer of ``size``: each takes the place of a random
    one of those that wait, which comes. With 0 they come as they are."""
    if not size:
        yield from examples
        return
    waiting = []
    for example in examples:
        if len(waiting) < size:
            waiting.append(example)
        else:
            place = int(generator.integers(size))
            waiting[place], example = example, waiting[place]
            yield example
    for place in generator.permutation(len(waiting)):
        yield waiting[place]


@dataclass(frozen=True)
class Dealing:
    """How the examples of a stream are dealt out in a run: what its order depends on, but the shards.

    Attributes:
        batch_size: clips of a batch.
        readers: how many streams the batches of each process are taken from in turn, each by itself. It is
            no matter which process on the CPU reads them.
        process, processes: which of those that train this is.
        seed: of the order.
        shuffle_buffer: clips that wait in each reader to be mixed.
    """

    batch_size: int
    readers: int = 1
    process: int = 0
    processes: int = 1
    seed: int = 0
    shuffle_buffer: int = 1000

    @property
    def all_readers(self) -> int:
        """Those of all processes."""
        return self.processes * self.readers

    def turn_of(self, reader: int) -> int:
        """Among all readers, which gives its batch as the how manieth, of a reader of this process."""
        return reader * self.processes + self.process

    def taken(self, turn: int, examples: int) -> int:
        """How many of the first ``examples`` of a run are in batches of the reader whose turn that is."""
        rounds, rest = divmod(examples, self.batch_size * self.all_readers)
        return rounds * self.batch_size + min(max(rest - turn * self.batch_size, 0), self.batch_size)

    def stretch(self, turn: int, number: int, size: int) -> tuple[int, int]:
        """From where to where a reader's part of a pass over ``size`` examples goes.

        Args:
            turn: of the reader. number: of the pass, from 0.
        """
        begin, end = number * size, (number + 1) * size
        counts = [self.taken(each, end) - self.taken(each, begin) for each in range(turn + 1)]
        return sum(counts[:-1]), sum(counts)


Place = tuple[int, int]  # the number of a pass, and how many examples of a reader's part of it have come


def examples_of_reader(
    stream: Stream, dealing: Dealing, reader: int, place: Place = (0, 0)
) -> Iterator[tuple[Example, Place]]:
    """The endless examples of one reader from a place on, each with the place behind it.

    Args:
        reader: its number in this process. place: where to go on.

    Raises:
        UserError: a shard cannot be read; or the stream holds no examples.
    """
    turn, (number, passed) = dealing.turn_of(reader), place
    shards, seed, empty = stream.shards, dealing.seed % 2**64, 0
    while True:
        order = np.random.default_rng([seed, number]).permutation(len(shards)).tolist()
        if stream.sizes is None:
            # In each pass another one's part: that of a shard with few examples may be empty.
            parts = whole_shards_of(order, (turn + number) % dealing.all_readers, dealing.all_readers)
        else:
            parts = stretch_of(order, stream.sizes, *dealing.stretch(turn, number, stream.size))
        found = chain.from_iterable(
            islice(shards.examples(shard), part.start, part.stop, part.step) for shard, part in parts
        )
        generator = np.random.default_rng([seed, number, turn])
        count = 0
        for count, example in enumerate(mixed(found, dealing.shuffle_buffer, generator), 1):
            if count > passed:
                yield example, (number, count)
        empty = 0 if count else empty + 1
        if stream.size == 0 or (stream.size is None and empty > 100 * dealing.all_readers):
            raise UserError(f"{stream.description} holds no examples")
        number, passed = number + 1, 0


@dataclass
class Source:
    """Where the clips of a batch come from.

    Attributes:
        reader: which gave them. place: where that goes on behind this batch.
        names: of the clips. left_out: (name, reason) of those that could not be used.
    """

    reader: int
    place: Place
    names: list[str]
    left_out: list[tuple[str, str]]


class StreamedBatches(torch.utils.data.IterableDataset):
    """Endless batches of one process, for a DataLoader with ``batch_size=None`` and no collation, whose
    number of workers is 0 or divides ``dealing.readers``.

    Args:
        stream, dealing: what is read, and how it is dealt out.
        make_item: gives the model's inputs of an example in the pass of this number, for ``collate``; raises
            UserError where its audio cannot be used.
        collate: makes a batch (a dict) of several.
        check: raises UserError for what no other example makes good, such as an unknown label.
        strict: raise for the first clip that cannot be used, instead of leaving it out.

    Yields dicts: the batch, and a ``Source`` as "source": names of its clips, and where reading goes on.
    """

    def __init__(
        self,
        stream: Stream,
        dealing: Dealing,
        make_item: Callable[[Example, int], dict[str, Any]],
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        check: Callable[[Example], None] = lambda example: None,
        strict: bool = False,
    ):
        self.stream, self.dealing = stream, dealing
        self.make_item, self.collate, self.check, self.strict = make_item, collate, check, strict
        self.go_on_from(0, {})

    def go_on_from(self, batches: int, places: dict[int, Place]) -> None:
        """Goes on behind so many batches, at these places of the readers."""
        self.batches, self.places = batches, dict(places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        readers = self.dealing.readers
        if readers % workers:
            raise UserError(f"the number of workers must divide that of readers, {readers}, got {workers}")
        # The loader takes the batches of its workers in turn: each reader is always of the same worker.
        batch, opened = self.batches + number, {}
        while True:
            reader = batch % readers
            if reader not in opened:
                place = self.places.get(reader, (0, 0))
                opened[reader] = examples_of_reader(self.stream, self.dealing, reader, place)
            yield self._batch(reader, opened[reader])
            batch += workers

    def _batch(self, reader: int, examples: Iterator[tuple[Example, Place]]) -> dict[str, Any]:
        items, source = [], Source(reader, (0, 0), [], [])
        while len(items) < self.dealing.batch_size:
            example, source.place = next(examples)
            self.check(example)
            try:
                items.append(self.make_item(example, source.place[0]))
                source.names.append(example.name)
            except UserError as error:
                if self.strict:
                    raise
                reason = str(error).removeprefix(example.name).lstrip(": ")
                source.left_out.append((example.name, reason))
                if not items and len(source.left_out) >= _MOST_BROKEN:
                    raise UserError(
                        f"{_MOST_BROKEN} clips in a row of {self.stream.description} cannot be used; the "
                        f"first, {source.left_out[0][0]}: {source.left_out[0][1]}"
                    ) from error
        return {**self.collate(items), "source": source}


def check_label(example: Example, labels: Sequence[str] | dict[str, int]) -> None:
    """Raises UserError where an example of a stream has no label, or one that is not among ``labels``."""
    if example.label is None:
        raise UserError(f"{example.name} has no label")
    if example.label not in labels:
        raise UserError(
            f"{example.name} has the label {example.label!r}, which is not one of the classes: "
            f"{listing(labels, 30)}"
        )
