"""Whether a file holds what its header says: cut files, headers that were never finished, joined files.

libsndfile reads what it can of such files without a word. Only headers are read here, never samples.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import UserError
from . import flac
from .notes import say_once
from .pieces import Pieces

_STREAMED = 0x7FFFF000  # 32-bit sizes from here on mean "unknown" in files written to a pipe

_CONVERT = "write it anew, for example with `ffmpeg -i IN -ar 16000 -ac 1 OUT.wav`"


_METADATA = frozenset(
    (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"_PMX", b"cue ", b"smpl", b"JUNK", b"PAD ")
)


@dataclass(frozen=True, slots=True)
class _Chunks:
    """How a container names and measures its chunks.

    Attributes:
        start: offset of the first chunk. name: bytes of a chunk's name. size: format of the size after it.
        included: bytes of name and size that the size counts too. align: what sizes are rounded up to.
        audio: name of the chunk with the samples.
    """

    start: int
    name: int
    size: str
    included: int
    align: int
    audio: bytes


_RIFF = _Chunks(12, 4, "<I", 0, 2, b"data")
_CONTAINERS = (  # signature, chunks
    (re.compile(rb"(RIFF|RF64|BW64).{4}WAVE", re.S), _RIFF),
    (re.compile(rb"RIFX.{4}WAVE", re.S), _Chunks(12, 4, ">I", 0, 2, b"data")),
    (re.compile(rb"FORM.{4}AIF[FC]", re.S), _Chunks(12, 4, ">I", 0, 2, b"SSND")),
    (re.compile(rb"caff", re.S), _Chunks(8, 4, ">q", 0, 1, b"data")),
    (
        re.compile(rb"riff\x2e\x91\xcf\x11", re.S),  # W64; chunks are named by GUIDs
        _Chunks(40, 16, "<Q", 24, 8, bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")),
    ),
)


def complete(file: BinaryIO, name: str) -> Pieces | None:
    """Looks whether ``file`` holds the audio that its header states, and no more.

    Args:
        file: seekable; its position is moved.
        name: of it in messages.

    Returns:
        the file with its header finished, where that was never done; else None.

    Raises:
        UserError: it is cut, joined from several, or states another length than it has.
    """
    size = file.seek(0, 2)
    head = _at(file, 0, 40)
    for signature, kind in _CONTAINERS:
        if signature.match(head):
            return _complete_chunks(file, name, kind, head, size)
    if head[:4] in (b".snd", b"dns."):
        order = ">II" if head[:4] == b".snd" else "<II"
        start, stated = struct.unpack(order, head[4:12].ljust(8, b"\0"))
        if stated < _STREAMED:
            _compare(stated, size - start, file, start + stated, name, lambda: False)
    elif head[:4] == b"OggS":
        _complete_ogg(file, name, size)
    elif head[:4] == b"fLaC":
        return _complete_flac(file, name)
    elif head[:7] == b"NIST_1A":
        _complete_sphere(file, name, size)
    return None


def _at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _complete_chunks(file: BinaryIO, name: str, kind: _Chunks, head: bytes, size: int) -> Pieces | None:
    large = None
    for chunk, start, stated in _walk(file, kind, kind.start, size):
        if chunk == b"ds64":
            large = struct.unpack("<Q", _at(file, start + 8, 8).ljust(8, b"\0"))[0]
        if chunk != kind.audio:
            continue
        if head[:4] in (b"RF64", b"BW64") and large is not None:
            stated = large
        elif stated < 0 or (kind.size.endswith("I") and stated >= _STREAMED):
            return None
        there = size - start
        if head[:4] == b"RIFF" and not stated and there and not _all_chunks(file, kind, start, size):
            return _finished(file, name, start, there)
        end = start + -(-stated // kind.align) * kind.align

        def harmless() -> bool:
            return any(_all_chunks(file, kind, at, size) for at in {end, start + stated})  # noqa: B023

        _compare(stated, there, file, start + stated, name, harmless)
        return None
    return None


def _walk(file: BinaryIO, kind: _Chunks, position: int, size: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset of its content, bytes of it) of the chunks."""
    header = kind.name + struct.calcsize(kind.size)
    while position + header <= size:
        head = _at(file, position, header)
        stated = struct.unpack(kind.size, head[kind.name :])[0] - kind.included
        yield head[: kind.name], position + header, stated
        if stated < 0:
            return
        position += header + -(-stated // kind.align) * kind.align


def _all_chunks(file: BinaryIO, kind: _Chunks, position: int, size: int) -> bool:
    """Whether from ``position`` on there is nothing but whole chunks."""
    end = position
    for chunk, start, stated in _walk(file, kind, position, size):
        if chunk in _METADATA:
            return True  # also where its size is wrong, as some programs write it
        if stated < 0 or start + stated > size or not re.fullmatch(rb"[ -~]{4}.*", chunk, re.S):
            return False
        if chunk[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff"):
            return False
        end = start + -(-stated // kind.align) * kind.align
    return end >= size or not _at(file, end, size - end).strip(b"\0")


def _finished(file: BinaryIO, name: str, start: int, there: int) -> Pieces:
    """A WAV whose length was never filled in, with that of the samples that are there."""
    if there >= _STREAMED:
        raise UserError(f"{name} states no length: it was never finished; {_CONVERT}")
    say_once(name, f"states no length (it was never finished); the {there} bytes of audio in it are read")
    sizes = struct.pack("<I", start + there - 8), struct.pack("<I", there)
    return Pieces(file, [b"RIFF", sizes[0], _at(file, 8, start - 12), sizes[1], (start, there)])


def _compare(
    stated: int, there: int, file: BinaryIO, end: int, name: str, harmless: Callable[[], bool]
) -> None:
    """Raises unless ``stated`` bytes of audio are there and nothing but tags or silence behind them."""
    if there < stated:
        raise UserError(
            f"{name} is truncated: its header promises {stated} bytes of audio, "
            f"{max(there, 0) or 'none'} are there"
        )
    rest = there - stated
    if rest < 8 or harmless():  # the header of a chunk is as long
        return
    head = _at(file, end, 16)
    if head[:3] in (b"ID3", b"TAG") or head[:8] == b"APETAGEX" or _only_zeros(file, end):
        return
    if any(head.lstrip(b"\0").startswith(each) for each in (b"RIFF", b"FORM", b".snd", b"riff", b"caff")):
        raise _joined_error(name)
    raise UserError(
        f"{name} holds {rest} more bytes than the {stated} bytes of audio that its header states: it was "
        f"never finished, or something was joined to it; {_CONVERT}"
    )


def _only_zeros(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return False
    return True


def _joined_error(name: str) -> UserError:
    return UserError(
        f"{name} is several recordings joined in one file, of which only the first can be read; {_CONVERT}"
    )


def _has(file: BinaryIO, position: int, what: bytes) -> bool:
    """Whether ``what`` is anywhere behind ``position``."""
    file.seek(position)
    kept = b""
    while block := file.read(1 << 20):
        if what in kept + block:
            return True
        kept = block[1 - len(what) :]
    return False


def _complete_flac(file: BinaryIO, name: str) -> Pieces | None:
    if _has(file, 1, b"fLaC\0\0\0\x22"):
        raise _joined_error(name)
    stated, there = flac.stated_length(file), flac.true_length(file)
    if there is None or there <= stated:  # decoding shows whether that is all there
        return None
    if stated:
        say_once(name, f"states a length of {stated} samples; the {there} samples that are there are read")
    return flac.with_length(file, there)


def _complete_ogg(file: BinaryIO, name: str, size: int) -> None:
    position, flags, pages, sound = 0, 0, {}, False
    while position < size:
        head = _at(file, position, 27)
        if flags & 4 and not _has(file, position, b"OggS"):
            return  # what is behind the end of the last stream is no audio
        table = _at(file, position + 27, head[26]) if len(head) == 27 and head[:4] == b"OggS" else b""
        if len(head) == 27 and head[:4] != b"OggS":
            raise UserError(f"{name} is damaged: byte {position} should begin an Ogg page and does not")
        end = position + 27 + len(table) + sum(table)
        if len(head) < 27 or len(table) < head[26] or end > size:
            raise UserError(f"{name} is truncated: it ends in the middle of an Ogg page")
        flags = head[5]
        stream, number = struct.unpack("<II", head[14:22])
        if flags & 2:
            if sound:
                raise _joined_error(name)
        elif number != pages.get(stream, number - 1) + 1:
            raise UserError(f"{name} is damaged: pages are missing before byte {position}")
        else:
            sound = True
        pages[stream] = number
        position = end
    if not flags & 4:
        say_once(
            name,
            "has no end mark, as recordings that were cut or never finished; it is read as far as it goes",
        )


def _complete_sphere(file: BinaryIO, name: str, size: int) -> None:
    head = _at(file, 0, 1024)
    fields = dict(re.findall(rb"^(\w+) -[irs]\d* (.+)$", head, re.M))
    try:
        start = int(head[8:16])
        stated = [int(fields[key]) for key in (b"sample_count", b"channel_count", b"sample_n_bytes")]
    except (KeyError, ValueError):
        return
    if b"shorten" not in fields.get(b"sample_coding", b""):
        stated = stated[0] * stated[1] * stated[2]
        _compare(stated, size - start, file, start + stated, name, lambda: False)
