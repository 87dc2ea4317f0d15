"""Manifests: tables of examples, alone or in a folder with one table per split."""

import os
import re
from functools import cache
from pathlib import Path

from ..errors import UserError
from .columns import (
    AUDIO,
    DURATION,
    LABEL,
    SPEAKER,
    SPLIT,
    START,
    STOP,
    check_segment,
    find_column,
    logger,
    need_column,
    normal,
    number,
    read_table,
)
from .examples import Example
from .folders import subfolders
from .options import Options
from .splits import CANONICAL, Splits, canonical_split

_PLACEHOLDER = re.compile(r"\{(\w+)\}|\$\{(\w+)\}|\$(\w+)")


def manifest_splits(path: Path) -> list[str | None]:
    """The values of the split column in order of appearance; ``[None]`` without one."""
    names, rows = read_table(path)
    column = find_column(names, None, SPLIT, os.fspath(path))
    if column is None:
        return [None]
    index = names.index(column)
    return list(dict.fromkeys(row[index] or None for _, row in rows)) or [None]


def read_manifest(path: Path, options: "Options", samples: bool | None) -> list[tuple[str | None, Example]]:
    """The examples of a manifest with the split that each is in (``None`` without such a column).

    ``samples`` says whether start and end are samples (SpeechBrain) or seconds; ``None`` finds out: samples
    where the columns are SpeechBrain's and the end minus the start is far more than the duration.

    Rows given twice are dropped with a warning.

    Raises:
        UserError: a malformed table, no audio column, an empty path, bad segments, the same utterance with
            two labels.
    """
    given = (
        options.audio_column,
        options.label_column,
        options.speaker_column,
        options.start_column,
        options.stop_column,
    )
    names, rows = read_table(path, [name for name in given if name])
    where = os.fspath(path)
    audio = find_column(names, options.audio_column, AUDIO, where)
    if audio is None:
        looks_like_data = any(re.search(r"\.(wav|flac|mp3|ogg|opus)$", name, re.I) for name in names)
        if looks_like_data:
            raise UserError(
                f"{where} has no header line: its first line must name the columns (such as path,label)"
            )
        need_column(names, None, AUDIO, where)
    label = (need_column if options.require_labels else find_column)(
        names, options.label_column, LABEL, where
    )
    speaker = find_column(names, options.speaker_column, SPEAKER, where)
    start = find_column(names, options.start_column, START, where)
    stop = find_column(names, options.stop_column, STOP, where)
    duration = find_column(names, None, DURATION, where)
    split = find_column(names, None, SPLIT, where)
    index = {name: i for i, name in enumerate(names)}
    speechbrain = {"id", "wav", "duration"} <= {normal(name) for name in names}

    def field(row: list[str], name: str | None) -> str:
        return "" if name is None else row[index[name]]

    root = options.data_root if options.data_root is not None else os.path.dirname(where)
    found: list[tuple[str | None, Example]] = []
    seen: dict[tuple, str | None] = {}
    doubled = 0
    for line, row in rows:
        at = f"{where}, line {line}"
        file = field(row, audio)
        if not file:
            raise UserError(f"{at}: the {audio} column is empty")
        first, last = number(field(row, start), at), number(field(row, stop), at)
        if (first is not None or last is not None) and samples is None:
            length = number(field(row, duration), at) if speechbrain and last is not None else None
            samples = bool(length) and last - (first or 0) > 100 * length
        if last is None and first is not None and duration is not None and not samples:
            length = number(field(row, duration), at)
            last = None if length is None else first + length
        check_segment(first, last, at)
        replaced = _PLACEHOLDER.sub(lambda _: root or ".", file) if samples or speechbrain else file
        file = replaced if replaced != file else os.path.join(root, file)
        name = field(row, label) or None
        part = field(row, split) or None
        key = (file, first, last, part)
        if key in seen:
            if seen[key] != name:
                raise UserError(f"{at}: {file} is given twice, as {seen[key]!r} and as {name!r}")
            doubled += 1
            continue
        seen[key] = name
        unit = "samples" if samples else "seconds"
        found.append(
            (part, Example(file, name, field(row, speaker) or None, start=first, stop=last, unit=unit))
        )
    if doubled:
        logger.warning("%s gives %d rows twice; they are used once", where, doubled)
    return found


def find_tables(path: Path) -> dict[str | None, Path]:
    """The manifests of a folder by split: metadata.csv as in the hub's audio folders, or one per split."""
    for name in ("metadata.csv", "metadata.tsv"):
        if (path / name).is_file():
            return {None: path / name}
        inside = {
            p.name: p / name for p in subfolders(path) if p.name.lower() in CANONICAL and (p / name).is_file()
        }
        if inside:
            return inside
    tables = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (".csv", ".tsv") and p.is_file()]
    named = {p.stem: p for p in tables if canonical_split(p.stem)}
    return named if "train" in {canonical_split(stem) for stem in named} else {}


def read_manifests(path: Path, options: Options, samples: bool | None) -> Splits:
    tables = {None: path} if path.is_file() else find_tables(path)
    if not tables:
        raise UserError(
            f"{path} holds no metadata.csv and no table per split (train.csv, test.csv): give the file"
        )
    if list(tables) != [None]:
        return {
            split: (lambda t=table: [e for _, e in read_manifest(t, options, samples)])
            for split, table in tables.items()
        }
    table = tables[None]
    read = cache(lambda: read_manifest(table, options, samples))
    return {
        split: (lambda split=split: [example for name, example in read() if name == split])
        for split in manifest_splits(table)
    }
