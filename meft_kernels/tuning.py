"""Block sizes of the Triton kernels: one table, each row with the reason for it.

Rows are chosen by kernel, side width and architecture family, never by batch or length, so that the same
inputs give the same bits on every call and nothing compiles twice for a new number of frames.

``python -m meft_kernels.tune`` measures better rows for one device on request and writes them to a JSON file;
where there is such a file for the device at hand, its rows come first.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

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
        mma: the instruction that its products should compile to on Hopper, "wgmma", or "hmma" where their
            tiles are too small for it by nature.
    """

    kernel: str
    widths: tuple[int, int]
    blocks: dict[str, int] = field(hash=False)
    num_warps: int
    num_stages: int
    reason: str
    family: str = "any"
    mma: str = "wgmma"


def sm_of(capability: tuple[int, int] | None) -> int:
    """The known architecture that serves a CUDA compute capability; ``None`` (no GPU) counts as Hopper."""
    if capability is None:
        return 90
    number = 10 * capability[0] + capability[1]
    known = [sm for sm in sorted(FAMILIES) if sm <= number]
    return known[-1] if known else min(FAMILIES)


def choose(kernel: str, width: int, capability: tuple[int, int] | None = None) -> Row | None:
    """The row that serves a kernel at a width on a device, or None where no block shape fits."""
    family = FAMILIES[sm_of(capability)]
    tuned = device_rows(torch.cuda.get_device_name()) if capability and torch.cuda.is_available() else ()
    found = (best_of(rows, kernel, width, family) for rows in (_trial, tuned, TABLE))
    return next((row for row in found if row is not None), None)


def best_of(rows: Iterable[Row], kernel: str, width: int, family: str) -> Row | None:
    """The first of ``rows`` for a kernel, width and family, one of the exact family before one for any."""
    fitting = [row for row in rows if row.kernel == kernel and row.widths[0] <= width <= row.widths[1]]
    exact = [row for row in fitting if row.family == family]
    general = [row for row in fitting if row.family == "any"]
    return next(iter(exact + general), None)


_trial: tuple[Row, ...] = ()


@contextmanager
def trial(*rows: Row) -> Iterator[None]:
    """Puts rows before all others inside the ``with`` block, to time them."""
    global _trial
    before, _trial = _trial, rows
    try:
        yield
    finally:
        _trial = before


def device_file(device_name: str) -> Path:
    """Where the rows measured on a device are kept: in ``MEFT_KERNELS_TUNING_DIR``, else a user folder."""
    folder = os.environ.get("MEFT_KERNELS_TUNING_DIR")
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "meft_kernels" / "tuning"
    return Path(folder) / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-').lower()}.json"


@functools.cache
def device_rows(device_name: str) -> tuple[Row, ...]:
    """The rows measured on a device, none where there is no file.

    Raises:
        ValueError: the file is there and cannot be used; its name is in the message.
    """
    path = device_file(device_name)
    if not path.is_file():
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return tuple(Row(**{**row, "widths": tuple(row["widths"])}) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no usable block sizes, remove it or tune again: {error}") from error


# --- norm_linear, adapter, ladder ---------------------------------------------------------------------------

# Compiled for sm_90 in bf16 (registers per thread, spills, shared memory), not measured. Two blocks of 4
# warps on a multiprocessor hide each other's loads; above width 96 the accumulators need 8 warps.
_ROWS = "row-wise, bound by memory; tiles of 16 KB on average, no spill at any width"
_SMALL = "100 KB of shared memory: half the rows"

_LADDER: tuple[Row, ...] = (
    Row("row_statistics", (1, 2048), {"BLOCK_M": 4}, 4, 1, "width is D; 48 registers at 640"),
    Row("norm_linear_fwd", (1, 192), {"BLOCK_M": 32}, 4, 1, _ROWS),
    Row("norm_linear_fwd", (193, 1280), {"BLOCK_M": 8}, 4, 1, _ROWS),
    Row("norm_linear_bwd", (1, 192), {"BLOCK_M": 32}, 4, 1, _ROWS),
    Row("norm_linear_bwd", (193, 1280), {"BLOCK_M": 8}, 4, 1, _ROWS),
    Row("adapter_fwd", (1, 96), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "156 registers at 96, 60 KB"),
    Row("adapter_fwd", (97, 384), {"BLOCK_M": 64, "BLOCK_H": 32}, 8, 2, "225 registers at 384, 144 KB"),
    Row("adapter_fwd", (193, 384), {"BLOCK_M": 32, "BLOCK_H": 32}, 8, 2, _SMALL, "consumer", "hmma"),
    Row("adapter_bwd", (1, 96), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "255 registers at 96, no spill, 72 KB"),
    Row("adapter_bwd", (97, 192), {"BLOCK_M": 64, "BLOCK_H": 32}, 8, 2, "241 registers at 192, 96 KB"),
    Row("adapter_bwd_weight", (1, 80), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "255 registers at 80, no spill"),
    Row("adapter_bwd_weight", (81, 128), {"BLOCK_M": 64, "BLOCK_H": 64}, 8, 2, "255 registers at 128, 96 KB"),
    Row("adapter_bwd_weight", (129, 192), {"BLOCK_M": 32, "BLOCK_H": 64}, 8, 2, "64 rows spill 56 bytes"),
    Row("adapter_bwd_normed", (1, 192), {"BLOCK_M": 32}, 8, 1, _ROWS),
    Row("adapter_bwd_normed", (193, 640), {"BLOCK_M": 16}, 8, 1, _ROWS),
    Row("adapter_bwd_normed", (641, 1280), {"BLOCK_M": 8}, 8, 1, _ROWS),
    Row("adapter_bwd_input", (1, 192), {"BLOCK_M": 32}, 8, 1, _ROWS),
    Row("adapter_bwd_input", (193, 640), {"BLOCK_M": 16}, 8, 1, _ROWS),
    Row("adapter_bwd_input", (641, 1280), {"BLOCK_M": 8}, 8, 1, _ROWS),
    Row(
        "adapter_bwd_hidden",
        (1, 8192),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        4,
        1,
        "width is the hidden one; partial sums take 1/64 of what is read",
    ),
    Row("ladder_fwd", (1, 96), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "233 registers at 96, 60 KB"),
    Row("ladder_fwd", (97, 127), {"BLOCK_M": 64, "BLOCK_H": 64}, 8, 2, "97 spills with 32 hidden columns"),
    Row("ladder_fwd", (128, 256), {"BLOCK_M": 64, "BLOCK_H": 32}, 8, 2, "212 registers at 192, 72 KB"),
    Row("ladder_fwd", (257, 384), {"BLOCK_M": 32, "BLOCK_H": 32}, 8, 2, "64 rows spill", mma="hmma"),
    Row("ladder_fwd", (193, 256), {"BLOCK_M": 32, "BLOCK_H": 32}, 8, 2, _SMALL, "consumer", "hmma"),
    Row("ladder_bwd", (1, 80), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "255 registers at 80, no spill, 60 KB"),
    Row("ladder_bwd", (81, 96), {"BLOCK_M": 64, "BLOCK_H": 64}, 8, 2, "232 registers; 4 warps spill"),
    Row("ladder_bwd", (128, 128), {"BLOCK_M": 64, "BLOCK_H": 32}, 8, 2, "213 registers; 97 and 160 spill"),
    Row("ladder_bwd_mixed", (1, 192), {"BLOCK_M": 32}, 8, 1, _ROWS),
    Row("ladder_bwd_mixed", (193, 640), {"BLOCK_M": 16}, 8, 1, _ROWS),
    Row("ladder_bwd_mixed", (641, 1280), {"BLOCK_M": 8}, 8, 1, _ROWS),
    Row("ladder_bwd_split", (1, 192), {"BLOCK_M": 32}, 8, 1, _ROWS),
    Row("ladder_bwd_split", (193, 640), {"BLOCK_M": 16}, 8, 1, _ROWS),
    Row("ladder_bwd_split", (641, 1280), {"BLOCK_M": 8}, 8, 1, _ROWS),
)

# --- relu_attention -----------------------------------------------------------------------------------------

# In the rows for any family loads go through pointers and tiles fit 99 KB: Ampere and the consumer cards.
# Hopper's rows use the copy engine, Blackwell's pointers. M is queries and N keys. The reference serves the
# widths 97 to 103, which no encoder gives: they pad to 128, miss the engine's 16 bytes and spill.
_RELU_ATTENTION: tuple[Row, ...] = (
    Row(
        "relu_attention_sum",
        (1, 384),
        {"BLOCK_M": 32},
        num_warps=4,
        num_stages=3,
        reason="bound by memory; 80 registers at 192, no spill",
    ),
    Row(
        "relu_attention_fwd",
        (1, 64),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=4,
        num_stages=3,
        reason="168 registers at 48 on sm_80, 3 blocks per SM",
    ),
    Row(
        "relu_attention_fwd",
        (65, 96),
        {"BLOCK_M": 64, "BLOCK_N": 32},
        num_warps=4,
        num_stages=3,
        reason="255 registers at 96, spills 8 bytes at most; 64 keys spill 72",
    ),
    Row(
        "relu_attention_fwd",
        (104, 192),
        {"BLOCK_M": 32, "BLOCK_N": 32},
        num_warps=4,
        num_stages=2,
        reason="230 registers at 192, 2 blocks per SM; 64 x 32 with 8 warps spills 224 bytes",
    ),
    Row(
        "relu_attention_fwd",
        (193, 384),
        {"BLOCK_M": 32, "BLOCK_N": 32},
        num_warps=8,
        num_stages=2,
        reason="217 registers at 384, 50 KB; 64 queries spill 816 bytes",
    ),
    Row(
        "relu_attention_bwd_anchor",
        (1, 96),
        {"BLOCK_M": 64, "BLOCK_N": 32},
        num_warps=4,
        num_stages=3,
        reason="166 registers at 48, 255 at 96, spills 24 bytes at most; 36 KB",
    ),
    Row(
        "relu_attention_bwd_anchor",
        (104, 192),
        {"BLOCK_M": 32, "BLOCK_N": 32},
        num_warps=4,
        num_stages=2,
        reason="2 blocks per SM with 24 bytes of spill; 64 queries spill 156",
    ),
    Row(
        "relu_attention_bwd_anchor",
        (193, 384),
        {"BLOCK_M": 32, "BLOCK_N": 32},
        num_warps=8,
        num_stages=2,
        reason="255 registers at 384, no spill; 74 KB of 99",
    ),
    Row(
        "relu_attention_bwd_features",
        (1, 96),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=4,
        num_stages=2,
        reason="168 registers at 48, 255 at 96, no spill; 36 KB",
    ),
    Row(
        "relu_attention_bwd_features",
        (104, 192),
        {"BLOCK_M": 32, "BLOCK_N": 32},
        num_warps=4,
        num_stages=2,
        reason="168 registers at 192, 3 blocks per SM; 64 keys spill 252 bytes",
    ),
    Row(
        "relu_attention_bwd_features",
        (193, 384),
        {"BLOCK_M": 16, "BLOCK_N": 32},
        num_warps=8,
        num_stages=2,
        reason="128 registers at 384, 49 KB",
    ),
    Row(
        "relu_attention_fwd",
        (1, 96),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=4,
        num_stages=3,
        reason="131 registers at 48, 216 at 96, 2 blocks per SM; without descriptors 238 at 96",
        family="hopper",
    ),
    Row(
        "relu_attention_fwd",
        (104, 192),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=8,
        num_stages=3,
        reason="218 registers at 192, no spill; 128 keys in 2 stages spill 64 bytes",
        family="hopper",
    ),
    Row(
        "relu_attention_fwd",
        (193, 256),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=8,
        num_stages=2,
        reason="spills 40 bytes at 256",
        family="hopper",
    ),
    Row(
        "relu_attention_fwd",
        (257, 384),
        {"BLOCK_M": 64, "BLOCK_N": 32},
        num_warps=8,
        num_stages=2,
        reason="correct but slow: spills 1.1 KB at 384",
        family="hopper",
    ),
    Row(
        "relu_attention_bwd_anchor",
        (1, 96),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=4,
        num_stages=3,
        reason="147 registers at 48, 194 at 96, 2 blocks per SM",
        family="hopper",
    ),
    Row(
        "relu_attention_bwd_anchor",
        (104, 192),
        {"BLOCK_M": 64, "BLOCK_N": 32},
        num_warps=4,
        num_stages=3,
        reason="235 registers at 192, 2 blocks per SM; without descriptors 128 bytes spill",
        family="hopper",
    ),
    Row(
        "relu_attention_bwd_anchor",
        (193, 384),
        {"BLOCK_M": 64, "BLOCK_N": 32},
        num_warps=8,
        num_stages=2,
        reason="233 registers at 256; spills 0.5 KB at 320 and 1.3 KB at 384",
        family="hopper",
    ),
    Row(
        "relu_attention_bwd_features",
        (1, 96),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=4,
        num_stages=3,
        reason="146 registers at 48, 204 at 96, 2 blocks per SM",
        family="hopper",
    ),
    Row(
        "relu_attention_bwd_features",
        (104, 192),
        {"BLOCK_M": 32, "BLOCK_N": 64},
        num_warps=4,
        num_stages=3,
        reason="244 registers at 192, 2 blocks per SM; 64 queries with 8 warps spill",
        family="hopper",
    ),
    Row(
        "relu_attention_bwd_features",
        (193, 256),
        {"BLOCK_M": 16, "BLOCK_N": 64},
        num_warps=4,
        num_stages=2,
        reason="spills 40 bytes at 256, 2 blocks per SM; 32 queries with 8 warps 460",
        family="hopper",
    ),
    Row(
        "relu_attention_bwd_features",
        (257, 384),
        {"BLOCK_M": 16, "BLOCK_N": 64},
        num_warps=8,
        num_stages=2,
        reason="correct but slow: spills 0.8 KB at 384",
        family="hopper",
    ),
    Row(
        "relu_attention_fwd",
        (1, 96),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=4,
        num_stages=3,
        reason="144 registers at 48, 210 at 96, 2 blocks per SM",
        family="blackwell",
    ),
    Row(
        "relu_attention_fwd",
        (104, 384),
        {"BLOCK_M": 64, "BLOCK_N": 32},
        num_warps=8,
        num_stages=2,
        reason="198 registers at 192; spills 0.3 KB at 256 and 1 KB at 384",
        family="blackwell",
    ),
    Row(
        "relu_attention_bwd_anchor",
        (1, 96),
        {"BLOCK_M": 64, "BLOCK_N": 32},
        num_warps=4,
        num_stages=3,
        reason="126 registers at 48, 168 at 96, 3 blocks per SM",
        family="blackwell",
    ),
    Row(
        "relu_attention_bwd_anchor",
        (104, 384),
        {"BLOCK_M": 64, "BLOCK_N": 32},
        num_warps=8,
        num_stages=2,
        reason="167 registers at 192, 246 at 256; spills 0.6 KB at 384",
        family="blackwell",
    ),
    Row(
        "relu_attention_bwd_features",
        (1, 96),
        {"BLOCK_M": 64, "BLOCK_N": 64},
        num_warps=4,
        num_stages=2,
        reason="160 registers at 48, 174 at 96, 2 blocks per SM",
        family="blackwell",
    ),
    Row(
        "relu_attention_bwd_features",
        (104, 192),
        {"BLOCK_M": 32, "BLOCK_N": 64},
        num_warps=4,
        num_stages=2,
        reason="198 registers at 192, 2 blocks per SM",
        family="blackwell",
    ),
    Row(
        "relu_attention_bwd_features",
        (193, 384),
        {"BLOCK_M": 16, "BLOCK_N": 64},
        num_warps=8,
        num_stages=2,
        reason="178 registers at 256, 198 at 384",
        family="blackwell",
    ),
)

# --- gated_down, guidance, gated_up -------------------------------------------------------------------------

_SHERL: tuple[Row, ...] = (
    Row(
        "guidance_fwd",
        (1, 1280),
        {"BLOCK_T": 4, "BLOCK_D": 32},
        num_warps=4,
        num_stages=2,
        reason="one frame per warp, since the batched products are split over warps by frame alone; 45-72"
        " registers at K = 10, 72-128 at K = 30, no spill, 4-10 KB, 128-bit copies through the pointer tuple",
        mma="hmma",
    ),
    Row(
        "guidance_bwd",
        (8, 1280),
        {"BLOCK_T": 4, "BLOCK_D": 16, "GROUPS": 16},
        num_warps=4,
        num_stages=2,
        reason="chunks of 32 take 189 registers (2 blocks per SM), of 16 118 (4) and fit 48, 80 and 160"
        " without padding; 253 at K = 30, no spill up to width 320; 64 frames per program keep the partial"
        " sums of the weight at 1/300 of what is read at K = 10",
        mma="hmma",
    ),
    Row(
        "gated_down_fwd",
        (1, 32),
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="one tile of columns",
    ),
    Row(
        "gated_down_fwd",
        (33, 64),
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="one tile of columns",
    ),
    Row(
        "gated_down_fwd",
        (65, 96),
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="three tiles without padding at 96, 84 registers, 5 blocks per SM; one tile of 128 takes 255",
    ),
    Row(
        "gated_down_fwd",
        (97, 1280),
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="142 registers, 3 blocks per SM; 128 columns take 255, with 8 warps and 128 rows they spill",
    ),
    Row(
        "gated_down_bwd_gate",
        (1, 32),
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="one tile of columns",
    ),
    Row(
        "gated_down_bwd_gate",
        (33, 64),
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
        num_warps=8,
        num_stages=2,
        reason="one tile of columns; 8 warps take 121 registers, 4 take 205",
    ),
    Row(
        "gated_down_bwd_gate",
        (65, 96),
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="three tiles without padding at 96, 112 registers, 4 blocks per SM",
    ),
    Row(
        "gated_down_bwd_gate",
        (97, 1280),
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
        num_warps=8,
        num_stages=2,
        reason="8 warps take 121 registers, 4 take 205; 128 columns spill 1.7 KB",
    ),
    Row(
        "gated_down_bwd_hidden",
        (1, 32),
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="one tile of columns",
    ),
    Row(
        "gated_down_bwd_hidden",
        (33, 64),
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="one tile of columns",
    ),
    Row(
        "gated_down_bwd_hidden",
        (65, 127),
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="three tiles without padding at 96, 56 registers, 9 blocks per SM; odd widths spill with 64",
    ),
    Row(
        "gated_down_bwd_hidden",
        (128, 1280),
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32},
        num_warps=4,
        num_stages=2,
        reason="99 registers, 4 blocks per SM; 128 columns take 184",
    ),
    Row(
        "gated_up_fwd",
        (1, 32),
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16},
        num_warps=8,
        num_stages=2,
        reason="64 registers, 4 blocks of 8 warps per SM; one chunk of 32 spills 12 KB in fp32",
    ),
    Row(
        "gated_up_fwd",
        (33, 1280),
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32},
        num_warps=8,
        num_stages=2,
        reason="78 registers, 3 blocks of 8 warps per SM to cover the wait for h; 128 rows fit once",
    ),
    Row(
        "gated_up_bwd",
        (1, 32),
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64},
        num_warps=4,
        num_stages=3,
        reason="one tile of columns, so that the upstream gradient is read once",
    ),
    Row(
        "gated_up_bwd",
        (33, 64),
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64},
        num_warps=4,
        num_stages=3,
        reason="one tile of columns",
    ),
    Row(
        "gated_up_bwd",
        (65, 128),
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64},
        num_warps=8,
        num_stages=3,
        reason="one tile of columns; 118 registers, 2 blocks of 8 warps; 4 warps take 184",
    ),
    Row(
        "gated_up_bwd",
        (129, 192),
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64},
        num_warps=4,
        num_stages=3,
        reason="up to three tiles without padding at 192, 145 registers; the later ones read L2",
    ),
    Row(
        "gated_up_bwd",
        (193, 1280),
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64},
        num_warps=8,
        num_stages=3,
        reason="fewest tiles that fit twice per SM; 256 columns fit once",
    ),
)

# --- eight_bit ----------------------------------------------------------------------------------------------

# Widths are the backbone's, in Whisper multiples of 128. 8 elements per thread are 16 bytes of bf16 and 8 of
# codes, so that no tile is rearranged between load and store, as it is with 16.
_EIGHT_BIT: tuple[Row, ...] = (
    Row(
        "eight_bit_channels",
        (1, 2048),
        {"BLOCK_M": 16, "BLOCK_N": 128, "STEPS": 16},
        num_warps=8,
        num_stages=1,
        reason="48 registers, 5 blocks per SM; partial results of 256 rows take 1/40 of what is read in bf16",
    ),
    Row(
        "eight_bit_encode",
        (1, 2048),
        {"BLOCK_M": 16, "BLOCK_N": 128, "STEPS": 8},
        num_warps=8,
        num_stages=1,
        reason="48 registers, 5 blocks per SM, no shared memory; 128 rows share a channel's two divisions",
    ),
    Row(
        "eight_bit_decode",
        (1, 2048),
        {"BLOCK_M": 16, "BLOCK_N": 128, "STEPS": 8},
        num_warps=8,
        num_stages=1,
        reason="39 registers, 6 blocks per SM, no shared memory; 4 warps take 64 and 2 barriers a tile",
    ),
)

TABLE: tuple[Row, ...] = (*_LADDER, *_RELU_ATTENTION, *_SHERL, *_EIGHT_BIT)
