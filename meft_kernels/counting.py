"""What a memory counter has to know about the ops: the Python code that serves each, and how to run it for a
device that is not there."""

from collections.abc import Callable

from . import ops
from .ops import assume_backend
from .ops.backends import NAMESPACES
from .reference.stand_in import standing_for

__all__ = ["assume_backend", "host_code", "standing_for"]

# The backend that an op of ours names by its namespace; None where it leaves the choice open.
_BACKENDS = {space: None if name == "auto" else name for name, space in NAMESPACES.items()}


def host_code(function: object, backend: str, device_type: str) -> Callable | None:
    """The Python function that runs when ``function`` is called, which allocates all that the op allocates.

    Args:
        function: an operator, as a ``TorchDispatchMode`` is handed it.
        backend: of ops that leave the choice open, see ``use_backend``.
        device_type: ``"cpu"`` or ``"cuda"``, where it runs.

    Returns:
        None for operators that are not ours and for kernels that are not Python.
    """
    namespace, _, name = function._schema.name.partition("::")
    if namespace not in _BACKENDS:
        return None
    return ops.host_code(name, _BACKENDS[namespace] or backend, device_type)
