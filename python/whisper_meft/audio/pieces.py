"""A file in another order: parts of it, with bytes of our own between them."""

import io
from bisect import bisect_right
from itertools import accumulate
from typing import BinaryIO


def open_binary(file: str | bytes) -> BinaryIO:
    """A path, or a file's content, as a binary file."""
    return io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")


class Pieces(io.RawIOBase):
    """Reads ``pieces`` one after the other as if they were one file, holding none of it in memory.

    Args:
        file: what is read; is closed with this.
        pieces: bytes, or (offset, length) of a part of ``file``.
    """

    def __init__(self, file: BinaryIO, pieces: list[bytes | tuple[int, int]]):
        self._file, self._pieces, self._position = file, pieces, 0
        sizes = [len(piece) if isinstance(piece, bytes) else piece[1] for piece in pieces]
        self._starts = [0, *accumulate(sizes)]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        wanted, done = memoryview(buffer).cast("B"), 0
        while done < len(wanted) and self._position < self._starts[-1]:
            number = bisect_right(self._starts, self._position) - 1
            piece, skip = self._pieces[number], self._position - self._starts[number]
            size = min(len(wanted) - done, self._starts[number + 1] - self._position)
            if isinstance(piece, bytes):
                part = piece[skip : skip + size]
            else:
                self._file.seek(piece[0] + skip)
                part = self._file.read(size)
            if not part:
                break
            wanted[done : done + len(part)] = part
            done, self._position = done + len(part), self._position + len(part)
        return done

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
