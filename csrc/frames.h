// Frames as the lanes of vectors: W rows of an activation, transposed on the way in and out.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common.h"

namespace meft {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size();

// Calls work(scalar_t()) for the type of an activation.
template <typename Work>
void dispatch(at::ScalarType type, const Work& work) {
  if (type == at::kFloat) {
    work(float());
  } else if (type == at::kBFloat16) {
    work(at::BFloat16());
  } else {
    TORCH_CHECK_TYPE(type == at::kHalf, "activations must be float32, bfloat16 or float16, got ", type);
    work(at::Half());
  }
}

// `count` <= W rows of `width` to [width][W] in fp32, the missing ones as zeros; `staging` holds W rows.
template <typename scalar_t>
void load_frames(const scalar_t* rows, int64_t count, int64_t width, float* out, float* staging) {
  const int64_t columns = (width + W - 1) / W * W;
  int64_t column = 0;
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (count == W) {
      for (; column + W <= width; column += W) {
        at::vec::transpose_mxn<float, W, W>(rows + column, width, out + column * W, W);
      }
    }
  }
  if (column == width) {
    return;
  }
  const int64_t left = width - column;
  for (int64_t row = 0; row < W; ++row) {
    float* staged = staging + row * columns;
    const int64_t present = row < count ? left : 0;
    if constexpr (std::is_same_v<scalar_t, float>) {
      std::copy_n(rows + row * width + column, present, staged);
    } else {
      widen(rows + row * width + column, staged, present);
    }
    std::fill(staged + present, staged + (left + W - 1) / W * W, 0.0f);
  }
  for (int64_t start = 0; start < left; start += W) {
    float tile[W * W];
    at::vec::transpose_mxn<float, W, W>(staging + start, columns, tile, W);
    std::copy(tile, tile + std::min(W, left - start) * W, out + (column + start) * W);
  }
}

// The first `columns` <= W of [W channels][W frames] to `count` rows at `out`, `width` apart.
template <typename scalar_t>
void store_frames(const float* tile, int64_t columns, scalar_t* out, int64_t count, int64_t width) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (count == W && columns == W) {
      at::vec::transpose_mxn<float, W, W>(tile, W, out, width);
      return;
    }
  }
  float rows[W * W];
  at::vec::transpose_mxn<float, W, W>(tile, W, rows, W);
  for (int64_t row = 0; row < count; ++row) {
    narrow(rows + row * W, out + row * width, columns);
  }
}

}  // namespace meft
