"""Reading any source as a waveform: the public functions."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..errors import LazyPackage, UserError, one_line
from .decoding import BLOCK, file_blocks
from .notes import say_once
from .samples import LOUD, LOUDEST, as_samples
from .segments import Mono, Segment, begins_too_late, check_rate, make_segment

soxr = LazyPackage("soxr", "resampling audio")

VERSION = 4  # of what a source is read as: what was computed of an earlier one may be of another sound

Unit = Literal["seconds", "samples"]


def read_audio(
    source: Any,
    sampling_rate: int = 16_000,
    start: float | None = None,
    stop: float | None = None,
    *,
    unit: Unit = "seconds",
    source_rate: int | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Reads ``source``, or a segment of it, as one channel at ``sampling_rate``.

    Args:
        source: a path; bytes or a binary file object holding a whole audio file; a Hugging Face audio value
            (``{"path", "bytes"}`` or ``{"array", "sampling_rate"}``); a numpy array, tensor or list of
            samples (of two axes the shorter one is channels; integers are scaled to [-1, 1) as
            :func:`~whisper_meft.audio.samples.as_samples` says); or a decoder
            object with torchcodec's ``get_all_samples()``.
        sampling_rate: of the result, in Hz.
        start, stop: the segment, half open; ``None`` means the beginning and the end. A ``stop`` past the end
            is the end. Only MP3 and Vorbis are decoded from their beginning to reach a segment.
        unit: of ``start`` and ``stop``: seconds, or samples at the source's own rate.
        source_rate: of a bare array; ``sampling_rate`` by default. Other sources know their rate.
        name: what messages call the source; its path by default.

    Returns:
        float32 ``(samples,)``, at least one sample, finite; channels are averaged.

    Raises:
        UserError: naming the source: missing, a folder, empty, truncated, damaged, not audio that libsndfile
            reads, non-finite samples, an empty segment or one that begins after the end.
    """
    return read_window(source, sampling_rate, start, stop, unit=unit, source_rate=source_rate, name=name)[0]


def read_window(
    source: Any,
    sampling_rate: int = 16_000,
    start: float | None = None,
    stop: float | None = None,
    *,
    unit: Unit = "seconds",
    source_rate: int | None = None,
    name: str | None = None,
    channel: int | None = None,
    longest: float | None = None,
    whole: bool = False,
    window: tuple[float, float] | None = None,
) -> tuple[np.ndarray, float]:
    """:func:`read_audio` of the first ``longest`` seconds of the segment, and how many seconds were decoded.

    With ``whole`` the rest of the segment is decoded and checked too, in blocks that are not kept: what this
    returns is then the same, with the length of the whole segment, and whatever reading a part of it can
    raise is raised. ``channel`` (from 0) is read alone; by default channels are averaged. ``window``: of the
    segment the seconds that are passed over, and how many follow that take its place.

    Returns:
        float32 ``(samples,)``, at least one sample, finite; and a length in seconds.
    """
    _check_sampling_rate(sampling_rate)
    name = name or describe_source(source)
    segment = make_segment(start, stop, unit, channel, None if whole else longest, name, window)
    kept, total, room, rate = [], 0, math.inf, 0
    try:
        for block, rate in _checked_blocks(source, segment, source_rate or int(sampling_rate), name):
            if not total and longest is not None:
                room = segment.within(longest).frames(rate, name)
                room = room[1] - room[0]
            if total < room:
                kept.append(block[: int(min(len(block), room - total))])
            total += len(block)
        wave = kept[0] if len(kept) == 1 else np.concatenate(kept)
        return _resample(wave, rate, int(sampling_rate), name), total / rate
    except MemoryError as error:
        raise UserError(f"{name} needs more memory than there is") from error


def read_windows(
    source: Any,
    sampling_rate: int,
    starts: Sequence[float],
    length: float,
    start: float | None = None,
    stop: float | None = None,
    *,
    unit: Unit = "seconds",
    source_rate: int | None = None,
    name: str | None = None,
    channel: int | None = None,
) -> Iterator[np.ndarray]:
    """Windows of a segment, decoded once from its beginning to its end; no more than a window and a block of
    it is held at a time.

    Args:
        starts: of the windows, in seconds from the beginning of the segment, ascending.
        length: of each, in seconds; one that reaches past the end is what is there.

    Yields:
        what :func:`read_window` gives with ``window=(start, length)``, bit for bit, for each of them.

    Raises:
        UserError: as there.
    """
    _check_sampling_rate(sampling_rate)
    name = name or describe_source(source)
    segment = make_segment(start, stop, unit, channel, None, name)
    held, at, number = np.zeros(0, np.float32), 0, 0  # samples from the position `at` on, windows given
    try:
        for block, rate in _checked_blocks(source, segment, source_rate or int(sampling_rate), name):
            held = np.concatenate([held, block])
            while number < len(starts):
                window = replace(segment, after=starts[number], longest=length)
                first, last = (each - segment.frames(rate, name)[0] for each in window.frames(rate, name))
                if at + len(held) < last:
                    break
                yield _resample(held[first - at : last - at], rate, int(sampling_rate), name)
                number += 1
            else:
                return
            passed = min(max(first - at, 0), len(held))
            held, at = held[passed:], at + passed
        for after in starts[number:]:  # what reaches past the end
            first = round(after * rate)
            if first >= at + len(held):
                raise begins_too_late(name, first, at + len(held), rate)
            yield _resample(held[first - at :], rate, int(sampling_rate), name)
    except MemoryError as error:
        raise UserError(f"{name} needs more memory than there is") from error


def _check_sampling_rate(sampling_rate: Any) -> None:
    if (
        isinstance(sampling_rate, bool)
        or not isinstance(sampling_rate, int | np.integer)
        or sampling_rate < 1
    ):
        raise UserError(f"sampling_rate must be a positive integer number of Hz, got {sampling_rate!r}")


def decode_audio(
    source: Any,
    start: float | None = None,
    stop: float | None = None,
    *,
    unit: Unit = "seconds",
    source_rate: int | None = None,
    name: str | None = None,
    channel: int | None = None,
    window: tuple[float, float] | None = None,
) -> tuple[np.ndarray, int]:
    """:func:`read_audio` before resampling: float32 ``(samples,)`` at the source's rate, and that rate.

    ``channel`` (from 0) is read alone; by default channels are averaged. ``window``: see :func:`read_window`.
    """
    name = name or describe_source(source)
    segment = make_segment(start, stop, unit, channel, None, name, window)
    try:
        blocks = list(_checked_blocks(source, segment, source_rate, name))
        return np.concatenate([block for block, _ in blocks]), blocks[0][1]
    except MemoryError as error:
        raise UserError(f"{name} needs more memory than there is") from error


def describe_source(source: Any) -> str:
    """The name of an audio source in messages."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source) or "the empty path"
    if isinstance(source, dict) and isinstance(source.get("path"), str | os.PathLike):
        return os.fsdecode(source["path"])
    named = getattr(source, "name", None)
    return named if isinstance(named, str) else f"the given {type(source).__name__}"


def _resample(wave: np.ndarray, rate: int, sampling_rate: int, name: str) -> np.ndarray:
    if rate == sampling_rate:
        return wave
    wave = soxr.resample(wave, rate, sampling_rate, quality="HQ")
    if not len(wave):
        raise UserError(f"{name} is too short: nothing is left of it at {sampling_rate} Hz")
    return wave


def _checked_blocks(
    source: Any, segment: Segment, source_rate: Any, name: str
) -> Iterator[tuple[np.ndarray, int]]:
    """A segment in blocks of at least one sample, float32 ``(samples,)``, and their rate; at least one block.

    Raises:
        UserError: whatever is wrong with the source.
    """
    try:
        for block, rate in _blocks(source, segment, source_rate, name):
            peak = max(float(block.max()), -float(block.min()))
            if not math.isfinite(peak):
                raise UserError(f"{name} holds samples that are not finite (NaN or infinite)")
            if peak > LOUDEST:
                raise UserError(
                    f"{name} holds samples up to {peak:.3g}: that is not audio, which lies in -1 to 1"
                )
            if peak > LOUD:
                say_once(
                    name,
                    "holds floats far outside -1 to 1, which are used as they are: integers that were "
                    "written as floats must be divided by their full scale (32768 for 16 bits) first",
                )
            yield block, rate
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of a library or an object of the user's: what can be mended is the source
        raise UserError(f"{name} cannot be read: {one_line(error)}") from error


def _blocks(source: Any, segment: Segment, source_rate: Any, name: str) -> Iterator[tuple[np.ndarray, int]]:
    if isinstance(source, dict):
        source, source_rate = _of_dict(source, source_rate, name)
    if isinstance(source, str | os.PathLike):
        yield from file_blocks(os.fsdecode(source), segment, name)
    elif isinstance(source, bytes | bytearray | memoryview):
        yield from file_blocks(bytes(source), segment, name)
    elif callable(getattr(source, "get_all_samples", None)):
        try:
            samples = source.get_all_samples()
            array, rate = samples.data, samples.sample_rate
        except Exception as error:  # somebody else's: the file is what can be mended
            raise UserError(f"cannot decode {name}: {one_line(error)}") from error
        yield from _array_blocks(array, rate, segment, name)
    elif callable(getattr(source, "read", None)):
        try:
            # Every epoch reads the same bytes again.
            begin = source.tell() if source.seekable() else None
            content = source.read()
            if begin is not None:
                source.seek(begin)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"cannot read {name}: {error}") from error
        if not isinstance(content, bytes):
            raise UserError(
                f"{name} must be opened in binary mode, its read() gives {type(content).__name__}"
            )
        yield from file_blocks(content, segment, name)
    else:
        yield from _array_blocks(source, source_rate, segment, name)


def _of_dict(source: dict, source_rate: Any, name: str) -> tuple[Any, Any]:
    """What a Hugging Face audio value holds, and the rate of an array."""
    if source.get("bytes") is not None:
        return source["bytes"], source_rate
    for key in ("array", "raw"):
        if source.get(key) is not None:
            if source.get("sampling_rate") is None:
                raise UserError(f"{name}: an audio dict with an array needs its `sampling_rate`, it has none")
            return source[key], source["sampling_rate"]
    if source.get("path") is not None:
        return source["path"], source_rate
    raise UserError(
        f"an audio dict needs `bytes`, `path` or `array` with `sampling_rate`, got {sorted(source)}"
    )


def _array_blocks(array: Any, rate: Any, segment: Segment, name: str) -> Iterator[tuple[np.ndarray, int]]:
    samples = as_samples(array, name)
    if rate is None:
        raise UserError(f"{name}: a bare array needs its source_rate in Hz")
    rate = check_rate(rate, name)
    first, last = segment.frames(rate, name)
    total = len(samples)
    if not total:
        raise UserError(f"{name} holds no samples")
    if first >= total:
        raise begins_too_late(name, first, total, rate)
    last = int(min(last, total))
    mono = Mono(segment.channel, name)
    for at in range(first, last, BLOCK):
        yield samples.part(at, min(at + BLOCK, last), mono), rate
