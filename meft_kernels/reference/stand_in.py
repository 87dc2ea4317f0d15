"""What CPU tensors stand for while memory is counted: fake ones that hold nothing, in place of a device's.

Whoever counts (``whisper_meft.memory``) runs the kernels' host code on fake tensors to see what it allocates.
That code asks here for the device instead of the tensors, and takes the decisions it would take there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StandIn:
    """device_type: ``"cpu"`` or ``"cuda"``. capability: of the CUDA device, such as (9, 0)."""

    device_type: str
    capability: tuple[int, int] | None


_current: StandIn | None = None


@contextmanager
def standing_for(device_type: str, capability: tuple[int, int] | None = None) -> Iterator[None]:
    """Lets fake CPU tensors stand for a device's inside the ``with`` block: no kernel is launched, and loops
    over blocks of rows run as often as their peak memory needs."""
    global _current
    previous, _current = _current, StandIn(device_type, capability)
    try:
        yield
    finally:
        _current = previous


def active() -> bool:
    """Whether tensors are stand-ins that hold nothing."""
    return _current is not None


def standing() -> bool:
    """Whether tensors stand for those of a device at all."""
    return _current is not None


def device_type(device: torch.device) -> str:
    """The type of the device, or of the one that its tensors stand for."""
    return device.type if _current is None else _current.device_type


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, or of the one stood for; None off CUDA."""
    if _current is not None:
        return _current.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
