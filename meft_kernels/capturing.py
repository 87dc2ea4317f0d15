"""What whoever captures ops in a CUDA graph has to know about them."""

from collections.abc import Iterator
from contextlib import contextmanager

from .ops import backends, self_check

__all__ = ["chosen_backend", "with_checked_kernels"]

chosen_backend = backends.current


@contextmanager
def with_checked_kernels() -> Iterator[None]:
    """Around a capture: the kernels that are captured were checked on the device before.

    Inside a graph nothing can be compared, so an op whose check has not come yet, or for which there was no
    memory, would be captured as the reference, for good. Run what is captured once before.

    Raises:
        RuntimeError: at the end, naming such ops.
    """
    self_check.left_unchecked.clear()
    yield
    if self_check.left_unchecked:
        names = ", ".join(sorted(self_check.left_unchecked))
        raise RuntimeError(f"the kernels of {names} could not be checked before the capture")
