// The backward of softmax attention, out = softmax(scale Q K^T) V of each clip and head, given what PyTorch's
// own forward returns beside it: the logarithm of every query's sum of exponentials.
//
//     P = exp(scale Q K^T - logsumexp);   dV = P^T dO;   delta = rows' sums of dO * out
//     dS = P * (dO V^T - delta);          dQ = scale dS K;   dK = scale dS^T Q
//
// A piece of work is one head of one clip, so that no gradient is shared between threads. Its keys and values
// are packed once, those that the mask leaves out not at all: they cost nothing and get zeros. Then blocks of
// b queries pass over them, tile by tile of keys:
//
//     [P | dS] (keys, b) from K Q^T and V dO^T, keys down, a query being a vector lane
//     dV += P dO;   dK += dS Q;   dQ^T (d, b) += K^T dS
//
// Five products, the least there is without keeping scores; a tile's scores stay in the second-level cache.
// Memory beyond inputs and outputs is five (T, d) per thread.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common.h"
#include "gemm.h"
#include "kernels.h"

namespace meft {
namespace {

// Queries and keys are filled up to multiples: whole vectors at every level, and few sizes of products.
constexpr int64_t LANES = 16;
constexpr int64_t QUERIES = 128;  // at most, in a block
constexpr int64_t KEYS = 256;     // at most, in a tile
constexpr float LOG2_E = 1.44269504f;

int64_t filled(int64_t count) {
  return (count + LANES - 1) / LANES * LANES;
}

// 2^x for x <= 0, to about one rounding; 0 from -127 on. Loops over it vectorise: no branch, no call.
inline float exp2_of_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x < -127.0f ? -127.0f : x;         // whose bits come out as those of zero
  const float shifted = x + kRound;
  const float rest = x - (shifted - kRound);
  // 2^rest, |rest| <= 1/2, by the polynomial of degree 6 that is nearest to it, to 2e-9 of it
  float series = 1.534581201e-4f;
  series = series * rest + 1.339993122e-3f;
  series = series * rest + 9.618488957e-3f;
  series = series * rest + 5.550328777e-2f;
  series = series * rest + 2.402264689e-1f;
  series = series * rest + 6.931472057e-1f;
  series = series * rest + 1.0f;
  uint32_t bits, exponent;
  std::memcpy(&bits, &series, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;
  std::memcpy(&series, &bits, sizeof(bits));
  return series;
}

// One (B, H, T, d) tensor of fp32 whose rows are contiguous.
class Heads {
 public:
  explicit Heads(const at::Tensor& tensor)
      : tensor_(tensor.size(3) == 1 || tensor.stride(3) == 1 ? tensor : tensor.contiguous()),
        data_(tensor_.data_ptr<float>()) {}

  float* row(int64_t clip, int64_t head, int64_t frame) const {
    return data_ + clip * tensor_.stride(0) + head * tensor_.stride(1) + frame * tensor_.stride(2);
  }

 private:
  at::Tensor tensor_;
  float* data_;
};

// (B, T, H, d) in memory, as the linear layers around the attention have it, seen as (B, H, T, d).
at::Tensor empty_like_heads(const at::Tensor& tensor) {
  return empty_fp32({tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)}).transpose(1, 2);
}

struct Inputs {
  int64_t clips, heads, queries, keys, width;
  float scale;
  Heads grad, query, key, value, out;
  at::Tensor logsumexp;                    // (B, H, T)
  std::vector<std::vector<int64_t>> kept;  // of each clip the keys that are looked at
};

class Backward {
 public:
  explicit Backward(const Inputs& in, int64_t most_kept)
      : in_(in),
        block_size_(std::min(QUERIES, filled(in.queries))),
        keys_(filled(most_kept) * in.width),
        values_(filled(most_kept) * in.width),
        transposed_(filled(most_kept) * in.width),
        key_grad_(filled(most_kept) * in.width),
        value_grad_(filled(most_kept) * in.width),
        query_(block_size_ * in.width),
        query_across_(block_size_ * in.width),
        grad_(block_size_ * in.width),
        grad_across_(block_size_ * in.width),
        query_grad_(block_size_ * in.width),
        logsumexp_(block_size_),
        delta_(block_size_),
        weights_(KEYS * block_size_),
        flows_(KEYS * block_size_) {}

  void run(int64_t clip, int64_t head, const Heads& query_grad, const Heads& key_grad,
           const Heads& value_grad) {
    const int64_t width = in_.width;
    const auto& kept = in_.kept[clip];
    pack(clip, head);
    for (int64_t start = 0; start < in_.queries; start += QUERIES) {
      const int64_t count = std::min(QUERIES, in_.queries - start);
      load(clip, head, start, count);
      for (int64_t tile = 0; tile < padded_; tile += KEYS) {
        attend(tile, std::min(KEYS, padded_ - tile), start > 0);
      }
      if (padded_ == 0) {
        std::fill_n(static_cast<float*>(query_grad_), width * block_, 0.0f);
      }
      transpose(width, block_, query_grad_, block_, query_across_, width);
      for (int64_t row = 0; row < count; ++row) {
        store(query_across_ + row * width, in_.scale, query_grad.row(clip, head, start + row));
      }
    }
    for (int64_t key = 0, place = 0; key < in_.keys; ++key) {
      float *to_key = key_grad.row(clip, head, key), *to_value = value_grad.row(clip, head, key);
      if (place < count_ && kept[place] == key) {
        store(key_grad_ + place * width, in_.scale, to_key);
        store(value_grad_ + place * width, 1.0f, to_value);
        ++place;
      } else {
        std::fill_n(to_key, width, 0.0f);
        std::fill_n(to_value, width, 0.0f);
      }
    }
  }

 private:
  void store(const float* from, float factor, float* to) const {
#pragma omp simd
    for (int64_t i = 0; i < in_.width; ++i) {
      to[i] = factor * from[i];
    }
  }

  // The keys and values that are looked at, zero rows after them.
  void pack(int64_t clip, int64_t head) {
    const auto& kept = in_.kept[clip];
    const int64_t width = in_.width;
    count_ = static_cast<int64_t>(kept.size());
    padded_ = filled(count_);
    for (int64_t place = 0; place < count_; ++place) {
      std::copy_n(in_.key.row(clip, head, kept[place]), width, keys_ + place * width);
      std::copy_n(in_.value.row(clip, head, kept[place]), width, values_ + place * width);
    }
    std::fill(keys_ + count_ * width, keys_ + padded_ * width, 0.0f);
    std::fill(values_ + count_ * width, values_ + padded_ * width, 0.0f);
    for (int64_t tile = 0; tile < padded_; tile += KEYS) {
      const int64_t size = std::min(KEYS, padded_ - tile);
      transpose(size, width, keys_ + tile * width, width, transposed_ + tile * width, size);
    }
  }

  // A block of queries, their upstream gradients, and those across; zeros after them.
  void load(int64_t clip, int64_t head, int64_t start, int64_t count) {
    const int64_t width = in_.width;
    const float* logsumexp =
        in_.logsumexp.const_data_ptr<float>() + (clip * in_.heads + head) * in_.queries + start;
    block_ = filled(count);
    for (int64_t row = 0; row < count; ++row) {
      const float* grad = in_.grad.row(clip, head, start + row);
      std::copy_n(in_.query.row(clip, head, start + row), width, query_ + row * width);
      std::copy_n(grad, width, grad_ + row * width);
      logsumexp_[row] = LOG2_E * logsumexp[row];
      delta_[row] = dot(grad, in_.out.row(clip, head, start + row), width);
    }
    std::fill(query_ + count * width, query_ + block_ * width, 0.0f);
    std::fill(grad_ + count * width, grad_ + block_ * width, 0.0f);
    std::fill(logsumexp_ + count, logsumexp_ + block_, 0.0f);
    std::fill(delta_ + count, delta_ + block_, 0.0f);
    transpose(block_, width, query_, width, query_across_, block_);
    transpose(block_, width, grad_, width, grad_across_, block_);
  }

  // One block of queries and one tile of keys.
  void attend(int64_t tile, int64_t size, bool accumulate) {
    const int64_t width = in_.width, offset = tile * width;
    gemm(size, block_, width, keys_ + offset, width, query_across_, block_, weights_, block_);
    gemm(size, block_, width, values_ + offset, width, grad_across_, block_, flows_, block_);
    const int64_t present = std::min(size, count_ - tile);
    weigh(present);
    std::fill(weights_ + present * block_, weights_ + size * block_, 0.0f);
    std::fill(flows_ + present * block_, flows_ + size * block_, 0.0f);
    gemm(size, width, block_, weights_, block_, grad_, width, value_grad_ + offset, width, accumulate);
    gemm(size, width, block_, flows_, block_, query_, width, key_grad_ + offset, width, accumulate);
    gemm(width, block_, size, transposed_ + offset, size, flows_, block_, query_grad_, block_, tile > 0);
  }

  // [Q K^T | dO V^T] of a tile to [P | dS].
  void weigh(int64_t keys) {
    const int64_t block = block_;
    const float factor = LOG2_E * in_.scale;
    const float *logsumexp = logsumexp_, *delta = delta_;
    for (int64_t key = 0; key < keys; ++key) {
      float *weights = weights_ + key * block, *flows = flows_ + key * block;
#pragma omp simd
      for (int64_t lane = 0; lane < block; ++lane) {
        const float weight = exp2_of_negative(factor * weights[lane] - logsumexp[lane]);
        weights[lane] = weight;
        flows[lane] = weight * (flows[lane] - delta[lane]);
      }
    }
  }

  const Inputs& in_;
  const int64_t block_size_;
  int64_t count_ = 0, padded_ = 0;  // keys that are looked at, and with zero rows after them
  int64_t block_ = 0;               // queries of the block at hand, filled up
  Buffer keys_, values_, transposed_, key_grad_, value_grad_;
  Buffer query_, query_across_, grad_, grad_across_, query_grad_, logsumexp_, delta_, weights_, flows_;
};

// Fills `in.kept`; returns the largest number of keys of a clip.
int64_t find_kept(const std::optional<at::Tensor>& mask, Inputs& in) {
  std::vector<int64_t> all(in.keys);
  std::iota(all.begin(), all.end(), 0);
  in.kept.assign(in.clips, all);
  if (!mask.has_value()) {
    return in.keys;
  }
  check_shape(*mask, {mask->size(0) == 1 ? 1 : in.clips, 1, 1, in.keys}, "mask");
  TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask must be boolean, got ", mask->scalar_type());
  const at::Tensor keep = mask->expand({in.clips, 1, 1, in.keys}).contiguous();
  const bool* row = keep.const_data_ptr<bool>();
  int64_t most = 0;
  for (auto& kept : in.kept) {
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](int64_t key) { return !row[key]; }), kept.end());
    most = std::max(most, static_cast<int64_t>(kept.size()));
    row += in.keys;
  }
  return most;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> self_attention_bwd(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& logsumexp, const std::optional<at::Tensor>& mask, double scale) {
  check_shape(key, {query.size(0), query.size(1), key.size(2), query.size(3)}, "key");
  check_shape(value, key.sizes(), "value");
  check_shape(out, query.sizes(), "out");
  check_shape(grad, query.sizes(), "grad");
  check_shape(logsumexp, query.sizes().slice(0, 3), "logsumexp");
  Inputs in{query.size(0),
            query.size(1),
            query.size(2),
            key.size(2),
            query.size(3),
            static_cast<float>(scale),
            Heads(grad),
            Heads(query),
            Heads(key),
            Heads(value),
            Heads(out),
            logsumexp.contiguous(),
            {}};
  const int64_t most_kept = find_kept(mask, in);
  const at::Tensor query_grad = empty_like_heads(query), key_grad = empty_like_heads(key),
                   value_grad = empty_like_heads(value);
  const Heads to_query(query_grad), to_key(key_grad), to_value(value_grad);
  const int64_t tasks = in.clips * in.heads;
  for_each_share(share_count(tasks), tasks, [&](int64_t, int64_t first, int64_t last) {
    Backward backward(in, most_kept);
    for (int64_t task = first; task < last; ++task) {
      backward.run(task / in.heads, task % in.heads, to_query, to_key, to_value);
    }
  });
  return {query_grad, key_grad, value_grad};
}

}  // namespace meft
