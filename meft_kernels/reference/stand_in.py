"""What tensors stand for while memory or launches are counted: ones that hold nothing, in a device's place.

Whoever counts (``whisper_meft.memory``, ``benchmarks.launches``) runs the kernels' host code on them to see
what it allocates and launches. That code asks here for the device instead of the tensors, and takes the
decisions it would take there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StandIn:
    """device_type: ``"cpu"`` or ``"cuda"``. capability: of the CUDA device, such as (9, 0). launching:
    whether kernels go to Triton, and loops run in full."""

    device_type: str
    capability: tuple[int, int] | None
    launching: bool


_current: StandIn | None = None


@contextmanager
def standing_for(
    device_type: str, capability: tuple[int, int] | None = None, launching: bool = False
) -> Iterator[None]:
    """Lets tensors stand for a device's inside the ``with`` block: no kernel is launched, and loops over
    blocks of rows run as often as their peak memory needs. ``launching``: all is done as on the device, for
    whoever counts launches and has put a driver that launches nothing in Triton's place."""
    global _current
    previous, _current = _current, StandIn(device_type, capability, launching)
    try:
        yield
    finally:
        _current = previous


def active() -> bool:
    """Whether tensors are stand-ins that no kernel may be given."""
    return _current is not None and not _current.launching


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
