"""Memory that a training step on a CPU frees, kept for the next step."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Of mallopt(3); a process that sets one of them gives up how glibc adapts the other.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_KEPT = 2**31 - 1  # what an int holds
_OWN_MAPPING = 2**25  # the largest that glibc takes, and comes to by itself with tensors of that size

_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Has glibc keep up to 2 GiB of freed memory with this process, and give it back at the end.

    A step's hidden states are freed in its backward, and glibc gives the top of its heap back where more than
    twice the largest tensor lies free. The next step asks for all of it again, page by page, each of which is
    cleared first: 15,000 pages in a step of Whisper-small on one clip.

    Yields:
        whether that is done: not without glibc, nor where the environment says how its allocator is to work.
    """
    library = _glibc()
    kept = bool(
        library
        and library.mallopt(_MMAP_THRESHOLD, _OWN_MAPPING)
        and library.mallopt(_TRIM_THRESHOLD, _MOST_KEPT)
    )
    try:
        yield kept
    finally:
        if kept:
            library.mallopt(_TRIM_THRESHOLD, 2 * _OWN_MAPPING)  # as glibc would have it by now
            library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SETTINGS):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
