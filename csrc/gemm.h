// Matrix products of row-major fp32 blocks, for use on one thread inside at::parallel_for.
//
// at::native::cpublas::brgemm is the one such product that libtorch exports. It takes oneDNN's generated
// kernels on x86 CPUs with AVX2 or better, whatever capability these files are compiled for, and elsewhere
// (older CPUs, or oneDNN switched off) the BLAS that libtorch was built with; both run on the calling thread
// inside a parallel region. A kernel is generated per thread for each set of sizes (about 0.2 ms, once) and
// kept, so callers use one block size throughout and a shorter block only at the end.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>

namespace meft {

// At most so many terms are summed one after the other. PyTorch's products err as if they took 100 to 400,
// by the kernels that MKL chooses; still shorter pieces would pass over C so often that it costs time.
constexpr int64_t kLongestSum = 96;

// C (m, n) = A (m, k) B (k, n), or C += A B if `accumulate`; `ld*` is the distance between rows. C must not
// overlap A or B; what it holds is not read unless it is accumulated into.
inline void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                 float* c, int64_t ldc, bool accumulate = false) {
  if (m == 0 || n == 0) {
    return;
  }
  if (k == 0) {
    for (int64_t i = 0; i < m && !accumulate; ++i) {
      std::fill_n(c + i * ldc, n, 0.0f);
    }
    return;
  }
  // brgemm sums its k terms one after the other in fp32, which for long sums loses digits that PyTorch's own
  // products keep: in pieces, each added to C, it does not.
  const int64_t pieces = (k + kLongestSum - 1) / kLongestSum, piece = (k + pieces - 1) / pieces;
  for (int64_t begin = 0; begin < k; begin += piece) {
    at::native::cpublas::brgemm(m, n, std::min(piece, k - begin), lda, ldb, ldc, accumulate || begin > 0,
                                a + begin, b + begin * ldb, c, /*is_vnni=*/false);
  }
}

// Writes the transpose (columns, rows) of `from` (rows, columns); the two must not overlap. Products take
// neither operand transposed, so a small one is transposed first.
inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t ld_from, float* to,
                      int64_t ld_to) {
  constexpr int64_t kTile = 16;
  const int64_t full_rows = rows / kTile * kTile, full_columns = columns / kTile * kTile;
  for (int64_t i = 0; i < full_rows; i += kTile) {
    for (int64_t j = 0; j < full_columns; j += kTile) {
      at::vec::transpose_mxn<float, kTile, kTile>(from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < full_rows ? full_columns : 0; j < columns; ++j) {
      to[j * ld_to + i] = from[i * ld_from + j];
    }
  }
}

}  // namespace meft
