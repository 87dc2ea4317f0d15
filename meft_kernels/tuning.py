"""Block sizes of the Triton kernels: one table, each row with the reason for it.

Rows are chosen by kernel, side width and architecture family, never by batch or length, so that the same inputs
give the same bits on every call and nothing compiles twice for a new number of frames.
"""

from dataclasses import dataclass, field

# Shared memory that one block may use, in bytes, and the family that a compute capability belongs to.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
FAMILIES = {80: "ampere", 86: "consumer", 89: "consumer", 90: "hopper", 100: "blackwell", 120: "consumer"}


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
    """

    kernel: str
    widths: tuple[int, int]
    blocks: dict[str, int] = field(hash=False)
    num_warps: int
    num_stages: int
    reason: str
    family: str = "any"


def family_of(capability: tuple[int, int] | None) -> str:
    """Architecture family of a CUDA compute capability; ``None`` (the interpreter) counts as "hopper"."""
    if capability is None:
        return "hopper"
    number = 10 * capability[0] + capability[1]
    known = [sm for sm in sorted(FAMILIES) if sm <= number]
    return FAMILIES[known[-1]] if known else "consumer"


def choose(kernel: str, width: int, capability: tuple[int, int] | None = None) -> Row | None:
    """The row that serves a kernel at a width on a device, or None where no block shape fits."""
    family = family_of(capability)
    rows = [row for row in TABLE if row.kernel == kernel and row.widths[0] <= width <= row.widths[1]]
    exact = [row for row in rows if row.family == family]
    general = [row for row in rows if row.family == "any"]
    return (exact or general or [None])[0]


# --- norm_linear, adapter, ladder ---------------------------------------------------------------------------

_LADDER: tuple[Row, ...] = ()

# --- relu_attention -----------------------------------------------------------------------------------------

_RELU_ATTENTION: tuple[Row, ...] = ()

# --- gated_down, guidance, gated_up -------------------------------------------------------------------------

_SHERL: tuple[Row, ...] = ()

TABLE: tuple[Row, ...] = (*_LADDER, *_RELU_ATTENTION, *_SHERL)
