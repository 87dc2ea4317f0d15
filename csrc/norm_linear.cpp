// LayerNorm folded into a projection, forward and backward; the equations stand in
// meft_kernels/reference/norm_linear.py. Blocks of rows stay in cache between a product and what follows it.
#include "blocks.h"
#include "kernels.h"

namespace meft {

at::Tensor norm_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                       const at::Tensor& mean, const at::Tensor& rstd) {
  const Projection projection(weight, bias);
  projection.check(x, mean, rstd);
  const Rows rows(x);
  const at::Tensor means = widened(mean), rstds = widened(rstd);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = projection.side;
  at::Tensor out = at::empty(sizes, x.options());
  Rows result(out);

  const int64_t step = block_rows(rows.count(), projection.side), blocks = (rows.count() + step - 1) / step;
  for_each_share(share_count(blocks), blocks, [&](int64_t, int64_t first, int64_t last) {
    const Buffer x_scratch(rows.scratch(step)), out_scratch(result.scratch(step));
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      float* written = result.write(begin, out_scratch);
      projection.forward(rows.read(begin, count, x_scratch), count, means.data_ptr<float>() + begin,
                         rstds.data_ptr<float>() + begin, written);
      result.store(begin, count, written);
    }
  });
  return out;
}

std::vector<at::Tensor> norm_linear_bwd(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                        const at::Tensor& bias, const at::Tensor& mean,
                                        const at::Tensor& rstd, bool need_x) {
  const Projection projection(weight, bias);
  projection.check(x, mean, rstd);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = projection.side;
  check_shape(grad, sizes, "grad");
  const Rows upstream(grad), rows(x);
  const at::Tensor means = widened(mean), rstds = widened(rstd);
  at::Tensor grad_x = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Rows to_x(grad_x);

  const int64_t side = projection.side, step = block_rows(rows.count(), projection.side);
  const int64_t blocks = (rows.count() + step - 1) / step, shares = share_count(blocks);
  Partials partials(shares, projection.sums(), blocks);
  for_each_share(shares, blocks, [&](int64_t share, int64_t first, int64_t last) {
    const Projection::Work work(projection, step);
    const Buffer grad_scratch(upstream.scratch(step)), x_scratch(rows.scratch(step));
    const Buffer x_written(to_x.scratch(need_x ? step : 0)), scaled(step * side);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * step, count = std::min(step, rows.count() - begin);
      const float* block_mean = means.data_ptr<float>() + begin;
      const float* block_rstd = rstds.data_ptr<float>() + begin;
      const float* hidden_state = rows.read(begin, count, x_scratch);
      const float* grad_block = upstream.read(begin, count, grad_scratch);
      if (need_x) {
        float* written = to_x.write(begin, x_written);
        projection.backward_x(grad_block, hidden_state, count, block_mean, block_rstd, written);
        to_x.store(begin, count, written);
      }
      std::copy_n(grad_block, count * side, static_cast<float*>(scaled));
      projection.backward(scaled, hidden_state, count, block_mean, block_rstd, work, partials.of(share));
      partials.end_block(share);
    }
  });
  float* sums = partials.total();
  projection.finish(sums);
  return {grad_x, tensor_like(sums, weight), tensor_like(sums + weight.numel(), bias)};
}

}  // namespace meft
