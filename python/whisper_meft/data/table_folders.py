"""Tables in folders: metadata as the hub's AudioFolder has it, one table per split, one per language."""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..once import warn_once
from .columns import AUDIO, LABEL, TEXT, find_column
from .examples import listing
from .folders import list_audio_files, subfolders
from .names import normal
from .options import Options
from .splits import canonical_split, code_pairs, split_kinds, split_level
from .tables import SPREADSHEETS, read_table, table_name, tables_in

_DEEPEST = 3  # folders below which no metadata is looked for

_LARGEST = 64 << 20  # bytes of a table that is looked into without being asked for

_LOOKED_AT = 20  # tables, and rows of each, that are looked into

# Labels that surely are the class, also where there is a folder per language.
_OF_THE_CLIP = ("label", "labels", "label_name", "language", "lang", "class", "class_name", "category") + (
    ("target", "locale")
)


@dataclass(frozen=True)
class Table:
    """A table of examples; ``label`` is their class where it has no column of labels."""

    path: Path
    label: str | None = None


Tables = dict[str | None, list[Table]]


def find_tables(path: Path, options: Options, asked: bool = False) -> Tables:
    """The tables of a folder by split; nothing where it is not made of tables.

    Args:
        path: the folder.
        options: the columns that were named, and the layout.
        asked: whether tables were asked for: then those without a split's name are read together although
            there is audio beside them.

    Raises:
        UserError: two tables of one name, audio that no table lists, names that may be languages or splits.
    """
    tables = (
        _metadata(path, options)
        or _per_split(path, options)
        or _split_tables_per_folder(path, options)
        or _together(path, options, asked)
    )
    _check_once(tables)
    return tables


def _metadata(path: Path, options: Options) -> Tables:
    found = [(parts, table) for parts, table in _walk(path) if _is_metadata(table)]
    if not found:
        return {}
    own = [table for parts, table in found if not parts]
    if own:
        return {None: [Table(each) for each in own]}
    covered = {parts for parts, _ in found}
    for file in list_audio_files(path):
        parts = Path(file).relative_to(path).parts[:-1]
        if not any(parts[:i] in covered for i in range(1, len(parts) + 1)):
            raise UserError(
                f"{path} has metadata in {listing(os.path.join(*each) for each in sorted(covered))}, and "
                f"none for {Path(file).relative_to(path)}: a table is needed there too"
            )
    level = split_level([(*parts, "metadata") for parts, _ in found], options.layout, os.fspath(path))
    level = None if level is not None and any(len(parts) <= level for parts, _ in found) else level
    tables = defaultdict(list)
    for parts, table in found:
        outer = [part for i, part in enumerate(parts) if i != level]
        split = None if level is None else parts[level]
        tables[split].append(_labelled(table, outer[0] if outer else None, options))
    return dict(tables)


def _is_metadata(table: Path) -> bool:
    stem, suffix = table_name(table)
    return stem.lower() == "metadata" and suffix in (".csv", ".tsv", ".jsonl", ".ndjson")


def _walk(path: Path, parts: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Path]]:
    """(folders above it, table) of every table down to a few folders below ``path``."""
    yield from ((parts, each) for each in tables_in(path))
    if len(parts) < _DEEPEST:
        for folder in subfolders(path):
            yield from _walk(folder, (*parts, folder.name))


def _named_tables(path: Path) -> list[Path]:
    return [p for p in tables_in(path) if table_name(p)[1] != ".txt"]


def _per_split(path: Path, options: Options) -> Tables:
    tables = _named_tables(path)
    by_stem = [(table_name(p)[0], p) for p in tables if table_name(p)[1] != ".json" or _header(p, options)[0]]
    if options.layout == "split/class":
        every = not list_audio_files(path)  # else the folders may be meant
        return _grouped(
            (stem, p) for stem, p in by_stem if (every or canonical_split(stem)) and _header(p, options)[0]
        )
    kinds = {} if options.layout else split_kinds(stem for stem, _ in by_stem)
    if "train" in kinds.values() or len(set(kinds.values())) > 1:
        return _grouped((stem, p) for stem, p in by_stem if stem in kinds)
    return {}


def _grouped(pairs) -> Tables:
    tables = defaultdict(list)
    for split, path in pairs:
        tables[split].append(Table(path))
    return dict(tables)


def _check_once(tables: Tables) -> None:
    for each in tables.values():
        names = defaultdict(list)
        for table in each:
            names[table.path.parent / table_name(table.path)[0]].append(table.path)
        doubled = next((paths for paths in names.values() if len(paths) > 1), None)
        if doubled:
            raise UserError(
                f"{doubled[0].parent} holds {listing(p.name for p in doubled)}, which go by one name: remove "
                "one, or give the file"
            )


def _split_tables_per_folder(path: Path, options: Options) -> Tables:
    """``<language>/train.tsv``, ``<language>/test.tsv`` ..., as in Common Voice."""
    if options.layout in ("class", "split/class"):
        return {}
    found, without = defaultdict(list), []
    for folder in subfolders(path):
        tables = [(table_name(p)[0], p) for p in _named_tables(folder)]
        kinds = split_kinds(stem for stem, _ in tables)
        tables = [(stem, p) for stem, p in tables if stem in kinds and _header(p, options)[0]]
        if len({kinds[stem] for stem, _ in tables}) < 2:
            without.append(folder)
        for stem, table in tables:
            found[stem].append(_labelled(table, folder.name, options))
    if not found:
        return {}
    missing = [folder.name for folder in without if list_audio_files(folder)]
    if missing:
        raise UserError(
            f"{path} has a table per split in some of its folders and none in {listing(missing)}: give one "
            "table with a column split, or one per split"
        )
    return dict(found)


def _labelled(table: Path, folder: str | None, options: Options) -> Table:
    """A table in a folder that may be its class."""
    if options.with_text:
        return Table(table)
    label = _header(table, options)[1]
    if label is None:
        return Table(table, folder)
    if options.label_column is None and folder is not None and normal(label) not in _OF_THE_CLIP:
        raise UserError(
            f"{table}: its class may be the folder {folder} or the column {label!r}: say which with "
            f"label_column_name ({label!r}, or a column that holds what the folders are called)"
        )
    return Table(table)


def _together(path: Path, options: Options, asked: bool) -> Tables:
    tables = [p for p in _named_tables(path) if all(_header(p, options))]
    if not tables or not (asked or (len(tables) > 1 and not list_audio_files(path))):
        return {}
    stems = [table_name(p)[0] for p in tables]
    codes = code_pairs(stems)
    if not options.layout and len(codes) == len(stems) and any(len(code) > 2 for code in codes):
        raise UserError(
            f"{path}: the tables {listing(codes)} may be splits or languages: say --layout split/class or "
            "--layout class"
        )
    if len(tables) > 1 and options.layout != "class":
        warn_once(
            f"{path}: its tables are read as one data set, as none is called like a split for training: "
            f"{listing(p.name for p in tables)} (--layout split/class reads each as a split)"
        )
    return {None: [Table(p) for p in tables]}


def _header(path: Path, options: Options) -> tuple[str | None, str | None]:
    """The columns of audio and label, or transcript where that is wanted, as far as a table has them."""
    try:
        if path.stat().st_size > _LARGEST:
            return None, None
        names, _ = read_table(path, options.columns())
        where = os.fspath(path)
        given, usual = (options.text_column, TEXT) if options.with_text else (options.label_column, LABEL)
        target = _found(names, given, usual, where)
        return _found([n for n in names if n != target], options.audio_column, AUDIO, where), target
    except (UserError, OSError):  # not a table after all
        return None, None


def _found(names: list[str], given: str | None, usual: tuple[str, ...], where: str) -> str | None:
    try:
        return find_column(names, given, usual, where)
    except UserError:
        return None


def check_tables_beside(path: Path, options: Options) -> None:
    """Looks for tables beside folders of audio that are about to be taken as the classes.

    Raises:
        UserError: a table with a column of labels lists the audio.
    """
    mentioned = []
    tables = [table for _, table in zip(range(_LOOKED_AT), _beside(path))]
    files = {os.path.basename(file) for file in list_audio_files(path)} if tables else set()
    files |= {os.path.splitext(file)[0] for file in files}
    known = files | {folder.name for folder in subfolders(path)}
    for table in tables:
        audio, label = _header(table, options)
        if audio and label and _lists(table, files, audio):
            raise UserError(
                f"{table} lists audio files with their labels (column {label!r}), and the folders would be "
                f"taken as classes: give the table; or say --data_format manifest for all tables of {path}, "
                "--data_format audiofolder for the folders as classes"
            )
        if _lists(table, known, audio):
            mentioned.append(os.fspath(table.relative_to(path)))
    sheets = [p.name for p in path.iterdir() if p.suffix.lower() in SPREADSHEETS]
    if mentioned or sheets:
        warn_once(
            f"{path}: its folders are taken as classes; not read: {listing(mentioned + sorted(sheets), 3)}"
        )


def _beside(path: Path) -> Iterator[Path]:
    for folder in (path, *subfolders(path)):
        yield from (p for p in tables_in(folder) if p.stat().st_size <= _LARGEST)


def _lists(table: Path, known: set[str], audio: str | None) -> bool:
    """Whether one of the first rows has one of the names, in the column of audio or else in front."""
    try:
        names, rows = read_table(table)
        first = [names] if audio is None else []
        for row in first + [row for _, (_, row) in zip(range(_LOOKED_AT), rows)]:
            fields = row[:1] + row[0].split()[:1] if audio is None else [row[names.index(audio)]]
            if any(os.path.basename(field.replace("\\", "/")) in known for field in fields):
                return True
    except (UserError, OSError):
        pass
    return False
