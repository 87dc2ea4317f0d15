// The mean over time of a side network's output without that output; the equations stand in
// meft_kernels/reference/pooled_upsample.py. Per block of frames there is one product with the (r, r) matrix
// Wc^T Wc, in the backward a second one for N2; frames beyond a clip's length are never read.
#include "blocks.h"
#include "kernels.h"

namespace meft {
namespace {

// The centred weight Wc (D, r) and bias bc (D,), and the quadratic form of |Wc n + bc|^2.
struct Form {
  Form(const at::Tensor& weight, const at::Tensor& bias)
      : size(weight.size(0)), side(weight.size(1)), centred(size * side), turned(size * side),
        centred_bias(size), gram(side * side), cross(side) {
    check_shape(bias, {size}, "bias");
    const at::Tensor wide_weight = widened(weight), wide_bias = widened(bias);
    centre(wide_weight.data_ptr<float>(), side, centred);
    centre(wide_bias.data_ptr<float>(), 1, centred_bias);
    transpose(size, side, centred, side, turned, size);
    gemm(side, side, size, turned, size, centred, side, gram, side);
    gemm(1, side, size, centred_bias, size, centred, side, cross, side);
    square = dot(centred_bias, centred_bias, size);
  }

  // `to` gets (D, width) `from` less the mean over D of each column.
  void centre(const float* from, int64_t width, float* to) const {
    const Buffer mean(width);
    std::fill_n(static_cast<float*>(mean), width, 0.0f);
    add_column_sums(from, size, width, mean);
    for (int64_t d = 0; d < size; ++d) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        to[d * width + i] = from[d * width + i] - mean[i] / static_cast<float>(size);
      }
    }
  }

  const int64_t size, side;
  Buffer centred, turned, centred_bias, gram, cross;
  float square;
};

// The frames that count, cut into blocks that do not cross a clip's end.
struct Frames {
  struct Block {
    int64_t clip, begin, count;
  };

  Frames(const at::Tensor& x, const std::optional<at::Tensor>& lengths)
      : frames(x.size(1)), step(block_rows(x.size(0) * x.size(1))), share(x.size(0)) {
    at::Tensor given;
    if (lengths) {
      check_shape(*lengths, {x.size(0)}, "lengths");
      given = lengths->to(at::kLong).contiguous();
    }
    for (int64_t clip = 0; clip < x.size(0); ++clip) {
      const int64_t length = lengths ? given.data_ptr<int64_t>()[clip] : frames;
      share[clip] = 1.0f / static_cast<float>(std::max<int64_t>(length, 1));
      for (int64_t begin = 0; begin < std::min(length, frames); begin += step) {
        blocks.push_back({clip, clip * frames + begin, std::min(step, std::min(length, frames) - begin)});
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(blocks.size()); }

  int64_t frames, step;
  std::vector<float> share;  // of a frame in the mean, by clip
  std::vector<Block> blocks;
};

// n, s and what they are made of, for one block of frames.
class Features {
 public:
  Features(const Form& form, const at::Tensor& norm_weight, const at::Tensor& norm_bias, bool relu,
           int64_t step)
      : normed(step * form.side), n(step * form.side), rstd(step), product(step * form.side), inverse(step),
        form_(form), norm_weight_(norm_weight.data_ptr<float>()), norm_bias_(norm_bias.data_ptr<float>()),
        relu_(relu) {}

  void compute(const float* x, int64_t rows) {
    const int64_t side = form_.side;
    normalise(x, rows, side, norm_weight_, norm_bias_, normed, n, rstd);
    if (relu_) {
      float* all = n;
      for (int64_t i = 0; i < rows * side; ++i) {
        all[i] = all[i] < 0 ? 0.0f : all[i];
      }
    }
    gemm(rows, side, side, n, side, form_.gram, side, product, side);
    for (int64_t t = 0; t < rows; ++t) {
      const float* row = n + t * side;
      const float linear = 2 * dot(form_.cross, row, side) + form_.square;
      // Not max: a NaN must stay one.
      const float variance = (dot(product + t * side, row, side) + linear) / static_cast<float>(form_.size);
      inverse[t] = 1.0f / std::sqrt((variance < 0 ? 0.0f : variance) + NORM_EPS);
    }
  }

  // Adds s n (r,) and s, times a frame's share, of every row.
  void pool(int64_t rows, float share, float* sums) const {
    const int64_t side = form_.side;
    double total = 0;
    for (int64_t t = 0; t < rows; ++t) {
      const float scale = share * inverse[t];
      const float* row = n + t * side;
#pragma omp simd
      for (int64_t i = 0; i < side; ++i) {
        sums[i] += scale * row[i];
      }
      total += scale;
    }
    sums[side] += static_cast<float>(total);
  }

  Buffer normed, n, rstd, product, inverse;

 private:
  const Form& form_;
  const float *norm_weight_, *norm_bias_;
  bool relu_;
};

// The sums of each block, (blocks, r + 1), added up by clip: nb (B, r) and sb (B,).
void gather(const Frames& frames, const Buffer& pools, int64_t side, int64_t batch, float* pooled,
            float* scale) {
  std::fill_n(pooled, batch * side, 0.0f);
  std::fill_n(scale, batch, 0.0f);
  for (int64_t block = 0; block < frames.count(); ++block) {
    const float* sums = pools + block * (side + 1);
    const int64_t clip = frames.blocks[block].clip;
    add(sums, side, pooled + clip * side);
    scale[clip] += sums[side];
  }
}

void check(const Form& form, const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
           const at::Tensor& out_norm_weight, const at::Tensor& out_norm_bias) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x must have shape (B, T, r), got ", x.sizes());
  check_rows(x, form.side, "x");
  check_shape(norm_weight, {form.side}, "norm_weight");
  check_shape(norm_bias, {form.side}, "norm_bias");
  check_shape(out_norm_weight, {form.size}, "out_norm_weight");
  check_shape(out_norm_bias, {form.size}, "out_norm_bias");
}

// up (B, D) = Wc nb + sb bc: the mean of the output before the last LayerNorm's affine part.
void upsample(const Form& form, int64_t batch, const float* pooled, const float* scale, float* up) {
  gemm(batch, form.size, form.side, pooled, form.side, form.turned, form.size, up, form.size);
  for (int64_t clip = 0; clip < batch; ++clip) {
    for (int64_t d = 0; d < form.size; ++d) {
      up[clip * form.size + d] += scale[clip] * form.centred_bias[d];
    }
  }
}

}  // namespace

at::Tensor pooled_upsample(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                           const at::Tensor& weight, const at::Tensor& bias,
                           const at::Tensor& out_norm_weight, const at::Tensor& out_norm_bias,
                           const std::optional<at::Tensor>& lengths, bool relu) {
  const Form form(weight, bias);
  check(form, x, norm_weight, norm_bias, out_norm_weight, out_norm_bias);
  const Rows rows(x);
  const Frames frames(x, lengths);
  const at::Tensor wide_weight = widened(norm_weight), wide_bias = widened(norm_bias);
  const int64_t batch = x.size(0), side = form.side, size = form.size;
  const Buffer pools(frames.count() * (side + 1)), pooled(batch * side), scale(batch);
  std::fill_n(static_cast<float*>(pools), frames.count() * (side + 1), 0.0f);
  for_each_share(share_count(frames.count()), frames.count(), [&](int64_t, int64_t first, int64_t last) {
    Features features(form, wide_weight, wide_bias, relu, frames.step);
    const Buffer x_scratch(rows.scratch(frames.step));
    for (int64_t index = first; index < last; ++index) {
      const Frames::Block& block = frames.blocks[index];
      features.compute(rows.read(block.begin, block.count, x_scratch), block.count);
      features.pool(block.count, frames.share[block.clip], pools + index * (side + 1));
    }
  });
  gather(frames, pools, side, batch, pooled, scale);
  at::Tensor out = empty_fp32({batch, size});
  upsample(form, batch, pooled, scale, out.data_ptr<float>());
  const at::Tensor gamma = widened(out_norm_weight), beta = widened(out_norm_bias);
  return out.mul_(gamma).add_(beta).to(x.scalar_type());
}

std::vector<at::Tensor> pooled_upsample_bwd(const at::Tensor& grad, const at::Tensor& x,
                                            const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                            const at::Tensor& weight, const at::Tensor& bias,
                                            const at::Tensor& out_norm_weight,
                                            const at::Tensor& out_norm_bias,
                                            const std::optional<at::Tensor>& lengths, bool relu,
                                            bool need_x) {
  const Form form(weight, bias);
  check(form, x, norm_weight, norm_bias, out_norm_weight, out_norm_bias);
  const int64_t batch = x.size(0), side = form.side, size = form.size;
  check_shape(grad, {batch, size}, "grad");
  const Rows rows(x);
  const Frames frames(x, lengths);
  const at::Tensor wide_weight = widened(norm_weight), wide_bias = widened(norm_bias);
  // Frames that do not count get a gradient of zero.
  at::Tensor grad_x = need_x ? at::zeros(x.sizes(), x.options()) : at::empty({0}, x.options());
  Rows to_x(grad_x);

  const at::Tensor upstream = widened(grad), e = upstream.mul(widened(out_norm_weight));  // (B, D)
  const Buffer grad_pooled(batch * side), grad_scale(batch);
  gemm(batch, side, size, e.data_ptr<float>(), size, form.centred, side, grad_pooled, side);
  for (int64_t clip = 0; clip < batch; ++clip) {
    grad_scale[clip] = dot(e.data_ptr<float>() + clip * size, form.centred_bias, size);
  }

  const Buffer pools(frames.count() * (side + 1)), pooled(batch * side), scale(batch);
  std::fill_n(static_cast<float*>(pools), frames.count() * (side + 1), 0.0f);
  const int64_t shares = share_count(frames.count());
  // Of each share: N2 (r, r), n1 (r,), n0, and the gradients of norm_weight and norm_bias (r,).
  Partials partials(shares, side * (side + 3) + 1, frames.count());
  for_each_share(shares, frames.count(), [&](int64_t share, int64_t first, int64_t last) {
    Features features(form, wide_weight, wide_bias, relu, frames.step);
    const Buffer x_scratch(rows.scratch(frames.step)), weighted(frames.step * side);
    const Buffer turned(frames.step * side), written(to_x.scratch(need_x ? frames.step : 0));
    const Buffer vectors(3 * side + 1);
    float* second = partials.of(share);
    for (int64_t index = first; index < last; ++index) {
      const Frames::Block& block = frames.blocks[index];
      const float p = frames.share[block.clip], *to_pooled = grad_pooled + block.clip * side;
      features.compute(rows.read(block.begin, block.count, x_scratch), block.count);
      features.pool(block.count, p, pools + index * (side + 1));
      // Summed by block first: long sums of fp32 lose digits.
      float *sum_first = vectors, *sum_zeroth = sum_first + side;
      float *sum_norm_weight = sum_zeroth + 1, *sum_norm_bias = sum_norm_weight + side;
      std::fill_n(sum_first, 3 * side + 1, 0.0f);
      for (int64_t t = 0; t < block.count; ++t) {
        const float* n = features.n + t * side;
        float *q_n = weighted + t * side, *grad_n = features.product + t * side;
        const float inverse = features.inverse[t], frame_scale = p * inverse;
        const float grad_inverse = p * (dot(n, to_pooled, side) + grad_scale[block.clip]);
        const float q = inverse * inverse * inverse * grad_inverse * (-0.5f / static_cast<float>(size));
        const float* cross = form.cross;
#pragma omp simd
        for (int64_t i = 0; i < side; ++i) {
          q_n[i] = q * n[i];
          sum_first[i] += q_n[i];
          const float value = frame_scale * to_pooled[i] + 2 * q * (grad_n[i] + cross[i]);
          grad_n[i] = relu && !(n[i] > 0) ? 0.0f : value;
        }
        *sum_zeroth += q;
      }
      transpose(block.count, side, weighted, side, turned, block.count);
      gemm(side, side, block.count, turned, block.count, features.n, side, second, side, true);
      float* to = need_x ? to_x.write(block.begin, written) : nullptr;
      normalise_bwd(features.product, features.normed, features.rstd, block.count, side,
                    wide_weight.data_ptr<float>(), nullptr, sum_norm_weight, sum_norm_bias, to);
      if (need_x) {
        to_x.store(block.begin, block.count, to);
      }
      add(vectors, 3 * side + 1, second + side * side);
      partials.end_block(share);
    }
  });

  gather(frames, pools, side, batch, pooled, scale);
  const float *second = partials.total(), *sum_first = second + side * side;
  const float *sum_zeroth = sum_first + side, *sum_norm_weight = sum_zeroth + 1;
  // dWc = sum_b e nb^T + 2 (Wc N2 + bc n1^T);   dbc = sum_b e sb + 2 (Wc n1 + bc n0)
  const Buffer e_turned(batch * size), grad_weight(size * side), grad_bias(size);
  transpose(batch, size, e.data_ptr<float>(), size, e_turned, batch);
  gemm(size, side, side, form.centred, side, second, side, grad_weight, side);
  for (int64_t d = 0; d < size; ++d) {
    const float centred_bias = form.centred_bias[d];
    float* row = grad_weight + d * side;
#pragma omp simd
    for (int64_t i = 0; i < side; ++i) {
      row[i] = 2 * (row[i] + centred_bias * sum_first[i]);
    }
    grad_bias[d] = 2 * (dot(form.centred + d * side, sum_first, side) + centred_bias * *sum_zeroth) +
                   dot(e_turned + d * batch, scale, batch);
  }
  gemm(size, side, batch, e_turned, batch, pooled, side, grad_weight, side, /*accumulate=*/true);
  form.centre(grad_weight, side, grad_weight);
  form.centre(grad_bias, 1, grad_bias);
  at::Tensor up = empty_fp32({batch, size});
  upsample(form, batch, pooled, scale, up.data_ptr<float>());
  return {grad_x,
          tensor_like(sum_norm_weight, norm_weight),
          tensor_like(sum_norm_weight + side, norm_bias),
          tensor_like(grad_weight, weight),
          tensor_like(grad_bias, bias),
          upstream.mul(up).sum(0).to(out_norm_weight.scalar_type()),
          upstream.sum(0).to(out_norm_bias.scalar_type())};
}

}  // namespace meft
