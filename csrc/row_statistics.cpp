// Mean and reciprocal standard deviation of every row, as meft_kernels/reference/common.py defines them.
// A row is read once from memory: the pass around the mean finds it in the first cache.
#include "common.h"
#include "kernels.h"

namespace meft {

std::tuple<at::Tensor, at::Tensor> row_statistics(const at::Tensor& x) {
  const Rows rows(x);
  at::Tensor mean = empty_fp32(x.sizes().slice(0, x.dim() - 1)), rstd = empty_fp32(mean.sizes());
  float *means = mean.data_ptr<float>(), *rstds = rstd.data_ptr<float>();
  constexpr int64_t kRowsPerThread = 16;  // fewer are not worth a thread
  at::parallel_for(0, rows.count(), kRowsPerThread, [&](int64_t begin, int64_t end) {
    const Buffer scratch(rows.scratch(1));
    for (int64_t t = begin; t < end; ++t) {
      row_moments(rows.read(t, 1, scratch), rows.width(), means[t], rstds[t]);
    }
  });
  return {mean, rstd};
}

}  // namespace meft
