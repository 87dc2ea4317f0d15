// What ReLU attention's two directions share: its inputs with the gates, packed keys, and sums over layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "common.h"
#include "gemm.h"

namespace meft {
namespace attention {

constexpr int64_t LANES = 16;    // queries and keys are filled up to multiples: of W at every capability
constexpr int64_t QUERIES = 64;  // at most, in a block
constexpr int64_t KEYS = 128;    // at most, in a tile

inline int64_t filled(int64_t count) {
  return (count + LANES - 1) / LANES * LANES;
}

// What forward and backward are given, with the gates.
struct Inputs {
  int64_t batch, frames, width, layers;
  int64_t block;  // queries in a block but the last
  Rows anchor;
  std::vector<Rows> features;
  std::vector<int64_t> keys;  // [batch], valid frames
  std::vector<float> share;   // [batch], of a valid frame in a mean
  at::Tensor weight;          // (1, r)
  std::vector<float> means;   // [batch][layers + 1][r], the anchor's last
  std::vector<float> gates;   // [batch][layers]

  Inputs(const at::Tensor& given_anchor, const at::Tensor& gate_weight, const at::Tensor& gate_bias,
         const std::optional<at::Tensor>& lengths, at::TensorList given_features)
      : batch(given_anchor.size(0)),
        frames(given_anchor.size(1)),
        width(given_anchor.size(2)),
        layers(static_cast<int64_t>(given_features.size())),
        anchor(given_anchor),
        keys(batch, frames),
        share(batch, 1.0f / static_cast<float>(frames)),
        weight(widened(gate_weight)),
        means(batch * (layers + 1) * width),
        gates(batch * layers) {
    TORCH_CHECK_VALUE(layers > 0, "features must hold at least one tensor, got none");
    check_shape(gate_weight, {1, width}, "gate_weight");
    check_shape(gate_bias, {1}, "gate_bias");
    for (const auto& feature : given_features) {
      check_shape(feature, given_anchor.sizes(), "every feature");
      features.emplace_back(feature);
    }
    block = std::min(QUERIES, filled(frames));
    if (lengths.has_value()) {
      check_shape(*lengths, {batch}, "lengths");
      const at::Tensor given = lengths->to(at::kLong).contiguous();
      for (int64_t clip = 0; clip < batch; ++clip) {
        const int64_t length = given.const_data_ptr<int64_t>()[clip];
        keys[clip] = std::min(std::max<int64_t>(length, 0), frames);
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

 private:
  void compute_gates(float bias) {
    const int64_t tasks = batch * (layers + 1);
    for_each_share(share_count(tasks), tasks, [&](int64_t, int64_t first, int64_t last) {
      std::vector<float> scratch(QUERIES * width), part(width);
      for (int64_t task = first; task < last; ++task) {
        const int64_t clip = task / (layers + 1), layer = task % (layers + 1);
        const Rows& rows = layer == layers ? anchor : features[layer];
        float* sums = mean(clip, layer);
        for (int64_t start = 0; start < keys[clip]; start += QUERIES) {
          const int64_t count = std::min(QUERIES, keys[clip] - start);
          std::fill(part.begin(), part.end(), 0.0f);
          add_column_sums(rows.read(clip * frames + start, count, scratch.data()), count, width, part.data());
          add(part.data(), width, sums);
        }
        for (int64_t i = 0; i < width; ++i) {
          sums[i] *= share[clip];
        }
      }
    });
    for (int64_t clip = 0; clip < batch; ++clip) {
      float *row = gates.data() + clip * layers, largest = -INFINITY, total = 0;
      for (int64_t layer = 0; layer < layers; ++layer) {
        float confidence = bias;
        for (int64_t i = 0; i < width; ++i) {
          confidence += mean(clip, layers)[i] * mean(clip, layer)[i] * gate_weight()[i];
        }
        row[layer] = confidence;
        largest = std::max(largest, confidence);
      }
      for (int64_t layer = 0; layer < layers; ++layer) {
        total += row[layer] = std::exp(row[layer] - largest);
      }
      for (int64_t layer = 0; layer < layers; ++layer) {
        row[layer] /= total;
      }
    }
  }
};

// The keys of one layer of one clip: rows (K, r), and tile by tile their transposes.
struct Keys {
  int64_t count = 0, width;  // count: filled up
  at::Tensor rows_, transposed_;

  Keys(int64_t frames, int64_t width)
      : width(width),
        rows_(empty_fp32({filled(frames), width})),
        transposed_(empty_fp32({filled(frames), width})) {}

  void pack(const Rows& features, int64_t begin, int64_t valid) {
    count = filled(valid);
    float* all = rows_.data_ptr<float>();
    const float* from = features.read(begin, valid, all);
    if (from != all) {
      std::copy_n(from, valid * width, all);
    }
    std::fill_n(all + valid * width, (count - valid) * width, 0.0f);
    for (int64_t start = 0; start < count; start += KEYS) {
      const int64_t tile = size(start);
      transpose(tile, width, rows(start), width, transposed_.data_ptr<float>() + start * width, tile);
    }
  }

  // Keys in the tile from `start` on.
  int64_t size(int64_t start) const { return std::min(KEYS, count - start); }
  const float* rows(int64_t start) const { return rows_.data_ptr<float>() + start * width; }
  const float* transposed(int64_t start) const { return transposed_.data_ptr<float>() + start * width; }
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

}  // namespace attention
}  // namespace meft
