"""Which column of a table means what."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from ..errors import UserError
from ..once import warn_once
from .examples import listing
from .names import composed, folded, normal
from .splits import CANONICAL, split_kinds

logger = logging.getLogger(__name__)

# Names in lower case with "_" for every other character; the earlier one wins where a table has several.
AUDIO = (
    ("path", "file", "file_name", "filename", "file_path", "filepath")
    + ("audio", "audio_path", "audiopath", "audio_file", "audiofile", "audio_file_name", "audio_filepath")
    + ("wav", "wav_path", "wavpath", "wav_file", "wav_filename", "clip", "clip_path", "sound")
)

LABEL = (
    ("label", "labels", "label_name", "dialect", "subdialect", "sub_dialect", "dialect_label")
    + ("speakerdialect", "speaker_dialect", "accent", "accents", "variety")
    + ("language", "lang", "class", "class_name", "category", "target", "locale")
)

TEXT = ("text", "sentence", "transcription", "transcript", "transcriptions", "transcripts", "raw_text")

LANGUAGE = ("language", "lang", "locale")

SPEAKER = ("speaker", "speaker_id", "speakerid", "speaker_name", "spk", "spk_id", "spkid", "client_id")

SPLIT = ("split", "subset", "partition")

CHANNEL = ("channel", "channel_id", "channel_index", "channel_number", "audio_channel", "ch", "chan")

# Times; each may be followed by its unit. "offset" is a start, but the end of an event beside "onset".
START = (
    "start",
    "start_time",
    "begin",
    "begin_time",
    "onset",
    "segment_start",
    "seg_start",
    "start_offset",
    "t_start",
    "time_start",
    "starttime",
) + (("offset", "frame_offset"))

STOP = ("end", "end_time", "stop", "stop_time", "segment_end", "seg_end", "end_offset") + (
    "t_end",
    "time_end",
    "endtime",
)

DURATION = ("duration", "dur", "segment_duration", "num_frames")

SAMPLES, FRAMES = "samples", "frames"

# Seconds in one of the unit that ends a column's name.
_UNITS: dict[str, float | str] = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "msecs", "millis", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "microseconds"), 1e-6),
    **dict.fromkeys(("sample", "samples"), SAMPLES),
    **dict.fromkeys(("frame", "frames"), FRAMES),
}

_LOOKED_AT = 100  # rows that tell most columns from those of splits

_NAMED = frozenset((*AUDIO, *LABEL, *TEXT, *SPEAKER, *SPLIT, *CHANNEL, "id"))


def time_column(name: str) -> tuple[str, float | str | None]:
    """The name of a column of times without its unit, and that: its seconds, :data:`SAMPLES`, :data:`FRAMES`
    or ``None`` where it is not said."""
    plain = normal(name)
    if plain in ("frame_offset", "num_frames"):  # torchaudio's
        return plain, SAMPLES
    for end in sorted(_UNITS, key=len, reverse=True):
        base = plain.removesuffix(end)
        # Glued on (startMs) it is told from a word's own letters by what is left.
        if base != plain and (base.endswith("_") or base in (*START, *STOP, *DURATION)):
            return base.rstrip("_").removesuffix("_in"), _UNITS[end]
    return plain, None


def names_a_part(name: str) -> bool:
    """Whether a column of this name says which part of a file is meant: from or until when, which channel."""
    return normal(name) in CHANNEL or time_column(name)[0] in (*START, *STOP)


def is_known(name: str) -> bool:
    """Whether a column is known by its name."""
    return normal(name) in _NAMED or time_column(name)[0] in (*START, *STOP, *DURATION)


def find_column(names: Sequence[str], given: str | None, usual: Sequence[str], where: str) -> str | None:
    """The column called ``given``, or the first with a usual name, or ``None``.

    Raises:
        UserError: ``given`` is not there, or there are two of the name that differ in case, width or form.
    """
    if given is not None:
        found = [name for name in names if name == given] or [
            name for name in names if composed(name) == composed(given)
        ]
        found = found or [name for name in names if normal(name) == normal(given)]
        if not found:
            raise UserError(f"{where} has no column {given!r}: it has {listing(names, 30)}")
    else:
        plain = [(normal(name), name) for name in names]
        usual_one = next((each for each in usual if any(each == name for name, _ in plain)), None)
        found = [name for each, name in plain if each == usual_one]
    if len(found) > 1:
        raise UserError(
            f"{where} has columns whose names differ only in how they are written "
            f"({listing(map(repr, found))}): name the right one with its option, as it is written, or "
            "rename one"
        )
    return found[0] if found else None


def unknown_columns(names: Sequence[str], given: Sequence[str]) -> list[str]:
    """Those of the columns that neither their name nor who gave it (``given``) says anything of."""
    taken = {normal(name) for name in given}
    return [name for name in names if not is_known(name) and normal(name) not in taken]


def split_column(
    names: Sequence[str],
    given: Sequence[str],
    values: Callable[[str, int | None], Iterable[str | None]],
    where: str,
    say: bool = True,
) -> str | None:
    """The column that says the split of each row: by its name, or else one that holds nothing but names of
    splits (:func:`are_splits_of_rows`; ``set``, ``usage``), which a warning says.

    Args:
        names: the columns that may be it. given: those that were named for something else.
        values: gives the values of a column in the first so many rows, or in all.
        say: warn, and raise; else the first one is meant, by whoever has splits already.

    Raises:
        UserError: several hold such names.
    """
    taken = {normal(name) for name in given}
    free = [name for name in names if normal(name) not in taken]
    if (known := find_column(free, None, SPLIT, where)) is not None:
        return known
    found: dict[str, list[str]] = {}
    for name in unknown_columns(names, given):
        if not all(folded(value or "") in CANONICAL for value in {*values(name, _LOOKED_AT)} - {"", None}):
            continue
        if are_splits_of_rows(there := {*values(name, None)} - {"", None}):
            found[name] = sorted(there)
    if say and len(found) > 1:
        raise UserError(
            f"{where}: the columns {listing(map(repr, found))} all name splits: call the one that is meant "
            "'split', or remove the others"
        )
    for name, there in found.items() if say else ():
        warn_once(
            f"{where}: its column {name!r} is taken for the split of each row, as it holds {listing(there)}"
        )
    return next(iter(found), None)


def are_splits_of_rows(values: Collection[str]) -> bool:
    """Whether the values of a column whose name says nothing are those of splits alone: that for training and
    another among them."""
    kinds = split_kinds(values)
    exact = len(kinds) == len(values) and all(folded(value) in CANONICAL for value in values)
    return exact and {"train"} < set(kinds.values())


def language_column(names: Sequence[str]) -> str | None:
    """The first column that says, by its name, which language a transcript is in."""
    return next((name for name in names if normal(name) in LANGUAGE), None)


def say_languages(column: str, values: Iterable[str | None], where: str) -> None:
    """Warns where a table of transcripts has several languages, regions (en-GB) not counted: a model hears
    and writes one."""
    counts = Counter(re.split("[-_]", value)[0].lower() for value in values if value)
    if len(counts) > 1:
        found = listing(f"{name} {number}" for name, number in counts.most_common())
        warn_once(
            f"{where}: its column {column!r} tells {len(counts)} languages apart ({found}), and a model "
            "learns one, and is scored in one unless it guesses: make a table of each"
        )


def need_column(names: Sequence[str], given: str | None, usual: Sequence[str], where: str) -> str:
    """:func:`find_column` for the audio, label or text column, which must be there."""
    found = find_column(names, given, usual, where)
    if found is None:
        what = "label" if usual is LABEL else "text" if usual is TEXT else "audio"
        raise UserError(
            f"{where} has no {what} column that is known by its name: it has {listing(names, 30)}; "
            f"name it with {what}_column_name"
        )
    return found


def value_as_text(value: Any) -> str | None:
    """A typed value as the field of a table, stripped: a whole number in digits also where it is a decimal or
    a float, to which a missing value elsewhere in the column turns it; "True" and "False" as pandas writes
    them, also for ``true`` in JSON; ``None`` where it is empty, or NaN, which is how such a value is then
    written."""
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            return None
        value = int(value) if math.isfinite(value) and value == int(value) else value
    return None if value is None else str(value).strip() or None


@lru_cache(maxsize=256)  # the records of a source mostly have the same names
def _found(names: tuple[str, ...], given: str | None, usual: tuple[str, ...]) -> str | None:
    return find_column(names, given, usual, "")


def field_of(record: Mapping[str, Any], given: str | None, usual: tuple[str, ...], where: str) -> str | None:
    """What one record has in its field called ``given``, or in the first with a usual name, as text; integers
    in digits, ``None`` where it is empty, NaN or not there.

    Raises:
        UserError: as :func:`find_column`; or it is neither text nor a whole number.
    """
    names = tuple(record)
    try:
        name = _found(names, given, usual)
    except UserError:  # the same again, in words that name the record
        name = find_column(names, given, usual, where)
    value = None if name is None else record[name]
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: {name} is not text in UTF-8") from error
    fraction = isinstance(value, float) and not (value.is_integer() or math.isnan(value))
    if fraction or not (value is None or isinstance(value, str | int | float)):
        raise UserError(f"{where}: {name} must be text or a whole number, got {type(value).__name__}")
    return value_as_text(value)


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
