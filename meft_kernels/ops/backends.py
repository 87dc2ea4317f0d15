"""Which kernels serve an op: the backends, and the one that is chosen now.

Under ``torch.ops.meft`` the reference serves every device, and a faster kernel registered on a device's
dispatch key takes over with no change here or above. ``torch.ops.meft_reference``, ``meft_native`` and
``meft_triton`` hold the same ops for ``use_backend``, with one kernel for all that it can serve.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .. import native
from .schemas import OP_NAMES

NAMESPACES = {  # under ``torch.ops``
    "auto": "meft",
    "reference": "meft_reference",
    "native": "meft_native",
    "triton": "meft_triton",
}
BACKENDS = tuple(NAMESPACES)
HAS_TRITON = importlib.util.find_spec("triton") is not None

_current = "auto"


def current() -> str:
    """The backend that is chosen at present."""
    return _current


def kernel(name: str, backend: str | None = None) -> Callable:
    """An op by the name under which it is registered, on a backend or on the one that is chosen."""
    return getattr(getattr(torch.ops, NAMESPACES[backend or _current]), name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the kernels of every op called inside the ``with`` block; its backward follows the forward.

    Args:
        name: ``"auto"`` (the fastest that is registered for the tensors' device), ``"reference"`` (plain
            PyTorch), ``"native"`` (C++) or ``"triton"``.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend has no kernels in this installation.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name == "native" and not native.LOADED:
        raise RuntimeError(f"backend 'native' has no kernels in this installation: {native.REASON}")
    if name == "triton" and not HAS_TRITON:
        raise RuntimeError("backend 'triton' needs the triton package, which is not installed")
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "backend 'triton' needs a CUDA device (or TRITON_INTERPRET=1 to interpret it on the CPU)"
        )
    with assume_backend(name):
        yield


@contextmanager
def assume_backend(name: str) -> Iterator[None]:
    """``use_backend`` whether or not the backend can run here, for whoever counts what it would allocate."""
    global _current
    previous, _current = _current, name
    try:
        yield
    finally:
        _current = previous


def uses_native() -> bool:
    """Whether the current choice of kernels takes the C++ ones on the CPU, where they were built."""
    return _current in ("auto", "native")


def backend_status() -> dict[str, tuple[str, str]]:
    """For every op, and for the 8-bit copies, the backend that ``auto`` uses here and, in words, why."""
    status = {}
    for name in (*OP_NAMES, "eight_bit"):
        registered = "encode" if name == "eight_bit" else name
        has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"meft::{registered}")
        if torch.cuda.is_available() and has("CUDA"):
            status[name] = ("triton", "each kernel is checked against the reference at its first use")
        elif has("CPU"):
            status[name] = ("native", native.REASON)
        else:
            none = "no faster kernel is registered for this device"
            status[name] = ("reference", none if native.LOADED else native.REASON)
    return status
