"""The block sizes of every Triton kernel, each row with the reason for it: what was compiled or measured.

A row reads: kernel, smallest and largest width, block sizes, warps, stages, reason, and where they are not
the usual ones family and matrix instruction. Of two rows that serve a width on one family the first counts.
``triton_kernels/<op>.py`` holds the kernels, whose names begin with the op's.
"""

from .row import Row

# fmt: off

# --- row_statistics, norm_linear, adapter, ladder -----------------------------------------------------------

# Compiled for sm_90 in bf16 (registers per thread, spills, shared memory), not measured. Two blocks of 4
# warps on a multiprocessor hide each other's loads; above width 96 the accumulators need 8 warps.
_ROWS = "row-wise, bound by memory; tiles of 16 KB on average, no spill at any width"
_SERIALISED = "one tile: with 8 warps or 2 stages its wgmma run one at a time, as ptxas says (C7515)"
_SMALL = "100 KB of shared memory: half the rows"

_LST: tuple[Row, ...] = (
    Row("row_statistics", (1, 2048), {"BLOCK_M": 4}, 4, 1, "width is D; 48 registers at 640"),
    Row("norm_linear_fwd", (1, 192), {"BLOCK_M": 32}, 4, 1, _ROWS),
    Row("norm_linear_fwd", (193, 1280), {"BLOCK_M": 8}, 4, 1, _ROWS),
    Row("norm_linear_bwd", (1, 192), {"BLOCK_M": 32}, 4, 1, _ROWS),
    Row("norm_linear_bwd", (193, 1280), {"BLOCK_M": 8}, 4, 1, _ROWS),
    Row("adapter_fwd", (1, 32), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 1, _SERIALISED, "hopper"),
    Row("adapter_fwd", (49, 64), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 1, _SERIALISED, "hopper"),
    Row("adapter_fwd", (97, 128), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 1, _SERIALISED, "hopper"),
    Row("adapter_fwd", (1, 96), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "156 registers at 96, 60 KB"),
    Row("adapter_fwd", (97, 384), {"BLOCK_M": 64, "BLOCK_H": 32}, 8, 2, "225 registers at 384, 144 KB"),
    Row("adapter_fwd", (193, 384), {"BLOCK_M": 32, "BLOCK_H": 32}, 8, 2, _SMALL, "consumer", "hmma"),
    Row("adapter_bwd", (97, 128), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 1, _SERIALISED, "hopper"),
    Row("adapter_bwd", (1, 96), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "250 registers at 96, no spill, 72 KB"),
    Row("adapter_bwd", (129, 192), {"BLOCK_M": 64, "BLOCK_H": 32}, 4, 1,
        "no spill at 192; 8 warps have 256 registers and spill 0.5 KB", "amd"),
    Row("adapter_bwd", (97, 192), {"BLOCK_M": 64, "BLOCK_H": 32}, 8, 2, "241 registers at 192, 96 KB"),
    Row("adapter_bwd_weight", (1, 80), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "255 registers at 80, no spill"),
    Row("adapter_bwd_weight", (128, 128), {"BLOCK_M": 32, "BLOCK_H": 64}, 4, 1, _SERIALISED, "hopper"),
    Row("adapter_bwd_weight", (1, 192), {"BLOCK_M": 32, "BLOCK_H": 64}, 4, 1,
        "238 of 512 registers at 96, 386 at 192, no spill; 8 warps have 256 and spill 0.7 KB", "amd"),
    Row("adapter_bwd_weight", (81, 128), {"BLOCK_M": 64, "BLOCK_H": 64}, 8, 2, "255 registers at 128, 96 KB"),
    Row("adapter_bwd_weight", (129, 192), {"BLOCK_M": 32, "BLOCK_H": 64}, 8, 1, "2 stages serialise wgmma"),
    Row("adapter_bwd_normed", (1, 192), {"BLOCK_M": 32}, 8, 1, _ROWS),
    Row("adapter_bwd_normed", (193, 640), {"BLOCK_M": 16}, 8, 1, _ROWS),
    Row("adapter_bwd_normed", (641, 1280), {"BLOCK_M": 8}, 8, 1, _ROWS),
    Row("adapter_bwd_input", (1, 192), {"BLOCK_M": 32}, 8, 1, _ROWS),
    Row("adapter_bwd_input", (193, 640), {"BLOCK_M": 16}, 8, 1, _ROWS),
    Row("adapter_bwd_input", (641, 1280), {"BLOCK_M": 8}, 8, 1, _ROWS),
    Row("adapter_bwd_hidden", (1, 8192), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 1,
        "width is the hidden one; partial sums take 1/64 of what is read"),
    Row("ladder_fwd", (1, 32), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 1, _SERIALISED, "hopper"),
    Row("ladder_fwd", (49, 64), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 1, _SERIALISED, "hopper"),
    Row("ladder_fwd", (97, 128), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 1, _SERIALISED, "hopper"),
    Row("ladder_fwd", (1, 96), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "233 registers at 96, 60 KB"),
    Row("ladder_fwd", (97, 127), {"BLOCK_M": 64, "BLOCK_H": 64}, 8, 2, "97 spills with 32 hidden columns"),
    Row("ladder_fwd", (128, 256), {"BLOCK_M": 64, "BLOCK_H": 32}, 8, 2, "212 registers at 192, 72 KB"),
    Row("ladder_fwd", (257, 384), {"BLOCK_M": 32, "BLOCK_H": 32}, 8, 2, "64 rows spill", mma="hmma"),
    Row("ladder_fwd", (193, 256), {"BLOCK_M": 32, "BLOCK_H": 32}, 8, 2, _SMALL, "consumer", "hmma"),
    Row("ladder_bwd", (1, 80), {"BLOCK_M": 64, "BLOCK_H": 64}, 4, 2, "255 registers at 80, no spill, 60 KB"),
    Row("ladder_bwd", (1, 96), {"BLOCK_M": 64, "BLOCK_H": 32}, 4, 1,
        "254 registers at 96, 2 blocks per CU, no spill; 8 warps spill 1.5 KB", "amd"),
    Row("ladder_bwd", (128, 128), {"BLOCK_M": 64, "BLOCK_H": 32}, 4, 1, "274 registers, no spill", "amd"),
    Row("ladder_bwd", (96, 96), {"BLOCK_M": 64, "BLOCK_H": 64}, 8, 2,
        "232 registers; 4 warps spill, and so do the masks of the widths from 81"),
    Row("ladder_bwd", (128, 128), {"BLOCK_M": 64, "BLOCK_H": 32, "TILE": 64}, 8, 2,
        "166 registers as two tiles; as one triton 3.6's wgmma run one at a time", "hopper"),
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
    Row("relu_attention_sum", (1, 384), {"BLOCK_M": 32}, 4, 3,
        "bound by memory; 80 registers at 192, no spill"),
    Row("relu_attention_fwd", (1, 64), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3,
        "168 registers at 48 on sm_80, 3 blocks per SM"),
    Row("relu_attention_fwd", (65, 96), {"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3,
        "255 registers at 96, spills 8 bytes at most; 64 keys spill 72"),
    Row("relu_attention_fwd", (104, 192), {"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2,
        "230 registers at 192, 2 blocks per SM; 64 x 32 with 8 warps spills 224 bytes"),
    Row("relu_attention_fwd", (193, 384), {"BLOCK_M": 32, "BLOCK_N": 32}, 8, 2,
        "217 registers at 384, 50 KB; 64 queries spill 816 bytes"),
    Row("relu_attention_bwd_anchor", (1, 96), {"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3,
        "166 registers at 48, 255 at 96, spills 24 bytes at most; 36 KB"),
    Row("relu_attention_bwd_anchor", (104, 192), {"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2,
        "2 blocks per SM with 24 bytes of spill; 64 queries spill 156"),
    Row("relu_attention_bwd_anchor", (193, 384), {"BLOCK_M": 32, "BLOCK_N": 32}, 8, 2,
        "255 registers at 384, no spill; 74 KB of 99"),
    Row("relu_attention_bwd_features", (1, 96), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2,
        "168 registers at 48, 255 at 96, no spill; 36 KB"),
    Row("relu_attention_bwd_features", (104, 192), {"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2,
        "168 registers at 192, 3 blocks per SM; 64 keys spill 252 bytes"),
    Row("relu_attention_bwd_features", (193, 384), {"BLOCK_M": 16, "BLOCK_N": 32}, 8, 2,
        "128 registers at 384, 49 KB"),
    Row("relu_attention_fwd", (1, 96), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3,
        "131 registers at 48, 216 at 96, 2 blocks per SM; without descriptors 238 at 96", "hopper",
        descriptors=True),
    Row("relu_attention_fwd", (104, 192), {"BLOCK_M": 64, "BLOCK_N": 64}, 8, 3,
        "218 registers at 192, no spill; 128 keys in 2 stages spill 64 bytes", "hopper", descriptors=True),
    Row("relu_attention_fwd", (193, 256), {"BLOCK_M": 64, "BLOCK_N": 64}, 8, 2,
        "spills 40 bytes at 256", "hopper", descriptors=True),
    Row("relu_attention_fwd", (257, 384), {"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2,
        "correct but slow: spills 1.1 KB at 384", "hopper", descriptors=True),
    Row("relu_attention_bwd_anchor", (1, 96), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3,
        "147 registers at 48, 194 at 96, 2 blocks per SM", "hopper", descriptors=True),
    Row("relu_attention_bwd_anchor", (104, 192), {"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3,
        "235 registers at 192, 2 blocks per SM; without descriptors 128 bytes spill", "hopper",
        descriptors=True),
    Row("relu_attention_bwd_anchor", (193, 384), {"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2,
        "233 registers at 256; spills 0.5 KB at 320 and 1.3 KB at 384", "hopper", descriptors=True),
    Row("relu_attention_bwd_features", (1, 96), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3,
        "146 registers at 48, 204 at 96, 2 blocks per SM", "hopper", descriptors=True),
    Row("relu_attention_bwd_features", (104, 192), {"BLOCK_M": 32, "BLOCK_N": 64}, 4, 3,
        "244 registers at 192, 2 blocks per SM; 64 queries with 8 warps spill", "hopper", descriptors=True),
    Row("relu_attention_bwd_features", (193, 256), {"BLOCK_M": 16, "BLOCK_N": 64}, 4, 2,
        "spills 40 bytes at 256, 2 blocks per SM; 32 queries with 8 warps 460", "hopper", descriptors=True),
    Row("relu_attention_bwd_features", (257, 384), {"BLOCK_M": 16, "BLOCK_N": 128}, 8, 2,
        "spills 0.3 KB at 320, 1.4 KB at 384; 64 keys serialise wgmma", "hopper", descriptors=True),
    Row("relu_attention_bwd_features", (1, 96), {"BLOCK_M": 32, "BLOCK_N": 64}, 4, 1,
        "206 registers at 96, 2 blocks per CU; 64 queries in 2 stages take 512 and spill 160 bytes", "amd"),
    Row("relu_attention_fwd", (1, 96), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3,
        "144 registers at 48, 210 at 96, 2 blocks per SM", "blackwell"),
    Row("relu_attention_fwd", (104, 384), {"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2,
        "198 registers at 192; spills 0.3 KB at 256 and 1 KB at 384", "blackwell"),
    Row("relu_attention_bwd_anchor", (1, 96), {"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3,
        "126 registers at 48, 168 at 96, 3 blocks per SM", "blackwell"),
    Row("relu_attention_bwd_anchor", (104, 384), {"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2,
        "167 registers at 192, 246 at 256; spills 0.6 KB at 384", "blackwell"),
    Row("relu_attention_bwd_features", (1, 96), {"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2,
        "160 registers at 48, 174 at 96, 2 blocks per SM", "blackwell"),
    Row("relu_attention_bwd_features", (104, 192), {"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2,
        "198 registers at 192, 2 blocks per SM", "blackwell"),
    Row("relu_attention_bwd_features", (193, 384), {"BLOCK_M": 16, "BLOCK_N": 64}, 8, 2,
        "178 registers at 256, 198 at 384", "blackwell"),
)

# --- gated_down, guidance, gated_up -------------------------------------------------------------------------

_SHERL: tuple[Row, ...] = (
    Row("guidance_fwd", (1, 1280), {"BLOCK_T": 4, "BLOCK_D": 32}, 4, 2,
        "one frame per warp, since the batched products are split over warps by frame alone; 45-72"
        " registers at K = 10, 72-128 at K = 30, no spill, 4-10 KB, 128-bit copies through the pointer tuple",
        mma="hmma"),
    Row("guidance_bwd", (8, 1280), {"BLOCK_T": 4, "BLOCK_D": 16}, 4, 2,
        "chunks of 32 take 189 registers (2 blocks per SM), of 16 118 (4) and fit 48, 80 and 160"
        " without padding; 253 at K = 30, no spill up to width 320", mma="hmma"),
    Row("guidance_bwd", (8, 1280), {"BLOCK_T": 4, "BLOCK_D": 16}, 4, 2,
        "as above with fp32 matrix instructions", "amd", "hmma", precision="ieee"),
    Row("gated_down_fwd", (1, 32), {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2,
        "one tile of columns"),
    Row("gated_down_fwd", (33, 64), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2,
        "one tile of columns"),
    Row("gated_down_fwd", (65, 96), {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2,
        "three tiles without padding at 96, 84 registers, 5 blocks per SM; one tile of 128 takes 255"),
    Row("gated_down_fwd", (97, 1280), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2,
        "142 registers, 3 blocks per SM; 128 columns take 255, with 8 warps and 128 rows they spill"),
    Row("gated_down_bwd", (1, 32), {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2,
        "whole rows, so that dp is made of dy and dg in registers; 106 registers, 4 blocks per SM"),
    Row("gated_down_bwd", (40, 64), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2,
        "174 registers at 64, 200 at 48, 2 blocks per SM; odd widths spill"),
    Row("gated_down_bwd", (72, 128), {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, 8, 2,
        "214 registers at 96, 8 warps per SM; odd widths spill"),
    Row("gated_down_bwd_gate", (1, 32), {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2,
        "one tile of columns"),
    Row("gated_down_bwd_gate", (33, 64), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 2,
        "one tile of columns; 8 warps take 121 registers, 4 take 205"),
    Row("gated_down_bwd_gate", (65, 96), {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2,
        "three tiles without padding at 96, 112 registers, 4 blocks per SM"),
    Row("gated_down_bwd_gate", (97, 1280), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 8, 2,
        "8 warps take 121 registers, 4 take 205; 128 columns spill 1.7 KB"),
    Row("gated_down_bwd_hidden", (1, 32), {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2,
        "one tile of columns"),
    Row("gated_down_bwd_hidden", (33, 64), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2,
        "one tile of columns"),
    Row("gated_down_bwd_hidden", (65, 127), {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32}, 4, 2,
        "three tiles without padding at 96, 56 registers, 9 blocks per SM; odd widths spill with 64"),
    Row("gated_down_bwd_hidden", (128, 1280), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2,
        "99 registers, 4 blocks per SM; 128 columns take 184"),
    Row("gated_up_fwd", (1, 32), {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16}, 8, 2,
        "64 registers, 4 blocks of 8 warps per SM; one chunk of 32 spills 12 KB in fp32"),
    Row("gated_up_fwd", (33, 1280), {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, 8, 2,
        "78 registers, 3 blocks of 8 warps per SM to cover the wait for h; 128 rows fit once"),
    Row("gated_up_bwd", (1, 32), {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}, 4, 3,
        "one tile of columns, so that the upstream gradient is read once"),
    Row("gated_up_bwd", (33, 64), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, 4, 3, "one tile of columns"),
    Row("gated_up_bwd", (65, 128), {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3,
        "one tile of columns; 118 registers, 2 blocks of 8 warps; 4 warps take 184"),
    Row("gated_up_bwd", (129, 192), {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, 4, 3,
        "up to three tiles without padding at 192, 145 registers; the later ones read L2"),
    Row("gated_up_bwd", (193, 1280), {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3,
        "fewest tiles that fit twice per SM; 256 columns fit once"),
)

# --- eight_bit ----------------------------------------------------------------------------------------------

# Widths are the backbone's, in Whisper multiples of 128. 8 elements per thread are 16 bytes of bf16 and 8 of
# codes, so that no tile is rearranged between load and store, as it is with 16.
_EIGHT_BIT: tuple[Row, ...] = (
    Row("eight_bit_channels", (1, 2048), {"BLOCK_M": 16, "BLOCK_N": 128, "STEPS": 16}, 8, 1,
        "48 registers, 5 blocks per SM; partial results of 256 rows take 1/40 of what is read in bf16"),
    Row("eight_bit_encode", (1, 2048), {"BLOCK_M": 16, "BLOCK_N": 128, "STEPS": 8}, 8, 1,
        "48 registers, 5 blocks per SM, no shared memory; 128 rows share a channel's two divisions"),
    Row("eight_bit_decode", (1, 2048), {"BLOCK_M": 16, "BLOCK_N": 128, "STEPS": 8}, 8, 1,
        "39 registers, 6 blocks per SM, no shared memory; 4 warps take 64 and 2 barriers a tile"),
)
# fmt: on

TABLE: tuple[Row, ...] = (*_LST, *_RELU_ATTENTION, *_SHERL, *_EIGHT_BIT)
