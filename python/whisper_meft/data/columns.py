"""Tables: reading CSV and TSV files, and which column means what."""

import csv
import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .examples import listing

logger = logging.getLogger(__name__)

# Names in lower case with "_" for every other character; the earlier one wins where a table has several.
AUDIO = (
    ("path", "file", "file_name", "filename", "file_path", "filepath")
    + ("audio", "audio_path", "audiopath", "audio_file", "audiofile", "audio_filepath")
    + ("wav", "wav_path", "wavpath", "wav_file", "wav_filename", "clip", "clip_path", "sound")
)

LABEL = (
    ("label", "labels", "label_name", "dialect", "subdialect", "sub_dialect", "dialect_label")
    + ("speakerdialect", "speaker_dialect", "accent", "accents", "variety")
    + ("language", "lang", "class", "class_name", "category", "target")
)

SPEAKER = ("speaker", "speaker_id", "speakerid", "speaker_name", "spk", "spk_id", "spkid", "client_id")

START = ("start", "start_time", "start_seconds", "start_s", "begin", "begin_time", "onset")

STOP = ("end", "end_time", "end_seconds", "end_s", "stop", "stop_time")

DURATION = ("duration", "duration_seconds", "duration_s", "dur")

SPLIT = ("split", "subset", "partition")

_ALL = frozenset((*AUDIO, *LABEL, *SPEAKER, *START, *STOP, *DURATION, *SPLIT, "id"))


def normal(name: str) -> str:
    """A column name as it is compared: lower case, other characters than letters and digits as "_"."""
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower()).strip("_")


def find_column(names: Sequence[str], given: str | None, usual: Sequence[str], where: str) -> str | None:
    """The column called ``given``, or the first with a usual name, or ``None``.

    Raises:
        UserError: ``given`` is not there.
    """
    if given is not None:
        found = [name for name in names if name == given] or [n for n in names if normal(n) == normal(given)]
        if not found:
            raise UserError(f"{where} has no column {given!r}: it has {listing(names, 30)}")
        return found[0]
    by_name = {normal(name): name for name in reversed(names)}
    return next((by_name[name] for name in usual if name in by_name), None)


def need_column(names: Sequence[str], given: str | None, usual: Sequence[str], where: str) -> str:
    """:func:`find_column` for the audio or label column, which must be there."""
    found = find_column(names, given, usual, where)
    if found is None:
        what = "label" if usual is LABEL else "audio"
        raise UserError(
            f"{where} has no {what} column that is known by its name: it has {listing(names, 30)}; "
            f"name it with {what}_column_name"
        )
    return found


def number(text: str, where: str) -> float | None:
    """A number of seconds or samples, ``None`` for an empty field."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: start and end must be numbers, got {text!r}")
    return value


def check_segment(start: float | None, stop: float | None, where: str) -> None:
    if (start is not None and start < 0) or (stop is not None and stop <= (start or 0)):
        raise UserError(f"{where}: the segment from {start} to {stop} is empty or begins before 0")


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark.

    Raises:
        UserError: it cannot be read or is not such text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 (byte {error.start}): save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path} is not a text file: it holds zero bytes")
    return text


def read_table(path: Path, wanted: Sequence[str] = ()) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header of a CSV or TSV file and its rows with their line numbers, stripped; empty rows left out.

    The delimiter (comma, tab, semicolon or bar) is the one that finds the most known or ``wanted`` column
    names in the header. Fields may be quoted, except between tabs, where quotation marks often stand alone in
    transcripts.

    Raises:
        UserError: not text, no header, or a row of another length.
    """
    text = read_text(path)
    lines = io.StringIO(text, newline="")
    header = next((line for line in lines if line.strip()), None)
    if header is None:
        raise UserError(f"{path} is empty: a header line that names the columns is needed")
    known = _ALL | {normal(name) for name in wanted}

    def fields(delimiter: str) -> list[str]:
        return _parse_header(header, delimiter, path)

    delimiter = max(",\t;|", key=lambda d: (sum(normal(f) in known for f in fields(d)), len(fields(d))))
    names = fields(delimiter)
    doubled = sorted({name for name in names if names.count(name) > 1 and name})
    if doubled:
        raise UserError(f"{path} has two columns called {doubled[0]!r}")
    above = text[: text.index(header)].count("\n") + header.count("\n")
    return names, _rows(path, lines, delimiter, len(names), above)


def _parse_header(header: str, delimiter: str, path: Path) -> list[str]:
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error as error:
        raise UserError(
            f"{path} is not a table: its first line cannot be split into columns ({error})"
        ) from error
    return [name.strip().strip('"') for name in names]


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
            row = [f[1:-1].replace('""', '"') if len(f) > 1 and f[0] == f[-1] == '"' else f for f in row]
        yield line, row
