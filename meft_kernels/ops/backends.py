"""Which kernels serve an op: the backends, and the one that is chosen now.

Under ``torch.ops.meft`` the reference serves every device, and a faster kernel registered on a device's
dispatch key takes over with no change here or above. ``torch.ops.meft_reference``, ``meft_native`` and
``meft_triton`` hold the same ops for ``use_backend``, with one kernel for all that it can serve.
"""

import functools
import importlib.util
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .. import native
from .._ops import add_op_namespace_prefix, ops
from ..reference import stand_in
from ..tune.row import FAMILIES, architecture, architecture_of
from .schemas import OP_NAMES

NAMESPACES = {  # under ``torch.ops``
    "auto": ops.name,
    "reference": f"{ops.name}_reference",
    "native": f"{ops.name}_native",
    "triton": f"{ops.name}_triton",
}
BACKENDS = tuple(NAMESPACES)
HAS_TRITON = importlib.util.find_spec("triton") is not None

# What `auto` leaves to the reference in fp32, whose products are the vendor library's: by op and family of
# cards, the smallest side width r at which the fused kernel cannot win by the roofline. Without matrix
# instructions for fp32 its 16 x 16 tiles take operands from shared memory: of the forward's instructions 38 %
# are FMA, of the backward's 51 % (compiled for sm_90 at r = 96), so that it reaches no more of the peak. The
# library reaches about 80 %, but the T x T scores cross the memory bus 5 times, 21 times in the backward.
# Forward in us, per layer and clip of T = 1500 frames (9e6 r FLOP, 9 MB of scores):
#   H100   67 TFLOP/s, 3.35 TB/s   fused 0.354 r   library 0.168 r + 13.4   even at r =  72 (backward  74)
#   A100   19.5        2.0         fused 1.216 r   library 0.577 r + 22.5                35            36
#   B200   80          8.0         fused 0.296 r   library 0.141 r +  5.6                36            37
#   3090   35.6        0.94        fused 0.666 r   library 0.316 r + 48.0               137           139
# An H200's memory brings the library in front from r = 50, a 4090's cache from 60; with TF32 allowed, its
# products on Hopper are 7 times as fast. The other ops stay fused: the library would write and read more than
# it saves (docs/kernels/index.md). AMD's cards have matrix instructions for fp32. None of this was timed.
FASTER_BY_LIBRARY: dict[str, dict[str, int]] = {
    "relu_attention": {"hopper": 75, "ampere": 37, "blackwell": 38, "consumer": 140}
}

_of_process = "auto"  # by the main thread, for itself and for threads that chose none
_of_thread = threading.local()  # and no contextvars.ContextVar, which torch.compile neither traces nor guards


def current() -> str:
    """The backend that is chosen at present, for the calling thread."""
    own = getattr(_of_thread, "backend", None)
    return _of_process if own is None else own


def kernel(name: str, backend: str | None = None) -> Callable:
    """An op by the name under which it is registered, on a backend or on the one that is chosen."""
    return getattr(getattr(torch.ops, NAMESPACES[backend or current()]), name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Chooses the kernels of every op called inside the ``with`` block; its backward follows the forward.

    The choice is the calling thread's. What the main thread chose also holds in threads that chose nothing
    themselves, such as those of ``torch.nn.DataParallel``; what another thread chose holds there alone.

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
    global _of_process
    before = getattr(_of_thread, "backend", None), _of_process
    for_process = not torch.compiler.is_compiling() and threading.current_thread() is threading.main_thread()
    _of_thread.backend = name
    if for_process:
        _of_process = name
    try:
        yield
    finally:
        _of_thread.backend = before[0]
        if for_process:
            _of_process = before[1]


def library_is_faster(op: str, arguments: Sequence) -> bool:
    """Whether ``auto`` leaves a call of an op or its backward to the reference on CUDA, see
    ``FASTER_BY_LIBRARY``: by the first of its arguments, of those ops an activation or a gradient to one."""
    widths, first = FASTER_BY_LIBRARY.get(op), arguments[0]
    if widths is None or first.dtype != torch.float32:
        return False
    return first.shape[-1] >= widths.get(_family(first.device), math.inf)


def _family(device: torch.device) -> str:
    """The family of the card that a tensor is on or stands for."""
    if stand_in.standing() or device.type != "cuda":
        return FAMILIES[architecture(stand_in.capability(device))]
    return FAMILIES[architecture_of(device)]


def uses_native() -> bool:
    """Whether the current choice of kernels takes the C++ ones on the CPU, where they were built."""
    return current() in ("auto", "native")


def backend_status() -> dict[str, tuple[str, str]]:
    """For every op, and for the 8-bit copies, the backend that ``auto`` uses here and, in words, why."""
    status = {}
    for name in (*OP_NAMES, "eight_bit"):
        registered = "encode" if name == "eight_bit" else name
        full_name = add_op_namespace_prefix(registered)
        has = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, full_name)
        if torch.cuda.is_available() and has("CUDA"):
            why = "each kernel is checked against the reference at its first use"
            width = FASTER_BY_LIBRARY.get(name, {}).get(_family(torch.device("cuda")))
            if width is not None:
                why += f"; in float32 the reference from side width {width}, where its products are faster"
            status[name] = ("triton", why)
        elif has("CPU"):
            status[name] = ("native", native.REASON)
        else:
            none = "no faster kernel is registered for this device"
            status[name] = ("reference", none if native.LOADED else native.REASON)
    return status
