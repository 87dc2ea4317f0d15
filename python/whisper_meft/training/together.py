"""Work that the processes of a run share."""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object

from ..errors import UserError, one_line

T = TypeVar("T")


def gathered(work: Callable[[], T]) -> list[T]:
    """What ``work`` gives in each process, in their order; all must call it. Where it fails in one it fails
    in all: the others would wait for that one's part forever.

    Raises:
        UserError: ``work`` failed in another process. Where it failed in this one, its own error.
    """
    found, error = None, None
    try:
        found = work()
    except Exception as raised:
        error = raised
    parts = gather_object([(found, None if error is None else one_line(error))])
    if error is not None:
        raise error
    for _, reason in parts:
        if reason is not None:
            raise UserError(reason)
    return [part for part, _ in parts]
