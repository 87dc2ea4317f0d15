"""Manifests: tables of examples, alone or several in a folder."""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from ..errors import UserError
from ..once import warn_once
from .columns import (
    AUDIO,
    LABEL,
    SPEAKER,
    TEXT,
    find_column,
    language_column,
    logger,
    need_column,
    say_languages,
    split_column,
)
from .examples import Example, listing, say_forms, utterance
from .names import normal
from .options import Options
from .paths import Paths, RealPaths
from .segments import Channels, Times
from .splits import Splits, SplitsOfRows, split_level
from .table_folders import Table, find_tables
from .tables import Nested, read_table

_PLACEHOLDER = re.compile(r"\{(\w+)\}|\$\{(\w+)\}|\$(\w+)")

# Columns that tell any row from any other, and so nothing of what is heard in it.
_ROW_NAMES = frozenset(
    ("", "id", "index", "idx", "row", "no", "number", "unnamed_0", "utt_id", "utterance_id")
    + ("index_level_0", "level_0")  # what pandas calls the numbers of rows that were chosen among others
)

Rows = Iterable[tuple[int, list[str]]]


def read_manifest(
    path: Path, options: Options, samples: bool | None = None
) -> list[tuple[str | None, Example]]:
    """The examples of a manifest with the split that each is in (``None`` where it tells of none).

    ``samples`` says whether start and end are samples (SpeechBrain) or seconds; ``None`` finds out.

    Raises:
        UserError: a malformed table, and what :func:`table_examples` raises.
    """
    names, rows = read_table(path, options.columns())
    where = os.fspath(path)
    root = options.data_root if options.data_root is not None else os.path.dirname(where)
    paths = Paths(root, where, search=options.data_root is None)
    rows = list(rows)
    split = _split_column(names, rows, options, where)
    return table_examples(names, rows, options, where, paths, samples, split=split)


def _split_column(
    names: Sequence[str], rows: Sequence[tuple[int, list[str]]], options: Options, where: str
) -> str | None:
    index = {name: i for i, name in enumerate(names)}

    def values(name: str, most: int | None) -> Iterable[str]:
        return (row[index[name]] for _, row in rows[:most])

    return split_column(names, options.columns(), values, where)


def table_examples(
    names: Sequence[str],
    rows: Rows,
    options: Options,
    where: str,
    paths: Paths,
    samples: bool | None = None,
    unit: str = "line",
    split: str | None = None,
) -> list[tuple[str | None, Example]]:
    """The examples that the rows of a table are, each with its split.

    Args:
        names: the columns. rows: (number, fields as text).
        where: what messages call the table. unit: what they call its rows.
        paths: finds the files.
        samples: whether start and end are samples; ``None`` finds out (:class:`Times`).
        split: the column that says it, if one does.

    Rows given twice are dropped with a warning. Where no column says the split, the paths may
    (``train/a.wav``). Lists and objects of JSON are no names: a column that holds some is not used, with a
    warning, unless it was named or must be there.

    Raises:
        UserError: no audio column, none of transcripts where those are wanted, an empty path, bad segments,
            lists or objects in a column that was named or must be there, rows of the same audio that differ
            in their label (transcript) or in a column that is not known.
    """
    rows = list(rows)
    nested = {name for _, row in rows for name, value in zip(names, row) if isinstance(value, Nested)}
    audio = _audio_column(names, options, where)
    find = need_column if options.require_labels else find_column
    label = find(names, options.label_column, LABEL, where)
    text = need_column(names, options.text_column, TEXT, where) if options.with_text else None
    speaker = find_column(names, options.speaker_column, SPEAKER, where)
    times = Times(names, options, samples, where)
    channels = Channels(names, options.channel_column, where)
    if not (options.require_labels or options.label_column):
        label = _usable(label, nested, where)
    speaker = speaker if options.speaker_column else _usable(speaker, nested, where)
    split = _usable(split, nested, where)
    given = options.start_column, options.stop_column, None
    times.columns = tuple(
        name if named else _usable(name, nested, where) for name, named in zip(times.columns, given)
    )
    channels.column = channels.column if channels.given else _usable(channels.column, nested, where)
    index = {name: i for i, name in enumerate(names)}

    def field(row: Sequence[str], name: str | None) -> str:
        return "" if name is None else row[index[name]]

    used = [c for c in (audio, label, text, speaker, split, channels.column, *times.columns) if c is not None]
    located = []
    for line, row in rows:
        at = f"{where}, {unit} {line}"
        if wrong := next((name for name in used if isinstance(field(row, name), Nested)), None):
            raise UserError(
                f"{at}: the column {wrong!r} holds {field(row, wrong)[:60]}; text or a number is accepted"
            )
        file = field(row, audio)
        if not file:
            raise UserError(f"{at}: the {audio} column is empty")
        replaced = file
        if samples or times.speechbrain:
            replaced = _PLACEHOLDER.sub(lambda _: paths.root or ".", file)
        located.append((at, row, file, replaced if replaced != file else paths(file, at)))
    paths.say()
    times.look_at([(path, row) for _, row, _, path in located], field)
    if channels.column is not None and located:
        channels.check((path, field(row, channels.column)) for _, row, _, path in located)
    parts = splits_of_paths([file for _, _, file, _ in located], options, where) if split is None else None

    target = text if options.with_text else label
    told = _Repeated(names, {target, audio, split, *times.columns, channels.column}, where)
    found, labels = [], []
    for i, (at, row, _, path) in enumerate(located):
        first, last, counted = times.of(row, field, at)
        channel = channels.of(field(row, channels.column))
        part = parts[i] if parts else field(row, split) or None
        name = field(row, label) or None
        labels.append(name)
        if told.again((path, first, last, channel, part), row, field(row, target) or None, at):
            continue
        example = Example(
            path,
            name,
            field(row, speaker) or None,
            start=first,
            stop=last,
            unit=counted,
            channel=channel,
            text=field(row, text) or None,
        )
        found.append((part, example))
    told.say()
    if options.with_text and (language := language_column(names)):
        say_languages(language, (field(row, language) for _, row, _, _ in located), where)
    say_forms(labels, where)
    return found


def _audio_column(names: Sequence[str], options: Options, where: str) -> str:
    audio = find_column(names, options.audio_column, AUDIO, where)
    if audio is None and any(re.search(r"\.(wav|flac|mp3|ogg|opus)$", name, re.I) for name in names):
        raise UserError(
            f"{where} has no header line: its first line must name the columns (such as path,label)"
        )
    return audio if audio is not None else need_column(names, None, AUDIO, where)


def _usable(column: str | None, nested: Collection[str], where: str) -> str | None:
    """A column that nobody named, if it holds names: it is none of ``nested``, which is said."""
    if column not in nested:
        return column
    warn_once(f"{where}: its column {column!r} is not used, as it holds lists or objects of JSON")
    return None


def splits_of_paths(files: list[str], options: Options, where: str) -> list[str] | None:
    """The split of each file where its folders say it, ``None`` where they do not."""
    paths = [tuple(re.split(r"[/\\]+", file)[:-1]) for file in files]
    shared = os.path.commonprefix(paths)
    paths = [path[len(shared) :] for path in paths]
    try:
        # Classes are in the table and not in the folders: what lies directly in a split's has one, too.
        level = split_level([(*path, "") for path in paths], options.layout, where)
    except UserError as error:
        if options.layout:
            raise
        warn_once(f"{error}; no split is taken from its paths")
        return None
    if level is None or any(len(path) <= level for path in paths):
        return None
    if not options.layout:
        there = listing(dict.fromkeys(path[level] for path in paths))
        warn_once(
            f"{where}: its splits are taken from the folders in its paths ({there}); a column split, or "
            "--layout for text, says otherwise"
        )
    return [path[level] for path in paths]


class _Repeated:
    """Rows of the same audio: dropped where they say the same, refused where they do not."""

    def __init__(self, names: Sequence[str], known: set[str | None], where: str):
        self.where = where
        self._other = [
            (i, name) for i, name in enumerate(names) if name not in known and normal(name) not in _ROW_NAMES
        ]
        self._seen: dict[tuple, tuple[list[str], str | None]] = {}
        self._open: dict[tuple, tuple] = {}
        self._doubled = 0
        self._real = RealPaths()

    def again(self, key: tuple, row: list[str], target: str | None, at: str) -> bool:
        """Whether a row is one that was there before.

        ``key``: path, start, stop, channel and split. ``target``: its label, or its transcript.

        Raises:
            UserError: the two have other targets, or other values in a column that is not known; or two rows
                of one file begin at different times and neither ends.
        """
        path, first, last, channel, part = key
        key = self._real(path), *key[1:]
        if first is not None and last is None:
            before = self._open.setdefault((key[0], channel, part), key)
            if before != key:
                raise UserError(
                    f"{at}: {path} is given from {before[1]:g} and from {first:g}, both to its end: no "
                    "column is known by its name for the end or the duration (--stop_column_name)"
                )
        if key not in self._seen:
            self._seen[key] = row, target
            return False
        old, before = self._seen[key]
        others = [column for i, column in self._other if row[i] != old[i]]
        hint = (
            f": the rows differ in {listing(map(repr, others))}, which is not known to say what part of it "
            "they mean (--start_column_name, --stop_column_name and --channel_column_name name such columns; "
            "else give the audio once)"
            if others
            else ""
        )
        if before != target:
            raise UserError(f"{at}: {path} is given twice, as {before!r} and as {target!r}{hint}")
        if others:
            raise UserError(f"{at}: {path} is given twice{hint}")
        self._doubled += 1
        return True

    def say(self) -> None:
        if self._doubled:
            logger.warning("%s gives %d rows twice; they are used once", self.where, self._doubled)


def read_manifests(path: Path, options: Options, samples: bool | None) -> Splits:
    """The splits of one table, or of those in a folder (:func:`find_tables`)."""
    tables = {None: [Table(path)]} if path.is_file() else find_tables(path, options, asked=True)
    if options.layout and path.is_dir():  # it is of the tables, and not of the paths in them
        options = replace(options, layout="class")
    if not tables:
        raise UserError(
            f"{path} holds no metadata.csv and no table per split (train.csv, test.csv), nor any table "
            "with columns of audio and label: give the file"
        )

    def read(split: str | None) -> list[tuple[str | None, Example]]:
        found, origin, real = [], {}, RealPaths()
        for table in tables[split]:
            for part, example in _read(table, options, samples):
                before = origin.setdefault((utterance(example, real), part), table.path)
                if before != table.path:
                    raise UserError(
                        f"{example.name} is in {before} and in {table.path}: give one of the tables"
                    )
                found.append((part, example))
        return found

    if list(tables) != [None]:
        return {split: (lambda split=split: [example for _, example in read(split)]) for split in tables}
    pairs = cache(lambda: read(None))
    splits = dict.fromkeys(split for table in tables[None] for split in table_splits(table.path, options))
    return SplitsOfRows(
        (split, lambda split=split: [example for part, example in pairs() if part == split])
        for split in splits or [None]
    )


def _read(table: Table, options: Options, samples: bool | None) -> list[tuple[str | None, Example]]:
    if table.label is None:
        return read_manifest(table.path, options, samples)
    found = read_manifest(table.path, replace(options, require_labels=False), samples)
    return [(part, replace(example, label=table.label)) for part, example in found]


def table_splits(path: Path, options: Options) -> list[str | None]:
    """The splits of a table in order of appearance, ``None`` for rows of none."""
    names, rows = read_table(path, options.columns())
    rows, where = list(rows), os.fspath(path)
    split = _split_column(names, rows, options, where)
    if split is not None and any(isinstance(row[names.index(split)], Nested) for _, row in rows):
        split = None
    column = split or find_column(names, options.audio_column, AUDIO, where)
    if column is None:
        return [None]
    index = names.index(column)
    values = [row[index] for _, row in rows]
    parts = values if split else splits_of_paths(values, options, where)
    return list(dict.fromkeys(part or None for part in parts or [None]))
