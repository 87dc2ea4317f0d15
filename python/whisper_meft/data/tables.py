"""Tables: reading CSV, TSV and JSON lines, also gzipped."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import lines_of
from .columns import is_known, value_as_text
from .names import normal

TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")

SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")

_SEPARATOR = re.compile(r'"?sep=([,\t;|:])"?\s*', re.I)

# What a file that is not text may be instead.
_PACKED = ((b"PK\3\4", "zip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))


def table_name(path: Path) -> tuple[str, str]:
    """The stem and the suffix (lower case) of a table; a final ``.gz`` belongs to neither."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return plain.stem, plain.suffix.lower()


def tables_in(folder: Path) -> list[Path]:
    """The files of a folder that are tables by their name, sorted. Asks nothing of the many that are not.

    Raises:
        UserError: it cannot be listed.
    """
    endings = (*TABLE_SUFFIXES, *(f"{suffix}.gz" for suffix in TABLE_SUFFIXES))
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(endings) and name[0] != "."]
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror or error}") from error
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; gzipped ones are unpacked.

    Raises:
        UserError: it cannot be read or is not such text.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    packed = next((name for mark, name in _PACKED if content.startswith(mark)), None)
    if packed:
        hint = " or a spreadsheet: save it as CSV" if packed == "zip" else ": unpack it"
        raise UserError(f"{path} is not text, it is a {packed} archive{hint}")
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 (byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path} is not a text file: it holds zero bytes")
    return text


def read_table(path: Path, wanted: Sequence[str] = ()) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header of a table and its rows with their line numbers, stripped; empty rows left out.

    CSV and TSV: the delimiter (comma, tab, semicolon or bar) is the one that finds the most known or
    ``wanted`` column names in the header, unless a first line such as Excel's ``sep=;`` says it. Fields may
    be quoted, except between tabs, where quotation marks often stand alone in transcripts. JSON: one object
    per line, or one list of objects; the columns are the keys of them all, and lists and objects in them are
    :class:`Nested`.

    Raises:
        UserError: not text, no header, or a row of another length; a line that is no object of JSON.
    """
    text = read_text(path)
    if table_name(path)[1] in (".json", ".jsonl", ".ndjson"):
        return _json_rows(text, path)
    lines = io.StringIO(text, newline="")
    header = next((line for line in lines if line.strip()), None)
    told = header and _SEPARATOR.fullmatch(header)
    if told:
        header = next((line for line in lines if line.strip()), None)
    if header is None:
        raise UserError(f"{path} is empty: a header line that names the columns is needed")
    also = {normal(name) for name in wanted}

    def fields(delimiter: str) -> list[str]:
        return _parse_header(header, delimiter, path)

    def known(delimiter: str) -> int:
        return sum(is_known(field) or normal(field) in also for field in fields(delimiter))

    delimiter = told[1] if told else max(",\t;|", key=lambda d: (known(d), len(fields(d))))
    names = fields(delimiter)
    doubled = sorted({name for name in names if names.count(name) > 1 and name})
    if doubled:
        raise UserError(f"{path} has two columns called {doubled[0]!r}")
    above = text[: text.index(header)].count("\n") + header.count("\n")
    return names, _rows(path, lines, delimiter, len(names), above)


def _json_rows(text: str, path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    rows: list[tuple[int, Any]] = []
    try:
        whole = json.loads(text)
        rows = list(enumerate(whole if isinstance(whole, list) else [whole], 1))
    except ValueError:
        for number, line in enumerate(lines_of(text), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not a line of JSON ({error})") from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: an object of JSON is needed, got {str(row)[:60]!r}")
    if not rows:
        raise UserError(f"{path} is empty: an object of JSON in each line is needed")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    return names, ((number, [_as_text(row.get(name)) for name in names]) for number, row in rows)


class Nested(str):
    """A list or an object of JSON as it is written: no name of anything."""


def _as_text(value: Any) -> str:
    if isinstance(value, list | dict):
        return Nested(json.dumps(value, ensure_ascii=False))
    return value_as_text(value) or ""


def _parse_header(header: str, delimiter: str, path: Path) -> list[str]:
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error as error:
        raise UserError(
            f"{path} is not a table: its first line cannot be split into columns ({error})"
        ) from error
    return [name.strip().strip('"') for name in names]


def _unquoted(field: str) -> str:
    """A field between tabs without the quotation marks around it; where single ones stand inside, those at
    its ends are not around it but said."""
    inside = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inside.replace('""', "")
    return inside.replace('""', '"') if quoted else field


def _rows(
    path: Path, lines: io.StringIO, delimiter: str, width: int, above: int
) -> Iterator[tuple[int, list[str]]]:
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {above + reader.line_num}: not a row of the table ({error})"
            ) from error
        if row is None:
            return
        line = above + reader.line_num
        row = [field.strip() for field in row]
        if not any(row):
            continue
        if len(row) > width and not any(row[width:]):  # a delimiter at the end of the line
            row = row[:width]
        if len(row) != width:
            raise UserError(f"{path}, line {line}: {len(row)} fields, the header has {width}")
        if delimiter == "\t":
            row = [_unquoted(field) for field in row]
        yield line, row
