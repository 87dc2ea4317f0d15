// UniPT's ReLU attention from the anchor to every layer's features; the formulas are those of
// reference/relu_attention.py.
//
// A piece of work is one layer of one clip, so that the gradient of its features is gathered by one thread.
// Its keys F (K, r) and their transpose are packed once, zero rows filling K up to whole vectors: a zero key
// scores zero and attends to nothing. Then blocks of b queries Q pass over them. Scores are held with the
// keys down and the queries across: a query is a vector lane, and row sums are plain vector sums. Nothing is
// rescaled, as a softmax would need: sums of ReLU scores just add up.
//
//     forward, tile by tile of keys:   P = relu(F Q^T) (keys, b);   R += sum of P;   O^T += F^T P
//     backward, all tiles:             [S | E] = F [Q^T | dM^T] (keys, 2 b);   R, delta from their sums
//               all tiles, in place:   [S | E] to [k relu(S) | X];   dQ^T += F^T X;   dF += [k S | X] [dM; Q]
//
// Two products forward and five backward, the least there is without keeping scores; a block's scores
// (K, 2 b) stay in the second-level cache. Memory beyond inputs and outputs is a few (T, r) per thread.

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

// `count` rows as columns: their transpose (r, block) at distance `ld`, zeros in the columns beyond them.
void load_transposed(const float* rows, int64_t count, int64_t width, int64_t block, float* to, int64_t ld) {
  transpose(count, width, rows, width, to, ld);
  for (int64_t i = 0; i < width && count < block; ++i) {
    std::fill(to + i * ld + count, to + i * ld + block, 0.0f);
  }
}

// target (+)= values
void add_to(float* target, const float* values, int64_t count, bool is_first) {
  if (is_first) {
    std::copy_n(values, count, target);
    return;
  }
  add(values, count, target);
}

Vec relu(const Vec& x) {
  return at::vec::maximum(x, Vec(0.0f));  // hands on NaN
}

// totals (count,) += the sum of four rows
void add_partial(const float* partial, int64_t count, float* totals) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    totals[i] += (partial[i] + partial[count + i]) + (partial[2 * count + i] + partial[3 * count + i]);
  }
}

// --- forward ----------------------------------------------------------------------------------------------

class Forward {
 public:
  explicit Forward(const Inputs& in)
      : in_(in), keys_(in.frames, in.width), scratch_(empty_fp32({scratch_size(in)})) {
    const int64_t size = in.block * in.width;
    query_ = scratch_.data_ptr<float>();
    attended_ = query_ + size;
    rows_ = attended_ + size;
    row_sums_ = rows_ + size;
    partial_ = row_sums_ + in.block;
    scores_ = partial_ + 4 * in.block;
  }

  // sum (T, r) (+)= gate * (attention to one layer + its features)
  void run(int64_t clip, int64_t layer, float* sum, bool is_first) {
    const int64_t begin = clip * in_.frames, width = in_.width;
    const float gate = in_.gates[clip * in_.layers + layer];
    keys_.pack(in_.features[layer], begin, in_.keys[clip]);
    for (int64_t start = 0; start < in_.frames; start += in_.block) {
      const int64_t count = std::min(in_.block, in_.frames - start);
      block_ = filled(count);
      load_transposed(in_.anchor.read(begin + start, count, rows_), count, width, block_, query_, block_);
      attend(gate);
      transpose(width, block_, attended_, block_, rows_, width);
      // The attended values are in rows_; the transpose's place takes what is read of half precision.
      const float* features = in_.features[layer].read(begin + start, count, attended_);
#pragma omp simd
      for (int64_t i = 0; i < count * width; ++i) {
        rows_[i] += gate * features[i];
      }
      add_to(sum + start * width, rows_, count * width, is_first);
    }
  }

 private:
  static int64_t scratch_size(const Inputs& in) { return in.block * (3 * in.width + 5 + KEYS); }

  // attended (r, block) = gate * (relu(F Q^T) / row sums)^T F
  void attend(float gate) {
    const int64_t block = block_, width = in_.width;
    std::fill_n(row_sums_, block, 0.0f);
    for (int64_t start = 0; start < keys_.count; start += KEYS) {
      const int64_t tile = keys_.size(start);
      gemm(tile, block, width, keys_.rows(start), width, query_, block, scores_, block);
      // Each fourth key's apart: long sums of fp32 lose digits, and wait for each other.
      std::fill_n(partial_, 4 * block, 0.0f);
      for (int64_t key = 0; key < tile; ++key) {
        float *row = scores_ + key * block, *sums = partial_ + key % 4 * block;
        for (int64_t lane = 0; lane < block; lane += W) {
          const Vec score = relu(Vec::loadu(row + lane));
          score.store(row + lane);
          (Vec::loadu(sums + lane) + score).store(sums + lane);
        }
      }
      add_partial(partial_, block, row_sums_);
      gemm(width, block, tile, keys_.transposed(start), tile, scores_, block, attended_, block, start > 0);
    }
    if (keys_.count == 0) {
      std::fill_n(attended_, width * block, 0.0f);
    }
    for (int64_t lane = 0; lane < block; lane += W) {
      const Vec factor = Vec(gate) / (Vec::loadu(row_sums_ + lane) + Vec(ATTENTION_EPS));
      for (int64_t i = 0; i < width; ++i) {
        (Vec::loadu(attended_ + i * block + lane) * factor).store(attended_ + i * block + lane);
      }
    }
  }

  const Inputs& in_;
  int64_t block_ = 0;  // queries of the block at hand, filled up
  Keys keys_;
  at::Tensor scratch_;
  float *query_, *attended_, *rows_, *row_sums_, *partial_, *scores_;
};

// --- backward ---------------------------------------------------------------------------------------------

class Backward {
 public:
  Backward(const Inputs& in, const Rows& grad)
      : in_(in),
        grad_(grad),
        keys_(in.frames, in.width),
        key_grad_(empty_fp32({filled(in.frames), in.width})),
        scores_(empty_fp32({filled(in.frames), 2 * in.block})),
        scratch_(empty_fp32({scratch_size(in)})) {
    const int64_t size = in.block * in.width;
    across_ = scratch_.data_ptr<float>();
    down_ = across_ + 2 * size;
    query_grad_ = down_ + 2 * size;
    rows_ = query_grad_ + size;
    factors_ = rows_ + 2 * size;
    partial_ = factors_ + 2 * in.block;
  }

  // query_sum (T, r) (+)= the gradient of the queries through one layer; the clip's rows of feature_grad =
  // the gradient of the layer's features but for the means' part. Returns the gate's gradient.
  double run(int64_t clip, int64_t layer, float* query_sum, bool is_first, Rows& feature_grad) {
    const int64_t begin = clip * in_.frames, width = in_.width, valid = in_.keys[clip];
    const float gate = in_.gates[clip * in_.layers + layer];
    float* key_grad = key_grad_.data_ptr<float>();
    double gate_grad = 0;
    keys_.pack(in_.features[layer], begin, valid);
    for (int64_t start = 0; start < in_.frames; start += in_.block) {
      const int64_t count = std::min(in_.block, in_.frames - start);
      block_ = filled(count);
      load(begin + start, count);
      gate_grad += score(gate);
      weigh(start > 0, key_grad);
      transpose(width, block_, query_grad_, block_, rows_, width);
      add_to(query_sum + start * width, rows_, count * width, is_first);
    }
    std::fill_n(key_grad + valid * width, (filled(in_.frames) - valid) * width, 0.0f);
    for (int64_t start = 0; start < in_.frames; start += in_.block) {
      const int64_t count = std::min(in_.block, in_.frames - start), size = count * width;
      const float* upstream = grad_.read(begin + start, count, rows_);
      const float* features = in_.features[layer].read(begin + start, count, rows_ + in_.block * width);
      gate_grad += dot(upstream, features, size);
      float* target = feature_grad.write(begin + start, down_);
      const float* gathered = key_grad + start * width;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        target[i] = gathered[i] + gate * upstream[i];
      }
      feature_grad.store(begin + start, count, target);
    }
    return gate_grad;
  }

 private:
  static int64_t scratch_size(const Inputs& in) { return in.block * (7 * in.width + 10); }

  // across (r, 2 block) = [Q^T | dM^T], down (2 block, r) = [dM; Q]
  void load(int64_t begin, int64_t count) {
    const int64_t block = block_, width = in_.width;
    const float* query = in_.anchor.read(begin, count, rows_);
    const float* upstream = grad_.read(begin, count, rows_ + block * width);
    load_transposed(query, count, width, block, across_, 2 * block);
    load_transposed(upstream, count, width, block, across_ + block, 2 * block);
    float* second = down_ + block * width;
    std::copy_n(upstream, count * width, down_);
    std::fill(down_ + count * width, second, 0.0f);
    std::copy_n(query, count * width, second);
    std::fill(second + count * width, second + block * width, 0.0f);
  }

  // scores (keys, 2 block) = [S | E], and of their sums over keys [k | delta] in `factors_`. Returns the sum
  // of delta.
  float score(float gate) {
    const int64_t block = block_, width = in_.width;
    float *row_sums = factors_, *products = factors_ + block;
    std::fill_n(factors_, 2 * block, 0.0f);
    for (int64_t start = 0; start < keys_.count; start += KEYS) {
      const int64_t tile = keys_.size(start);
      float* scores = scores_.data_ptr<float>() + start * 2 * block;
      gemm(tile, 2 * block, width, keys_.rows(start), width, across_, 2 * block, scores, 2 * block);
      std::fill_n(partial_, 8 * block, 0.0f);
      for (int64_t key = 0; key < tile; ++key) {
        float *row = scores + key * 2 * block, *sums = partial_ + key % 4 * 2 * block;
        for (int64_t lane = 0; lane < block; lane += W) {
          const Vec score = relu(Vec::loadu(row + lane));
          const Vec product = Vec::loadu(sums + block + lane);
          (Vec::loadu(sums + lane) + score).store(sums + lane);
          at::vec::fmadd(score, Vec::loadu(row + block + lane), product).store(sums + block + lane);
        }
      }
      add_partial(partial_, 2 * block, factors_);
    }
    for (int64_t lane = 0; lane < block; lane += W) {
      const Vec row_sum = Vec::loadu(row_sums + lane) + Vec(ATTENTION_EPS);
      (Vec(gate) / row_sum).store(row_sums + lane);
      (Vec::loadu(products + lane) / row_sum).store(products + lane);
    }
    return sum_of(products, block);
  }

  // The gradients through a block's scores: query_grad (r, block), key_grad (keys, r) (+)=.
  void weigh(bool accumulate, float* key_grad) {
    const int64_t block = block_, width = in_.width;
    for (int64_t start = 0; start < keys_.count; start += KEYS) {
      const int64_t tile = keys_.size(start);
      float* scores = scores_.data_ptr<float>() + start * 2 * block;
      for (int64_t key = 0; key < tile; ++key) {
        float* row = scores + key * 2 * block;
        for (int64_t lane = 0; lane < block; lane += W) {
          const Vec score = relu(Vec::loadu(row + lane)), factor = Vec::loadu(factors_ + lane);
          const Vec flow = Vec::loadu(row + block + lane) - Vec::loadu(factors_ + block + lane);
          (factor * score).store(row + lane);
          (flow * (factor * score.gt(Vec(0.0f)))).store(row + block + lane);
        }
      }
      gemm(width, block, tile, keys_.transposed(start), tile, scores + block, 2 * block, query_grad_, block,
           start > 0);
      gemm(tile, width, 2 * block, scores, 2 * block, down_, width, key_grad + start * width, width,
           accumulate);
    }
    if (keys_.count == 0) {
      std::fill_n(query_grad_, width * block, 0.0f);
    }
  }

  const Inputs& in_;
  int64_t block_ = 0;  // queries of the block at hand, filled up
  const Rows& grad_;
  Keys keys_;
  at::Tensor key_grad_, scores_, scratch_;
  float *across_, *down_, *query_grad_, *rows_, *factors_, *partial_;
};

// rows of the clip's valid frames += share * values (r)
void add_share(Rows& rows, int64_t begin, int64_t valid, const std::vector<float>& values) {
  const int64_t width = rows.width();
  std::vector<float> scratch(rows.scratch(QUERIES));
  for (int64_t start = 0; start < valid; start += QUERIES) {
    const int64_t count = std::min(QUERIES, valid - start);
    rows.read(begin + start, count, scratch.data());
    float* block = rows.write(begin + start, scratch.data());
    for (int64_t row = 0; row < count; ++row) {
      add(values.data(), width, block + row * width);
    }
    rows.store(begin + start, count, block);
  }
}

// The way back through the gates: adds the means' parts to the gradients of anchor and features, and returns
// the gate weight's.
std::vector<float> gate_backward(const Inputs& in, const std::vector<double>& gate_grads, Rows& anchor_grad,
                                 std::vector<Rows>& feature_grads) {
  std::vector<float> weight_grad(in.width, 0.0f), confidence_grads(in.batch * in.layers);
  for (int64_t clip = 0; clip < in.batch; ++clip) {
    const float* gates = in.gates.data() + clip * in.layers;
    const double* grads = gate_grads.data() + clip * in.layers;
    for (int64_t layer = 0; layer < in.layers; ++layer) {
      double centred = 0;  // grads less their mean over the gates, as a sum of differences
      for (int64_t other = 0; other < in.layers; ++other) {
        centred += gates[other] * (grads[layer] - grads[other]);
      }
      const float grad = static_cast<float>(gates[layer] * centred);
      confidence_grads[clip * in.layers + layer] = grad;
      for (int64_t i = 0; i < in.width; ++i) {
        weight_grad[i] += grad * in.mean(clip, in.layers)[i] * in.mean(clip, layer)[i];
      }
    }
  }
  const int64_t tasks = in.batch * (in.layers + 1);
  for_each_share(share_count(tasks), tasks, [&](int64_t, int64_t first, int64_t last) {
    std::vector<float> values(in.width);
    for (int64_t task = first; task < last; ++task) {
      const int64_t clip = task / (in.layers + 1), layer = task % (in.layers + 1);
      const float* grads = confidence_grads.data() + clip * in.layers;
      for (int64_t i = 0; i < in.width; ++i) {
        float value = 0;
        if (layer < in.layers) {
          value = grads[layer] * in.mean(clip, in.layers)[i];
        } else {
          for (int64_t other = 0; other < in.layers; ++other) {
            value += grads[other] * in.mean(clip, other)[i];
          }
        }
        values[i] = value * in.gate_weight()[i] * in.share[clip];
      }
      add_share(layer < in.layers ? feature_grads[layer] : anchor_grad, clip * in.frames, in.keys[clip],
                values);
    }
  });
  return weight_grad;
}

}  // namespace

at::Tensor relu_attention(const at::Tensor& anchor, const at::Tensor& gate_weight,
                          const at::Tensor& gate_bias, const std::optional<at::Tensor>& lengths,
                          at::TensorList features) {
  const Inputs in(anchor, gate_weight, gate_bias, lengths, features);
  at::Tensor sum = empty_fp32(anchor.sizes());
  const int64_t tasks = in.batch * in.layers, shares = share_count(tasks);
  LayerSums sums(in, sum.data_ptr<float>(), shares);
  for_each_share(shares, tasks, [&](int64_t share, int64_t first, int64_t last) {
    Forward forward(in);
    for (int64_t task = first; task < last; ++task) {
      bool is_first;
      float* target = sums.of(share, task, is_first);
      forward.run(task / in.layers, task % in.layers, target, is_first);
    }
  });
  sums.add_heads();
  return sum.to(anchor.scalar_type());
}

std::vector<at::Tensor> relu_attention_bwd(const at::Tensor& grad, const at::Tensor& anchor,
                                           const at::Tensor& gate_weight, const at::Tensor& gate_bias,
                                           const std::optional<at::Tensor>& lengths,
                                           at::TensorList features) {
  const Inputs in(anchor, gate_weight, gate_bias, lengths, features);
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
    Backward backward(in, upstream);
    for (int64_t task = first; task < last; ++task) {
      bool is_first;
      float* target = sums.of(share, task, is_first);
      const int64_t layer = task % in.layers;
      gate_grads[task] = backward.run(task / in.layers, layer, target, is_first, feature_grads[layer]);
    }
  });
  sums.add_heads();
  Rows anchor_grad(query_sum);
  const std::vector<float> weight_grad = gate_backward(in, gate_grads, anchor_grad, feature_grads);
  grads[0] = query_sum.to(anchor.scalar_type());
  grads[1] = tensor_like(weight_grad.data(), gate_weight);
  return grads;
}

}  // namespace meft
