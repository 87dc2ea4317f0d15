// SHERL's way back to the backbone's width, forward and backward; the equations stand in
// meft_kernels/reference/gated_up.py.
//
// Blocks of rows: the bias and the gated hidden state are laid out first, the product is added to them. The
// backward reads a block of the upstream gradient once for all that is made of it; the weight's gradient is
// added up transposed, (r, D), so that only the narrow operand has to be turned.
#include "common.h"
#include "gemm.h"
#include "kernels.h"

namespace meft {
namespace {

void check(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& bias,
           const at::Tensor& gate) {
  check_shape(weight, {x.size(-1), y.size(-1)}, "weight");
  check_shape(bias, {x.size(-1)}, "bias");
  check_shape(gate, {1}, "gate");
  check_shape(y.select(-1, 0), x.sizes().slice(0, x.dim() - 1), "y without its last axis");
}

float tanh_of(const at::Tensor& gate) {
  return std::tanh(widened(gate).data_ptr<float>()[0] / GATE_TEMPERATURE);
}

void relu(const float* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    to[i] = from[i] < 0 ? 0 : from[i];  // hands on NaN
  }
}

}  // namespace

at::Tensor gated_up(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight,
                    const at::Tensor& bias, const at::Tensor& gate) {
  check(x, y, weight, bias, gate);
  const Rows rows(x), narrow_rows(y);
  const at::Tensor wide_weight = widened(weight), wide_bias = widened(bias);
  const int64_t width = rows.width(), side = narrow_rows.width(), step = block_rows(rows.count());
  const float keep = tanh_of(gate);
  const Buffer transposed(side * width);
  transpose(width, side, wide_weight.data_ptr<float>(), side, transposed, width);
  at::Tensor out = at::empty(x.sizes(), x.options());
  Rows result(out);
  const int64_t blocks = (rows.count() + step - 1) / step, shares = share_count(blocks);
  for_each_share(shares, blocks, [&](int64_t, int64_t first, int64_t last) {
    const Buffer x_scratch(rows.scratch(step)), y_scratch(narrow_rows.scratch(step));
    const Buffer out_scratch(result.scratch(step)), hidden(step * side);
    const float* offset = wide_bias.data_ptr<float>();
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      const float* hidden_state = rows.read(begin, count, x_scratch);
      relu(narrow_rows.read(begin, count, y_scratch), count * side, hidden);
      float* written = result.write(begin, out_scratch);
      for (int64_t t = 0; t < count; ++t) {
        const float* from = hidden_state + t * width;
        float* row = written + t * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          row[i] = offset[i] + keep * from[i];
        }
      }
      gemm(count, width, side, hidden, side, transposed, width, written, width, /*accumulate=*/true);
      result.store(begin, count, written);
    }
  });
  return out;
}

std::vector<at::Tensor> gated_up_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y,
                                     const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& gate,
                                     bool need_x) {
  check(x, y, weight, bias, gate);
  check_shape(grad, x.sizes(), "grad");
  const Rows upstream(grad), rows(x), narrow_rows(y);
  const at::Tensor wide_weight = widened(weight);
  const int64_t width = rows.width(), side = narrow_rows.width(), step = block_rows(rows.count());
  const float keep = tanh_of(gate);
  at::Tensor grad_x = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  at::Tensor grad_y = at::empty(y.sizes(), y.options());
  Rows to_x(grad_x), to_y(grad_y);
  const int64_t blocks = (rows.count() + step - 1) / step, shares = share_count(blocks);
  // Of each share: dW^T (r, D), the bias' and the gate's.
  const int64_t after_weight = side * width, after_bias = after_weight + width;
  Partials partials(shares, after_bias + 1, blocks);
  for_each_share(shares, blocks, [&](int64_t share, int64_t first, int64_t last) {
    float* sums = partials.of(share);
    double gate_sum = 0;
    const Buffer grad_scratch(upstream.scratch(step)), x_scratch(rows.scratch(step));
    const Buffer y_scratch(narrow_rows.scratch(step)), grad_y_scratch(to_y.scratch(step));
    const Buffer grad_x_scratch(to_x.scratch(need_x ? step : 0));
    const Buffer hidden(step * side), turned(step * side), bias_sums(width);
    const ZeroBuffer lost(width);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      const float* upstream_block = upstream.read(begin, count, grad_scratch);
      const float* hidden_state = rows.read(begin, count, x_scratch);
      relu(narrow_rows.read(begin, count, y_scratch), count * side, hidden);

      float* back = to_y.write(begin, grad_y_scratch);
      gemm(count, side, width, upstream_block, width, wide_weight.data_ptr<float>(), side, back, side);
      const float* active = hidden;
#pragma omp simd
      for (int64_t i = 0; i < count * side; ++i) {
        back[i] *= active[i] > 0 ? 1.0f : 0.0f;
      }
      to_y.store(begin, count, back);

      transpose(count, side, hidden, side, turned, count);
      gemm(side, width, count, turned, count, upstream_block, width, sums, width, /*accumulate=*/true);
      std::fill_n(static_cast<float*>(bias_sums), width, 0.0f);
      add_column_sums(upstream_block, count, width, bias_sums);
      for (int64_t t = 0; t < count; ++t) {
        gate_sum += dot(upstream_block + t * width, hidden_state + t * width, width);
      }
      add(bias_sums, width, sums + after_weight, lost);
      if (need_x) {
        float* written = to_x.write(begin, grad_x_scratch);
#pragma omp simd
        for (int64_t i = 0; i < count * width; ++i) {
          written[i] = keep * upstream_block[i];
        }
        to_x.store(begin, count, written);
      }
      partials.end_block(share);
    }
    sums[after_bias] = static_cast<float>(gate_sum);
  });

  float* sums = partials.total();
  const Buffer grad_weight(width * side);
  transpose(side, width, sums, width, grad_weight, side);
  sums[after_bias] *= (1 - keep * keep) / GATE_TEMPERATURE;
  return {grad_x, grad_y, tensor_like(grad_weight, weight), tensor_like(sums + after_weight, bias),
          tensor_like(sums + after_bias, gate)};
}

}  // namespace meft
