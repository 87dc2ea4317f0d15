// The two computations that the ops over rows are made of, on a block of fp32 rows that stays in cache: the
// folded projection (norm_linear, ladder) and the bottleneck adapter (adapter, ladder).
#pragma once

#include "common.h"
#include "gemm.h"

namespace meft {

// The folded projection of hidden states (see reference/norm_linear.py), x (rows, D) -> z (rows, r):
//
//     z = rstd * (x W^T - mean * c) + b,   c = rowsum(W)
class Projection {
 public:
  Projection(const at::Tensor& weight, const at::Tensor& bias)
      : width(weight.size(1)), side(weight.size(0)), weight_(widened(weight)), bias_(widened(bias)),
        transposed_(width * side), column_sum_(side) {
    check_shape(bias, {side}, "bias");
    const float* rows = weight_.data_ptr<float>();
    transpose(side, width, rows, width, transposed_, side);
    for (int64_t i = 0; i < side; ++i) {
      column_sum_[i] = sum_of(rows + i * width, width);
    }
  }

  const int64_t width, side;

  void check(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd) const {
    check_rows(x, width, "x");
    check_shape(mean, x.sizes().slice(0, x.dim() - 1), "mean");
    check_shape(rstd, mean.sizes(), "rstd");
  }

  void forward(const float* x, int64_t rows, const float* mean, const float* rstd, float* z) const {
    gemm(rows, side, width, x, width, transposed_, side, z, side);
    const float* bias = bias_.data_ptr<float>();
    const float* column_sum = column_sum_;
    for (int64_t t = 0; t < rows; ++t) {
      float* row = z + t * side;
      const float centre = mean[t], scale = rstd[t];
#pragma omp simd
      for (int64_t i = 0; i < side; ++i) {
        row[i] = scale * (row[i] - centre * column_sum[i]) + bias[i];
      }
    }
  }

  // Elements of the sums that `backward` adds to: of the weight (r, D), the bias (r,), and of rstd dz mean
  // (r,), which `finish` takes from the weight's.
  int64_t sums() const { return side * (width + 2); }

  // Scratch for the backward of blocks of up to `rows` rows.
  struct Work {
    Work(const Projection& of, int64_t rows)
        : turned(of.side * rows), sums(2 * of.side), lost(2 * of.side) {}

    Buffer turned, sums;
    ZeroBuffer lost;
  };

  // Adds the gradients of weight and bias. `grad` dz (rows, r) is left scaled by rstd.
  void backward(float* grad, const float* x, int64_t rows, const float* mean, const float* rstd,
                const Work& work, float* sums) const {
    // Summed by block first: long sums of fp32 lose digits.
    float *grad_bias = work.sums, *shift = grad_bias + side;
    std::fill_n(grad_bias, 2 * side, 0.0f);
    add_column_sums(grad, rows, side, grad_bias);
    for (int64_t t = 0; t < rows; ++t) {
      float* row = grad + t * side;
      const float centre = mean[t], scale = rstd[t];
#pragma omp simd
      for (int64_t i = 0; i < side; ++i) {
        row[i] *= scale;
        shift[i] += row[i] * centre;
      }
    }
    add(grad_bias, 2 * side, sums + side * width, work.lost);
    transpose(rows, side, grad, side, work.turned, rows);
    gemm(side, width, rows, work.turned, rows, x, width, sums, width, /*accumulate=*/true);
  }

  void finish(float* sums) const {
    const float* shift = sums + side * (width + 1);
    for (int64_t i = 0; i < side; ++i) {
      float* row = sums + i * width;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        row[j] -= shift[i];
      }
    }
  }

  // The gradient of x (rows, D), with the path through mean and rstd; `grad` dz as it is before `backward`.
  void backward_x(const float* grad, const float* x, int64_t rows, const float* mean, const float* rstd,
                  float* grad_x) const {
    gemm(rows, width, side, grad, side, weight_.data_ptr<float>(), width, grad_x, width);
    for (int64_t t = 0; t < rows; ++t) {
      const float* from = x + t * width;
      float* row = grad_x + t * width;
      const float centre = mean[t], scale = rstd[t];
      // The means of the gradient, and of the gradient times the normalised x.
      const float mean_grad = sum_of(row, width) / static_cast<float>(width);
      const float along = scale * dot(row, from, width, centre) / static_cast<float>(width);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        row[j] = scale * (row[j] - mean_grad - (from[j] - centre) * scale * along);
      }
    }
  }

 private:
  at::Tensor weight_, bias_;
  Buffer transposed_, column_sum_;
};

// LayerNorm of `rows` rows without and with its affine part, and the rstd of each.
inline void normalise(const float* v, int64_t rows, int64_t width, const float* norm_weight,
                      const float* norm_bias, float* normed, float* affine, float* rstd) {
  for (int64_t t = 0; t < rows; ++t) {
    const float* row = v + t * width;
    float *normed_row = normed + t * width, *affine_row = affine + t * width;
    float mean, scale;
    row_moments(row, width, mean, scale);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      normed_row[i] = (row[i] - mean) * scale;
      affine_row[i] = normed_row[i] * norm_weight[i] + norm_bias[i];
    }
    rstd[t] = scale;
  }
}

// The gradient of v in `normalise` from that of the affine rows, `grad`, which is left scaled by the weight;
// nothing is written where `grad_v` is null, and `residual` is added unless it is null. The sums of the
// weight's and the bias' gradient are added to.
inline void normalise_bwd(float* grad, const float* normed, const float* rstd, int64_t rows, int64_t width,
                          const float* norm_weight, const float* residual, float* sum_weight, float* sum_bias,
                          float* grad_v) {
  add_column_sums(grad, rows, width, sum_bias);
  for (int64_t t = 0; t < rows; ++t) {
    const float* normed_row = normed + t * width;
    float* row = grad + t * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      sum_weight[i] += row[i] * normed_row[i];
      row[i] *= norm_weight[i];
    }
    if (grad_v == nullptr) {
      continue;
    }
    const float mean = sum_of(row, width) / static_cast<float>(width);
    const float along = dot(row, normed_row, width) / static_cast<float>(width);
    const float scale = rstd[t];
    const float* kept = residual == nullptr ? row : residual + t * width;
    const float share = residual == nullptr ? 0.0f : 1.0f;
    float* to = grad_v + t * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      to[i] = scale * (row[i] - mean - normed_row[i] * along) + share * kept[i];
    }
  }
}

// GELU's factor Phi(x), the normal distribution function, and its density phi(x).
//
// With e = exp(-x^2 / 2) and t = 1 / (1 + k |x| / sqrt(2)), the upper tail of |x| is e times a polynomial in
// t (Abramowitz and Stegun 7.1.26; its error is below 7.5e-8).
inline void normal(float x, float& distribution, float& density) {
  const float magnitude = std::fabs(x);
  const float e = exp_of_negative(-0.5f * x * x);
  const float t = 1.0f / (1.0f + 0.231641888f * magnitude);
  float tail = 0.5307027145f;
  tail = tail * t - 0.7265760135f;
  tail = tail * t + 0.7107068705f;
  tail = tail * t - 0.142248368f;
  tail = tail * t + 0.127414796f;
  tail *= t * e;
  distribution = x < 0 ? tail : 1.0f - tail;
  density = 0.398942280f * e;
}

// The adapter (see reference/adapter.py), v (rows, r) -> W2 gelu(W1 LN(v) + b1) + b2, with hidden width a.
class Bottleneck {
 public:
  Bottleneck(const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& weight_1,
             const at::Tensor& bias_1, const at::Tensor& weight_2, const at::Tensor& bias_2)
      : side(weight_1.size(1)), hidden(weight_1.size(0)), norm_weight_(widened(norm_weight)),
        norm_bias_(widened(norm_bias)), weight_1_(widened(weight_1)), bias_1_(widened(bias_1)),
        weight_2_(widened(weight_2)), bias_2_(widened(bias_2)), transposed_1_(side * hidden),
        transposed_2_(side * hidden) {
    check_shape(norm_weight, {side}, "norm_weight");
    check_shape(norm_bias, {side}, "norm_bias");
    check_shape(bias_1, {hidden}, "bias_1");
    check_shape(weight_2, {side, hidden}, "weight_2");
    check_shape(bias_2, {side}, "bias_2");
    transpose(hidden, side, weight_1_.data_ptr<float>(), side, transposed_1_, hidden);
    transpose(side, hidden, weight_2_.data_ptr<float>(), hidden, transposed_2_, side);
  }

  const int64_t side, hidden;

  // Scratch for blocks of up to `rows` rows.
  struct Work {
    Work(const Bottleneck& of, int64_t rows)
        : normed(rows * of.side), affine(rows * of.side), turned(rows * of.side), grad_affine(rows * of.side),
          hidden(rows * of.hidden), grad_hidden(rows * of.hidden), rstd(rows), sums(of.vectors()),
          lost(of.vectors()) {}

    Buffer normed, affine, turned, grad_affine, hidden, grad_hidden, rstd, sums;
    ZeroBuffer lost;
  };

  // `out` (rows, r) gets the adapter of v, plus v where `residual`.
  void forward(const float* v, int64_t rows, const Work& work, bool residual, float* out) const {
    preactivation(v, rows, work);
    const float *bias_1 = bias_1_.data_ptr<float>(), *bias_2 = bias_2_.data_ptr<float>();
    for (int64_t t = 0; t < rows; ++t) {
      float* row = work.hidden + t * hidden;
#pragma omp simd
      for (int64_t j = 0; j < hidden; ++j) {
        const float p = row[j] + bias_1[j];
        float distribution, density;
        normal(p, distribution, density);
        row[j] = p * distribution;
      }
    }
    gemm(rows, side, hidden, work.hidden, hidden, transposed_2_, side, out, side);
    for (int64_t t = 0; t < rows; ++t) {
      const float* from = v + t * side;
      float* row = out + t * side;
#pragma omp simd
      for (int64_t i = 0; i < side; ++i) {
        row[i] += bias_2[i] + (residual ? from[i] : 0.0f);
      }
    }
  }

  // Elements of the sums that `backward` adds to, in this order: norm_weight (r,), norm_bias (r,), bias_1
  // (a,), bias_2 (r,), weight_1 transposed (r, a), weight_2 (r, a).
  int64_t sums() const { return vectors() + 2 * side * hidden; }
  int64_t vectors() const { return 3 * side + hidden; }

  // Adds the gradients of the parameters for upstream `grad` (rows, r), and writes the gradient of v, plus
  // `grad` where `residual`.
  void backward(const float* grad, const float* v, int64_t rows, const Work& work, bool residual, float* sums,
                float* grad_v) const {
    float *sum_norm_weight = work.sums, *sum_norm_bias = sum_norm_weight + side;
    float *sum_bias_1 = sum_norm_bias + side, *sum_bias_2 = sum_bias_1 + hidden;
    float *sum_weight_1 = sums + vectors(), *sum_weight_2 = sum_weight_1 + side * hidden;
    std::fill_n(sum_norm_weight, vectors(), 0.0f);

    preactivation(v, rows, work);
    gemm(rows, hidden, side, grad, side, weight_2_.data_ptr<float>(), hidden, work.grad_hidden, hidden);
    const float* bias_1 = bias_1_.data_ptr<float>();
    for (int64_t t = 0; t < rows; ++t) {
      float *row = work.hidden + t * hidden, *grad_row = work.grad_hidden + t * hidden;
#pragma omp simd
      for (int64_t j = 0; j < hidden; ++j) {
        const float p = row[j] + bias_1[j];
        float distribution, density;
        normal(p, distribution, density);
        row[j] = p * distribution;
        grad_row[j] *= distribution + p * density;
      }
    }
    add_column_sums(work.grad_hidden, rows, hidden, sum_bias_1);
    transpose(rows, side, grad, side, work.turned, rows);
    gemm(side, hidden, rows, work.turned, rows, work.hidden, hidden, sum_weight_2, hidden, true);
    transpose(rows, side, work.affine, side, work.turned, rows);
    gemm(side, hidden, rows, work.turned, rows, work.grad_hidden, hidden, sum_weight_1, hidden, true);
    gemm(rows, side, hidden, work.grad_hidden, hidden, weight_1_.data_ptr<float>(), side, work.grad_affine,
         side);

    normalise_bwd(work.grad_affine, work.normed, work.rstd, rows, side, norm_weight_.data_ptr<float>(),
                  residual ? grad : nullptr, sum_norm_weight, sum_norm_bias, grad_v);
    add_column_sums(grad, rows, side, sum_bias_2);
    add(sum_norm_weight, vectors(), sums, work.lost);
  }

  // The gradients of the six parameters in their order and types, from the sums over all rows.
  void append_gradients(const float* sums, at::TensorList parameters, std::vector<at::Tensor>& grads) const {
    const float *bias_1 = sums + 2 * side, *bias_2 = bias_1 + hidden, *turned = bias_2 + side;
    at::Tensor weight_1 = empty_fp32({hidden, side});
    transpose(side, hidden, turned, hidden, weight_1.data_ptr<float>(), side);
    grads.push_back(tensor_like(sums, parameters[0]));
    grads.push_back(tensor_like(sums + side, parameters[1]));
    grads.push_back(weight_1.to(parameters[2].scalar_type()));
    grads.push_back(tensor_like(bias_1, parameters[3]));
    grads.push_back(tensor_like(turned + side * hidden, parameters[4]));
    grads.push_back(tensor_like(bias_2, parameters[5]));
  }

 private:
  // LN(v) without and with its affine part, rstd, and W1 LN(v) without its bias, into `work`.
  void preactivation(const float* v, int64_t rows, const Work& work) const {
    normalise(v, rows, side, norm_weight_.data_ptr<float>(), norm_bias_.data_ptr<float>(), work.normed,
              work.affine, work.rstd);
    gemm(rows, hidden, side, work.affine, side, transposed_1_, hidden, work.hidden, hidden);
  }

  at::Tensor norm_weight_, norm_bias_, weight_1_, bias_1_, weight_2_, bias_2_;
  Buffer transposed_1_, transposed_2_;
};

}  // namespace meft
