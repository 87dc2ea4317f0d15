// What ReLU attention's two directions share, and linear attention with them: inputs with the gates and the way
// back through those, keys, products with scores and keys, and sums over layers. A key is a frame, or the mean of `pool` neighbouring ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "active.h"
#include "common.h"
#include "gemm.h"

namespace meft {
namespace attention {

constexpr int64_t QUERIES = 128;  // at most, in a block
constexpr int64_t KEYS = 128;     // at most, in a tile
constexpr int64_t SOURCES = 32;   // at most, queries in a product without zeros: each has two rows

// Queries in a block. Each block reads all keys: where they are wide they come from the third-level cache,
// and larger blocks read them less often; else they stay in the second, as do a smaller block's scores.
inline int64_t block_of(int64_t frames, int64_t width) {
  return std::min(Panels(width).count > 1 ? QUERIES : QUERIES / 2, filled(frames));
}

// What forward and backward are given, with the gates.
struct Inputs {
  int64_t batch, frames, width, layers, pool;
  int64_t block;  // queries in a block but the last
  Rows anchor;
  std::vector<Rows> features;
  std::vector<int64_t> valid;  // [batch], valid frames
  std::vector<float> share;   // [batch], of a valid frame in a mean
  at::Tensor weight;          // (1, r)
  std::vector<float> means;   // [batch][layers + 1][r], the anchor's last
  std::vector<float> gates;   // [batch][layers]

  Inputs(const at::Tensor& given_anchor, const at::Tensor& gate_weight, const at::Tensor& gate_bias,
         const std::optional<at::Tensor>& lengths, at::TensorList given_features, int64_t given_pool)
      : batch(given_anchor.size(0)),
        frames(given_anchor.size(1)),
        width(given_anchor.size(2)),
        layers(static_cast<int64_t>(given_features.size())),
        // Of more frames than there are a key has no more: all that counts is its share of `pool`.
        pool(std::min(given_pool, std::max<int64_t>(given_anchor.size(1), 1))),
        anchor(given_anchor),
        valid(batch, frames),
        share(batch, 1.0f / static_cast<float>(frames)),
        weight(widened(gate_weight)),
        means(batch * (layers + 1) * width),
        gates(batch * layers) {
    TORCH_CHECK_VALUE(layers > 0, "features must hold at least one tensor, got none");
    TORCH_CHECK_VALUE(pool > 0, "pool must be a positive integer, got ", pool);
    check_shape(gate_weight, {1, width}, "gate_weight");
    check_shape(gate_bias, {1}, "gate_bias");
    for (const auto& feature : given_features) {
      check_shape(feature, given_anchor.sizes(), "every feature");
      features.emplace_back(feature);
    }
    block = block_of(frames, width);
    if (lengths.has_value()) {
      check_shape(*lengths, {batch}, "lengths");
      const at::Tensor given = lengths->to(at::kLong).contiguous();
      for (int64_t clip = 0; clip < batch; ++clip) {
        const int64_t length = given.const_data_ptr<int64_t>()[clip];
        valid[clip] = std::min(std::max<int64_t>(length, 0), frames);
        share[clip] = 1.0f / static_cast<float>(std::max<int64_t>(length, 1));
      }
    }
    compute_gates(widened(gate_bias).const_data_ptr<float>()[0]);
  }

  float* mean(int64_t clip, int64_t layer) { return means.data() + (clip * (layers + 1) + layer) * width; }
  const float* mean(int64_t clip, int64_t layer) const {
    return means.data() + (clip * (layers + 1) + layer) * width;
  }
  const float* gate_weight() const { return weight.const_data_ptr<float>(); }
  // What is added to row sums of scores whose weights are those of the formula over `pool`.
  float eps() const { return ATTENTION_EPS / static_cast<float>(pool); }

 private:
  void compute_gates(float bias) {
    const int64_t tasks = batch * (layers + 1);
    for_each_share(share_count(tasks), tasks, [&](int64_t, int64_t first, int64_t last) {
      std::vector<float> scratch(QUERIES * width), part(width);
      for (int64_t task = first; task < last; ++task) {
        const int64_t clip = task / (layers + 1), layer = task % (layers + 1);
        const Rows& rows = layer == layers ? anchor : features[layer];
        float* sums = mean(clip, layer);
        for (int64_t start = 0; start < valid[clip]; start += QUERIES) {
          const int64_t count = std::min(QUERIES, valid[clip] - start);
          std::fill(part.begin(), part.end(), 0.0f);
          add_column_sums(rows.read(clip * frames + start, count, scratch.data()), count, width, part.data());
          add(part.data(), width, sums);
        }
        for (int64_t i = 0; i < width; ++i) {
          sums[i] *= share[clip];
        }
      }
    });
    // In fp64: an error here is one of every frame's.
    std::vector<double> row(layers);
    for (int64_t clip = 0; clip < batch; ++clip) {
      double largest = -INFINITY, total = 0;
      for (int64_t layer = 0; layer < layers; ++layer) {
        row[layer] = bias;
        for (int64_t i = 0; i < width; ++i) {
          row[layer] += static_cast<double>(mean(clip, layers)[i]) * mean(clip, layer)[i] * gate_weight()[i];
        }
        largest = std::max(largest, row[layer]);
      }
      for (double& value : row) {
        total += value = std::exp(value - largest);
      }
      for (int64_t layer = 0; layer < layers; ++layer) {
        gates[clip * layers + layer] = static_cast<float>(row[layer] / total);
      }
    }
  }
};

// `count` rows as columns: their transpose (r, block) at distance `ld`, zeros in the columns beyond them.
inline void load_transposed(const float* rows, int64_t count, int64_t width, int64_t block, float* to,
                            int64_t ld) {
  transpose(count, width, rows, width, to, ld);
  for (int64_t i = 0; i < width && count < block; ++i) {
    std::fill(to + i * ld + count, to + i * ld + block, 0.0f);
  }
}

// The keys of one layer of one clip. Zero rows fill them up to whole vectors: a zero key scores zero and
// attends to nothing. Scores are weighed by the frames of their key over `pool`, which only the last can have
// fewer of.
class Keys {
 public:
  const Panels panels;
  const int64_t pool;
  const int64_t height;  // rows of a panel

  explicit Keys(const Inputs& in)
      : panels(in.width), pool(in.pool), height(filled((in.frames + in.pool - 1) / in.pool)) {
    if (!in.anchor.is_fp32() || pool > 1) {
      widened_ = empty_fp32({height, in.width});
    }
    if (!in.anchor.is_fp32() && pool > 1) {
      frames_ = empty_fp32({pool, in.width});
    }
  }

  void load(const Rows& features, int64_t begin, int64_t valid) {
    valid_ = (valid + pool - 1) / pool;
    last_size_ = valid - (valid_ - 1) * pool;
    float* widened = widened_.defined() ? widened_.data_ptr<float>() : nullptr;
    rows_ = pool == 1 ? features.read(begin, valid, widened) : widened;
    for (int64_t key = 0; key < valid_ && pool > 1; ++key) {
      float* scratch = frames_.defined() ? frames_.data_ptr<float>() : nullptr;
      const float* frames = features.read(begin + key * pool, size_of(key), scratch);
      float* mean = widened + key * panels.width;
      std::fill_n(mean, panels.width, 0.0f);
      add_column_sums(frames, size_of(key), panels.width, mean);
      scale_row(mean, panels.width, 1.0f / static_cast<float>(size_of(key)));
    }
    has_panels_ = has_transposed_ = false;
  }

  // Valid frames of a key.
  int64_t size_of(int64_t key) const { return key == valid_ - 1 ? last_size_ : pool; }

  // The last key's row of `tile`, if that is the one from `start` on which it is in, times the key's weight.
  void weigh(int64_t start, int64_t columns, int64_t ld, float* tile) const {
    const int64_t last = valid_ - 1 - start;
    if (last_size_ < pool && last >= 0 && last < KEYS) {
      scale_row(tile + last * ld, columns, static_cast<float>(last_size_) / static_cast<float>(pool));
    }
  }

  int64_t count() const { return filled(valid_); }
  // Keys in the tile from `start` on.
  int64_t size(int64_t start) const { return std::min(KEYS, count() - start); }

  // scores (tile, columns) = F B for the tile from `start` on, the first `weighed` columns times the keys'
  // weights; `b` is (r, columns)
  void score(int64_t start, const float* b, int64_t columns, float* scores, int64_t weighed) const {
    const int64_t present = std::min(KEYS, valid_ - start), width = panels.width;
    gemm(present, columns, width, rows_ + start * width, width, b, columns, scores, columns);
    std::fill(scores + present * columns, scores + size(start) * columns, 0.0f);
    weigh(start, weighed, columns, scores);
  }

  // Rows from `start` on of a panel; the panels stand one after another.
  const float* panel(int64_t index, int64_t start) {
    if (!has_panels_) {
      resize(packed_, panels.padded());
      panels.pack(rows_, valid_, packed_.data_ptr<float>(), height, 0);
      panels.clear(packed_.data_ptr<float>(), height, valid_, count() - valid_);
      has_panels_ = true;
    }
    return packed_.const_data_ptr<float>() + (index * height + start) * panels.columns;
  }

  // The transpose (r, tile) of the tile from `start` on.
  const float* transposed(int64_t start) {
    const int64_t width = panels.width;
    if (!has_transposed_) {
      resize(transposed_, width);
      for (int64_t first = 0; first < count(); first += KEYS) {
        load_transposed(rows_ + first * width, std::min(KEYS, valid_ - first), width, size(first),
                        transposed_.data_ptr<float>() + first * width, size(first));
      }
      has_transposed_ = true;
    }
    return transposed_.const_data_ptr<float>() + start * width;
  }

 private:
  static void scale_row(float* row, int64_t width, float factor) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      row[i] *= factor;
    }
  }

  void resize(at::Tensor& tensor, int64_t columns) const {
    if (!tensor.defined()) {
      tensor = empty_fp32({height, columns});
    }
  }

  int64_t valid_ = 0, last_size_ = 0;
  const float* rows_ = nullptr;  // (valid, r)
  at::Tensor widened_, frames_, packed_, transposed_;
  bool has_panels_ = false, has_transposed_ = false;
};

// What a block of queries attends to, out (block, r) = scores^T (block, K) F in panels, tile by tile of keys:
// out^T += F^T scores if the scores are dense, else out += scores^T F without zeros.
class KeySums {
 public:
  KeySums(Keys& keys, int64_t block)
      : keys_(keys),
        out_(empty_fp32({block * keys.panels.padded()})),
        across_(empty_fp32({keys.panels.padded(), block})),
        turned_(empty_fp32({block, TILE})),
        active_(block) {}

  void begin(int64_t block, bool is_sparse) {
    block_ = block;
    is_sparse_ = is_sparse;
    at::Tensor& sums = is_sparse ? out_ : across_;
    std::fill_n(sums.data_ptr<float>(), block * keys_.panels.padded(), 0.0f);
  }

  // `scores` (tile, block), at distance `ld`, of the tile of keys from `start` on
  void add(const float* scores, int64_t ld, int64_t start) {
    const int64_t tile = keys_.size(start), width = keys_.panels.width;
    if (!is_sparse_) {
      gemm(width, block_, tile, keys_.transposed(start), tile, scores, ld, across_.data_ptr<float>(), block_,
           true);
      return;
    }
    for (int64_t first = 0; first < tile; first += TILE) {
      add_active_tile(scores + first * ld, ld, start + first, std::min(TILE, tile - first));
    }
  }

  void end() {
    const Panels& panels = keys_.panels;
    for (int64_t panel = 0; panel < panels.count && !is_sparse_; ++panel) {
      const float* from = across_.const_data_ptr<float>() + panel * panels.columns * block_;
      transpose(panels.present(panel), block_, from, block_, rows(panel), panels.columns);
    }
  }

  float* rows(int64_t panel) { return out_.data_ptr<float>() + panel * block_ * keys_.panels.columns; }

 private:
  void add_active_tile(const float* scores, int64_t ld, int64_t start, int64_t tile) {
    float* turned = turned_.data_ptr<float>();
    transpose(tile, block_, scores, ld, turned, tile);
    for (int64_t row = 0; row < block_; ++row) {
      active_[row] = active_bits(turned + row * tile, tile);
    }
    const int64_t count = keys_.panels.count, columns = keys_.panels.columns;
    for (int64_t panel = 0; panel < count; ++panel) {
      const float* next = panel + 1 < count ? keys_.panel(panel + 1, start) : keys_.panel(0, start + tile);
      add_active<1>({turned, tile, 0, active_.data()}, block_, keys_.panel(panel, start), 0, columns,
                    rows(panel), next);
    }
  }

  Keys& keys_;
  int64_t block_ = 0;  // queries of the block at hand, filled up
  bool is_sparse_ = false;
  at::Tensor out_, across_, turned_;
  std::vector<uint64_t> active_;  // [block]
};

// The sum over layers of (T, r) in fp32, for every clip. Layers are worked through in order; a share that
// begins in the middle of a clip gathers that clip's part apart, and the parts are added in the end.
class LayerSums {
 public:
  LayerSums(const Inputs& in, float* sums, int64_t shares)
      : in_(in), size_(in.frames * in.width), shares_(shares), sums_(sums) {
    for (int64_t share = 0; share < shares; ++share) {
      const bool split = first_task(share) % in.layers != 0;
      heads_.push_back(split ? empty_fp32({size_}) : at::Tensor());
    }
  }

  // Where a share adds up a clip, and whether it is the first to write there.
  float* of(int64_t share, int64_t task, bool& is_first) const {
    const int64_t clip = task / in_.layers, start = first_task(share);
    is_first = task == start || task % in_.layers == 0;
    const bool apart = heads_[share].defined() && clip == start / in_.layers;
    return apart ? heads_[share].data_ptr<float>() : sums_ + clip * size_;
  }

  void add_heads() {
    for (int64_t share = 0; share < shares_; ++share) {
      if (heads_[share].defined()) {
        float* sums = sums_ + first_task(share) / in_.layers * size_;
        const float* head = heads_[share].const_data_ptr<float>();
        at::parallel_for(0, in_.frames, 256, [&](int64_t begin, int64_t end) {
          add(head + begin * in_.width, (end - begin) * in_.width, sums + begin * in_.width);
        });
      }
    }
  }

 private:
  int64_t first_task(int64_t share) const { return share * in_.batch * in_.layers / shares_; }

  const Inputs& in_;
  int64_t size_, shares_;
  float* sums_;
  std::vector<at::Tensor> heads_;
};

// rows of the clip's valid frames += share * values (r)
inline void add_share(Rows& rows, int64_t begin, int64_t valid, const std::vector<float>& values) {
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
inline std::vector<float> gate_backward(const Inputs& in, const std::vector<double>& gate_grads,
                                        Rows& anchor_grad, std::vector<Rows>& feature_grads) {
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
      add_share(layer < in.layers ? feature_grads[layer] : anchor_grad, clip * in.frames, in.valid[clip],
                values);
    }
  });
  return weight_grad;
}

}  // namespace attention
}  // namespace meft
