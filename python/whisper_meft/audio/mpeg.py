"""MP3: how long it is. An MP3 has no header: a tag in its first frame may state its length, and libsndfile
believes that, or guesses from the first frame and the size of the file, and reads no further.

Frames are counted here by walking from header to header (ISO 11172-3, 13818-3). Where their number is another
than libsndfile's, the frames are handed to it behind a tag with the right number.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from ..errors import UserError
from .notes import say_once
from .pieces import Pieces

_RATES = {
    3: (44_100, 48_000, 32_000),
    2: (22_050, 24_000, 16_000),
    0: (11_025, 12_000, 8_000),
}  # Hz by version

_KBPS = {  # by (MPEG-1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}

_BLOCK = 1 << 16  # bytes searched at a time for the next frame

DELAY = 529  # samples by which any decoder of layer III is late

_BEGINNINGS = re.compile(rb"\xff[\xe0-\xff]|ID3|APET")


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame's header: MPEG ``version`` (3 is 1, 2 is 2, 0 is 2.5), ``layer``, ``rate`` (Hz), whether it is
    mono, and its ``length`` in bytes."""

    version: int
    layer: int
    rate: int
    mono: bool
    length: int

    @property
    def kind(self) -> tuple:
        """What all frames of one recording have in common."""
        return self.version, self.layer, self.rate, self.mono

    @property
    def samples(self) -> int:
        return {1: 384, 2: 1152, 3: 1152 if self.version == 3 else 576}[self.layer]

    @property
    def side(self) -> int:
        """Bytes of a layer III frame before its tag: header and side information."""
        return 4 + ((17 if self.mono else 32) if self.version == 3 else (9 if self.mono else 17))


def parse_header(head: bytes) -> Frame | None:
    """The frame that four bytes begin, or None."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    index, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or index in (0, 15) or rate == 3:
        return None
    kbps, hertz, padding = _KBPS[version == 3, layer][index - 1], _RATES[version][rate], head[2] >> 1 & 1
    if layer == 1:
        length = 4 * (12_000 * kbps // hertz + padding)
    else:
        length = (72_000 if layer == 3 and version != 3 else 144_000) * kbps // hertz + padding
    return Frame(version, layer, hertz, head[3] >> 6 == 3, length)


@dataclass(frozen=True, slots=True)
class Tag:
    """What a first frame says of its recording: its number of frames, and how many samples the encoder put
    before it (``delay``) and after it (``padding``); whether it is a Xing or Info tag, not a VBRI one."""

    frames: int
    xing: bool
    delay: int = 0
    padding: int = 0


@dataclass
class Survey:
    """The frames of a file.

    Attributes:
        first: the first frame, and its four ``head`` bytes. count: of frames with sound.
        runs: (offset, length) of frames that follow one another without anything between.
        tags: of the recordings that it holds. leading: whether the first recording has one.
        strange: bytes between frames that are no known tag. cut: whether it ends within a frame.
        whole: whether all of the file was looked at.
    """

    first: Frame
    head: bytes
    count: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)
    tags: list[Tag] = field(default_factory=list)
    leading: bool = False
    strange: int = 0
    cut: bool = False
    whole: bool = True

    @property
    def stated(self) -> int | None:
        """Frames of all recordings together, or None where the first does not state them."""
        return sum(tag.frames for tag in self.tags) if self.leading else None

    @property
    def xing(self) -> bool:
        """Whether it begins with a tag that decoders honour."""
        return self.leading and self.tags[0].xing

    def add(self, offset: int, length: int) -> None:
        if self.runs and sum(self.runs[-1]) == offset:
            self.runs[-1] = (self.runs[-1][0], self.runs[-1][1] + length)
        else:
            self.runs.append((offset, length))


def survey(file: BinaryIO, name: str, enough: float = math.inf) -> Survey | None:
    """Counts the frames of ``file``, at least ``enough`` of them; None where there is none to count.

    Raises:
        UserError: rate or channels change in the middle, which libsndfile does not follow.
    """
    found = None
    for offset, frame, head, strange in _frames(file):
        if found is None:
            found = Survey(frame, head)
        elif strange:
            found.strange += strange
        if frame is None:  # the last bytes are not all of a frame
            found.cut = True
            break
        if frame.kind != found.first.kind:
            at = found.count * found.first.samples / found.first.rate
            raise UserError(
                f"{name} changes after {at:.2f} s from {_describe(found.first)} to {_describe(frame)}, as "
                "joined files do: convert it first, for example with `ffmpeg -i IN -ar 16000 -ac 1 OUT.wav`"
            )
        tag = _tag(file, offset, frame)
        if tag is None:
            found.count += 1
            found.add(offset, frame.length)
        else:
            found.leading |= not found.count
            found.tags.append(tag)
        if found.count >= enough:
            found.whole = False
            break
    return found


def repaired(file: BinaryIO, found: Survey, last: float, name: str) -> tuple[Pieces | None, int]:
    """What libsndfile reads to its end: the frames behind a tag that states their number, or None where it
    can read the file as it is; and how many samples of silence belong before what it reads.

    Args:
        file: what was surveyed as ``found``, as far as ``last`` at least.
        last: the sample up to which it is wanted.
        name: of it in messages.

    Raises:
        UserError: its tag promises more than there is, and that is wanted.
    """
    seconds = found.first.samples / found.first.rate
    if found.stated is not None and found.stated > found.count:
        if last > found.count * found.first.samples:
            raise UserError(
                f"{name} is truncated or damaged: {found.count * seconds:.2f} s are there of the "
                f"{found.stated * seconds:.2f} s that its header promises"
            )
    elif found.stated is None and found.cut:
        say_once(name, f"ends within a frame, as cut files do; {found.count * seconds:.2f} s are read")
    if found.strange and found.stated != found.count:
        say_once(name, f"has {found.strange} bytes in the middle that are no MP3; they are passed over")
    if len(found.runs) == len(found.tags) == 1 and found.tags[0].frames == found.count and found.leading:
        return None, 0
    if found.first.layer != 3:  # these have no tags
        return Pieces(file, list(found.runs)), 0
    # Behind a Xing tag the decoder leaves its own delay out; segments of files without one count it.
    return Pieces(file, [_tag_frame(found), *found.runs]), 0 if found.xing else DELAY


def _describe(frame: Frame) -> str:
    return f"{frame.rate} Hz {'mono' if frame.mono else 'stereo'}"


def _frames(file: BinaryIO) -> Iterator[tuple[int, Frame | None, bytes, int]]:
    """(offset, frame, its head, strange bytes before it) of all frames; the frame is None where the file ends
    within it."""
    size = file.seek(0, 2)
    position, strange, kind = 0, 0, None
    while position < size:
        head = _at(file, position, 4)
        frame = parse_header(head)
        if frame is not None and (frame.kind == kind or _goes_on(file, position, frame, size)):
            if position + frame.length > size:
                if kind is not None:
                    yield position, None, head, strange
                return
            yield position, frame, head, strange
            position, strange, kind = position + frame.length, 0, frame.kind
            continue
        known = _tag_length(file, position, head, size)
        if known:
            position += known
            continue
        following = _search(file, position + 1, size)
        if following is None:
            return
        strange, position = strange + following - position, following


def _at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _goes_on(file: BinaryIO, position: int, frame: Frame, size: int) -> bool:
    """Whether a frame of the same kind follows, or the end of the recording."""
    after = position + frame.length
    if after >= size:
        return after == size
    head = _at(file, after, 4)
    following = parse_header(head)
    if following is not None and following.kind == frame.kind:
        return True
    return _tag_length(file, after, head, size) > 0


def _tag_length(file: BinaryIO, position: int, head: bytes, size: int) -> int:
    """Bytes of the ID3, APE or Lyrics3 tag at ``position``, 0 where there is none."""
    length = 0
    if head[:3] == b"ID3":
        rest = _at(file, position, 10)
        if len(rest) == 10 and max(rest[6:10]) < 128:
            length = _synchsafe(rest[6:10]) + (20 if rest[5] & 0x10 else 10)
    elif head == b"APET":
        rest = _at(file, position, 32)
        if len(rest) == 32 and rest[:8] == b"APETAGEX":
            items, flags = struct.unpack("<I", rest[12:16])[0], struct.unpack("<I", rest[20:24])[0]
            length = 32 + items if flags & 1 << 29 else 32  # a header with what follows it, or a footer
    elif head == b"LYRI":
        found = _at(file, position, 1 << 20).find(b"LYRICS200")
        length = found + 9 if found > 0 else 0
    elif head == b"TAG+":
        length = 227
    elif head[:3] == b"TAG":
        length = 128
    return length if position + length <= size else 0


def _synchsafe(four: bytes) -> int:
    return sum(byte << shift for byte, shift in zip(four, (21, 14, 7, 0)))


def _search(file: BinaryIO, position: int, size: int) -> int | None:
    """Where the next frame or tag begins."""
    while position < size:
        block = _at(file, position, _BLOCK + 3)
        for match in _BEGINNINGS.finditer(block, 0, _BLOCK):
            at, head = match.start(), block[match.start() : match.start() + 4]
            frame = parse_header(head)
            if frame is not None and _goes_on(file, position + at, frame, size):
                return position + at
            if frame is None and head[0] != 0xFF and _tag_length(file, position + at, head, size):
                return position + at
        position += _BLOCK - 3
    return None


def _tag(file: BinaryIO, offset: int, frame: Frame) -> Tag | None:
    """The Xing, Info or VBRI tag that a frame holds instead of sound."""
    if frame.layer != 3:
        return None
    content = _at(file, offset, min(frame.length, 192))
    at = frame.side
    if content[at : at + 4] in (b"Xing", b"Info"):
        flags = struct.unpack(">I", content[at + 4 : at + 8])[0]
        frames = struct.unpack(">I", content[at + 8 : at + 12])[0] if flags & 1 else 0
        lame = at + 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
        gaps = content[lame + 21 : lame + 24]
        if len(gaps) < 3 or not content[lame]:
            return Tag(frames, True)
        return Tag(frames, True, gaps[0] << 4 | gaps[1] >> 4, (gaps[1] & 15) << 8 | gaps[2])
    if content[36:40] == b"VBRI" and len(content) >= 54:
        return Tag(struct.unpack(">I", content[50:54])[0], False)
    return None


def _tag_frame(found: Survey) -> bytes:
    """A frame that states how many follow, and how much the encoders put before the first recording and
    after the last one."""
    head = bytearray(found.head)
    head[1] |= 1  # no checksum
    for index in range(1, 15):  # the shortest frame that the tag fits into
        head[2] = head[2] & 0x0D | index << 4
        frame = parse_header(bytes(head))
        if frame.length >= frame.side + 120:
            break
    content, at = head.ljust(frame.length, b"\0"), frame.side
    content[at : at + 12] = b"Info" + struct.pack(">II", 1, found.count)
    if found.xing:
        delay, padding = found.tags[0].delay, found.tags[-1].padding
        content[at + 12 : at + 21] = b"LAME3.100"
        content[at + 33 : at + 36] = bytes([delay >> 4, (delay & 15) << 4 | padding >> 8, padding & 255])
    return bytes(content)
