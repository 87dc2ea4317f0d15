"""Reading audio: any source that a user may hold becomes a float32 mono waveform at one sampling rate.

Decoding is libsndfile's (WAV, FLAC, OGG Vorbis and Opus, MP3, AIFF, NIST SPHERE and more) through soundfile,
resampling is soxr's. torchcodec is never needed; a decoder object of its kind is read when one is passed.
"""

import io
import math
import os
import re
from typing import Any, Literal

import numpy as np
import soundfile
import soxr

from .errors import UserError

READABLE_SUFFIXES = frozenset(
    (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd")
    + (".sph", ".nist", ".caf", ".w64", ".rf64")
)

# Known to be audio, and not read by libsndfile: listed so that they are reported instead of passed over.
UNREADABLE_SUFFIXES = frozenset(
    [".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".wma", ".amr", ".3gp", ".ac3", ".ape"]
)

_RATES = (1_000, 1_000_000)  # Hz; a rate outside these is a damaged header

_LOUDEST = 1e10  # integers written as floats reach 2^31; squares of much more leave the range of float32

_BLOCK = 1 << 22  # frames decoded at a time, so that a damaged header cannot ask for terabytes

_STREAMED = 0x7FFFF000  # size fields from here on mean "unknown" in files written to a pipe

_CONVERT = "convert it first, for example with `ffmpeg -i IN -ar 16000 -ac 1 OUT.wav`"

_SIGNATURES = (
    (re.compile(rb".{4}ftyp", re.S), f"is MPEG-4 audio (m4a, mp4), which libsndfile cannot read: {_CONVERT}"),
    (re.compile(rb"\x1aE\xdf\xa3"), f"is WebM or Matroska audio, which libsndfile cannot read: {_CONVERT}"),
    (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), f"is raw AAC audio, which libsndfile cannot read: {_CONVERT}"),
    (re.compile(rb"#!AMR"), f"is AMR audio, which libsndfile cannot read: {_CONVERT}"),
    (re.compile(rb"\x30\x26\xb2\x75"), f"is Windows Media audio, which libsndfile cannot read: {_CONVERT}"),
    (
        re.compile(rb"version https://git-lfs"),
        "is a Git LFS pointer, not the audio itself: fetch it with `git lfs pull`",
    ),
)

_SHORT_DATA = re.compile(r"^\s*(?:data|SSND|Data Size)\s*:\s*(\d+) \(should be (\d+)\)", re.M)


def read_audio(
    source: Any,
    sampling_rate: int = 16_000,
    start: float | None = None,
    stop: float | None = None,
    *,
    unit: Literal["seconds", "samples"] = "seconds",
    source_rate: int | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Reads ``source``, or a segment of it, as one channel at ``sampling_rate``.

    Args:
        source: a path; bytes or a binary file object holding a whole audio file; a Hugging Face audio value
            (``{"path", "bytes"}`` or ``{"array", "sampling_rate"}``); a numpy array, tensor or list of
            samples (integers are scaled to [-1, 1); of two axes the shorter one is channels); or a decoder
            object with torchcodec's ``get_all_samples()``.
        sampling_rate: of the result, in Hz.
        start, stop: the segment, half open; ``None`` means the beginning and the end. A ``stop`` past the end
            is the end. Only MP3 is decoded from its beginning to reach a segment.
        unit: of ``start`` and ``stop``: seconds, or samples at the source's own rate.
        source_rate: of a bare array; ``sampling_rate`` by default. Other sources know their rate.
        name: what messages call the source; its path by default.

    An MP3 of varying bitrate without a length tag is read as far as libsndfile guesses its length.

    Returns:
        float32 ``(samples,)``, at least one sample, finite; channels are averaged.

    Raises:
        UserError: naming the source: missing, a folder, empty, truncated, damaged, not audio that libsndfile
            reads, non-finite samples, an empty segment or one that begins after the end.
    """
    if (
        isinstance(sampling_rate, bool)
        or not isinstance(sampling_rate, int | np.integer)
        or sampling_rate < 1
    ):
        raise UserError(f"sampling_rate must be a positive integer number of Hz, got {sampling_rate!r}")
    name = name or describe_source(source)
    wave, rate = decode_audio(
        source, start, stop, unit=unit, source_rate=source_rate or int(sampling_rate), name=name
    )
    return resample(wave, rate, int(sampling_rate), name)


def resample(wave: np.ndarray, rate: int, sampling_rate: int, name: str) -> np.ndarray:
    """``wave``, float32 ``(samples,)`` at ``rate`` Hz, at ``sampling_rate`` Hz.

    Raises:
        UserError: no sample is left of it.
    """
    if rate == sampling_rate:
        return wave
    wave = soxr.resample(wave, rate, sampling_rate, quality="HQ")
    if not len(wave):
        raise UserError(f"{name} is too short: nothing is left of it at {sampling_rate} Hz")
    return wave


def describe_source(source: Any) -> str:
    """The name of an audio source in messages."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source) or "the empty path"
    if isinstance(source, dict) and isinstance(source.get("path"), str | os.PathLike):
        return os.fsdecode(source["path"])
    named = getattr(source, "name", None)
    return named if isinstance(named, str) else f"the given {type(source).__name__}"


def decode_audio(
    source: Any,
    start: float | None = None,
    stop: float | None = None,
    *,
    unit: Literal["seconds", "samples"] = "seconds",
    source_rate: int | None = None,
    name: str | None = None,
    channel: int | None = None,
) -> tuple[np.ndarray, int]:
    """:func:`read_audio` before resampling: float32 ``(samples,)`` at the source's rate, and that rate.

    ``channel`` (from 0) is read alone; by default channels are averaged.
    """
    name = name or describe_source(source)
    start, stop = _check_segment(start, stop, unit, name)
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            source = source["bytes"]
        elif source.get("array") is not None or source.get("raw") is not None:
            if source.get("sampling_rate") is None:
                raise UserError(f"{name}: an audio dict with an array needs its `sampling_rate`, it has none")
            source_rate = source["sampling_rate"]
            source = source["array"] if source.get("array") is not None else source["raw"]
        elif source.get("path") is not None:
            source = source["path"]
        else:
            raise UserError(
                f"an audio dict needs `bytes`, `path` or `array` with `sampling_rate`, got {sorted(source)}"
            )

    if isinstance(source, str | os.PathLike):
        wave, rate = _decode_file(os.fsdecode(source), start, stop, unit, name, channel)
    elif isinstance(source, bytes | bytearray | memoryview):
        wave, rate = _decode_file(io.BytesIO(source), start, stop, unit, name, channel)
    elif callable(getattr(source, "get_all_samples", None)):
        wave, rate = _cut(*_from_decoder(source, name, channel), start, stop, unit, name)
    elif callable(getattr(source, "read", None)):
        try:
            content = source.read()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {name}: {error}") from error
        if not isinstance(content, bytes):
            raise UserError(
                f"{name} must be opened in binary mode, its read() gives {type(content).__name__}"
            )
        wave, rate = _decode_file(io.BytesIO(content), start, stop, unit, name, channel)
    else:
        wave = _mono(source, name, channel)
        if source_rate is None:
            raise UserError(f"{name}: a bare array needs its source_rate in Hz")
        wave, rate = _cut(wave, _check_rate(source_rate, name), start, stop, unit, name)
    if not np.isfinite(wave).all():
        raise UserError(f"{name} holds samples that are not finite (NaN or infinite)")
    if len(wave) and (peak := float(np.abs(wave).max())) > _LOUDEST:
        raise UserError(f"{name} holds samples up to {peak:.3g}: that is not audio, which lies in -1 to 1")
    return wave, rate


def _check_segment(start, stop, unit, name) -> tuple[float, float]:
    if unit not in ("seconds", "samples"):
        raise UserError(f'unit must be "seconds" or "samples", got {unit!r}')
    try:
        first = 0.0 if start is None else float(start)
        last = math.inf if stop is None else float(stop)
    except (TypeError, ValueError):
        raise UserError(f"{name}: start and stop must be numbers, got {start!r} and {stop!r}") from None
    if not 0 <= first < math.inf or math.isnan(last):
        raise UserError(f"{name}: start must be 0 or more and stop a number, got {start!r} and {stop!r}")
    if last <= first:
        raise UserError(f"{name}: the segment from {first:g} to {last:g} {unit} is empty")
    return first, last


def _frames(start: float, stop: float, unit: str, rate: int, name: str) -> tuple[int, float]:
    """The segment in samples at ``rate``; the second is ``inf`` where it reaches to the end."""
    scale = rate if unit == "seconds" else 1
    first, last = round(start * scale), stop if stop == math.inf else round(stop * scale)
    if last <= first:
        raise UserError(f"{name}: the segment from {start:g} to {stop:g} {unit} holds no sample at {rate} Hz")
    return first, last


def _check_rate(rate: Any, name: str) -> int:
    try:
        value = int(rate)
        if value != rate or not _RATES[0] <= value <= _RATES[1]:
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"{name} has a sampling rate of {rate!r} Hz; {_RATES[0]} to {_RATES[1]} are accepted"
        ) from None
    return value


def _cut(wave: np.ndarray, rate: int, start, stop, unit, name) -> tuple[np.ndarray, int]:
    first, last = _frames(start, stop, unit, rate, name)
    if not len(wave):
        raise UserError(f"{name} holds no samples")
    if first >= len(wave):
        raise _begins_too_late(name, first, len(wave), rate)
    return wave[first : min(last, len(wave))], rate


def _begins_too_late(name: str, first: int, total: int, rate: int) -> UserError:
    return UserError(
        f"{name}: the segment begins at {first / rate:.2f} s, the audio ends at {total / rate:.2f} s"
    )


def _mono(array: Any, name: str, channel: int | None = None) -> np.ndarray:
    """Samples of any kind as float32 ``(samples,)``."""
    if hasattr(array, "detach"):  # a tensor; bfloat16 has no numpy equivalent
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    try:
        array = np.asarray(array)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is not an array of samples: {error}") from error
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2):
        raise UserError(
            f"{name} is not audio: a path, bytes, a binary file, an audio dict or an array of one or two "
            f"axes is accepted, got {array.dtype} of shape {array.shape}"
        )
    if array.dtype.kind == "u":
        half = (np.iinfo(array.dtype).max + 1) / 2
        array = (array.astype(np.float64) - half) / half
    elif array.dtype.kind == "i":
        array = array / (np.iinfo(array.dtype).max + 1)
    if array.ndim == 2:
        array = _one_channel(array if array.shape[1] < array.shape[0] else array.T, channel, name)
    elif channel:
        raise _no_such_channel(name, channel, 1)
    with np.errstate(over="ignore"):  # what leaves the range of float32 is reported as infinite
        return np.ascontiguousarray(array, dtype=np.float32)


def _one_channel(block: np.ndarray, channel: int | None, name: str) -> np.ndarray:
    """``[samples, channels]`` as ``(samples,)``: the mean of the channels, or one of them."""
    count = block.shape[1]
    if channel is None:
        return block[:, 0] if count == 1 else block.mean(axis=1)
    if not 0 <= channel < count:
        raise _no_such_channel(name, channel, count)
    return np.ascontiguousarray(block[:, channel])


def _no_such_channel(name: str, channel: int, count: int) -> UserError:
    return UserError(f"{name} has {count} channel{'s'[: count > 1]}, channel {channel} (from 0) is not there")


def _from_decoder(decoder: Any, name: str, channel: int | None) -> tuple[np.ndarray, int]:
    try:
        samples = decoder.get_all_samples()
    except Exception as error:  # the decoder is somebody else's: whatever it raises, the file is the reason
        raise UserError(f"cannot decode {name}: {error}") from error
    return _mono(samples.data, name, channel), _check_rate(samples.sample_rate, name)


def _decode_file(file: str | io.BytesIO, start, stop, unit, name, channel) -> tuple[np.ndarray, int]:
    # Opening a pipe waits for its writer, maybe for ever.
    if (
        isinstance(file, str)
        and os.path.exists(file)
        and not os.path.isfile(file)
        and not os.path.isdir(file)
    ):
        raise UserError(f"{name} is a pipe or a device, a regular file is needed")
    try:
        # soundfile cannot encode a name that is not text; as bytes it is passed on as it is.
        name_as_is = isinstance(file, str) and os.name == "posix"
        with soundfile.SoundFile(os.fsencode(file) if name_as_is else file) as opened:
            rate = _check_rate(opened.samplerate, name)
            first, last = _frames(start, stop, unit, rate, name)
            if not opened.frames:
                raise UserError(f"{name} {_why_empty(opened.extra_info)}")
            if first >= opened.frames:
                raise _begins_too_late(name, first, opened.frames, rate)
            _check_complete(opened, last, name)
            # Seeking in MP3 loses the bit reservoir, and with it the first samples: decode up to the segment.
            mp3 = opened.format == "MP3" or opened.subtype.startswith("MPEG_LAYER")
            skip = first if mp3 else 0
            if not mp3 and first:
                opened.seek(first)
            wanted = min(last, opened.frames) - first
            wave = _read_mono(opened, skip + wanted, name, channel)[skip:]
            if len(wave) < wanted and not (mp3 and not _mp3_states_length(file)):
                raise UserError(
                    f"{name} is truncated or damaged: {len(wave) / rate:.2f} s could be decoded of the "
                    f"{wanted / rate:.2f} s that its header promises"
                )
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError) as error:
        raise UserError(f"{name} {_explain(file, error)}") from error
    if not len(wave):
        raise UserError(f"{name} holds no samples")
    return wave, rate


def _read_mono(opened: soundfile.SoundFile, frames: int, name: str, channel: int | None) -> np.ndarray:
    blocks = []
    while frames > 0:
        block = opened.read(min(frames, _BLOCK), dtype="float32", always_2d=True)  # [frames, channels]
        if not len(block):
            break
        blocks.append(_one_channel(block, channel, name))
        frames -= len(block)
    if len(blocks) == 1:
        return blocks[0]
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


def _promised(log: str) -> tuple[int, int] | None:
    """(bytes promised, bytes present) of a file whose audio chunk is cut short, from libsndfile's log."""
    found = _SHORT_DATA.search(log)
    if found is None:
        return None
    promised, present = int(found[1]), int(found[2])
    return (promised, present) if present < promised < _STREAMED else None


def _check_complete(opened: soundfile.SoundFile, last: float, name: str) -> None:
    """libsndfile reads what there is of a truncated WAV without a word; a whole segment is still good."""
    short = _promised(opened.extra_info)
    if short and last > opened.frames:
        raise UserError(
            f"{name} is truncated: its header promises {short[0]} bytes of audio, {short[1]} are there"
        )


def _why_empty(log: str) -> str:
    short = _promised(log)
    if short:
        return f"is truncated: its header promises {short[0]} bytes of audio, none are there"
    return "holds no samples"


def _mp3_states_length(file: str | io.BytesIO) -> bool:
    """Whether the length of an MP3 is written in it (Xing, Info or VBRI tag) and not a guess by size."""
    head = _head(file, 10)
    skip = 0
    if head[:3] == b"ID3" and len(head) == 10:
        skip = 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
    frame = _head(file, skip + 2048)[skip:]
    return any(tag in frame for tag in (b"Xing", b"Info", b"VBRI"))


def _head(file: str | io.BytesIO, size: int) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:size]
    with open(file, "rb") as opened:
        return opened.read(size)


def _explain(file: str | io.BytesIO, error: Exception) -> str:
    """Why a file could not be read, in words that complete "<name> ..."."""
    if isinstance(file, str):
        if os.path.isdir(file):
            return "is a folder, an audio file is needed"
        if not os.path.exists(file):
            return "does not exist" if not os.path.islink(file) else "is a link to a file that does not exist"
    try:
        head = _head(file, 64)
    except OSError as failure:
        return f"cannot be read: {failure.strerror or failure}"
    if not head:
        return "is empty (0 bytes)"
    for signature, reason in _SIGNATURES:
        if signature.match(head):
            return reason
    if isinstance(error, TypeError):  # soundfile takes .raw for headerless samples and asks for their format
        return f"has no header that says what it holds: {_CONVERT}"
    reason = (getattr(error, "error_string", None) or str(error)).removeprefix("Error : ").rstrip(".")
    if "not a regular file" in reason:  # what libsndfile says of an MP3 without a single frame
        reason = "no audio was found in it"
    return (
        f"cannot be read as audio ({reason}): WAV, FLAC, OGG (Vorbis or Opus), MP3 and the other formats of "
        "libsndfile are accepted"
    )
