// The bottleneck adapter with its own LayerNorm, forward and backward; the equations stand in
// meft_kernels/reference/adapter.py. A block of rows goes through both products while it is in cache, so that
// nothing of the hidden width is ever written to memory.
#include "blocks.h"
#include "kernels.h"

namespace meft {

at::Tensor adapter(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                   const at::Tensor& weight_1, const at::Tensor& bias_1, const at::Tensor& weight_2,
                   const at::Tensor& bias_2) {
  const Bottleneck bottleneck(norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2);
  check_rows(x, bottleneck.side, "x");
  const Rows rows(x);
  at::Tensor out = at::empty(x.sizes(), x.options());
  Rows result(out);

  const int64_t step = block_rows(rows.count(), bottleneck.side), blocks = (rows.count() + step - 1) / step;
  for_each_share(share_count(blocks), blocks, [&](int64_t, int64_t first, int64_t last) {
    const Bottleneck::Work work(bottleneck, step);
    const Buffer x_scratch(rows.scratch(step)), out_scratch(result.scratch(step));
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      float* written = result.write(begin, out_scratch);
      bottleneck.forward(rows.read(begin, count, x_scratch), count, work, /*residual=*/false, written);
      result.store(begin, count, written);
    }
  });
  return out;
}

std::vector<at::Tensor> adapter_bwd(const at::Tensor& grad, const at::Tensor& x,
                                    const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                    const at::Tensor& weight_1, const at::Tensor& bias_1,
                                    const at::Tensor& weight_2, const at::Tensor& bias_2, bool need_x) {
  const Bottleneck bottleneck(norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2);
  check_rows(x, bottleneck.side, "x");
  check_shape(grad, x.sizes(), "grad");
  const Rows upstream(grad), rows(x);
  at::Tensor grad_x = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Rows to_x(grad_x);

  const int64_t step = block_rows(rows.count(), bottleneck.side), blocks = (rows.count() + step - 1) / step;
  const int64_t shares = share_count(blocks);
  Partials partials(shares, bottleneck.sums(), blocks);
  for_each_share(shares, blocks, [&](int64_t share, int64_t first, int64_t last) {
    const Bottleneck::Work work(bottleneck, step);
    const Buffer grad_scratch(upstream.scratch(step)), x_scratch(rows.scratch(step));
    const Buffer x_written(step * bottleneck.side);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      float* written = need_x ? to_x.write(begin, x_written) : x_written;
      const float* grad_block = upstream.read(begin, count, grad_scratch);
      bottleneck.backward(grad_block, rows.read(begin, count, x_scratch), count, work, /*residual=*/false,
                          partials.of(share), written);
      if (need_x) {
        to_x.store(begin, count, written);
      }
      partials.end_block(share);
    }
  });
  std::vector<at::Tensor> grads{grad_x};
  bottleneck.append_gradients(partials.total(),
                              {norm_weight, norm_bias, weight_1, bias_1, weight_2, bias_2}, grads);
  return grads;
}

}  // namespace meft
