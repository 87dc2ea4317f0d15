"""The columns of a table that cut its rows out of files: start, end or duration, and channel."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice, product
from typing import Any

from ..errors import LazyPackage, UserError
from ..once import warn_once
from .columns import (
    CHANNEL,
    DURATION,
    FRAMES,
    SAMPLES,
    START,
    STOP,
    check_segment,
    find_column,
    number,
    time_column,
    unknown_columns,
)
from .examples import listing
from .names import folded, normal, whole_number
from .options import Options

soundfile = LazyPackage("soundfile", "reading audio")

_SIDES = {"l": 0, "left": 0, "a": 0, "r": 1, "right": 1, "b": 1}

_ASKED = 256  # files that are asked how many channels they have

_FEWEST_SAMPLES = 1000  # of a segment in whole numbers that may be one in samples: 60 ms, or 17 minutes

_MEASURED = 16  # files that are asked how long they are

# Words that tell the two columns of a beginning and an end apart, where their names are otherwise the same.
_PAIRS = (
    *product(("start", "begin", "onset", "from", "min"), ("end", "stop", "offset", "to", "max")),
    ("t0", "t1"),
)

Field = Callable[[Sequence[str], str | None], str]


class Times:
    """Start and end of a row, from whichever columns say them.

    Args:
        names: the columns of the table.
        samples: whether columns without a unit count in samples; ``None`` finds out where they are
            SpeechBrain's (:meth:`look_at`): they do where the end minus the start is far more than the
            duration.

    Raises:
        UserError: a column counts in frames, or "offset" may be an end as well as a start that was not named.
    """

    def __init__(self, names: Sequence[str], options: Options, samples: bool | None, where: str):
        start = find_column(names, options.start_column, (), where) or _time(names, START)
        onset = start is not None and time_column(start)[0] == "onset"
        stop = find_column(names, options.stop_column, (), where)
        stop = stop or _time(names, (*STOP, "offset") if onset else STOP, like=start)
        self.columns = (start, stop, _time(names, DURATION, like=start))
        offset = next((name for name in names if time_column(name)[0] == "offset"), None)
        guessed = start is not None and options.start_column is None
        if guessed and offset not in (None, start) and self.columns[1:] == (None, None):
            raise UserError(
                f"{where} has the columns {start!r} and {offset!r}, and none that is known by its name for "
                f"the end or the duration: say what {offset!r} is (--start_column_name, --stop_column_name), "
                "or remove it"
            )
        self.where, self.unknown = where, unknown_columns(names, options.columns())
        self.units = [None if name is None else time_column(name)[1] for name in self.columns]
        self.samples = samples
        self.speechbrain = {"id", "wav", "duration"} <= {normal(name) for name in names}
        vague = [n for n, unit in zip(self.columns[:2], self.units) if unit == FRAMES]
        if vague:
            raise UserError(
                f"{where}: the column {vague[0]!r} counts in frames of a length that is not known: seconds, "
                "milliseconds (_ms) or samples (_samples) are accepted"
            )

    def look_at(self, rows: Sequence[tuple[str, Sequence[str]]], field: Field) -> None:
        """Finds out from (path, row) of all rows what columns without a unit count in, and warns of rows that
        are heard from the beginning or to the end of a file because no column is known to say otherwise,
        where one may.

        Raises:
            UserError: they may be samples as well as seconds.
        """
        vague = [name for name, unit in zip(self.columns[:2], self.units) if name and unit is None]
        if self.samples is None and self.speechbrain and vague:
            self.samples = self._counts_in_samples(vague, [row for _, row in rows], field)
        start, stop, length = self.columns
        lasts = length is not None and self.units[2] != FRAMES and not self.samples

        def floats(name: str) -> list[float | None]:
            return [_float(field(row, name)) for _, row in rows]

        named = "(--start_column_name, --stop_column_name)"
        if start is None and stop is None:
            if pair := self._pair(floats):
                warn_once(
                    f"{self.where}: its columns {pair[0]!r} and {pair[1]!r} may say which part of a file is "
                    f"meant; they are not used, files are heard whole unless these are named {named}"
                )
            elif lasts and (longer := self._longer(list(zip((path for path, _ in rows), floats(length))))):
                warn_once(
                    f"{self.where}: its column {length!r} says less than files last ({longer}), and none is "
                    f"known by its name for the start; they are heard whole {named}"
                )
        elif stop is None and not lasts and any(floats(start)):
            warn_once(
                f"{self.where}: its column {start!r} says where to start, and none is known by its name for "
                "the end or the duration: files are heard to their ends (--stop_column_name)"
            )
        elif start is None:
            warn_once(
                f"{self.where}: its column {stop!r} says where to end, and none is known by its name for the "
                "start: files are heard from their beginnings (--start_column_name)"
            )

    def _counts_in_samples(self, vague: list[str], rows: list[Sequence[str]], field: Field) -> bool:
        """Whether a segment is far more than the duration beside it, which is in seconds."""
        longest, whole = 0.0, True
        for row in rows:
            first, last, seconds = (_float(field(row, name)) for name in self.columns)
            if last is None:
                continue
            first = first or 0.0
            if seconds:
                return last - first > 100 * seconds
            longest, whole = max(longest, last - first), whole and first.is_integer() and last.is_integer()
        if whole and longest >= _FEWEST_SAMPLES:
            raise UserError(
                f"{self.where}: {listing(map(repr, vague))} may be in samples or in seconds, as no row with "
                "an end has a duration: say --data_format speechbrain for samples, or let the name end in "
                "_seconds"
            )
        return False

    def _pair(self, floats: Callable[[str], list[float | None]]) -> tuple[str, str] | None:
        """Two columns that are not known and may be those of a beginning and an end, by names and numbers."""
        plain = {normal(name): name for name in self.unknown}
        for name, (begin, end) in product(plain, _PAIRS):
            other = name.replace(begin, end)
            if begin not in name or other not in plain:
                continue
            pairs = list(zip(floats(plain[name]), floats(plain[other])))
            both = [(first, last) for first, last in pairs if first is not None and last is not None]
            if both and all(0 <= first <= last for first, last in both) and any(a < b for a, b in both):
                return plain[name], plain[other]
        return None

    def _longer(self, rows: list[tuple[str, float | None]]) -> str | None:
        """The first of some (path, duration) whose file lasts longer, in words."""
        unit = self.units[2]
        for path, value in rows[:: -(-len(rows) // _MEASURED) or 1]:
            found = _info(path)
            if value is None or found is None or found.format == "MP3":  # of which it is a guess
                continue
            told = value / found.samplerate if unit == SAMPLES else value * _scale(unit or 1.0)
            slack = 1.0 if value.is_integer() and unit in (None, 1.0) else max(0.1, 0.05 * found.duration)
            if 0 < told < found.duration - slack:
                return f"{told:g} s of {found.duration:g} s in {path}"
        return None

    def of(self, row: Sequence[str], field: Field, at: str) -> tuple[float | None, float | None, str]:
        """(start, stop, unit), ``None`` for the beginning and the end of the file.

        Raises:
            UserError: no number, an empty segment, or samples beside seconds.
        """
        first, last = (number(field(row, name), at) for name in self.columns[:2])
        if first is None and last is None:
            return None, None, "seconds"
        length = self.columns[2]
        plain = SAMPLES if self.samples else 1.0
        units = [plain if unit is None else unit for unit in self.units]
        used = {unit for unit, value in zip(units, (first, last)) if value is not None}
        if last is None and length is not None and not self.samples:
            lasting = number(field(row, length), at)
            if lasting is not None and units[2] != FRAMES:
                used.add(units[2])
                last = first * _scale(units[0]) + lasting * _scale(units[2])
        elif last is not None:
            last = last * _scale(units[1])
        first = None if first is None else first * _scale(units[0])
        if SAMPLES in used and len(used) > 1:
            raise UserError(f"{at}: start, end and duration must all be in samples or all be times")
        check_segment(first, last, at)
        return first, last, "samples" if SAMPLES in used else "seconds"


def _float(text: str) -> float | None:
    """A number, ``None`` of what is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scale(unit: Any) -> float:
    return 1.0 if isinstance(unit, str) else unit


def _time(names: Sequence[str], bases: Sequence[str], like: str | None = None) -> str | None:
    """The column of times among ``names`` that is best known: in the unit of ``like``, then in seconds."""
    unit = time_column(like)[1] if like is not None else None
    ranked = []
    for i, name in enumerate(names):
        base, own = time_column(name)
        if base in bases:
            ranked.append((bases.index(base), own != unit, isinstance(own, str), i, name))
    return min(ranked)[-1] if ranked else None


class Channels:
    """The channel of a row, counted from 0, where a column says it and the files have several.

    Args:
        names: the columns of the table.
        given: the one that was named, if one was.
        where: the table, for messages.
    """

    def __init__(self, names: Sequence[str], given: str | None, where: str):
        self.column = find_column(names, given, CHANNEL, where)
        self.given = given is not None
        self.where = where
        self._first = 0

    def check(self, rows: Iterable[tuple[str, str]]) -> None:
        """Finds out from (path, channel as it is written) of every row what the column means.

        Raises:
            UserError: it was asked for, and holds something else than channels.
        """
        of_file: dict[str, set[str]] = defaultdict(set)
        for path, value in rows:
            of_file[path].add(value)
        values = set().union(*of_file.values()) - {""}
        odd = sorted(v for v in values if whole_number(v) is None and folded(v) not in _SIDES)
        if odd and self.given:
            raise UserError(
                f"{self.where}: a channel is a number, left or right, A or B; its column {self.column} has "
                f"{listing(odd, 3)}"
            )
        if odd or not values:
            if 0 < len(odd) < len(values):
                warn_once(
                    f"{self.where}: its column {self.column} is not used, as it holds {listing(odd, 3)} "
                    "beside channels (a number, left or right, A or B)"
                )
            self.column = None  # how or by what it was recorded
            return
        numbers = {number for value in values if (number := whole_number(value)) is not None}
        self._first = 1 if numbers and 0 not in numbers else 0
        told_apart = any(len(found - {""}) > 1 for found in of_file.values())
        if not told_apart and not self.given and (mono := self._only_mono(of_file)):
            which = mono[0] if len(of_file) == 1 else f"all of {len(mono)} files asked ({mono[0]}, ...)"
            verb = "has" if len(mono) == 1 else "have"
            warn_once(f"{self.where}: its column {self.column} is not used, as {which} {verb} one channel")
            self.column = None
            return
        if numbers:
            warn_once(
                f"{self.where}: the channels in its column {self.column} are taken to count from "
                f"{self._first}"
            )

    def _only_mono(self, of_file: dict[str, set[str]]) -> list[str]:
        """Those of the files that were asked and could be read, where all of them have one channel; else
        none. Asked are a file of each channel, then those of another than the first, then the others, up to
        a bound and spread over the table."""
        of_value: dict[str, str] = {}
        other, rest = [], []
        for path, found in of_file.items():
            for value in found - {""}:
                of_value.setdefault(value, path)
                (other if self.of(value) else rest).append(path)
        asked = dict.fromkeys([*of_value.values(), *_spread(other), *_spread(rest)])
        mono = []
        for path in islice(asked, _ASKED):
            count = _channel_count(path)
            if count is not None and count > 1:
                return []
            mono += [] if count is None else [path]
        return mono

    def of(self, value: str) -> int | None:
        """A channel as it is written as a number from 0; ``None`` where all are to be averaged."""
        if self.column is None or not value:
            return None
        number = whole_number(value)
        return _SIDES[folded(value)] if number is None else number - self._first


def _spread(paths: list[str]) -> list[str]:
    """At most so many of the paths as are asked, evenly spread."""
    return paths[:: -(-len(paths) // _ASKED) or 1]


def _channel_count(path: str) -> int | None:
    """How many channels a file has; ``None`` where it cannot be read."""
    found = _info(path)
    return None if found is None else found.channels


def _info(path: str) -> Any:
    """What the header of a file says; ``None`` where it cannot be read."""
    try:
        return soundfile.info(path)
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError):
        return None
