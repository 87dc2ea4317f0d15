// SHERL's gated down-projection of one hidden state, forward and backward; the equations stand in
// meft_kernels/reference/gated_down.py.
//
// Blocks of rows pass through the whole op while they are in cache: the first product reads a block of x,
// everything after it is r or 2 r wide, since the value's and the gate's projections stand side by side and
// are one product. The backward recomputes all of it from x, and each thread adds up its own weight
// gradients, (r, D) and (2 r, r), in place. p, (rows, r), is most of that: gated_down_keeping hands it on.
#include "common.h"
#include "gemm.h"
#include "kernels.h"

namespace meft {
namespace {

// The six parameters, as the products take them.
struct Parameters {
  Parameters(const at::Tensor& x, const at::Tensor& weight_1, const at::Tensor& bias_1,
             const at::Tensor& weight_2, const at::Tensor& bias_2, const at::Tensor& weight_3,
             const at::Tensor& bias_3)
      : width(weight_1.size(1)),
        side(weight_1.size(0)),
        first(widened(weight_1)),
        first_bias(widened(bias_1)),
        second_bias(widened(bias_2)),
        third_bias(widened(bias_3)),
        first_transposed(width * side),
        second(2 * side * side),
        second_transposed(2 * side * side) {
    check_rows(x, width, "x");
    check_shape(bias_1, {side}, "bias_1");
    check_shape(weight_2, {side, side}, "weight_2");
    check_shape(bias_2, {side}, "bias_2");
    check_shape(weight_3, {side, side}, "weight_3");
    check_shape(bias_3, {side}, "bias_3");
    const int64_t size = side * side;
    transpose(side, width, first.data_ptr<float>(), width, first_transposed, side);
    std::copy_n(widened(weight_2).data_ptr<float>(), size, static_cast<float*>(second));
    std::copy_n(widened(weight_3).data_ptr<float>(), size, second + size);
    transpose(2 * side, side, second, side, second_transposed, 2 * side);
  }

  const int64_t width, side;
  const at::Tensor first, first_bias, second_bias, third_bias;
  const Buffer first_transposed;           // (D, r)
  const Buffer second, second_transposed;  // [V2; V3] (2 r, r), and (r, 2 r)
};

inline float sigmoid(float x) {
  const float e = exp_of_negative(-std::fabs(x)), inverse = 1.0f / (1.0f + e);
  return x < 0 ? e * inverse : inverse;
}

// p (rows, r); `active`, (rows, ceil(r / 8)) bytes, says where p > 0 if it is known.
void hidden_block(const Parameters& of, const float* x, int64_t rows, const uint8_t* active, float* hidden) {
  const int64_t side = of.side;
  gemm(rows, side, of.width, x, of.width, of.first_transposed, side, hidden, side);
  const float* bias = of.first_bias.data_ptr<float>();
  for (int64_t t = 0; t < rows; ++t) {
    float* row = hidden + t * side;
    if (active == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < side; ++i) {
        const float value = row[i] + bias[i];
        row[i] = value < 0 ? 0 : value;  // hands on NaN
      }
    } else {
      const uint8_t* bits = active + t * ((side + 7) / 8);
      for (int64_t i = 0; i < side; ++i) {
        row[i] = (row[i] + bias[i]) * static_cast<float>(bits[i / 8] >> i % 8 & 1);
      }
    }
  }
}

// [y | g] (rows, 2 r) from p (rows, r).
void parts_block(const Parameters& of, const float* hidden, int64_t rows, float* parts) {
  const int64_t side = of.side;
  gemm(rows, 2 * side, side, hidden, side, of.second_transposed, 2 * side, parts, 2 * side);
  const float *value_bias = of.second_bias.data_ptr<float>(), *gate_bias = of.third_bias.data_ptr<float>();
  for (int64_t t = 0; t < rows; ++t) {
    const float* row = hidden + t * side;
    float *value = parts + t * 2 * side, *gate = value + side;
#pragma omp simd
    for (int64_t i = 0; i < side; ++i) {
      value[i] += value_bias[i] + row[i];
      gate[i] = sigmoid(gate[i] + gate_bias[i]);
    }
  }
}

// The forward; `kept` gets p (..., r) in fp32 unless it is null.
at::Tensor forward(const at::Tensor& x, const at::Tensor& weight_1, const at::Tensor& bias_1,
                   const at::Tensor& weight_2, const at::Tensor& bias_2, const at::Tensor& weight_3,
                   const at::Tensor& bias_3, at::Tensor* kept) {
  const Parameters of(x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3);
  const Rows rows(x);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = of.side;
  at::Tensor out = at::empty(sizes, x.options());
  Rows result(out);
  float* keep = nullptr;
  if (kept != nullptr) {
    *kept = empty_fp32(sizes);
    keep = kept->data_ptr<float>();
  }
  const int64_t side = of.side, step = block_rows(rows.count(), of.side);
  const int64_t blocks = (rows.count() + step - 1) / step, shares = share_count(blocks);
  for_each_share(shares, blocks, [&](int64_t, int64_t first, int64_t last) {
    const Buffer x_scratch(rows.scratch(step)), out_scratch(result.scratch(step));
    const Buffer hidden_scratch(keep == nullptr ? step * side : 0), parts(step * 2 * side);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      float* hidden = keep == nullptr ? static_cast<float*>(hidden_scratch) : keep + begin * side;
      hidden_block(of, rows.read(begin, count, x_scratch), count, nullptr, hidden);
      parts_block(of, hidden, count, parts);
      float* written = result.write(begin, out_scratch);
      for (int64_t t = 0; t < count; ++t) {
        const float *value = parts + t * 2 * side, *gate = value + side;
        float* row = written + t * side;
#pragma omp simd
        for (int64_t i = 0; i < side; ++i) {
          row[i] = value[i] * gate[i];
        }
      }
      result.store(begin, count, written);
    }
  });
  return out;
}

// The backward; `active` says where p > 0 if x is not exact, `kept` is p (..., r) if it was kept.
std::vector<at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight_1,
                                 const at::Tensor& bias_1, const at::Tensor& weight_2,
                                 const at::Tensor& bias_2, const at::Tensor& weight_3,
                                 const at::Tensor& bias_3, bool need_x,
                                 const std::optional<at::Tensor>& active, const at::Tensor& kept) {
  const Parameters of(x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3);
  const Rows upstream(grad), rows(x);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = of.side;
  check_shape(grad, sizes, "grad");
  if (active.has_value()) {
    check_shape(*active, {rows.count(), (of.side + 7) / 8}, "active");
  }
  const at::Tensor bits = active.has_value() ? active->contiguous() : at::Tensor();
  if (kept.defined()) {
    check_shape(kept, sizes, "hidden");
  }
  const at::Tensor known = kept.defined() ? widened(kept) : kept;
  at::Tensor grad_x = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Rows to_x(grad_x);
  const int64_t side = of.side, width = of.width, step = block_rows(rows.count(), of.side);
  const int64_t blocks = (rows.count() + step - 1) / step, shares = share_count(blocks);
  // Of each share: dV1, [dV2; dV3], and the three biases.
  const int64_t after_first = side * width, after_second = after_first + 2 * side * side;
  Partials partials(shares, after_second + 3 * side, blocks);
  for_each_share(shares, blocks, [&](int64_t share, int64_t first, int64_t last) {
    float* sums = partials.of(share);
    const Buffer x_scratch(rows.scratch(step)), grad_scratch(upstream.scratch(step));
    const Buffer grad_x_scratch(to_x.scratch(need_x ? step : 0));
    const Buffer hidden_scratch(known.defined() ? 0 : step * side), parts(step * 2 * side);
    const Buffer grad_hidden(step * side);
    const Buffer turned(step * 2 * side), bias_sums(3 * side);
    const ZeroBuffer lost(3 * side);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      const float* hidden_state = rows.read(begin, count, x_scratch);
      const float* upstream_block = upstream.read(begin, count, grad_scratch);
      const uint8_t* active_block =
          bits.defined() ? bits.const_data_ptr<uint8_t>() + begin * bits.size(1) : nullptr;
      const float* hidden = hidden_scratch;
      if (known.defined()) {
        hidden = known.const_data_ptr<float>() + begin * side;
      } else {
        hidden_block(of, hidden_state, count, active_block, hidden_scratch);
      }
      parts_block(of, hidden, count, parts);

      // [y | g] becomes [dy | dg], and dy is where dp begins.
      for (int64_t t = 0; t < count; ++t) {
        const float* row = upstream_block + t * side;
        float *value = parts + t * 2 * side, *gate = value + side, *start = grad_hidden + t * side;
#pragma omp simd
        for (int64_t i = 0; i < side; ++i) {
          const float grad_value = row[i] * gate[i];
          gate[i] = grad_value * value[i] * (1.0f - gate[i]);
          value[i] = start[i] = grad_value;
        }
      }
      gemm(count, side, 2 * side, parts, 2 * side, of.second, side, grad_hidden, side, /*accumulate=*/true);
      for (int64_t t = 0; t < count; ++t) {
        const float* row = hidden + t * side;
        const uint8_t* row_bits = active_block == nullptr ? nullptr : active_block + t * bits.size(1);
        float* back = grad_hidden + t * side;
        if (row_bits == nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < side; ++i) {
            back[i] *= row[i] > 0 ? 1.0f : 0.0f;
          }
        } else {
          for (int64_t i = 0; i < side; ++i) {
            back[i] *= static_cast<float>(row_bits[i / 8] >> i % 8 & 1);
          }
        }
      }
      // Biases are summed by block first: long sums of fp32 lose digits.
      std::fill_n(static_cast<float*>(bias_sums), 3 * side, 0.0f);
      add_column_sums(grad_hidden, count, side, bias_sums);
      add_column_sums(parts, count, 2 * side, bias_sums + side);
      add(bias_sums, 3 * side, sums + after_second, lost);
      transpose(count, 2 * side, parts, 2 * side, turned, count);
      gemm(2 * side, side, count, turned, count, hidden, side, sums + after_first, side, /*accumulate=*/true);
      transpose(count, side, grad_hidden, side, turned, count);
      gemm(side, width, count, turned, count, hidden_state, width, sums, width, /*accumulate=*/true);
      if (need_x) {
        float* written = to_x.write(begin, grad_x_scratch);
        gemm(count, width, side, grad_hidden, side, of.first.data_ptr<float>(), width, written, width);
        to_x.store(begin, count, written);
      }
      partials.end_block(share);
    }
  });

  const float *sums = partials.total(), *second = sums + after_first, *biases = sums + after_second;
  return {grad_x,
          tensor_like(sums, weight_1),
          tensor_like(biases, bias_1),
          tensor_like(second, weight_2),
          tensor_like(biases + side, bias_2),
          tensor_like(second + side * side, weight_3),
          tensor_like(biases + 2 * side, bias_3)};
}

}  // namespace

at::Tensor gated_down(const at::Tensor& x, const at::Tensor& weight_1, const at::Tensor& bias_1,
                      const at::Tensor& weight_2, const at::Tensor& bias_2, const at::Tensor& weight_3,
                      const at::Tensor& bias_3) {
  return forward(x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, nullptr);
}

std::vector<at::Tensor> gated_down_bwd(const at::Tensor& grad, const at::Tensor& x,
                                       const at::Tensor& weight_1, const at::Tensor& bias_1,
                                       const at::Tensor& weight_2, const at::Tensor& bias_2,
                                       const at::Tensor& weight_3, const at::Tensor& bias_3, bool need_x,
                                       const std::optional<at::Tensor>& active) {
  return backward(grad, x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, need_x, active, {});
}

std::tuple<at::Tensor, at::Tensor> gated_down_keeping(const at::Tensor& x, const at::Tensor& weight_1,
                                                      const at::Tensor& bias_1, const at::Tensor& weight_2,
                                                      const at::Tensor& bias_2, const at::Tensor& weight_3,
                                                      const at::Tensor& bias_3) {
  at::Tensor hidden;
  at::Tensor out = forward(x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, &hidden);
  return {out, hidden};
}

std::vector<at::Tensor> gated_down_keeping_bwd(const at::Tensor& grad, const at::Tensor& x,
                                               const at::Tensor& weight_1, const at::Tensor& bias_1,
                                               const at::Tensor& weight_2, const at::Tensor& bias_2,
                                               const at::Tensor& weight_3, const at::Tensor& bias_3,
                                               bool need_x, const at::Tensor& hidden) {
  return backward(grad, x, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, need_x, std::nullopt,
                  hidden);
}

}  // namespace meft
