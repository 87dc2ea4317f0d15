// UniPT's ReLU attention from the anchor to every layer's features; the formulas are those of
// reference/relu_attention.py.
//
// A piece of work is one layer of one clip, so that the gradient of its features is gathered by one thread.
// Blocks of b queries Q pass over its keys F (K, r). Scores are held with the keys down and the queries
// across: a query is a vector lane, and row sums are plain vector sums. Nothing is rescaled, as a softmax
// would need: sums of ReLU scores just add up.
//
//     forward, tile by tile of keys:   P = relu(F Q^T) (keys, b);   R += sum of P;   O += P^T F
//     backward, all tiles:             [S | E] = F [Q^T | dM^T] (keys, 2 b);   R, delta from their sums
//               all tiles, in place:   [S | E] to [k relu(S) | X];   dQ += X^T F;   dF += [k S | X] [dM; Q]
//
// Two products forward and five backward, the least there is without keeping scores; a block's scores
// (K, 2 b) stay in the second-level cache. Memory beyond inputs and outputs is a few (T, r) per thread.
//
// Dense products run at the rate of the CPU's multiply-adds, so what is left to save are products with zeros:
// P and X are zero where S <= 0. The four products with them leave zeros out (active.h) for blocks of queries
// where a quarter of the scores or more are zero; else they are dense products too.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention.h"
#include "common.h"
#include "frames.h"
#include "gemm.h"
#include "kernels.h"

namespace meft {
namespace {

using namespace attention;

// target (+)= values
void add_to(float* target, const float* values, int64_t count, bool is_first) {
  if (is_first) {
    std::copy_n(values, count, target);
    return;
  }
  add(values, count, target);
}

float share_of(int64_t count, int64_t all) {
  return static_cast<float>(count) / static_cast<float>(std::max<int64_t>(all, 1));
}

Vec relu(const Vec& x) {
  return at::vec::maximum(x, Vec(0.0f));  // hands on NaN
}

// A sum over keys in four parts: long sums of fp32 lose digits, and wait for each other.
struct FourSums {
  Vec parts[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};

  void add_to(float* total) const {
    (Vec::loadu(total) + ((parts[0] + parts[1]) + (parts[2] + parts[3]))).store(total);
  }
};

// The largest over keys, likewise.
struct FourMaxima {
  Vec parts[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};

  void raise(float* largest) const {
    using at::vec::maximum;
    maximum(Vec::loadu(largest), maximum(maximum(parts[0], parts[1]), maximum(parts[2], parts[3])))
        .store(largest);
  }
};

// --- forward ----------------------------------------------------------------------------------------------

class Forward {
 public:
  explicit Forward(const Inputs& in)
      : in_(in),
        keys_(in),
        key_sums_(keys_, in.block),
        queries_(empty_fp32({filled(in.frames) * in.width})),
        scratch_(empty_fp32({in.block * (in.width + 1 + KEYS)})) {
    rows_ = scratch_.data_ptr<float>();
    row_sums_ = rows_ + in.block * in.width;
    scores_ = row_sums_ + in.block;
  }

  // sum (T, r) (+)= gate * (attention to one layer + its features)
  void run(int64_t clip, int64_t layer, float* sum, bool is_first) {
    const int64_t begin = clip * in_.frames, width = in_.width;
    const float gate = in_.gates[clip * in_.layers + layer];
    keys_.load(in_.features[layer], begin, in_.valid[clip]);
    is_first_block_ = true;
    for (int64_t start = 0; start < in_.frames; start += in_.block) {
      const int64_t count = std::min(in_.block, in_.frames - start);
      block_ = filled(count);
      query_ = queries_.data_ptr<float>() + start * width;
      if (clip != clip_) {  // else they are there from another layer
        load_transposed(in_.anchor.read(begin + start, count, rows_), count, width, block_, query_, block_);
      }
      attend(gate);
      const float* features = in_.features[layer].read(begin + start, count, rows_);
      add_layer(count, gate, features, sum + start * width, is_first);
    }
    clip_ = clip;
  }

 private:
  // key_sums (block, r) = relu(F Q^T)^T F; row_sums = gate / row sums
  void attend(float gate) {
    const int64_t block = block_;
    int64_t active = 0;
    std::fill_n(row_sums_, block, 0.0f);
    key_sums_.begin(block, is_sparse_);
    for (int64_t start = 0; start < keys_.count(); start += KEYS) {
      keys_.score(start, query_, block, scores_, block);
      for (int64_t lane = 0; lane < block; lane += W) {
        FourSums sums;
        float* column = scores_ + lane;
        for (int64_t key = 0; key < keys_.size(start); key += 4) {
          for (Vec& part : sums.parts) {
            const Vec score = relu(Vec::loadu(column));
            score.store(column);
            part = part + score;
            column += block;
          }
          active += count_active(Vec::loadu(column - block));
        }
        sums.add_to(row_sums_ + lane);
      }
      // A block's scores are about as dense as the last one's, the first one's as its first tile's.
      if (is_first_block_) {
        decide(active, keys_.size(0));
        key_sums_.begin(block, is_sparse_);
      }
      key_sums_.add(scores_, block, start);
    }
    key_sums_.end();
    decide(active, keys_.count());
    for (int64_t lane = 0; lane < block; lane += W) {
      (Vec(gate) / (Vec::loadu(row_sums_ + lane) + Vec(in_.eps()))).store(row_sums_ + lane);
    }
  }

  // By how many scores are `active` among a quarter of those for `count` keys.
  void decide(int64_t active, int64_t count) {
    is_sparse_ = is_sparse(4 * share_of(active, block_ * count), keys_.panels);
    is_first_block_ = false;
  }

  void add_layer(int64_t count, float gate, const float* features, float* sum, bool is_first) {
    const Panels& panels = keys_.panels;
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t first = panel * panels.columns, present = panels.present(panel);
      for (int64_t row = 0; row < count; ++row) {
        const float* attended = key_sums_.rows(panel) + row * panels.columns;
        const float* feature = features + row * in_.width + first;
        float* target = sum + row * in_.width + first;
        const float factor = row_sums_[row];
        if (is_first) {
#pragma omp simd
          for (int64_t i = 0; i < present; ++i) {
            target[i] = factor * attended[i] + gate * feature[i];
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < present; ++i) {
            target[i] += factor * attended[i] + gate * feature[i];
          }
        }
      }
    }
  }

  const Inputs& in_;
  int64_t clip_ = -1;  // whose queries are at hand
  int64_t block_ = 0;  // queries of the block at hand, filled up
  bool is_sparse_ = false, is_first_block_ = true;
  Keys keys_;
  KeySums key_sums_;
  at::Tensor queries_, scratch_;
  float *query_, *rows_, *row_sums_, *scores_;
};

// --- backward ---------------------------------------------------------------------------------------------

class Backward {
 public:
  Backward(const Inputs& in, const Rows& grad)
      : in_(in),
        grad_(grad),
        keys_(in),
        panels_(keys_.panels),
        key_sums_(keys_, in.block),
        key_grad_(empty_fp32({keys_.height, panels_.padded()})),
        scores_(empty_fp32({keys_.height, 2 * in.block})),
        queries_(empty_fp32({2 * filled(in.frames) * (in.width + panels_.padded())})),
        scratch_(empty_fp32({in.block * (3 * in.width + 3)})) {
    rows_ = scratch_.data_ptr<float>();
    written_ = rows_ + 2 * in.block * in.width;
    factors_ = written_ + in.block * in.width;
    largest_ = factors_ + 2 * in.block;
  }

  // query_sum (T, r) (+)= the gradient of the queries through one layer; the clip's rows of feature_grad =
  // the gradient of the layer's features but for the means' part. Returns the gate's gradient.
  double run(int64_t clip, int64_t layer, float* query_sum, bool is_first, Rows& feature_grad) {
    const int64_t begin = clip * in_.frames, width = in_.width, valid = in_.valid[clip];
    const float gate = in_.gates[clip * in_.layers + layer];
    double gate_grad = 0;
    keys_.load(in_.features[layer], begin, valid);
    key_grad_.zero_();
    for (int64_t start = 0; start < in_.frames; start += in_.block) {
      const int64_t count = std::min(in_.block, in_.frames - start);
      block_ = filled(count);
      across_ = queries_.data_ptr<float>() + 2 * start * width;
      down_ = queries_.data_ptr<float>() + 2 * filled(in_.frames) * width + 2 * start * panels_.padded();
      if (clip != clip_) {  // else they are there from another layer
        load(begin + start, count);
      }
      gate_grad += score(gate);
      weigh();
      add_query_grad(count, query_sum + start * width, is_first);
    }
    clip_ = clip;
    for (int64_t start = 0; start < in_.frames; start += in_.block) {
      const int64_t count = std::min(in_.block, in_.frames - start);
      const float* upstream = grad_.read(begin + start, count, rows_);
      const float* features = in_.features[layer].read(begin + start, count, rows_ + in_.block * width);
      for (int64_t row = 0; row < count; ++row) {
        gate_grad += dot(upstream + row * width, features + row * width, width);
      }
      float* target = feature_grad.write(begin + start, written_);
      finish_key_grad(start, count, valid, gate, upstream, target);
      feature_grad.store(begin + start, count, target);
    }
    return gate_grad;
  }

 private:
  // across (r, 2 block) = [Q^T | dM^T], down (2 block, r) = [dM; Q] in panels
  void load(int64_t begin, int64_t count) {
    const int64_t block = block_, width = in_.width;
    const float* query = in_.anchor.read(begin, count, rows_);
    const float* upstream = grad_.read(begin, count, rows_ + block * width);
    load_transposed(query, count, width, block, across_, 2 * block);
    load_transposed(upstream, count, width, block, across_ + block, 2 * block);
    panels_.pack(upstream, count, down_, 2 * block, 0);
    panels_.clear(down_, 2 * block, count, block - count);
    panels_.pack(query, count, down_, 2 * block, block);
    panels_.clear(down_, 2 * block, block + count, block - count);
  }

  // scores (keys, 2 block) = [S | E], and of their sums over keys [k | delta] in `factors_`; where one key has
  // most of the weight (see `center`) E less delta, and what is left of delta. Returns the sum of delta.
  double score(float gate) {
    const int64_t block = block_;
    float *row_sums = factors_, *products = factors_ + block;
    int64_t active = 0;
    std::fill_n(factors_, 2 * block, 0.0f);
    std::fill_n(largest_, block, 0.0f);
    for (int64_t start = 0; start < keys_.count(); start += KEYS) {
      float* scores = scores_.data_ptr<float>() + start * 2 * block;
      keys_.score(start, across_, 2 * block, scores, block);
      for (int64_t lane = 0; lane < block; lane += W) {
        FourSums sums, score_products;
        FourMaxima maxima;
        const float* column = scores + lane;
        for (int64_t key = 0; key < keys_.size(start); key += 4) {
          for (int64_t part = 0; part < 4; ++part, column += 2 * block) {
            const Vec score = relu(Vec::loadu(column)), grad = Vec::loadu(column + block);
            sums.parts[part] = sums.parts[part] + score;
            score_products.parts[part] = at::vec::fmadd(score, grad, score_products.parts[part]);
            maxima.parts[part] = at::vec::maximum(score, maxima.parts[part]);
            active += part == 0 ? count_active(score) : 0;
          }
        }
        sums.add_to(row_sums + lane);
        score_products.add_to(products + lane);
        maxima.raise(largest_ + lane);
      }
    }
    // One key in four is counted.
    is_sparse_ = is_sparse(4 * share_of(active, block * keys_.count()), panels_);
    double sum = 0;
    for (int64_t lane = 0; lane < block; lane += W) {
      const Vec row_sum = Vec::loadu(row_sums + lane) + Vec(in_.eps());
      const Vec delta = Vec::loadu(products + lane) / row_sum;
      row_sum.store(row_sums + lane);
      delta.store(products + lane);
      sum = std::accumulate(products + lane, products + lane + W, sum);
      int64_t heavy = 0;  // queries of which one key has more than half the weight
      for (int64_t i = lane; i < lane + W; ++i) {
        heavy += 2 * largest_[i] > row_sums[i];
      }
      if (heavy > 0) {
        center(lane, delta, row_sum).store(products + lane);
      }
      (Vec(gate) / row_sum).store(row_sums + lane);
    }
    return sum;
  }

  // E - delta cancels for a key that has nearly all of a query's weight, to a share of E in which delta's own
  // rounding shows, and is then divided by what may be a small row sum. So E becomes E - delta, and what is
  // returned is the rest of delta: (rowsum(relu(S) * (E - delta)) - eps * delta) / R.
  Vec center(int64_t lane, const Vec& delta, const Vec& row_sum) {
    const int64_t ld = 2 * block_;
    float* column = scores_.data_ptr<float>() + lane;
    Vec rest = delta * Vec(-in_.eps());
    for (int64_t key = 0; key < keys_.count(); ++key, column += ld) {
      const Vec flow = Vec::loadu(column + block_) - delta;
      flow.store(column + block_);
      rest = at::vec::fmadd(relu(Vec::loadu(column)), flow, rest);
    }
    return rest / row_sum;
  }

  // The gradients through a block's scores: key_sums (block, r) = the queries', key_grad (keys, r) +=.
  void weigh() {
    const int64_t block = block_;
    key_sums_.begin(block, is_sparse_);
    for (int64_t start = 0; start < keys_.count(); start += KEYS) {
      const int64_t tile = keys_.size(start);
      float* scores = scores_.data_ptr<float>() + start * 2 * block;
      for (int64_t lane = 0; lane < block; lane += W) {
        const Vec factor = Vec::loadu(factors_ + lane), delta = Vec::loadu(factors_ + block + lane);
        float* column = scores + lane;
        for (int64_t key = 0; key < tile; ++key, column += 2 * block) {
          const Vec score = relu(Vec::loadu(column)), flow = Vec::loadu(column + block) - delta;
          (factor * score).store(column);
          (flow * (factor * score.gt(Vec(0.0f)))).store(column + block);
        }
      }
      keys_.weigh(start, block, 2 * block, scores + block);
      key_sums_.add(scores + block, 2 * block, start);
      add_key_grad(start, tile, scores);
    }
    key_sums_.end();
  }

  // key_grad (tile, r) += [k S | X] (tile, 2 block) [dM; Q], a panel at a time
  void add_key_grad(int64_t start, int64_t tile, const float* scores) {
    const int64_t block = block_, columns = panels_.columns;
    uint64_t active[QUERIES / SOURCES][KEYS];
    for (int64_t first = 0; first < block && is_sparse_; first += SOURCES) {
      const int64_t sources = std::min(SOURCES, block - first);
      for (int64_t key = 0; key < tile; ++key) {
        const float* row = scores + key * 2 * block + first;
        active[first / SOURCES][key] = active_bits(row, sources) | active_bits(row + block, sources);
      }
    }
    for (int64_t panel = 0; panel < panels_.count; ++panel) {
      const float* down = down_ + panel * 2 * block * columns;
      float* out = key_grad_.data_ptr<float>() + (panel * keys_.height + start) * columns;
      if (!is_sparse_) {
        gemm(tile, columns, 2 * block, scores, 2 * block, down, columns, out, columns, true);
        continue;
      }
      for (int64_t first = 0; first < block; first += SOURCES) {
        add_active<2>({scores + first, 2 * block, block, active[first / SOURCES]}, tile,
                      down + first * columns, block * columns, columns, out);
      }
    }
  }

  void add_query_grad(int64_t count, float* query_sum, bool is_first) {
    for (int64_t panel = 0; panel < panels_.count; ++panel) {
      for (int64_t row = 0; row < count; ++row) {
        add_to(query_sum + row * in_.width + panel * panels_.columns,
               key_sums_.rows(panel) + row * panels_.columns, panels_.present(panel), is_first);
      }
    }
  }

  // target (count, r) = key_grad over its frames, none beyond the valid ones, + gate * upstream
  void finish_key_grad(int64_t start, int64_t count, int64_t valid, float gate, const float* upstream,
                       float* target) const {
    const float* key_grad = key_grad_.const_data_ptr<float>();
    for (int64_t panel = 0; panel < panels_.count; ++panel) {
      const int64_t columns = panels_.columns, present = panels_.present(panel);
      for (int64_t row = 0; row < count; ++row) {
        const int64_t at = row * in_.width + panel * columns;
        const int64_t key = (start + row) / keys_.pool;
        const float* gathered = key_grad + (panel * keys_.height + key) * columns;
        const float share = start + row < valid ? 1.0f / static_cast<float>(keys_.size_of(key)) : 0.0f;
#pragma omp simd
        for (int64_t i = 0; i < present; ++i) {
          target[at + i] = (share == 0 ? 0 : share * gathered[i]) + gate * upstream[at + i];
        }
      }
    }
  }

  const Inputs& in_;
  int64_t clip_ = -1;       // whose queries and their gradients are at hand
  int64_t block_ = 0;       // queries of the block at hand, filled up
  bool is_sparse_ = false;  // its scores
  const Rows& grad_;
  Keys keys_;
  const Panels& panels_;
  KeySums key_sums_;
  at::Tensor key_grad_, scores_, queries_, scratch_;
  float *across_, *rows_, *down_, *written_, *factors_, *largest_;
};

}  // namespace

at::Tensor relu_attention(const at::Tensor& anchor, const at::Tensor& gate_weight,
                          const at::Tensor& gate_bias, const std::optional<at::Tensor>& lengths,
                          at::TensorList features) {
  return relu_attention_pooled(anchor, gate_weight, gate_bias, lengths, features, 1);
}

std::vector<at::Tensor> relu_attention_bwd(const at::Tensor& grad, const at::Tensor& anchor,
                                           const at::Tensor& gate_weight, const at::Tensor& gate_bias,
                                           const std::optional<at::Tensor>& lengths,
                                           at::TensorList features) {
  return relu_attention_pooled_bwd(grad, anchor, gate_weight, gate_bias, lengths, features, 1);
}

at::Tensor relu_attention_pooled(const at::Tensor& anchor, const at::Tensor& gate_weight,
                                 const at::Tensor& gate_bias, const std::optional<at::Tensor>& lengths,
                                 at::TensorList features, int64_t pool) {
  const Inputs in(anchor, gate_weight, gate_bias, lengths, features, pool);
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

std::vector<at::Tensor> relu_attention_pooled_bwd(const at::Tensor& grad, const at::Tensor& anchor,
                                                  const at::Tensor& gate_weight, const at::Tensor& gate_bias,
                                                  const std::optional<at::Tensor>& lengths,
                                                  at::TensorList features, int64_t pool) {
  const Inputs in(anchor, gate_weight, gate_bias, lengths, features, pool);
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
