// One rung of LST's ladder, forward and backward; the equations stand in meft_kernels/reference/ladder.py.
//
// Blocks of rows pass through the whole rung while they are in cache: the projection's product reads a block
// of x, everything after it is r or a wide. The backward recomputes z, v and the adapter from x and state in
// the same way, and each thread adds up its own weight gradients, (r, D) and 2 (r, a), in place. Its
// recomputation of z is a fifth of both directions' products at r = 96: ladder_keeping hands z on instead.
#include "blocks.h"
#include "kernels.h"

namespace meft {
namespace {

// u = sigmoid(gate / temperature) and 1 - u, which is computed and not subtracted so as to keep its digits.
struct Gate {
  explicit Gate(const at::Tensor& gate) {
    check_shape(gate, {1}, "gate");
    const double logit = widened(gate).data_ptr<float>()[0] / GATE_TEMPERATURE;
    keep = static_cast<float>(1 / (1 + std::exp(-logit)));
    pass = static_cast<float>(1 / (1 + std::exp(logit)));
  }

  // v (rows, r) = u state + (1 - u) z
  void mix(const float* state, const float* down, int64_t size, float* mixed) const {
    const float u = keep, rest = pass;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      mixed[i] = u * state[i] + rest * down[i];
    }
  }

  // From the gradient dv of one row: that of state, u dv, is written, and dv becomes that of z, (1 - u) dv.
  // Returns the sum of dv (state - z).
  float unmix(const float* state, const float* down, int64_t side, float* dv, float* grad_state) const {
    const Vec u(keep), rest(pass);
    Vec sums(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= side; i += kLanes) {
      const Vec grad = Vec::loadu(dv + i);
      sums = at::vec::fmadd(grad, Vec::loadu(state + i) - Vec::loadu(down + i), sums);
      (u * grad).store(grad_state + i);
      (rest * grad).store(dv + i);
    }
    float sum = sum_of_lanes(sums);
    for (; i < side; ++i) {
      sum += dv[i] * (state[i] - down[i]);
      grad_state[i] = keep * dv[i];
      dv[i] *= pass;
    }
    return sum;
  }

  float keep, pass;
};

void check(const Projection& projection, const Bottleneck& bottleneck, const at::Tensor& x,
           const at::Tensor& state, const at::Tensor& mean, const at::Tensor& rstd) {
  projection.check(x, mean, rstd);
  check_rows(state, projection.side, "state");
  check_shape(state.select(-1, 0), x.sizes().slice(0, x.dim() - 1), "state without its last axis");
  TORCH_CHECK_VALUE(bottleneck.side == projection.side, "weight_1 must take ", projection.side,
                    " channels, as many as weight gives, got ", bottleneck.side);
}

// The forward; `kept` gets z (..., r) in fp32 unless it is null.
at::Tensor forward(const at::Tensor& x, const at::Tensor& state, const at::Tensor& weight,
                   const at::Tensor& bias, const at::Tensor& mean, const at::Tensor& rstd,
                   const at::Tensor& gate, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                   const at::Tensor& weight_1, const at::Tensor& bias_1, const at::Tensor& weight_2,
                   const at::Tensor& bias_2, at::Tensor* kept) {
  const Projection projection(weight, bias);
  const Bottleneck bottleneck(norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2);
  const Gate mixing(gate);
  check(projection, bottleneck, x, state, mean, rstd);
  const Rows rows(x), below(state);
  const at::Tensor means = widened(mean), rstds = widened(rstd);
  at::Tensor out = at::empty(state.sizes(), x.options());
  Rows result(out);
  float* keep = nullptr;
  if (kept != nullptr) {
    *kept = empty_fp32(state.sizes());
    keep = kept->data_ptr<float>();
  }

  const int64_t side = projection.side, step = block_rows(rows.count(), projection.side);
  const int64_t blocks = (rows.count() + step - 1) / step, shares = share_count(blocks);
  for_each_share(shares, blocks, [&](int64_t, int64_t first, int64_t last) {
    const Bottleneck::Work work(bottleneck, step);
    const Buffer x_scratch(rows.scratch(step)), state_scratch(below.scratch(step)), out_scratch(step * side);
    const Buffer down_scratch(keep == nullptr ? step * side : 0), mixed(step * side);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      const float* hidden_state = rows.read(begin, count, x_scratch);
      float* down = keep == nullptr ? static_cast<float*>(down_scratch) : keep + begin * side;
      const float* state_block = below.read(begin, count, state_scratch);
      projection.forward(hidden_state, count, means.data_ptr<float>() + begin,
                         rstds.data_ptr<float>() + begin, down);
      mixing.mix(state_block, down, count * side, mixed);
      float* written = result.write(begin, out_scratch);
      bottleneck.forward(mixed, count, work, /*residual=*/true, written);
      result.store(begin, count, written);
    }
  });
  return out;
}

// The backward; z (..., r) is computed again where `kept` is undefined.
std::vector<at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& state,
                                 const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& mean,
                                 const at::Tensor& rstd, const at::Tensor& gate,
                                 const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                 const at::Tensor& weight_1, const at::Tensor& bias_1,
                                 const at::Tensor& weight_2, const at::Tensor& bias_2, bool need_x,
                                 const at::Tensor& kept) {
  const Projection projection(weight, bias);
  const Bottleneck bottleneck(norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2);
  const Gate mixing(gate);
  check(projection, bottleneck, x, state, mean, rstd);
  check_shape(grad, state.sizes(), "grad");
  const Rows upstream(grad), rows(x), below(state);
  const at::Tensor means = widened(mean), rstds = widened(rstd);
  at::Tensor grad_x = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  at::Tensor grad_state = at::empty(state.sizes(), state.options());
  Rows to_x(grad_x), to_state(grad_state);
  if (kept.defined()) {
    check_shape(kept, state.sizes(), "down");
  }
  const at::Tensor known = kept.defined() ? widened(kept) : kept;

  const int64_t side = projection.side, step = block_rows(rows.count(), projection.side);
  const int64_t blocks = (rows.count() + step - 1) / step, shares = share_count(blocks);
  // Of each share: the projection's sums, the bottleneck's, and the gate's.
  const int64_t after_projection = projection.sums(), after_bottleneck = after_projection + bottleneck.sums();
  Partials partials(shares, after_bottleneck + 1, blocks);
  for_each_share(shares, blocks, [&](int64_t share, int64_t first, int64_t last) {
    float* sums = partials.of(share);
    double sum_gate = 0;
    const Projection::Work down_work(projection, step);
    const Bottleneck::Work work(bottleneck, step);
    const Buffer grad_scratch(upstream.scratch(step)), x_scratch(rows.scratch(step));
    const Buffer state_scratch(below.scratch(step)), grad_state_scratch(to_state.scratch(step));
    const Buffer grad_x_scratch(to_x.scratch(need_x ? step : 0));
    const Buffer down_scratch(known.defined() ? 0 : step * side), mixed(step * side), grad_mixed(step * side);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin), size = count * side;
      const float* block_mean = means.data_ptr<float>() + begin;
      const float* block_rstd = rstds.data_ptr<float>() + begin;
      const float* grad_block = upstream.read(begin, count, grad_scratch);
      const float* hidden_state = rows.read(begin, count, x_scratch);
      const float* state_block = below.read(begin, count, state_scratch);
      const float* down = down_scratch;
      if (known.defined()) {
        down = known.const_data_ptr<float>() + begin * side;
      } else {
        projection.forward(hidden_state, count, block_mean, block_rstd, down_scratch);
      }
      mixing.mix(state_block, down, size, mixed);
      bottleneck.backward(grad_block, mixed, count, work, /*residual=*/true, sums + after_projection,
                          grad_mixed);

      // One pass, since at large r the state and z have left the cache by now.
      float *written = to_state.write(begin, grad_state_scratch), *dv = grad_mixed;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t row = t * side;
        sum_gate += mixing.unmix(state_block + row, down + row, side, dv + row, written + row);
      }
      to_state.store(begin, count, written);
      if (need_x) {
        float* x_written = to_x.write(begin, grad_x_scratch);
        projection.backward_x(dv, hidden_state, count, block_mean, block_rstd, x_written);
        to_x.store(begin, count, x_written);
      }
      projection.backward(dv, hidden_state, count, block_mean, block_rstd, down_work, sums);
      partials.end_block(share);
    }
    sums[after_bottleneck] = static_cast<float>(sum_gate);
  });

  float* sums = partials.total();
  projection.finish(sums);
  sums[after_bottleneck] *= mixing.keep * mixing.pass / GATE_TEMPERATURE;
  std::vector<at::Tensor> grads{grad_x, grad_state, tensor_like(sums, weight),
                                tensor_like(sums + weight.numel(), bias),
                                tensor_like(sums + after_bottleneck, gate)};
  bottleneck.append_gradients(sums + after_projection,
                              {norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2}, grads);
  return grads;
}

}  // namespace

at::Tensor ladder(const at::Tensor& x, const at::Tensor& state, const at::Tensor& weight,
                  const at::Tensor& bias, const at::Tensor& mean, const at::Tensor& rstd,
                  const at::Tensor& gate, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                  const at::Tensor& weight_1, const at::Tensor& bias_1, const at::Tensor& weight_2,
                  const at::Tensor& bias_2) {
  return forward(x, state, weight, bias, mean, rstd, gate, norm_weight, norm_bias, weight_1, bias_1, weight_2,
                 bias_2, nullptr);
}

std::vector<at::Tensor> ladder_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& state,
                                   const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& mean,
                                   const at::Tensor& rstd, const at::Tensor& gate,
                                   const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                   const at::Tensor& weight_1, const at::Tensor& bias_1,
                                   const at::Tensor& weight_2, const at::Tensor& bias_2, bool need_x) {
  return backward(grad, x, state, weight, bias, mean, rstd, gate, norm_weight, norm_bias, weight_1, bias_1,
                  weight_2, bias_2, need_x, {});
}

std::tuple<at::Tensor, at::Tensor> ladder_keeping(
    const at::Tensor& x, const at::Tensor& state, const at::Tensor& weight, const at::Tensor& bias,
    const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& gate, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, const at::Tensor& weight_1, const at::Tensor& bias_1,
    const at::Tensor& weight_2, const at::Tensor& bias_2) {
  at::Tensor down;
  at::Tensor out = forward(x, state, weight, bias, mean, rstd, gate, norm_weight, norm_bias, weight_1, bias_1,
                           weight_2, bias_2, &down);
  return {out, down};
}

std::vector<at::Tensor> ladder_keeping_bwd(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& state, const at::Tensor& weight,
    const at::Tensor& bias, const at::Tensor& mean, const at::Tensor& rstd, const at::Tensor& gate,
    const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& weight_1,
    const at::Tensor& bias_1, const at::Tensor& weight_2, const at::Tensor& bias_2, bool need_x,
    const at::Tensor& down) {
  return backward(grad, x, state, weight, bias, mean, rstd, gate, norm_weight, norm_bias, weight_1, bias_1,
                  weight_2, bias_2, need_x, down);
}

}  // namespace meft
