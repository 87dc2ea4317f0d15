"""One choice of block sizes, and the architectures and types that it is made for."""

from dataclasses import dataclass, field

import torch

# Shared memory that one block may use, in bytes, and the family that a compute capability belongs to.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
FAMILIES = {80: "ampere", 86: "consumer", 89: "consumer", 90: "hopper", 100: "blackwell", 120: "consumer"}
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
    descriptors: bool = False

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes beside the kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def sm_of(capability: tuple[int, int] | None) -> int:
    """The known architecture that serves a CUDA compute capability; ``None`` (no GPU) counts as Hopper."""
    if capability is None:
        return 90
    number = 10 * capability[0] + capability[1]
    known = [sm for sm in sorted(FAMILIES) if sm <= number]
    return known[-1] if known else min(FAMILIES)
