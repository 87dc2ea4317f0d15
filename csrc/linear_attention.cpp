// ReLU attention with the ReLU before the product; the formulas are those of reference/linear_attention.py.
//
// A piece of work is one layer of one clip. Its state S = relu(F)^T F (r, r) and u, the sum of relu(F), are
// gathered first, then frames pass by in blocks:
//
//     forward:    Y = relu(A) S;   out += C Y / R + C F
//     backward:   E = dM S^T, of which R, delta and dA;   dS += (k relu(A))^T dM;   du
//                 then dF = relu(F) dS + 1[F > 0] (F dS^T + du) + C dM
//
// Two products of (T, r) by (r, r) forward and five backward. Memory beyond inputs and outputs is a few blocks
// and (r, r) per thread.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <vector>

#include "attention.h"
#include "common.h"
#include "frames.h"
#include "gemm.h"
#include "kernels.h"

namespace meft {
namespace {

using namespace attention;

constexpr int64_t ROWS = 96;  // frames in a block: as many terms as a product sums in one go

// to = relu(from), which hands on NaN
void relu(const float* from, int64_t count, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    to[i] = from[i] < 0 ? 0.0f : from[i];
  }
}

class Linear {
 public:
  explicit Linear(const Inputs& in)
      : in_(in), width_(in.width), states_(empty_fp32({4, width_, width_})), rows_(empty_fp32({8, ROWS, width_})) {
    state_ = states_.data_ptr<float>();
    turned_ = state_ + width_ * width_;
    state_grad_ = turned_ + width_ * width_;
    turned_grad_ = state_grad_ + width_ * width_;
    float** blocks[] = {&given_, &read_, &query_, &key_, &product_, &across_, &other_, &written_};
    for (int64_t i = 0; i < 8; ++i) {
      *blocks[i] = rows_.data_ptr<float>() + i * ROWS * width_;
    }
    sums_.resize(width_);
    sums_grad_.resize(width_);
    part_.resize(width_);
  }

  // sum (T, r) (+)= gate * (attention to one layer + its features)
  void forward(int64_t clip, int64_t layer, float* sum, bool is_first) {
    const float gate = in_.gates[clip * in_.layers + layer];
    gather(clip, layer);
    for (int64_t start = 0; start < in_.frames; start += ROWS) {
      const int64_t count = std::min(ROWS, in_.frames - start), begin = clip * in_.frames + start;
      relu(in_.anchor.read(begin, count, given_), count * width_, query_);
      const float* features = in_.features[layer].read(begin, count, read_);
      gemm(count, width_, width_, query_, width_, state_, width_, product_, width_);
      for (int64_t row = 0; row < count; ++row) {
        const float factor = gate / (dot(query_ + row * width_, sums_.data(), width_) + ATTENTION_EPS);
        const float *attended = product_ + row * width_, *feature = features + row * width_;
        float* target = sum + (start + row) * width_;
        if (is_first) {
          std::fill_n(target, width_, 0.0f);
        }
#pragma omp simd
        for (int64_t i = 0; i < width_; ++i) {
          target[i] += factor * attended[i] + gate * feature[i];
        }
      }
    }
  }

  // query_sum (T, r) (+)= the gradient of relu(A) through one layer; the clip's rows of feature_grad = the
  // gradient of the layer's features but for the means' part. Returns the gate's gradient.
  double backward(const Rows& grad, int64_t clip, int64_t layer, float* query_sum, bool is_first,
                  Rows& feature_grad) {
    const float gate = in_.gates[clip * in_.layers + layer];
    gather(clip, layer);
    transpose(width_, width_, state_, width_, turned_, width_);
    std::fill_n(state_grad_, width_ * width_, 0.0f);
    std::fill(sums_grad_.begin(), sums_grad_.end(), 0.0f);
    double gate_grad = 0;
    for (int64_t start = 0; start < in_.frames; start += ROWS) {
      const int64_t count = std::min(ROWS, in_.frames - start), begin = clip * in_.frames + start;
      const float* upstream = grad.read(begin, count, given_);
      gate_grad += query_backward(upstream, begin, count, layer, gate, query_sum + start * width_, is_first);
      transpose(count, width_, query_, width_, across_, ROWS);
      gemm(width_, width_, count, across_, ROWS, upstream, width_, state_grad_, width_, true);
    }
    transpose(width_, width_, state_grad_, width_, turned_grad_, width_);
    for (int64_t start = 0; start < in_.frames; start += ROWS) {
      const int64_t count = std::min(ROWS, in_.frames - start);
      feature_backward(grad, clip, layer, gate, start, count, feature_grad);
    }
    return gate_grad;
  }

 private:
  // S and u of one layer of one clip
  void gather(int64_t clip, int64_t layer) {
    std::fill_n(state_, width_ * width_, 0.0f);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (int64_t start = 0; start < in_.valid[clip]; start += ROWS) {
      const int64_t count = std::min(ROWS, in_.valid[clip] - start);
      const float* features = in_.features[layer].read(clip * in_.frames + start, count, read_);
      relu(features, count * width_, key_);
      std::fill(part_.begin(), part_.end(), 0.0f);
      add_column_sums(key_, count, width_, part_.data());
      add(part_.data(), width_, sums_.data());
      transpose(count, width_, key_, width_, across_, ROWS);
      gemm(width_, width_, count, across_, ROWS, features, width_, state_, width_, true);
    }
  }

  // Of a block: query_sum (+)= k (E - delta u), query = k relu(A), du -= sum of k delta relu(A). Returns the
  // gate's gradient.
  double query_backward(const float* upstream, int64_t begin, int64_t count, int64_t layer, float gate,
                        float* query_sum, bool is_first) {
    double gate_grad = 0;
    relu(in_.anchor.read(begin, count, read_), count * width_, query_);
    const float* features = in_.features[layer].read(begin, count, other_);
    gemm(count, width_, width_, upstream, width_, turned_, width_, product_, width_);
    std::fill(part_.begin(), part_.end(), 0.0f);
    for (int64_t row = 0; row < count; ++row) {
      float *query = query_ + row * width_, *target = query_sum + row * width_;
      const float *flow = product_ + row * width_, *sums = sums_.data();
      const float row_sum = dot(query, sums, width_) + ATTENTION_EPS;
      const float factor = gate / row_sum, delta = dot(query, flow, width_) / row_sum;
      gate_grad += delta + dot(upstream + row * width_, features + row * width_, width_);
      if (is_first) {
        std::fill_n(target, width_, 0.0f);
      }
      float* part = part_.data();
#pragma omp simd
      for (int64_t i = 0; i < width_; ++i) {
        target[i] += factor * (flow[i] - delta * sums[i]);
        query[i] *= factor;
        part[i] -= delta * query[i];
      }
    }
    add(part_.data(), width_, sums_grad_.data());
    return gate_grad;
  }

  void feature_backward(const Rows& grad, int64_t clip, int64_t layer, float gate, int64_t start, int64_t count,
                        Rows& feature_grad) {
    const int64_t begin = clip * in_.frames + start;
    const int64_t valid = std::min(std::max<int64_t>(in_.valid[clip] - start, 0), count);
    const float* upstream = grad.read(begin, count, given_);
    const float* features = in_.features[layer].read(begin, count, read_);
    float* target = feature_grad.write(begin, written_);
    relu(features, valid * width_, key_);
    gemm(valid, width_, width_, key_, width_, state_grad_, width_, product_, width_);
    gemm(valid, width_, width_, features, width_, turned_grad_, width_, other_, width_);
    const float* sums_grad = sums_grad_.data();
    for (int64_t row = 0; row < count; ++row) {
      const int64_t at = row * width_;
      if (row >= valid) {
#pragma omp simd
        for (int64_t i = 0; i < width_; ++i) {
          target[at + i] = gate * upstream[at + i];
        }
        continue;
      }
#pragma omp simd
      for (int64_t i = 0; i < width_; ++i) {
        const float of_key = features[at + i] > 0 ? other_[at + i] + sums_grad[i] : 0.0f;
        target[at + i] = product_[at + i] + of_key + gate * upstream[at + i];
      }
    }
    feature_grad.store(begin, count, target);
  }

  const Inputs& in_;
  const int64_t width_;
  at::Tensor states_, rows_;
  float *state_, *turned_, *state_grad_, *turned_grad_;                                   // (r, r)
  float *given_, *read_, *query_, *key_, *product_, *across_, *other_, *written_;  // (ROWS, r)
  std::vector<float> sums_, sums_grad_, part_;                                       // (r,)
};

}  // namespace

at::Tensor linear_attention(const at::Tensor& anchor, const at::Tensor& gate_weight,
                            const at::Tensor& gate_bias, const std::optional<at::Tensor>& lengths,
                            at::TensorList features) {
  const Inputs in(anchor, gate_weight, gate_bias, lengths, features, 1);
  at::Tensor sum = empty_fp32(anchor.sizes());
  const int64_t tasks = in.batch * in.layers, shares = share_count(tasks);
  LayerSums sums(in, sum.data_ptr<float>(), shares);
  for_each_share(shares, tasks, [&](int64_t share, int64_t first, int64_t last) {
    Linear linear(in);
    for (int64_t task = first; task < last; ++task) {
      bool is_first;
      float* target = sums.of(share, task, is_first);
      linear.forward(task / in.layers, task % in.layers, target, is_first);
    }
  });
  sums.add_heads();
  return sum.to(anchor.scalar_type());
}

std::vector<at::Tensor> linear_attention_bwd(const at::Tensor& grad, const at::Tensor& anchor,
                                             const at::Tensor& gate_weight, const at::Tensor& gate_bias,
                                             const std::optional<at::Tensor>& lengths,
                                             at::TensorList features) {
  const Inputs in(anchor, gate_weight, gate_bias, lengths, features, 1);
  check_shape(grad, anchor.sizes(), "grad");
  const Rows upstream(grad);
  at::Tensor query_sum = empty_fp32(anchor.sizes());
  std::vector<at::Tensor> grads = {at::Tensor(), at::Tensor(), at::zeros_like(gate_bias)};
  std::vector<Rows> feature_grads;
  for (const auto& feature : features) {
    grads.push_back(at::empty(feature.sizes(), feature.options()));
    feature_grads.emplace_back(grads.back());
  }
  const int64_t tasks = in.batch * in.layers, shares = share_count(tasks);
  LayerSums sums(in, query_sum.data_ptr<float>(), shares);
  std::vector<double> gate_grads(tasks);
  for_each_share(shares, tasks, [&](int64_t share, int64_t first, int64_t last) {
    Linear linear(in);
    for (int64_t task = first; task < last; ++task) {
      bool is_first;
      float* target = sums.of(share, task, is_first);
      const int64_t clip = task / in.layers, layer = task % in.layers;
      gate_grads[task] = linear.backward(upstream, clip, layer, target, is_first, feature_grads[layer]);
    }
  });
  sums.add_heads();
  // From relu(A) to A.
  at::parallel_for(0, in.batch * in.frames, QUERIES, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(in.anchor.scratch(QUERIES));
    for (int64_t start = begin; start < end; start += QUERIES) {
      const int64_t count = std::min(QUERIES, end - start);
      const float* query = in.anchor.read(start, count, scratch.data());
      float* target = query_sum.data_ptr<float>() + start * in.width;
#pragma omp simd
      for (int64_t i = 0; i < count * in.width; ++i) {
        target[i] *= query[i] > 0 ? 1.0f : 0.0f;
      }
    }
  });
  Rows anchor_grad(query_sum);
  const std::vector<float> weight_grad = gate_backward(in, gate_grads, anchor_grad, feature_grads);
  grads[0] = query_sum.to(anchor.scalar_type());
  grads[1] = tensor_like(weight_grad.data(), gate_weight);
  return grads;
}

}  // namespace meft
