"""Streams: who reads which examples, in which order, and going on in the middle."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from data_fixtures import table
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming_fixtures import make_shards
from torch.utils.data import DataLoader
from whisper_meft.data import load_shards
from whisper_meft.data.examples import Example
from whisper_meft.data.streaming import (
    Dealing,
    ShardedExamples,
    Stream,
    StreamedBatches,
    count_labels,
    examples_of_reader,
    mixed,
)
from whisper_meft.errors import UserError


class Numbers(ShardedExamples):
    """Examples called 0, 1, ..., and how many of them were made."""

    description = "numbers"

    def __init__(self, sizes, labels="ab"):
        self.sizes, self._labels, self.made = sizes, labels, 0
        self.names = [f"shard {i}" for i in range(len(sizes))]

    def examples(self, shard):
        first = sum(self.sizes[:shard])
        for number in range(first, first + self.sizes[shard]):
            self.made += 1
            yield Example(np.zeros(1), self._labels[number % len(self._labels)], name=str(number))


def stream_of(sizes, counted=True) -> Stream:
    return Stream(Numbers(sizes), ["a", "b"], tuple(sizes) if counted else None)


def batches_of(stream, dealing, **options) -> StreamedBatches:
    plain = {"make_item": lambda example, _: example.name, "collate": lambda names: {"names": names}}
    return StreamedBatches(stream, dealing, **plain | options)


def same(batch):
    return batch


def loaded(batches: StreamedBatches, count: int, workers: int = 0) -> list[dict]:
    return list(islice(DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=same), count))


def names(found: list[dict]) -> list[str]:
    return [name for batch in found for name in batch["names"]]


# --- each once --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    readers=st.integers(1, 4),
    processes=st.integers(1, 3),
    batch_size=st.integers(1, 5),
    buffer=st.integers(0, 7),
    counted=st.booleans(),
)
def test_every_pass_has_every_example_once(sizes, readers, processes, batch_size, buffer, counted):
    stream, passes = stream_of(sizes, counted), (0, 1, 7)
    found = {number: Counter() for number in passes}
    for process in range(processes):
        dealing = Dealing(batch_size, readers, process, processes, seed=3, shuffle_buffer=buffer)
        for reader in range(readers):
            for example, (number, _) in examples_of_reader(stream, dealing, reader):
                if number > passes[-1]:
                    break
                if number in found:
                    found[number][example.name] += 1
    for count in found.values():
        assert count == Counter(str(i) for i in range(sum(sizes)))


@pytest.mark.parametrize("counted", [True, False])
def test_fewer_examples_than_readers(counted):
    for process in range(2):
        found = loaded(batches_of(stream_of([1], counted), Dealing(1, 3, process, 2)), 6)
        assert names(found) == ["0"] * 6


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[5, 13, 30], [1, 1, 1, 45], [48]])
def test_an_epoch_of_steps_is_a_pass(sizes, readers, processes):
    """Of uneven shards, and where there are fewer shards than readers."""
    steps = 48 // (4 * processes)
    epochs = [[], []]
    for process in range(processes):
        dealing = Dealing(4, readers, process, processes, seed=1, shuffle_buffer=5)
        found = loaded(batches_of(stream_of(sizes), dealing), 2 * steps)
        assert all(len(batch["names"]) == 4 for batch in found)
        epochs[0] += names(found[:steps])
        epochs[1] += names(found[steps:])
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(i) for i in range(48)]
    assert epochs[0] != epochs[1]


def test_what_is_over_of_a_pass_comes_before_the_next():
    found = names(loaded(batches_of(stream_of([4, 6]), Dealing(4, seed=2)), 10))
    for number in range(4):
        assert sorted(found[10 * number : 10 * (number + 1)], key=int) == [str(i) for i in range(10)]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_order_does_not_depend_on_who_reads(workers):
    dealing = Dealing(3, readers=4, seed=5, shuffle_buffer=6)
    expected = loaded(batches_of(stream_of([9, 20, 4]), dealing), 25)
    found = loaded(batches_of(stream_of([9, 20, 4]), dealing), 25, workers)
    assert [batch["names"] for batch in found] == [batch["names"] for batch in expected]


def test_workers_that_do_not_divide_the_readers_are_refused():
    with pytest.raises(UserError, match="number of workers must divide that of readers, 4, got 3"):
        loaded(batches_of(stream_of([9]), Dealing(3, readers=4)), 2, workers=3)


def test_the_seed_decides():
    orders = {
        seed: names(loaded(batches_of(stream_of([9, 20, 4]), Dealing(3, seed=seed)), 11))
        for seed in (0, 1, -1)
    }
    assert len({tuple(order) for order in orders.values()}) == 3
    assert orders[0] == names(loaded(batches_of(stream_of([9, 20, 4]), Dealing(3, seed=0)), 11))


# --- mixing -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 30), size=st.integers(0, 12))
def test_mixing_keeps_everything_and_holds_no_more_than_it_may(count, size):
    taken = 0

    def counting():
        nonlocal taken
        for number in range(count):
            taken += 1
            yield number

    found = []
    for each in mixed(counting(), size, np.random.default_rng(0)):
        assert taken - len(found) <= size + 1
        found.append(each)
    assert sorted(found) == list(range(count))
    if size == 0:
        assert found == list(range(count))


def test_a_large_buffer_mixes_all():
    found = list(mixed(range(1000), 1000, np.random.default_rng(0)))
    assert abs(np.corrcoef(found, np.arange(1000))[0, 1]) < 0.1


def test_a_buffer_reaches_over_shards():
    found = names(loaded(batches_of(stream_of([20] * 3), Dealing(30, shuffle_buffer=30)), 1))
    assert len({int(name) // 20 for name in found}) > 1


# --- going on ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    readers=st.integers(1, 3),
    done=st.integers(0, 20),
    buffer=st.integers(0, 8),
    counted=st.booleans(),
    broken=st.sets(st.integers(0, 14)),
)
def test_going_on_gives_what_would_have_come(sizes, readers, done, buffer, counted, broken):
    def item(example, number):
        if int(example.name) in broken and number // 6 % 2 == 0:  # a reader may have nothing else
            raise UserError(f"{example.name}: broken")
        return example.name

    dealing = Dealing(3, readers, seed=4, shuffle_buffer=buffer)

    def make():
        return batches_of(stream_of(sizes, counted), dealing, make_item=item)

    whole = loaded(make(), done + 12)
    places = {batch["source"].reader: batch["source"].place for batch in whole[:done]}
    resumed = make()
    resumed.go_on_from(done, places)
    assert [batch["names"] for batch in loaded(resumed, 12)] == [batch["names"] for batch in whole[done:]]


def test_going_on_does_not_read_earlier_passes():
    stream, dealing = stream_of([50, 50]), Dealing(5, seed=1, shuffle_buffer=10)
    whole = loaded(batches_of(stream, dealing), 85)
    before, batches = stream.shards.made, batches_of(stream, dealing)
    batches.go_on_from(84, {0: whole[83]["source"].place})
    assert loaded(batches, 1)[0]["names"] == whole[84]["names"]
    assert before > 420 and stream.shards.made - before <= 50


# --- what is wrong with clips -----------------------------------------------------------------------------


def broken_at(*numbers):
    def item(example, _):
        if int(example.name) in numbers:
            raise UserError(f"{example.name}: cannot be read")
        return example.name

    return item


def test_broken_clips_are_left_out_and_named():
    batches = batches_of(stream_of([10]), Dealing(4), make_item=broken_at(3, 7))
    found = loaded(batches, 2)
    left_out = [each for batch in found for each in batch["source"].left_out]
    assert sorted(left_out) == [("3", "cannot be read"), ("7", "cannot be read")]
    assert sorted(names(found), key=int) == ["0", "1", "2", "4", "5", "6", "8", "9"]
    assert [batch["source"].names for batch in found] == [batch["names"] for batch in found]


def test_strict_stops_at_the_first():
    batches = batches_of(stream_of([10]), Dealing(4), make_item=broken_at(3), strict=True)
    with pytest.raises(UserError, match="3: cannot be read"):
        loaded(batches, 3)


def test_a_stream_of_broken_clips_ends():
    batches = batches_of(stream_of([10]), Dealing(4), make_item=broken_at(*range(10)))
    with pytest.raises(
        UserError, match=r"1000 clips in a row of numbers cannot be used; the first, \d: cannot"
    ):
        loaded(batches, 1)


@pytest.mark.parametrize("counted", [True, False])
def test_an_empty_stream_ends(counted):
    with pytest.raises(UserError, match="numbers holds no examples"):
        loaded(batches_of(stream_of([0, 0], counted), Dealing(4, readers=2)), 1)


def test_a_check_that_fails_is_no_broken_clip():
    def check(example):
        raise UserError(f"{example.name} has another label")

    with pytest.raises(UserError, match="has another label"):
        loaded(batches_of(stream_of([3]), Dealing(2), check=check), 1)


def test_a_first_pass_counts():
    sizes, counts = count_labels(Numbers([3, 0, 4]), range(3))
    assert (sizes, counts) == ({0: 3, 1: 0, 2: 4}, Counter(a=4, b=3))
    with pytest.raises(UserError, match="1 has no label"):
        count_labels(Numbers([3], labels=["a", None]), [0])
    assert count_labels(Numbers([3], labels=["a", None]), [0], labelled=False) == ({0: 3}, Counter())


# --- what is streamed -------------------------------------------------------------------------------------


def test_other_layouts_are_refused(tmp_path):
    manifest = table(tmp_path / "list.csv", "path,label", "a.wav,a")
    with pytest.raises(UserError, match='list.csv has the format "manifest", which is not streamed'):
        load_shards(str(manifest))


def test_times_and_roots_are_refused(tmp_path):
    make_shards(tmp_path, [2])
    with pytest.raises(UserError, match="onset cannot be used, clips in shards are read whole"):
        load_shards(str(tmp_path), start_column_name="onset")
    with pytest.raises(UserError, match="elsewhere cannot be used"):
        load_shards(str(tmp_path), data_root="elsewhere")
