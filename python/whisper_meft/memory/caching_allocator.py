"""How much torch's CUDA allocator takes from the card to serve a sequence of allocations.

It takes segments, cuts blocks from them and keeps what is freed for later, so that it holds more than is in
use: the figure that ``nvidia-smi`` shows beside the CUDA context. The rules are those of the allocator's
default settings as torch documents and ships them (2.0 to 2.13): requests are rounded up to 512 bytes; up to
1 MiB they come from segments of 2 MiB, else from 20 MiB or, from 10 MiB on, from segments of their own size
rounded up to 2 MiB; the smallest free block that is large enough is taken, and cut where what remains is of
use (512 bytes, in large segments more than 1 MiB); neighbours that are free become one block.
"""

import bisect
from dataclasses import dataclass

_MIB = 2**20

_ROUND, _SMALL = 512, _MIB

_SMALL_SEGMENT, _LARGE_SEGMENT, _OWN_SEGMENT, _ROUND_SEGMENT = 2 * _MIB, 20 * _MIB, 10 * _MIB, 2 * _MIB


@dataclass(slots=True)
class _Block:
    size: int
    before: int | None  # addresses of the neighbours in the segment
    after: int | None
    in_use: bool
    small: bool


class CachingAllocator:
    """Serves allocations from imagined memory; ``reserved`` is how many bytes it has taken so far."""

    def __init__(self):
        self.reserved = 0
        self._blocks: dict[int, _Block] = {}  # by address
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (size, address), in order
        self._end = 0

    def allocate(self, nbytes: int) -> int:
        """The address of a block of at least ``nbytes``."""
        size = max(_ROUND, -(-nbytes // _ROUND) * _ROUND)
        small = size <= _SMALL
        free = self._free[small]
        index = bisect.bisect_left(free, (size, -1))
        found, address = free.pop(index) if index < len(free) else self._segment(size, small)
        block = self._blocks[address]
        block.in_use = True
        rest = found - size
        if rest >= _ROUND if small else rest > _SMALL:
            block.size = size
            self._blocks[address + size] = _Block(rest, address, block.after, False, small)
            if block.after is not None:
                self._blocks[block.after].before = address + size
            block.after = address + size
            bisect.insort(free, (rest, address + size))
        return address

    def _segment(self, size: int, small: bool) -> tuple[int, int]:
        if small:
            taken = _SMALL_SEGMENT
        elif size < _OWN_SEGMENT:
            taken = _LARGE_SEGMENT
        else:
            taken = -(-size // _ROUND_SEGMENT) * _ROUND_SEGMENT
        address = self._end
        self._end += taken + 1  # a gap: segments are no neighbours
        self.reserved += taken
        self._blocks[address] = _Block(taken, None, None, False, small)
        return taken, address

    def free(self, address: int) -> None:
        """Gives back the block at ``address``, which ``allocate`` returned."""
        block = self._blocks[address]
        block.in_use = False
        if block.before is not None and not self._blocks[block.before].in_use:
            address = block.before
            self._join(address)
        block = self._blocks[address]
        if block.after is not None and not self._blocks[block.after].in_use:
            self._join(address)
        bisect.insort(self._free[block.small], (block.size, address))

    def _join(self, address: int) -> None:
        """Makes one block of the one at ``address`` and the next; both leave the list of free ones."""
        block = self._blocks[address]
        after = self._blocks.pop(block.after)
        free = self._free[block.small]
        for entry in ((block.size, address), (after.size, block.after)):
            index = bisect.bisect_left(free, entry)
            if index < len(free) and free[index] == entry:
                free.pop(index)
        block.size += after.size
        block.after = after.after
        if after.after is not None:
            self._blocks[after.after].before = address
