// Linear layers held in int8, as meft_kernels/int8_linear.py defines them: rounding, torch's own product of
// int8 matrices, and what makes fp32 of its sums, block by block in the cache. Each pass over a block is one
// loop here and five to seven of PyTorch's.
#include <ATen/ops/_int_mm.h>

#include <limits>

#include "common.h"
#include "kernels.h"

namespace meft {
namespace {

// Elements of a block in the wider of its input and output: products are slower on few rows, and sums that
// leave the cache cost as much as the product.
constexpr int64_t kBlockElements = 1 << 20;
constexpr int64_t kRowsPerThread = 16;  // fewer are not worth a thread

// A group of a row in int8, its step and its zero point. A step that is no number makes the outputs that.
void round_group(const float* from, int64_t width, int8_t* codes, float& step, float& zero) {
  Vec lows(0.0f), highs(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Vec values = Vec::loadu(from + i);
    lows = at::vec::minimum(lows, values);
    highs = at::vec::maximum(highs, values);
  }
  const auto least = [](const Vec& a, const Vec& b) { return at::vec::minimum(a, b); };
  const auto most = [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); };
  float low = at::vec::vec_reduce_all<float>(least, lows);
  float high = at::vec::vec_reduce_all<float>(most, highs);
  for (; i < width; ++i) {  // as in the vectors a NaN stays
    const bool is_nan = from[i] != from[i];
    low = is_nan || from[i] < low ? from[i] : low;
    high = is_nan || from[i] > high ? from[i] : high;
  }
  step = (high - low) / 254;
  if (!(step <= std::numeric_limits<float>::max())) {
    step = std::numeric_limits<float>::quiet_NaN();
    zero = 0;
    std::fill_n(codes, width, int8_t{0});
    return;
  }
  step = std::max(step, std::numeric_limits<float>::min());
  const float inverse = 1.0f / step, shift = std::nearbyint(-low * inverse);
  const float offset = shift + 0.5f;  // cutting a positive number off is rounding it half a step before
  for (int64_t k = 0; k < width; ++k) {
    codes[k] = static_cast<int8_t>(static_cast<int32_t>(from[k] * inverse + offset) - 128);
  }
  zero = shift - 128;
}

// to (width,) = or += step (scale sums - zero total), begun with `bias` or nothing.
void add_group(const int32_t* sums, const float* scale, const float* total, float step, float zero,
               const float* bias, bool first, int64_t width, float* to) {
  if (!first) {
    bias = to;
  }
  if (bias == nullptr) {
    for (int64_t i = 0; i < width; ++i) {
      to[i] = step * (scale[i] * static_cast<float>(sums[i]) - zero * total[i]);
    }
    return;
  }
  for (int64_t i = 0; i < width; ++i) {
    to[i] = bias[i] + step * (scale[i] * static_cast<float>(sums[i]) - zero * total[i]);
  }
}

}  // namespace

std::vector<at::Tensor> int8_linear(const at::Tensor& x, at::TensorList codes, at::TensorList scales,
                                    at::TensorList totals,
                                    const c10::List<std::optional<at::Tensor>>& biases) {
  const Rows rows(x);
  TORCH_CHECK_VALUE(x.dim() == 2, "x must have shape (N, K), got ", x.sizes());
  TORCH_CHECK_VALUE(!scales.empty() && scales[0].dim() == 2 && scales[0].size(0) > 0,
                    "scales must hold a tensor (groups, outputs) for each of one or more layers");
  const int64_t width = rows.width(), groups = scales[0].size(0), size = width / groups;
  TORCH_CHECK_VALUE(codes.size() == scales.size() && codes.size() == totals.size() &&
                        codes.size() == biases.size() && size * groups == width,
                    "int8_linear takes codes, scales, totals and biases of as many layers");
  int64_t widest = 0;
  std::vector<at::Tensor> outs;
  for (size_t layer = 0; layer < codes.size(); ++layer) {
    const int64_t columns = codes[layer].size(0);
    check_shape(codes[layer], {columns, width}, "codes");
    check_shape(scales[layer], {groups, columns}, "scales");
    check_shape(totals[layer], {groups, columns}, "totals");
    if (const std::optional<at::Tensor> bias = biases.get(layer)) {
      check_shape(*bias, {columns}, "biases");
    }
    widest = std::max(widest, columns);
    outs.push_back(at::empty({rows.count(), columns}, x.options()));
  }
  const int64_t block = std::max<int64_t>(1, kBlockElements / std::max(widest, width));
  const int64_t most = std::min(block, rows.count());
  const auto int8s = at::TensorOptions().dtype(at::kChar);
  at::Tensor rounded = at::empty({most, width}, int8s);
  at::Tensor products = at::empty({most * widest}, at::TensorOptions().dtype(at::kInt));
  const bool is_fp32 = rows.is_fp32();
  const Buffer wide(is_fp32 ? 0 : most * widest), steps(most * groups), zeros(most * groups);
  for (int64_t begin = 0; begin < rows.count(); begin += block) {
    const int64_t count = std::min(block, rows.count() - begin);
    int8_t* row_codes = rounded.data_ptr<int8_t>();
    at::parallel_for(0, count, kRowsPerThread, [&](int64_t first, int64_t last) {
      const Buffer scratch(rows.scratch(1));
      for (int64_t t = first; t < last; ++t) {
        const float* row = rows.read(begin + t, 1, scratch);
        for (int64_t group = 0; group < groups; ++group) {
          round_group(row + group * size, size, row_codes + t * width + group * size,
                      steps[t * groups + group], zeros[t * groups + group]);
        }
      }
    });
    for (size_t layer = 0; layer < codes.size(); ++layer) {
      const int64_t columns = codes[layer].size(0);
      const at::Tensor scale = widened(scales[layer]), total = widened(totals[layer]);
      const std::optional<at::Tensor> given_bias = biases.get(layer);
      const at::Tensor bias = given_bias ? widened(*given_bias) : at::Tensor();
      Rows out(outs[layer]);
      float* target = out.write(begin, wide);
      at::Tensor sums = products.narrow(0, 0, count * columns).view({count, columns});
      for (int64_t group = 0; group < groups; ++group) {
        at::_int_mm_out(sums, rounded.narrow(0, 0, count).narrow(1, group * size, size),
                        // Of strides (1, 1), which the transpose of one column has, torch's sums are wrong.
                        size > 1 ? codes[layer].narrow(1, group * size, size).t()
                                 : codes[layer].narrow(1, group, 1).reshape({1, columns}));
        const int32_t* given = sums.data_ptr<int32_t>();
        const float *of_scale = scale.data_ptr<float>() + group * columns,
                    *of_total = total.data_ptr<float>() + group * columns,
                    *of_bias = given_bias ? bias.data_ptr<float>() : nullptr;
        at::parallel_for(0, count, kRowsPerThread, [&](int64_t first, int64_t last) {
          for (int64_t t = first; t < last; ++t) {
            add_group(given + t * columns, of_scale, of_total, steps[t * groups + group],
                      zeros[t * groups + group], of_bias, group == 0, columns, target + t * columns);
          }
        });
      }
      if (!is_fp32) {
        out.store(begin, count, target);
      }
    }
  }
  return outs;
}

}  // namespace meft
