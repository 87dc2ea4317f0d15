"""FLAC: how long it is. Its header may leave the length open (written to a pipe) or state another one than
that of its frames; each frame's header says where it belongs (RFC 9639, section 9.1)."""

import re
import struct
from typing import BinaryIO

from .pieces import Pieces

_TAIL = 1 << 20  # bytes at the end that are searched; a frame is rarely longer than 32 KiB

_SIZES = {1: 192, **{n: 576 << n - 2 for n in range(2, 6)}, **{n: 256 << n - 8 for n in range(8, 16)}}

_FRAME = re.compile(rb"\xff[\xf8\xf9]")


def stated_length(file: BinaryIO) -> int:
    """Samples per channel that the header states, 0 where it leaves that open."""
    file.seek(21)
    head = file.read(5).ljust(5, b"\0")
    return (head[0] & 15) << 32 | struct.unpack(">I", head[1:])[0]


def true_length(file: BinaryIO) -> int | None:
    """Samples per channel up to the end of the last frame; None where no frames are found."""
    file.seek(8)
    fixed = struct.unpack(">H", file.read(4)[2:].rjust(2, b"\0"))[0]
    size = file.seek(0, 2)
    start = file.seek(max(0, size - _TAIL))
    content = file.read()
    last = None
    # The bytes of a header occur in samples too, by chance: one that continues another's count does not.
    ends: set[int] = {0}
    for match in _FRAME.finditer(content):
        found = _frame(content[match.start() : match.start() + 16].ljust(16, b"\0"), fixed)
        if found is None:
            continue
        first, samples = found
        if first in ends and (first or start == 0):
            last = first + samples
        ends.add(first + samples)
    return last


def with_length(file: BinaryIO, samples: int) -> Pieces:
    """The file with this length in its header."""
    file.seek(0)
    head = bytearray(file.read(26))
    head[21] = head[21] & 0xF0 | samples >> 32
    head[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    return Pieces(file, [bytes(head), (26, file.seek(0, 2) - 26)])


def _frame(head: bytes, fixed: int) -> tuple[int, int] | None:
    """(first sample, number of samples) of the frame whose first 16 bytes are ``head``, or None."""
    if head[3] & 1 or head[2] & 15 == 15:
        return None
    length = 8 - (head[4] ^ 0xFF).bit_length() or 1  # bytes of the coded number, as in UTF-8
    if head[4] & 0xC0 == 0x80 or length > 7:
        return None
    number = head[4] if length == 1 else head[4] & (0x7F >> length)
    for byte in head[5 : 4 + length]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    at, code = 4 + length, head[2] >> 4
    if code in (6, 7):
        samples = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    else:
        samples = _SIZES.get(code, 0)
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if not samples or _crc8(head[:at]) != head[at]:
        return None
    return (number if head[1] & 1 else number * fixed), samples


def _crc8(content: bytes) -> int:
    value = 0
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07 if value & 0x80 else value << 1) & 0xFF
    return value
