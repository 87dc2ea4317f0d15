// Softmax attention of each clip and head, out = P V with P = softmax(scale Q K^T), and its backward.
//
//     logsumexp = log of the rows' sums of exp(scale Q K^T);   P = exp(scale Q K^T - logsumexp)
//     delta = rows' sums of dO * out;   dS = P * (dO V^T - delta)
//     dV = P^T dO;   dQ = scale dS K;   dK = scale dS^T Q
//
// A piece of work is one head of one clip, so that nothing is shared between threads. Its keys and values are
// packed once, those that the mask leaves out not at all: they cost nothing and get no gradient. Then blocks
// of b queries pass over them. Scores are held with the keys down and the queries across: a query is a vector
// lane, and maxima and sums of rows are those of plain vectors.
//
//     forward, tile by tile of keys:   scores K Q^T (keys, b) and their maxima
//              then tile by tile:      scores to exponentials E, and their sums;   out^T += V^T E
//     backward, tile by tile:          [P | dS] (keys, b) from K Q^T and V dO^T
//                                      dV += P dO;   dK += dS Q;   dQ^T += K^T dS
//
// Two products forward and five backward, the least there is without keeping scores from one to the other.
// What a block of queries needs stays in the second-level cache up to a few thousand keys. Memory beyond
// inputs and outputs is a few (T, d) per thread.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "common.h"
#include "gemm.h"
#include "kernels.h"

namespace meft {
namespace {

// Queries and keys are filled up: whole vectors, and few sizes of products.
constexpr int64_t QUERIES = 128;  // at most, in a block
constexpr int64_t KEYS = 256;     // at most, in a tile
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

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

// Unlike std::max it vectorises.
inline float larger(float a, float b) {
  return a > b ? a : b;
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

// to (width,) = factor * from
void scale_row(const float* from, int64_t width, float factor, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    to[i] = factor * from[i];
  }
}

void check_shapes(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  check_shape(key, {query.size(0), query.size(1), key.size(2), query.size(3)}, "key");
  check_shape(value, key.sizes(), "value");
}

struct Inputs {
  int64_t clips, heads, queries, keys, width;
  float scale;
  Heads query, key, value;
  std::vector<std::vector<int64_t>> kept;  // of each clip the keys that are looked at
  int64_t most_kept;                       // of all clips

  Inputs(const at::Tensor& given_query, const at::Tensor& given_key, const at::Tensor& given_value,
         const std::optional<at::Tensor>& mask, double given_scale)
      : clips(given_query.size(0)),
        heads(given_query.size(1)),
        queries(given_query.size(2)),
        keys(given_key.size(2)),
        width(given_query.size(3)),
        scale(static_cast<float>(given_scale)),
        query(given_query),
        key(given_key),
        value(given_value),
        kept(clips, std::vector<int64_t>(keys)),
        most_kept(keys) {
    for (auto& each : kept) {
      std::iota(each.begin(), each.end(), 0);
    }
    if (mask.has_value()) {
      apply(*mask);
    }
  }

  int64_t block_size() const { return std::min(QUERIES, filled(queries)); }

  // The rows of keys or values that are looked at, zero rows filling them up.
  void gather(const Heads& rows, int64_t clip, int64_t head, float* to) const {
    const auto& frames = kept[clip];
    const int64_t count = static_cast<int64_t>(frames.size());
    for (int64_t place = 0; place < count; ++place) {
      std::copy_n(rows.row(clip, head, frames[place]), width, to + place * width);
    }
    std::fill(to + count * width, to + filled(count) * width, 0.0f);
  }

  // `count` rows of queries or the like from `start` on, and their transpose, both filled up with zeros.
  void load(const Heads& rows, int64_t clip, int64_t head, int64_t start, int64_t count, float* to,
            float* across) const {
    const int64_t block = filled(count);
    for (int64_t row = 0; row < count; ++row) {
      std::copy_n(rows.row(clip, head, start + row), width, to + row * width);
    }
    std::fill(to + count * width, to + block * width, 0.0f);
    transpose(block, width, to, width, across, block);
  }

  // The transposes of tiles of `count` rows, one after the other.
  void transpose_tiles(const float* rows, int64_t count, float* to) const {
    for (int64_t tile = 0; tile < count; tile += KEYS) {
      const int64_t size = std::min(KEYS, count - tile);
      transpose(size, width, rows + tile * width, width, to + tile * width, size);
    }
  }

 private:
  void apply(const at::Tensor& mask) {
    check_shape(mask, {mask.dim() > 0 && mask.size(0) == 1 ? 1 : clips, 1, 1, keys}, "mask");
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "mask must be boolean, got ", mask.scalar_type());
    const at::Tensor keep = mask.expand({clips, 1, 1, keys}).contiguous();
    const bool* row = keep.const_data_ptr<bool>();
    most_kept = 0;
    for (auto& each : kept) {
      const auto left_out = [&](int64_t frame) { return !row[frame]; };
      each.erase(std::remove_if(each.begin(), each.end(), left_out), each.end());
      most_kept = std::max(most_kept, static_cast<int64_t>(each.size()));
      row += keys;
    }
  }
};

// --- forward ----------------------------------------------------------------------------------------------

class Forward {
 public:
  explicit Forward(const Inputs& in)
      : in_(in),
        keys_(filled(in.most_kept) * in.width),
        transposed_(filled(in.most_kept) * in.width),
        scores_(filled(in.most_kept) * in.block_size()),
        query_(in.block_size() * in.width),
        query_across_(in.block_size() * in.width),
        out_(in.block_size() * in.width),
        maxima_(in.block_size()),
        sums_(in.block_size()),
        tile_sums_(in.block_size()) {}

  void run(int64_t clip, int64_t head, const Heads& out, float* logsumexp) {
    const int64_t width = in_.width;
    count_ = static_cast<int64_t>(in_.kept[clip].size());
    padded_ = filled(count_);
    in_.gather(in_.value, clip, head, keys_);
    in_.transpose_tiles(keys_, padded_, transposed_);
    in_.gather(in_.key, clip, head, keys_);
    for (int64_t start = 0; start < in_.queries; start += QUERIES) {
      const int64_t count = std::min(QUERIES, in_.queries - start);
      block_ = filled(count);
      in_.load(in_.query, clip, head, start, count, query_, query_across_);
      if (count_ > 0) {
        attend();
      } else {  // as PyTorch has it
        std::fill_n(static_cast<float*>(out_), width * block_, 0.0f);
        std::fill_n(static_cast<float*>(maxima_), block_, -INFINITY);
      }
      transpose(width, block_, out_, block_, query_, width);
      for (int64_t row = 0; row < count; ++row) {
        std::copy_n(query_ + row * width, width, out.row(clip, head, start + row));
      }
      std::copy_n(static_cast<float*>(maxima_), count, logsumexp + start);
    }
  }

 private:
  // out_ (d, b) of one block of queries, and in maxima_ the logarithms of their sums.
  void attend() {
    const int64_t block = block_, width = in_.width;
    const float factor = LOG2_E * in_.scale;
    float *maxima = maxima_, *sums = sums_, *out = out_;
    std::fill_n(maxima, block, -INFINITY);
    std::fill_n(sums, block, 0.0f);
    for (int64_t tile = 0; tile < padded_; tile += KEYS) {
      float* scores = scores_ + tile * block;
      gemm(std::min(KEYS, padded_ - tile), block, width, keys_ + tile * width, width, query_across_, block,
           scores, block);
      find_maxima(scores, std::min(KEYS, count_ - tile));
    }
    scale_row(maxima, block, factor, maxima);
    for (int64_t tile = 0; tile < padded_; tile += KEYS) {
      const int64_t size = std::min(KEYS, padded_ - tile), present = std::min(size, count_ - tile);
      float* scores = scores_ + tile * block;
      std::fill_n(static_cast<float*>(tile_sums_), block, 0.0f);
      exponentiate(scores, present, factor);
      add(tile_sums_, block, sums);
      std::fill(scores + present * block, scores + size * block, 0.0f);
      gemm(width, block, size, transposed_ + tile * width, size, scores, block, out, block, tile > 0);
    }
    for (int64_t lane = 0; lane < block; ++lane) {
      maxima[lane] = LN_2 * (maxima[lane] + std::log2(sums[lane]));
      sums[lane] = 1.0f / sums[lane];
    }
    for (int64_t i = 0; i < width; ++i) {
#pragma omp simd
      for (int64_t lane = 0; lane < block; ++lane) {
        out[i * block + lane] *= sums[lane];
      }
    }
  }

  void find_maxima(const float* scores, int64_t keys) {
    const int64_t block = block_;
    float* maxima = maxima_;
    int64_t key = 0;
    for (; key + 4 <= keys; key += 4, scores += 4 * block) {
#pragma omp simd
      for (int64_t lane = 0; lane < block; ++lane) {
        const float first = larger(scores[lane], scores[block + lane]);
        const float second = larger(scores[2 * block + lane], scores[3 * block + lane]);
        maxima[lane] = larger(larger(first, second), maxima[lane]);
      }
    }
    for (; key < keys; ++key, scores += block) {
#pragma omp simd
      for (int64_t lane = 0; lane < block; ++lane) {
        maxima[lane] = larger(scores[lane], maxima[lane]);
      }
    }
  }

  // Scores of a tile to exponentials, whose sums are added to tile_sums_. Four keys together: long sums of
  // fp32 lose digits, and a block's sums are read less often.
  void exponentiate(float* scores, int64_t keys, float factor) {
    const int64_t block = block_;
    const float* maxima = maxima_;
    float* sums = tile_sums_;
    int64_t key = 0;
    for (; key + 4 <= keys; key += 4, scores += 4 * block) {
      float *second = scores + block, *third = second + block, *fourth = third + block;
#pragma omp simd
      for (int64_t lane = 0; lane < block; ++lane) {
        const float largest = maxima[lane];
        const float a = exp2_of_negative(factor * scores[lane] - largest);
        const float b = exp2_of_negative(factor * second[lane] - largest);
        const float c = exp2_of_negative(factor * third[lane] - largest);
        const float d = exp2_of_negative(factor * fourth[lane] - largest);
        scores[lane] = a, second[lane] = b, third[lane] = c, fourth[lane] = d;
        sums[lane] += (a + b) + (c + d);
      }
    }
    for (; key < keys; ++key, scores += block) {
#pragma omp simd
      for (int64_t lane = 0; lane < block; ++lane) {
        scores[lane] = exp2_of_negative(factor * scores[lane] - maxima[lane]);
        sums[lane] += scores[lane];
      }
    }
  }

  const Inputs& in_;
  int64_t count_ = 0, padded_ = 0;  // keys that are looked at, and with zero rows after them
  int64_t block_ = 0;               // queries of the block at hand, filled up
  Buffer keys_, transposed_, scores_, query_, query_across_, out_, maxima_, sums_, tile_sums_;
};

// --- backward ---------------------------------------------------------------------------------------------

// What the backward is given besides: the upstream gradient and what the forward returned.
struct Given {
  Heads grad, out;
  at::Tensor logsumexp;  // (B, H, T)
};

class Backward {
 public:
  Backward(const Inputs& in, const Given& given)
      : in_(in),
        given_(given),
        keys_(filled(in.most_kept) * in.width),
        values_(filled(in.most_kept) * in.width),
        transposed_(filled(in.most_kept) * in.width),
        key_grad_(filled(in.most_kept) * in.width),
        value_grad_(filled(in.most_kept) * in.width),
        query_(in.block_size() * in.width),
        query_across_(in.block_size() * in.width),
        grad_(in.block_size() * in.width),
        grad_across_(in.block_size() * in.width),
        query_grad_(in.block_size() * in.width),
        logsumexp_(in.block_size()),
        delta_(in.block_size()),
        weights_(KEYS * in.block_size()),
        flows_(KEYS * in.block_size()) {}

  void run(int64_t clip, int64_t head, const Heads& query_grad, const Heads& key_grad,
           const Heads& value_grad) {
    const int64_t width = in_.width;
    const auto& kept = in_.kept[clip];
    count_ = static_cast<int64_t>(kept.size());
    padded_ = filled(count_);
    in_.gather(in_.key, clip, head, keys_);
    in_.gather(in_.value, clip, head, values_);
    in_.transpose_tiles(keys_, padded_, transposed_);
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
        scale_row(query_across_ + row * width, width, in_.scale, query_grad.row(clip, head, start + row));
      }
    }
    for (int64_t key = 0, place = 0; key < in_.keys; ++key) {
      float *to_key = key_grad.row(clip, head, key), *to_value = value_grad.row(clip, head, key);
      if (place < count_ && kept[place] == key) {
        scale_row(key_grad_ + place * width, width, in_.scale, to_key);
        std::copy_n(value_grad_ + place * width, width, to_value);
        ++place;
      } else {
        std::fill_n(to_key, width, 0.0f);
        std::fill_n(to_value, width, 0.0f);
      }
    }
  }

 private:
  // A block of queries and their upstream gradients.
  void load(int64_t clip, int64_t head, int64_t start, int64_t count) {
    const int64_t width = in_.width;
    block_ = filled(count);
    in_.load(in_.query, clip, head, start, count, query_, query_across_);
    in_.load(given_.grad, clip, head, start, count, grad_, grad_across_);
    const float* logsumexp =
        given_.logsumexp.const_data_ptr<float>() + (clip * in_.heads + head) * in_.queries + start;
    for (int64_t row = 0; row < count; ++row) {
      logsumexp_[row] = LOG2_E * logsumexp[row];
      delta_[row] = dot(grad_ + row * width, given_.out.row(clip, head, start + row), width);
    }
    std::fill(logsumexp_ + count, logsumexp_ + block_, 0.0f);
    std::fill(delta_ + count, delta_ + block_, 0.0f);
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
  const Given& given_;
  int64_t count_ = 0, padded_ = 0;  // keys that are looked at, and with zero rows after them
  int64_t block_ = 0;               // queries of the block at hand, filled up
  Buffer keys_, values_, transposed_, key_grad_, value_grad_;
  Buffer query_, query_across_, grad_, grad_across_, query_grad_, logsumexp_, delta_, weights_, flows_;
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> self_attention(const at::Tensor& query, const at::Tensor& key,
                                                  const at::Tensor& value,
                                                  const std::optional<at::Tensor>& mask, double scale) {
  check_shapes(query, key, value);
  TORCH_CHECK_VALUE(scale > 0, "scale must be positive, got ", scale);  // as the maxima assume
  const Inputs in(query, key, value, mask, scale);
  const at::Tensor out = empty_like_heads(query), logsumexp = empty_fp32(query.sizes().slice(0, 3));
  const Heads to_out(out);
  const int64_t tasks = in.clips * in.heads;
  for_each_share(share_count(tasks), tasks, [&](int64_t, int64_t first, int64_t last) {
    Forward forward(in);
    for (int64_t task = first; task < last; ++task) {
      forward.run(task / in.heads, task % in.heads, to_out, logsumexp.data_ptr<float>() + task * in.queries);
    }
  });
  return {out, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> self_attention_bwd(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& logsumexp, const std::optional<at::Tensor>& mask, double scale) {
  check_shapes(query, key, value);
  check_shape(out, query.sizes(), "out");
  check_shape(grad, query.sizes(), "grad");
  check_shape(logsumexp, query.sizes().slice(0, 3), "logsumexp");
  const Inputs in(query, key, value, mask, scale);
  const Given given{Heads(grad), Heads(out), logsumexp.contiguous()};
  const at::Tensor query_grad = empty_like_heads(query), key_grad = empty_like_heads(key),
                   value_grad = empty_like_heads(value);
  const Heads to_query(query_grad), to_key(key_grad), to_value(value_grad);
  const int64_t tasks = in.clips * in.heads;
  for_each_share(share_count(tasks), tasks, [&](int64_t, int64_t first, int64_t last) {
    Backward backward(in, given);
    for (int64_t task = first; task < last; ++task) {
      backward.run(task / in.heads, task % in.heads, to_query, to_key, to_value);
    }
  });
  return {query_grad, key_grad, value_grad};
}

}  // namespace meft
