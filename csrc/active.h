// Products with scores of which ReLU zeroed many, out += scores other, that leave the zeros out.
//
// A dense product does twice the work where half of the scores are zero. Here a row of `out` is held in
// registers, and the rows of `other` whose score is not zero are added to it: one load for each multiply-add,
// so `other` must come from the first-level cache, and loads are what takes the time. Therefore
//
//   - matrices are stored in panels of at most 128 columns, row after row: 64 rows of one are 32 KiB;
//   - two rows of scores are worked through together. Of a quarter of the columns, where half of the scores
//     are zero, both need the row of `other`, which is loaded once;
//   - which scores are not zero are the bits of a word, and their places are found one by one from it.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "common.h"
#include "frames.h"
#include "gemm.h"

namespace meft {
namespace attention {

constexpr int64_t LANES = kFill;  // rows and columns of scores are multiples
constexpr int64_t PANEL = 8;   // at most, vectors of LANES in a row of a panel
constexpr int64_t TILE = 64;   // at most, rows of a panel in a product without zeros

// How the columns of a matrix of `width` are cut into panels.
struct Panels {
  int64_t width, count, columns;

  explicit Panels(int64_t width) : width(width) {
    const int64_t vectors = std::max<int64_t>(1, filled(width) / LANES);
    count = (vectors + PANEL - 1) / PANEL;
    columns = (vectors + count - 1) / count * LANES;
  }

  int64_t padded() const { return count * columns; }
  // Of a panel's columns, those that exist.
  int64_t present(int64_t panel) const {
    return std::max<int64_t>(0, std::min(columns, width - panel * columns));
  }

  // Rows (rows, width) to rows [begin, begin + rows) of panels (count, height, columns).
  void pack(const float* from, int64_t rows, float* to, int64_t height, int64_t begin) const {
    for (int64_t panel = 0; panel < count; ++panel) {
      const int64_t here = present(panel);
      float* target = to + (panel * height + begin) * columns;
      for (int64_t row = 0; row < rows; ++row, target += columns) {
        std::copy_n(from + row * width + panel * columns, here, target);
        std::fill(target + here, target + columns, 0.0f);
      }
    }
  }

  void clear(float* to, int64_t height, int64_t begin, int64_t rows) const {
    for (int64_t panel = 0; panel < count; ++panel) {
      std::fill_n(to + (panel * height + begin) * columns, rows * columns, 0.0f);
    }
  }
};

// A block of scores with, for each row, the bits of the columns that are to be worked through. In products of
// two matrices at once the second one's scores stand `second` after the first one's.
struct Scores {
  const float* values;
  int64_t ld, second;
  const uint64_t* active;
};

#if defined(CPU_CAPABILITY_AVX512)

// Whether a product that leaves zeros out is faster, where a `share` of the scores is not zero. Measured: at
// half of them by a third and more; at three quarters, or with short rows, no longer.
inline bool is_sparse(float share, const Panels& panels) {
  return panels.columns > 4 * LANES && share < 0.75f;
}

inline int64_t count_active(const Vec& scores) {
  return __builtin_popcount(_mm512_cmp_ps_mask(scores, _mm512_setzero_ps(), _CMP_NEQ_UQ));
}

// The bits of those of a row's `count` <= 64 scores that are not zero.
inline uint64_t active_bits(const float* scores, int64_t count) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < count; i += LANES) {
    const auto active = _mm512_cmp_ps_mask(_mm512_loadu_ps(scores + i), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    bits |= static_cast<uint64_t>(active) << i;
  }
  return bits;
}

// Two rows of `out` (VECTORS vectors each) += two rows of scores times `other`; with PRODUCTS = 2 += the
// second scores times the matrix `second` after it, too.
template <int64_t VECTORS, int64_t PRODUCTS>
__attribute__((target("bmi"))) void add_two_rows(const Scores& scores, int64_t row, const float* other,
                                                 int64_t second, float* out) {
  const float* values = scores.values + row * scores.ld;
  Vec sums[2][VECTORS];
  // Adds the columns `bits` to the first row (which = 0), the second (1) or both (2).
  const auto add = [&](uint64_t bits, auto which) __attribute__((always_inline, target("bmi"))) {
    for (; bits != 0; bits &= bits - 1) {
      const int64_t column = __builtin_ctzll(bits);
      for (int64_t product = 0; product < PRODUCTS; ++product) {
        const float* from = other + column * VECTORS * W + product * second;
        asm("" : "+r"(from));  // the address in one register, else each multiply-add takes two operations
        const float* value = values + column + product * scores.second;
        const Vec factors[2] = {Vec(value[0]), Vec(value[scores.ld])};
#pragma GCC unroll 8
        for (int64_t i = 0; i < VECTORS; ++i) {
          __m512 vector = _mm512_loadu_ps(from + i * W);
          if constexpr (which == 2) {
            asm("" : "+v"(vector));  // loaded once, not by both multiply-adds
            sums[0][i] = at::vec::fmadd(factors[0], Vec(vector), sums[0][i]);
            sums[1][i] = at::vec::fmadd(factors[1], Vec(vector), sums[1][i]);
          } else {
            sums[which][i] = at::vec::fmadd(factors[which], Vec(vector), sums[which][i]);
          }
        }
      }
    }
  };
#pragma GCC unroll 8
  for (int64_t i = 0; i < VECTORS; ++i) {
    sums[0][i] = sums[1][i] = Vec(0.0f);
  }
  const uint64_t first_bits = scores.active[row], second_bits = scores.active[row + 1];
  add(first_bits & ~second_bits, std::integral_constant<int, 0>());
  add(first_bits & second_bits, std::integral_constant<int, 2>());
  add(second_bits & ~first_bits, std::integral_constant<int, 1>());
#pragma GCC unroll 8
  for (int64_t i = 0; i < VECTORS; ++i) {
    (Vec::loadu(out + i * W) + sums[0][i]).store(out + i * W);
    (Vec::loadu(out + (VECTORS + i) * W) + sums[1][i]).store(out + (VECTORS + i) * W);
  }
}

template <int64_t PRODUCTS, size_t... VECTORS>
auto add_two_rows_of(int64_t columns, std::index_sequence<VECTORS...>) {
  using Function = void (*)(const Scores&, int64_t, const float*, int64_t, float*);
  constexpr Function functions[] = {add_two_rows<VECTORS + 1, PRODUCTS>...};
  return functions[columns / LANES - 1];
}

template <_mm_hint CACHE>
void prefetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) {
    _mm_prefetch(reinterpret_cast<const char*>(from + i), CACHE);
  }
}

// out (rows, columns) += scores (rows, at most TILE) other (at most TILE, columns), without zeros; with
// PRODUCTS = 2 += the second scores times the matrix `second` after `other`, too. Rows are read in no order,
// so what comes next is fetched ahead: the next rows' sums and scores, and little by little the panel `next`,
// which may stand in the third-level cache.
template <int64_t PRODUCTS>
void add_active(const Scores& scores, int64_t rows, const float* other, int64_t second, int64_t columns,
                float* out, const float* next = nullptr) {
  const auto add = add_two_rows_of<PRODUCTS>(columns, std::make_index_sequence<PANEL>());
  const int64_t share = TILE * columns / rows;
  for (int64_t row = 0; row < rows; row += 2) {
    prefetch<_MM_HINT_T0>(out + (row + 2) * columns, 2 * columns);
    for (int64_t following = row + 2; following < row + 4; ++following) {
      for (int64_t product = 0; product < PRODUCTS; ++product) {
        const float* values = scores.values + following * scores.ld + product * scores.second;
        prefetch<_MM_HINT_T0>(values, TILE / PRODUCTS);
      }
    }
    if (PRODUCTS == 1) {
      prefetch<_MM_HINT_T1>(next + row * share, 2 * share);
    }
    add(scores, row, other, second, out + row * columns);
  }
}

#else  // Nothing but AVX-512 has the registers for it: all products are dense.

inline bool is_sparse(float, const Panels&) {
  return false;
}

inline int64_t count_active(const Vec&) {
  return 0;
}

inline uint64_t active_bits(const float*, int64_t) {
  return 0;
}

template <int64_t PRODUCTS>
void add_active(const Scores&, int64_t, const float*, int64_t, int64_t, float*, const float* = nullptr) {}

#endif

}  // namespace attention
}  // namespace meft
