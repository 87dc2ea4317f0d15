// SHERL's redundancy-guided merge of the shallow layers, frame by frame; the formulas are those of
// reference/guidance.py.
//
// One vector lane is one frame: W frames of every feature are transposed into [channel][frame], and from
// there every dot product over channels, cosine, weight and gradient is plain arithmetic between vectors.
// Shallow features are kept as directions n_j = x_j / m_j, m_j = |x_j| + eps, so that x_j = m_j n_j:
//
//     c_ij = n_i . n_j;   rho_i = sum_j relu(c_ij);   t_j = x_j . wq + b,  wq = w * q
//     out = sum_j (alpha_j m_j) n_j + q
//     dx_i = alpha_i dA + dt_i wq + sum_j C_ij n_j,  C_ij = G_ij / m_i - 1[i = j] (sum_k G_ik c_ik) / |x_i|
//     dq = dA + w * y,   dw = sum y * q,   y = sum_j (dt_j m_j) n_j   (a last row of C)
//
// The products over pairs of layers run in tiles of TILE x TILE vectors held in registers, over chunks of
// channels that stay in the first-level cache. Every tensor is read once; what lies between is never written
// to memory.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "common.h"
#include "frames.h"
#include "kernels.h"

namespace meft {
namespace {

#ifdef CPU_CAPABILITY_AVX512
constexpr int64_t TILE = 4;  // 16 accumulators of 32 registers
#else
constexpr int64_t TILE = 2;
#endif
constexpr int64_t CHUNK = 32;  // channels

int64_t padded(int64_t count) {
  return (count + TILE - 1) / TILE * TILE;
}

Vec relu(const Vec& x) {
  return at::vec::maximum(x, Vec(0.0f));  // hands on NaN
}

Vec sum(const Vec* parts) {
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

// The rows of every feature: the shallow ones first, the deep one last.
template <typename scalar_t>
using Pointers = std::vector<scalar_t*>;

// W frames of all features and what is computed of them. Vectors of frames lie W floats apart.
struct Group {
  int64_t layers, width;  // shallow layers K, channels r
  at::Tensor values;
  std::vector<double> exact;                            // wq, [r]
  float *directions, *deep, *weighted_deep, *upstream;  // [padded K][r], and [r] each
  float *cosines, *mixing;                              // [padded K][padded K], [padded (K + 1)][K]
  float *norm, *scale, *inverse_scale, *logit, *inverse, *score, *alpha;  // [padded K] each
  float *alpha_grad, *logit_grad, *redundancy_grad, *shortening;          // [padded K] each
  float* staging;                                                         // W rows, [r] each

  Group(int64_t layers, int64_t width) : layers(layers), width(width), exact(width * W) {
    const int64_t all = padded(layers), rows = padded(layers + 1), columns = (width + W - 1) / W * W;
    std::vector<std::pair<float**, int64_t>> parts = {
        {&directions, all * width}, {&cosines, all * all}, {&mixing, rows * layers}, {&staging, columns}};
    for (float** part : {&deep, &weighted_deep, &upstream}) {
      parts.emplace_back(part, width);
    }
    for (float** part : {&norm, &scale, &inverse_scale, &logit, &inverse, &score, &alpha, &alpha_grad,
                         &logit_grad, &redundancy_grad, &shortening}) {
      parts.emplace_back(part, all);
    }
    int64_t total = 0;
    for (const auto& part : parts) {
      total += part.second * W;
    }
    values = zeros_fp32({total});
    float* next = values.data_ptr<float>();
    for (const auto& part : parts) {
      *part.first = next;
      next += part.second * W;
    }
  }

  Vec at(const float* vectors, int64_t index) const { return Vec::loadu(vectors + index * W); }
};

// c_ij for i <= j, in whole tiles.
void compute_cosines(Group& group) {
  const int64_t all = padded(group.layers), width = group.width;
  for (int64_t start = 0; start < width; start += CHUNK) {
    const int64_t end = std::min(start + CHUNK, width);
    for (int64_t i = 0; i < all; i += TILE) {
      for (int64_t j = i; j < all; j += TILE) {
        Vec sums[TILE][TILE];
        for (int64_t a = 0; a < TILE; ++a) {
          for (int64_t b = 0; b < TILE; ++b) {
            sums[a][b] = start ? group.at(group.cosines, (i + a) * all + j + b) : Vec(0.0f);
          }
        }
        for (int64_t channel = start; channel < end; ++channel) {
          Vec left[TILE], right[TILE];
          for (int64_t a = 0; a < TILE; ++a) {
            left[a] = group.at(group.directions, (i + a) * width + channel);
            right[a] = group.at(group.directions, (j + a) * width + channel);
          }
          for (int64_t a = 0; a < TILE; ++a) {
            for (int64_t b = 0; b < TILE; ++b) {
              sums[a][b] = at::vec::fmadd(left[a], right[b], sums[a][b]);
            }
          }
        }
        for (int64_t a = 0; a < TILE; ++a) {
          for (int64_t b = 0; b < TILE; ++b) {
            sums[a][b].store(group.cosines + ((i + a) * all + j + b) * W);
          }
        }
      }
    }
  }
}

// TILE rows of `mixing` times the directions' channels start .. start + W: out [TILE][W channels][W frames].
void mix(const Group& group, int64_t row, int64_t start, int64_t columns, float* out) {
  const int64_t width = group.width, layers = group.layers;
  for (int64_t first = 0; first < columns; first += TILE) {
    const int64_t wanted = std::min(TILE, columns - first);
    Vec sums[TILE][TILE];
    for (int64_t a = 0; a < TILE; ++a) {
      for (int64_t b = 0; b < TILE; ++b) {
        sums[a][b] = Vec(0.0f);
      }
    }
    for (int64_t layer = 0; layer < layers; ++layer) {
      Vec left[TILE], right[TILE];
      const int64_t channel = layer * width + start + first;
      for (int64_t a = 0; a < TILE; ++a) {
        left[a] = group.at(group.mixing, (row + a) * layers + layer);
        right[a] = group.at(group.directions, channel + std::min(a, wanted - 1));
      }
      for (int64_t a = 0; a < TILE; ++a) {
        for (int64_t b = 0; b < TILE; ++b) {
          sums[a][b] = at::vec::fmadd(left[a], right[b], sums[a][b]);
        }
      }
    }
    for (int64_t a = 0; a < TILE; ++a) {
      for (int64_t b = 0; b < wanted; ++b) {
        sums[a][b].store(out + (a * W + first + b) * W);
      }
    }
  }
}

// out [W] = x [width][W] . weights [width][W] + bias, rounded once. A logit just above zero is divided by a
// sum just above zero, so what is lost here would be lost many times over in the gradients.
void compute_logit(const float* x, const double* weights, int64_t width, float bias, float* out) {
  double sums[W];
  for (int64_t lane = 0; lane < W; ++lane) {
    sums[lane] = bias;
  }
  for (int64_t channel = 0; channel < width; ++channel) {
#pragma omp simd
    for (int64_t lane = 0; lane < W; ++lane) {
      sums[lane] += x[channel * W + lane] * weights[channel * W + lane];
    }
  }
  for (int64_t lane = 0; lane < W; ++lane) {
    out[lane] = static_cast<float>(sums[lane]);
  }
}

// Loads the features of `count` frames from row `start` on, and computes norms, directions, cosines, logits,
// scores and alpha; of a `backward`, with `upstream` in place, also dalpha.
template <typename scalar_t>
Vec compute_weights(Group& group, const Pointers<const scalar_t>& rows, int64_t start, int64_t count,
                    const float* weight, float bias, bool backward) {
  const int64_t layers = group.layers, width = group.width, all = padded(layers);
  load_frames(rows[layers] + start * width, count, width, group.deep, group.staging);
  for (int64_t channel = 0; channel < width; ++channel) {
    (group.at(group.deep, channel) * Vec(weight[channel])).store(group.weighted_deep + channel * W);
  }
  for (int64_t channel = 0; channel < width; ++channel) {
    for (int64_t lane = 0; lane < W; ++lane) {
      group.exact[channel * W + lane] = static_cast<double>(group.deep[channel * W + lane]) * weight[channel];
    }
  }
  for (int64_t layer = 0; layer < layers; ++layer) {
    float* direction = group.directions + layer * width * W;
    load_frames(rows[layer] + start * width, count, width, direction, group.staging);
    Vec squares[4], alpha_grad[4];
    for (int64_t part = 0; part < 4; ++part) {
      squares[part] = alpha_grad[part] = Vec(0.0f);
    }
    for (int64_t channel = 0; channel < width; ++channel) {
      const Vec x = group.at(direction, channel);
      const int64_t part = channel & 3;
      squares[part] = at::vec::fmadd(x, x, squares[part]);
      if (backward) {
        alpha_grad[part] = at::vec::fmadd(x, group.at(group.upstream, channel), alpha_grad[part]);
      }
    }
    compute_logit(direction, group.exact.data(), width, bias, group.logit + layer * W);
    const Vec norm = sum(squares).sqrt(), scale = norm + Vec(GUIDANCE_EPS);
    // A vector too short for its square is taken for zero.
    const Vec inverse_scale = Vec::blendv(Vec(1.0f) / scale, Vec(0.0f), norm < Vec(GUIDANCE_SHORT));
    for (int64_t channel = 0; channel < width; ++channel) {
      (group.at(direction, channel) * inverse_scale).store(direction + channel * W);
    }
    norm.store(group.norm + layer * W);
    scale.store(group.scale + layer * W);
    inverse_scale.store(group.inverse_scale + layer * W);
    sum(alpha_grad).store(group.alpha_grad + layer * W);
  }
  compute_cosines(group);
  Vec total(0.0f);
  for (int64_t i = 0; i < layers; ++i) {
    Vec redundancy(0.0f);
    for (int64_t j = 0; j < layers; ++j) {
      redundancy = redundancy + relu(group.at(group.cosines, std::min(i, j) * all + std::max(i, j)));
    }
    const Vec inverse = Vec::blendv(Vec(1.0f) / redundancy, Vec(0.0f), redundancy == Vec(0.0f));
    const Vec score = relu(group.at(group.logit, i)) * inverse;
    inverse.store(group.inverse + i * W);
    score.store(group.score + i * W);
    total = total + score;
  }
  total = total + Vec(GUIDANCE_EPS);
  for (int64_t i = 0; i < layers; ++i) {
    (group.at(group.score, i) / total).store(group.alpha + i * W);
  }
  return total;
}

template <typename scalar_t>
void forward_group(Group& group, const Pointers<const scalar_t>& rows, int64_t start, int64_t count,
                   const float* weight, float bias, scalar_t* out) {
  const int64_t layers = group.layers, width = group.width;
  compute_weights(group, rows, start, count, weight, bias, false);
  for (int64_t layer = 0; layer < layers; ++layer) {
    (group.at(group.alpha, layer) * group.at(group.scale, layer)).store(group.alpha + layer * W);
  }
  float tile[W * W];
  for (int64_t first = 0; first < width; first += W) {
    const int64_t columns = std::min(W, width - first);
    for (int64_t channel = 0; channel < columns; ++channel) {
      Vec sum(0.0f);
      for (int64_t layer = 0; layer < layers; ++layer) {
        const Vec direction = group.at(group.directions, layer * width + first + channel);
        sum = at::vec::fmadd(group.at(group.alpha, layer), direction, sum);
      }
      (sum + group.at(group.deep, first + channel)).store(tile + channel * W);
    }
    store_frames(tile, columns, out + start * width + first, count, width);
  }
}

// The rows of `mixing`, from `alpha_grad`.
void compute_mixing(Group& group, const Vec& total) {
  const int64_t layers = group.layers, all = padded(layers);
  float* shortening = group.shortening;
  const Vec rest = Vec(GUIDANCE_EPS) / total;  // 1 - sum alpha
  for (int64_t i = 0; i < layers; ++i) {
    const Vec score = group.at(group.score, i), inverse = group.at(group.inverse, i);
    // dalpha_i - sum alpha dalpha as a sum of differences: where one score is all there is, nothing cancels.
    const Vec own = group.at(group.alpha_grad, i);
    Vec centred = rest * own;
    for (int64_t j = 0; j < layers; ++j) {
      centred = at::vec::fmadd(group.at(group.alpha, j), own - group.at(group.alpha_grad, j), centred);
    }
    // Scores and their sum may be huge, their quotients are not: centred / total alone could vanish.
    const Vec grad = centred * (inverse / total) * score.gt(Vec(0.0f));
    grad.store(group.logit_grad + i * W);
    (Vec(0.0f) - centred * group.at(group.alpha, i) * inverse).store(group.redundancy_grad + i * W);
    (grad * group.at(group.scale, i)).store(group.mixing + (layers * layers + i) * W);
    Vec(0.0f).store(shortening + i * W);
  }
  for (int64_t i = 0; i < layers; ++i) {
    for (int64_t j = i; j < layers; ++j) {
      const Vec cosine = group.at(group.cosines, i * all + j);
      const Vec both = group.at(group.redundancy_grad, i) + group.at(group.redundancy_grad, j);
      const Vec pull = both * cosine.gt(Vec(0.0f));
      (pull * group.at(group.inverse_scale, i)).store(group.mixing + (i * layers + j) * W);
      at::vec::fmadd(pull, cosine, group.at(shortening, i)).store(shortening + i * W);
      if (i == j) {
        continue;
      }
      (pull * group.at(group.inverse_scale, j)).store(group.mixing + (j * layers + i) * W);
      at::vec::fmadd(pull, cosine, group.at(shortening, j)).store(shortening + j * W);
    }
  }
  for (int64_t i = 0; i < layers; ++i) {
    const Vec norm = group.at(group.norm, i), part = group.at(shortening, i) / norm;
    const Vec kept = Vec::blendv(part, Vec(0.0f), norm == Vec(0.0f));
    float* diagonal = group.mixing + (i * layers + i) * W;
    (Vec::loadu(diagonal) - kept).store(diagonal);
  }
}

// Gradients of `count` frames; dw and db are added to [r] vectors of frames and to one more behind them.
template <typename scalar_t>
void backward_group(Group& group, const Pointers<const scalar_t>& rows, const scalar_t* grad, int64_t start,
                    int64_t count, const float* weight, float bias, const Pointers<scalar_t>& grads,
                    float* sums) {
  const int64_t layers = group.layers, width = group.width;
  load_frames(grad + start * width, count, width, group.upstream, group.staging);
  const Vec total = compute_weights(group, rows, start, count, weight, bias, true);
  compute_mixing(group, total);
  Vec bias_grad = group.at(sums, width);
  for (int64_t layer = 0; layer < layers; ++layer) {
    bias_grad = bias_grad + group.at(group.logit_grad, layer);
  }
  bias_grad.store(sums + width * W);
  float tiles[TILE * W * W];
  for (int64_t first = 0; first < width; first += W) {
    const int64_t columns = std::min(W, width - first);
    for (int64_t row = 0; row <= layers; row += TILE) {
      mix(group, row, first, columns, tiles);
      for (int64_t layer = row; layer < std::min(row + TILE, layers + 1); ++layer) {
        float* tile = tiles + (layer - row) * W * W;
        const Vec alpha = group.at(group.alpha, std::min(layer, layers - 1));
        const Vec logit_grad = group.at(group.logit_grad, std::min(layer, layers - 1));
        for (int64_t column = 0; column < columns; ++column) {
          const int64_t channel = first + column;
          const Vec mixed = group.at(tile, column), upstream = group.at(group.upstream, channel);
          Vec result = at::vec::fmadd(alpha, upstream, mixed);
          if (layer < layers) {
            result = at::vec::fmadd(logit_grad, group.at(group.weighted_deep, channel), result);
          } else {
            result = at::vec::fmadd(Vec(weight[channel]), mixed, upstream);
            const Vec weight_grad =
                at::vec::fmadd(mixed, group.at(group.deep, channel), group.at(sums, channel));
            weight_grad.store(sums + channel * W);
          }
          result.store(tile + column * W);
        }
        store_frames(tile, columns, grads[layer] + start * width + first, count, width);
      }
    }
  }
}

struct Parameters {
  at::Tensor weight, bias;
  std::vector<at::Tensor> features;  // contiguous
  int64_t layers, width, frames, groups, shares;

  Parameters(const at::Tensor& given_weight, const at::Tensor& given_bias, at::TensorList given_features)
      : weight(widened(given_weight)), bias(widened(given_bias)) {
    TORCH_CHECK_VALUE(!given_features.empty(), "features must hold at least one tensor, got none");
    for (const auto& feature : given_features) {
      features.push_back(feature.contiguous());
    }
    layers = static_cast<int64_t>(features.size()) - 1;
    width = features.back().size(-1);
    check_shape(given_weight, {1, width}, "weight");
    check_shape(given_bias, {1}, "bias");
    for (const auto& feature : features) {
      check_shape(feature, features.back().sizes(), "every feature");
    }
    frames = features.back().numel() / width;
    groups = (frames + W - 1) / W;
    shares = share_count((groups + 3) / 4);
  }

  template <typename scalar_t>
  Pointers<const scalar_t> rows() const {
    Pointers<const scalar_t> result;
    for (const auto& feature : features) {
      result.push_back(feature.const_data_ptr<scalar_t>());
    }
    return result;
  }

  // Calls body(group, share, start, count) for all frames.
  template <typename Body>
  void for_groups(const Body& body) const {
    for_each_share(shares, groups, [&](int64_t share, int64_t first, int64_t last) {
      Group group(layers, width);
      for (int64_t index = first; index < last; ++index) {
        body(group, share, index * W, std::min(W, frames - index * W));
      }
    });
  }
};

}  // namespace

at::Tensor guidance(const at::Tensor& weight, const at::Tensor& bias, at::TensorList features) {
  if (features.size() == 1) {
    return features[0].clone();
  }
  const Parameters given(weight, bias, features);
  at::Tensor out = at::empty_like(given.features.back());
  dispatch(out.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rows = given.rows<scalar_t>();
    const float *w = given.weight.const_data_ptr<float>(), b = *given.bias.const_data_ptr<float>();
    scalar_t* result = out.mutable_data_ptr<scalar_t>();
    given.for_groups([&](Group& group, int64_t, int64_t start, int64_t count) {
      forward_group(group, rows, start, count, w, b, result);
    });
  });
  return out;
}

std::vector<at::Tensor> guidance_bwd(const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& bias,
                                     at::TensorList features) {
  if (features.size() == 1) {
    return {at::zeros_like(weight), at::zeros_like(bias), grad.clone()};
  }
  const Parameters given(weight, bias, features);
  check_shape(grad, features.back().sizes(), "grad");
  const at::Tensor upstream = grad.contiguous();
  std::vector<at::Tensor> grads(2);
  for (const auto& feature : given.features) {
    grads.push_back(at::empty_like(feature));
  }
  const int64_t width = given.width;
  Partials sums(given.shares, (width + 1) * W);
  dispatch(upstream.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto rows = given.rows<scalar_t>();
    Pointers<scalar_t> targets;
    for (size_t i = 2; i < grads.size(); ++i) {
      targets.push_back(grads[i].mutable_data_ptr<scalar_t>());
    }
    const float *w = given.weight.const_data_ptr<float>(), b = *given.bias.const_data_ptr<float>();
    const scalar_t* g = upstream.const_data_ptr<scalar_t>();
    given.for_groups([&](Group& group, int64_t share, int64_t start, int64_t count) {
      backward_group(group, rows, g, start, count, w, b, targets, sums.of(share));
    });
  });
  const float* lanes = sums.total();
  std::vector<float> totals(width + 1);
  for (int64_t channel = 0; channel <= width; ++channel) {
    totals[channel] = sum_of(lanes + channel * W, W);
  }
  grads[0] = tensor_like(totals.data(), weight);
  grads[1] = tensor_like(totals.data() + width, bias);
  return grads;
}

}  // namespace meft
