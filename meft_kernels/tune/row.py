"""One choice of block sizes, and the architectures and types that it is made for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, wraps
from types import MappingProxyType
from typing import Any

import torch

Architecture = int | str  # NVIDIA's by number, such as 90, and AMD's by name, such as "gfx942"
# Shared memory that one block may use, in bytes, and the family that an architecture belongs to.
SHARED_MEMORY: dict[Architecture, int] = {
    **{80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376},
    **{"gfx942": 65536, "gfx950": 163840},
}
FAMILIES: dict[Architecture, str] = {
    **{80: "ampere", 86: "consumer", 89: "consumer", 90: "hopper", 100: "blackwell", 120: "consumer"},
    **{"gfx942": "amd", "gfx950": "amd"},
}
# Triton's and torch's words for the activation types.
TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Row:
    """One choice of block sizes.

    Attributes:
        kernel: name of the jit function without ``_kernel``.
        widths: smallest and largest width (side width r unless the kernel says otherwise) it serves.
        blocks: the kernel's constexpr block sizes by argument name.
        num_warps, num_stages: launch options.
        reason: why these, with what was measured or compiled.
        family: architecture family, or "any". A row of the exact family is preferred.
        mma: the instruction that its products should compile to on Hopper, "wgmma", or "hmma" where their
            tiles are too small for it by nature.
        precision: of products of fp32 operands beside half-precision ones, in Triton's words; AMD's cards
            have no tf32x3, but matrix instructions for fp32.
        descriptors: whether blocks are loaded by the copy engine, through descriptors, where a kernel can.
    """

    kernel: str
    widths: tuple[int, int]
    blocks: dict[str, int] = field(hash=False)
    num_warps: int
    num_stages: int
    reason: str
    family: str = "any"
    mma: str = "wgmma"
    precision: str = "tf32x3"
    descriptors: bool = False

    @cached_property
    def options(self) -> dict[str, int]:
        """What a launch takes beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @cached_property
    def blocks_and_options(self) -> dict[str, int]:
        """``blocks`` and ``options`` in one."""
        return {**self.blocks, **self.options}

    @cached_property
    def made(self) -> dict[tuple, Any]:
        """What was made of the row, see ``once_per_row``."""
        return {}


def once_per_row(make: Callable) -> Callable:
    """A function of a row and of what can be a key, whose results are kept with the row: a launch asks again
    every time. Dictionaries are read-only then."""

    @wraps(make)
    def kept(row: Row, *given: Any) -> Any:
        key = (make, *given)
        if key not in row.made:
            result = make(row, *given)
            row.made[key] = MappingProxyType(result) if isinstance(result, dict) else result
        return row.made[key]

    return kept


@cache
def architecture(capability: tuple[int, int] | None, amd_name: str | None = None) -> Architecture:
    """The known architecture that serves a device.

    Args:
        capability: such as (9, 0); None (no GPU) counts as Hopper.
        amd_name: AMD's name of the chip, such as "gfx942:sramecc+:xnack-", None on NVIDIA's: ROCm gives an
            MI300 the capability (9, 4).
    """
    if amd_name is not None:
        name = amd_name.split(":")[0]
        return name if name in FAMILIES else "gfx942"
    if capability is None:
        return 90
    known = sorted(number for number in FAMILIES if isinstance(number, int))
    fitting = [number for number in known if number <= 10 * capability[0] + capability[1]]
    return fitting[-1] if fitting else known[0]


def architecture_of(device: torch.device | None = None) -> Architecture:
    """The known architecture that serves a CUDA or ROCm device, without an argument the current one."""
    amd_name = torch.cuda.get_device_properties(device).gcnArchName if torch.version.hip else None
    return architecture(torch.cuda.get_device_capability(device), amd_name)
