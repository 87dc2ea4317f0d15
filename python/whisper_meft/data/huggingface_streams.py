"""Hugging Face data sets with ``streaming=True``: rows as they come, of one shard at a time.

As in :mod:`.huggingface`, ``datasets`` decodes no audio. Its own shuffling and dealing out to processes are
not used, since neither says how to go on in the middle: :mod:`.streaming` does both.
"""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import columns
from .examples import DatasetCell, Example, listing
from .huggingface import (
    _FEATURES,
    _NAMES,
    _audio_column,
    _is_nested_list,
    _reason,
    datasets,
    label_names,
    opened,
    rooted,
    say_unread,
    split_columns,
    table_of,
    without_splits,
)
from .names import composed, folded
from .options import Options
from .splits import CANONICAL, canonical_split
from .streaming import ShardedExamples

_AT_ONCE = 16  # rows that are made of columns together

_SHARDS = 64  # that a data set on disk is divided into


class _Row:
    """A row, as a data set of one."""

    def __init__(self, values: dict[str, Any], features: Any):
        self.values, self.features = values, features

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.values


class HuggingFaceShards(ShardedExamples):
    """The rows of a ``datasets.IterableDataset``, whose shards are those of the data set.

    Args:
        divided: whether they are of one of several splits, or of one that is called so.

    Raises:
        UserError: no audio or label column, or columns of types that mean nothing here.
    """

    far = True

    def __init__(self, dataset: Any, options: Options, description: str, divided: bool = False):
        if dataset.features is None:
            dataset = dataset._resolve_features()
        if dataset.features is None:
            raise UserError(f"{description}: the types of its columns are not known before all is read")
        self.dataset, self.options, self.description = dataset.with_format(None), options, description
        self.names = [f"shard {number} of {description}" for number in range(dataset.num_shards)]
        names = list(dataset.features)
        self.audio = _audio_column(dataset, options, description)
        others = [name for name in names if name != self.audio]
        find = columns.need_column if options.require_labels else columns.find_column
        self.label = find(others, options.label_column, columns.LABEL, description)
        self.speaker = columns.find_column(others, options.speaker_column, columns.SPEAKER, description)
        self.text = None
        if options.with_text:
            self.text = columns.need_column(others, options.text_column, columns.TEXT, description)
        self.id = next((name for name in _NAMES if name in others), None)
        if self.label is not None:
            label_names([], self.label, dataset.features, description)  # its type
        # Such columns of files that rows share say which part is meant, which a stream does not hear.
        self.timed = [name for name in others if columns.names_a_part(name)]
        self._check_audio()
        may_be = [] if divided else split_columns(dataset.features)
        # Without rows only the names of columns tell; others are looked at as rows come.
        self.split = columns.split_column(may_be, options.columns(), lambda *_: (), description)
        self._only = None  # what all rows must have there: the first one's
        other = columns.unknown_columns(may_be, options.columns()) if self.split is None else []
        # What such a column of any other name has held so far, until something else is found there.
        self._held: dict[str, set[str]] = {name: set() for name in other}

    def _check_split(self, row: dict[str, Any]) -> None:
        """Raises UserError where a column says that a row is of another split than the first one is."""
        for name in list(self._held):
            self._check_held(name, row)
        if self.split is None:
            return
        if self._only is None:
            first = next(self._rows(0, [self.split]), row)
            self._only = (self._text(first, self.split) or "",)
        found = self._text(row, self.split) or ""
        if found != self._only[0] and (canonical_split(found) or canonical_split(self._only[0])):
            self._refuse_splits(self.split, [self._only[0] or "none", found or "none"])

    def _check_held(self, name: str, row: dict[str, Any]) -> None:
        """The same for a column that holds nothing but names of splits, until it holds something else."""
        held, found = self._held[name], self._text(row, name)
        if not found or found in held:
            return
        if folded(found) not in CANONICAL:
            del self._held[name]
            return
        if not held:  # maybe of a shard that holds one split, where the first holds another
            held |= {self._text(first, name) for first in islice(self._rows(0, [name]), 1)} - {None}
        held.add(found)
        if columns.are_splits_of_rows(held):
            self._refuse_splits(name, sorted(held))

    def _refuse_splits(self, name: str, found: list[str]) -> None:
        raise UserError(
            f"{self.description}: its column {name!r} says the split of each row ({', '.join(found)}), and a "
            "stream is not divided by it: leave streaming out, or store each split in a file of its own"
        )

    def _refuse_parts(self) -> None:
        raise UserError(
            f"{self.description}: {listing(self.timed)} says which part of a file is meant, and clips of a "
            "stream are heard whole: leave streaming out, or remove such columns"
        )

    def _check_audio(self) -> None:
        feature = self.dataset.features[self.audio]
        if isinstance(feature, datasets.Audio):
            self.dataset = self.dataset.cast_column(self.audio, datasets.Audio(decode=False))
        self.features = self.audio == _FEATURES or _is_nested_list(feature)
        plain = isinstance(feature, dict) and set(feature) & {"bytes", "path", "array"}
        text = getattr(feature, "dtype", None) in ("string", "large_string")
        if not (isinstance(feature, datasets.Audio) or self.features or plain or text):
            raise UserError(
                f"{self.description}: the column {self.audio!r} is of type {feature}; audio, paths, {{bytes, "
                "path}, {array, sampling_rate} or input_features are accepted"
            )
        if text and self.timed:
            self._refuse_parts()

    def _rows(self, shard: int, names: list[str | None]) -> Iterator[dict[str, Any]]:
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        part = self.dataset.shard(num_shards=len(self), index=shard).select_columns(wanted)
        try:
            # Plain iteration would deal rows out to the processes of a DataLoader, as it sees fit.
            for rows in part.iter(batch_size=_AT_ONCE):
                yield from (dict(zip(rows, values)) for values in zip(*rows.values()))
        except UserError:
            raise
        except Exception as error:  # of a library of many exceptions: what can be mended is the source
            raise UserError(
                f"{self.names[shard]} cannot be read: {_reason(self.names[shard], error)}"
            ) from error

    def examples(self, shard: int) -> Iterator[Example]:
        named = [self.audio, self.label, self.speaker, self.text, self.id, self.split, *self._held]
        for number, row in enumerate(self._rows(shard, named)):
            self._check_split(row)
            value = row[self.audio]
            if self.timed and _is_path_alone(value):
                self._refuse_parts()
            told = value.get("path") if isinstance(value, dict) else None
            told = told or (row[self.id] if self.id is not None else None)
            name = self._name(shard, number) + (f", {told}" if told else "")
            yield Example(
                self._cell(value, row),
                self._label(row),
                self._text(row, self.speaker),
                name,
                text=self._text(row, self.text),
            )

    def labels(self, shard: int) -> Iterator[tuple[str, str | None]]:
        named = [self.label or self.text or self.audio, self.split, *self._held]
        for number, row in enumerate(self._rows(shard, named)):
            self._check_split(row)
            yield self._name(shard, number), self._label(row)

    def _name(self, shard: int, number: int) -> str:
        return f"row {number} of {self.names[shard]}"

    def _cell(self, value: Any, row: dict[str, Any]) -> Any:
        root = self.options.data_root or ""
        if isinstance(value, str):
            return os.path.join(root, value)
        kind = "features" if self.features else "audio"
        return DatasetCell(_Row({self.audio: value}, self.dataset.features), 0, self.audio, kind, root)

    def _label(self, row: dict[str, Any]) -> str | None:
        if self.label is None:
            return None
        found = label_names([row[self.label]], self.label, self.dataset.features, self.description)[0]
        return None if found is None else composed(found)

    def _text(self, row: dict[str, Any], column: str | None) -> str | None:
        if column is None:
            return None
        if isinstance(self.dataset.features[column], datasets.ClassLabel):
            return label_names([row[column]], column, self.dataset.features, self.description)[0]
        return columns.value_as_text(row[column])


def _is_path_alone(value: Any) -> bool:
    return (
        isinstance(value, dict) and bool(value.get("path")) and value.get("bytes", value.get("array")) is None
    )


def stream_huggingface(source: Any, options: Options) -> dict[str | None, HuggingFaceShards]:
    """The splits of a data set, of which nothing but columns' names and types is read yet.

    Args:
        source: a path, a name on the hub, or an ``IterableDataset`` or ``IterableDatasetDict``.

    Raises:
        UserError: it cannot be loaded.
    """
    shown, loaded = opened(source, _load, options)
    options = rooted(source, options)
    if not isinstance(loaded, dict):
        return {None: HuggingFaceShards(_iterable(loaded), options, shown)}
    divided, chosen = without_splits(loaded) is None, dict(loaded)
    return _Lazily(
        {name: (_iterable(each), options, f"{shown} ({name})", divided) for name, each in chosen.items()}
    )


class _Lazily(dict):
    """Splits whose columns are looked at when one is asked for: another split may have others."""

    def __getitem__(self, name: str) -> HuggingFaceShards:
        return HuggingFaceShards(*super().__getitem__(name))


def _iterable(dataset: Any) -> Any:
    if isinstance(dataset, datasets.Dataset):
        return dataset.to_iterable_dataset(num_shards=max(1, min(_SHARDS, len(dataset))))
    if not isinstance(dataset, datasets.IterableDataset):
        raise UserError(f"a {type(dataset).__name__} cannot be streamed, a datasets.IterableDataset can")
    return dataset


def _load(source: str, options: Options) -> Any:
    path, how = Path(source), {"streaming": True, "cache_dir": options.cache_dir}
    if path.is_dir() and (table := table_of(path)):
        return _load(os.fspath(table), options)
    if path.is_file():
        kind = "arrow" if path.suffix.lower() == ".arrow" else "parquet"
        return datasets.load_dataset(kind, data_files=source, split="train", **how)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return datasets.load_from_disk(source)
        if not any(path.rglob("*.parquet")) and any(path.glob("*.arrow")):
            files = [os.fspath(each) for each in sorted(path.glob("*.arrow"))]
            return datasets.load_dataset("arrow", data_files=files, split="train", **how)
        say_unread(path, options)
        return datasets.load_dataset(source, options.config, **how)
    return datasets.load_dataset(
        source, options.config, revision=options.revision, token=options.token, **how
    )
