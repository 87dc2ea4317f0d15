"""Decoding files with libsndfile, in blocks, to their true end."""

import math
import os
import re
from collections.abc import Iterator

import numpy as np

from ..errors import LazyPackage, UserError
from . import mpeg
from .containers import complete
from .pieces import Pieces, open_binary
from .segments import Mono, Segment, begins_too_late, check_rate

soundfile = LazyPackage("soundfile", "reading audio")

BLOCK = 1 << 20  # samples decoded at a time, whatever a header promises

_LAST_PAGE = 30  # seconds: more than what a page of Vorbis holds

_UNKNOWN = 1 << 50  # frames that libsndfile says where a header leaves the length open

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


def file_blocks(file: str | bytes, segment: Segment, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """The segment of a file (its path, or its content) as blocks of float32 ``(samples,)``, and its rate.

    Raises:
        UserError: it cannot be read, ends before the segment begins, or holds less or more than its header
            says where the segment reaches that far.
    """
    # Opening a pipe waits for its writer, maybe for ever.
    if isinstance(file, str) and os.path.exists(file) and not (os.path.isfile(file) or os.path.isdir(file)):
        raise UserError(f"{name} is a pipe or a device, a regular file is needed")
    pieces, silence = None, 0
    try:
        opened = _open(file)
    except (soundfile.SoundFileError, RuntimeError, OSError, TypeError) as error:
        pieces, silence = _rescued(file, error, name)
        opened = soundfile.SoundFile(pieces)
    try:
        rate = check_rate(opened.samplerate, name)
        first, last = segment.frames(rate, name)
        if pieces is None:
            if opened.format == "MP3":
                pieces, silence = _to_its_end(file, opened.frames, last, name)
            elif last > opened.frames or opened.frames > _UNKNOWN:
                pieces = _completed(file, name)
            if pieces is not None:
                opened.close()
                opened = soundfile.SoundFile(pieces)
        total = opened.frames + silence if opened.frames else 0
        if not total:
            raise UserError(f"{name} holds no samples")
        if first >= total:
            raise begins_too_late(name, first, total, rate)
        begin = first if opened.seekable() else 0
        # Decoded up to the segment: seeking in MP3 loses the bit reservoir, and with it the first samples; in
        # Vorbis near the end it lands beside its place, by what the last page was cut by.
        if opened.format == "MP3" or opened.subtype.startswith("MPEG_LAYER"):
            begin = 0
        elif opened.subtype == "VORBIS":
            begin = max(0, min(begin, total - _LAST_PAGE * rate))
        if begin:
            opened.seek(begin)
        yield from _blocks(
            opened, first - begin, int(min(last, total)) - first, silence, segment.channel, name
        )
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise UserError(f"{name} {_explain(file, error, name)}") from error
    finally:
        opened.close()
        if pieces is not None:
            pieces.close()


def _open(file: str | bytes) -> "soundfile.SoundFile":
    if isinstance(file, bytes):
        return soundfile.SoundFile(open_binary(file))
    # soundfile cannot encode a name that is not text; as bytes it is passed on as it is.
    return soundfile.SoundFile(os.fsencode(file) if os.name == "posix" else file)


def _blocks(
    opened: "soundfile.SoundFile", skip: int, wanted: int, silence: int, channel: int | None, name: str
) -> Iterator[tuple[np.ndarray, int]]:
    """``wanted`` frames after the first ``skip`` ones of ``silence`` and then the file, as mono blocks, and
    their rate."""
    mono = Mono(channel, name)
    size, rate, done = max(1, BLOCK // opened.channels), opened.samplerate, silence - skip
    if done > 0:
        done = min(done, wanted)
        yield np.zeros(done, np.float32), rate
    while done < wanted:
        try:
            block = opened.read(
                min(wanted - done, size), dtype="float32", always_2d=True
            )  # [frames, channels]
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise UserError(
                f"{name} is truncated or damaged: the {(skip + wanted) / rate:.2f} s that its header "
                "promises cannot all be decoded"
            ) from error
        if not len(block):
            raise UserError(
                f"{name} is truncated or damaged: {max(0, done) / rate:.2f} s could be decoded of the "
                f"{wanted / rate:.2f} s that its header promises"
            )
        fresh = block[max(0, -done) :]
        done += len(block)
        if len(fresh):
            yield mono(fresh), rate


def _completed(file: str | bytes, name: str) -> Pieces | None:
    """:func:`whisper_meft.audio.containers.complete` of a path or content; the caller closes them."""
    binary = open_binary(file)
    pieces = None
    try:
        pieces = complete(binary, name)
    finally:
        if pieces is None:
            binary.close()
    return pieces


def _to_its_end(file: str | bytes, frames: int, last: float, name: str) -> tuple[Pieces | None, int]:
    """:func:`whisper_meft.audio.mpeg.repaired` of an MP3 of which libsndfile would read ``frames`` samples.

    Raises:
        UserError: it is cut, or cannot be read to its end.
    """
    binary = open_binary(file)
    pieces = None
    try:
        # Where a part in the beginning is wanted, what is looked at first is enough if nothing is strange.
        found = mpeg.survey(binary, name, math.inf if last >= frames else last / 384 + 8)
        if found is not None and not found.whole and len(found.runs) > 1:
            found = mpeg.survey(binary, name)
        if found is None or (found.xing and not found.whole):
            return None, 0
        pieces, silence = mpeg.repaired(binary, found, last, name)
        return pieces, silence
    finally:
        if pieces is None:
            binary.close()


def _rescued(file: str | bytes, error: Exception, name: str) -> tuple[Pieces, int]:
    """An MP3 that libsndfile does not open because its tag states less than the encoder's padding.

    Raises:
        UserError: that is not the reason.
    """
    pieces, silence = None, 0
    if isinstance(error, soundfile.SoundFileError) and (isinstance(file, bytes) or os.path.isfile(file)):
        with open_binary(file) as opened:
            head = opened.read(4)
        if head[:3] == b"ID3" or mpeg.parse_header(head) is not None:
            pieces, silence = _to_its_end(file, 0, math.inf, name)
    if pieces is None:
        raise UserError(f"{name} {_explain(file, error, name)}") from error
    return pieces, silence


def _explain(file: str | bytes, error: Exception, name: str) -> str:
    """Why a file could not be read, in words that complete "<name> ..."."""
    if isinstance(file, str):
        if os.path.isdir(file):
            return "is a folder, an audio file is needed"
        if not os.path.exists(file):
            return "does not exist" if not os.path.islink(file) else "is a link to a file that does not exist"
    try:
        with open_binary(file) as opened:
            head = opened.read(64)
    except OSError as failure:
        return f"cannot be read: {failure.strerror or failure}"
    if not head:
        return "is empty (0 bytes)"
    for signature, reason in _SIGNATURES:
        if signature.match(head):
            return reason
    if isinstance(error, TypeError):  # soundfile takes .raw for headerless samples and asks for their format
        return f"has no header that says what it holds: {_CONVERT}"
    try:
        if (pieces := _completed(file, name)) is not None:
            pieces.close()
    except UserError as known:
        return str(known).removeprefix(name).lstrip()
    reason = (getattr(error, "error_string", None) or str(error)).removeprefix("Error : ").rstrip(".")
    reason = reason or "it is damaged"
    if "not a regular file" in reason:  # what libsndfile says of an MP3 without a single frame
        reason = "no audio was found in it"
    return (
        f"cannot be read as audio ({reason}): WAV, FLAC, OGG (Vorbis or Opus), MP3 and the other formats of "
        "libsndfile are accepted"
    )
