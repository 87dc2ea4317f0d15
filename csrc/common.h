// What the kernels share: constants, fp32 views of rows of any activation type, work over blocks of rows with
// sums that come out the same for the same number of threads, LayerNorm and GELU of fp32 rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace meft {

// As in meft_kernels/reference/common.py.
constexpr float NORM_EPS = 1e-5f;
constexpr float GATE_TEMPERATURE = 0.1f;
constexpr float ATTENTION_EPS = 1e-7f;
constexpr float GUIDANCE_EPS = 1e-6f;
constexpr float GUIDANCE_SHORT = 1e-14f;

// --- tensors -----------------------------------------------------------------------------------------------

inline void check_shape(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
}

inline void check_rows(const at::Tensor& tensor, int64_t width, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() > 0 && tensor.size(-1) == width, name, " must have rows of width ", width,
                    ", got shape ", tensor.sizes());
}

// A parameter as contiguous fp32.
inline at::Tensor widened(const at::Tensor& tensor) {
  return tensor.to(at::kFloat).contiguous();
}

inline at::Tensor empty_fp32(at::IntArrayRef sizes) {
  return at::empty(sizes, at::TensorOptions().dtype(at::kFloat));
}

inline at::Tensor zeros_fp32(at::IntArrayRef sizes) {
  return at::zeros(sizes, at::TensorOptions().dtype(at::kFloat));
}

// Between fp32 and bf16 or fp16, in vectors.
template <typename scalar_t>
inline void widen(const scalar_t* from, float* to, int64_t count) {
  using Half = at::vec::Vectorized<scalar_t>;
  int64_t i = 0;
  for (; i + Half::size() <= count; i += Half::size()) {
    const auto [low, high] = at::vec::convert_to_float<scalar_t>(Half::loadu(from + i));
    low.store(to + i);
    high.store(to + i + Half::size() / 2);
  }
  for (; i < count; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

template <typename scalar_t>
inline void narrow(const float* from, scalar_t* to, int64_t count) {
  using Half = at::vec::Vectorized<scalar_t>;
  using Wide = at::vec::Vectorized<float>;
  int64_t i = 0;
  for (; i + Half::size() <= count; i += Half::size()) {
    const Wide low = Wide::loadu(from + i), high = Wide::loadu(from + i + Half::size() / 2);
    at::vec::convert_from_float<scalar_t>(low, high).store(to + i);
  }
  for (; i < count; ++i) {
    to[i] = static_cast<scalar_t>(from[i]);
  }
}

inline void widen(const float* from, float* to, int64_t count) {
  std::copy_n(from, count, to);
}

inline void narrow(const float* from, float* to, int64_t count) {
  std::copy_n(from, count, to);
}

// Uninitialised fp32 scratch, aligned for vectors.
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(c10::GetCPUAllocator()->allocate(size * sizeof(float))) {}

  operator float*() const { return static_cast<float*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

class ZeroBuffer : public Buffer {
 public:
  explicit ZeroBuffer(int64_t size) : Buffer(size) { std::fill_n(static_cast<float*>(*this), size, 0.0f); }
};

// A tensor (..., width) of fp32, bf16 or fp16 as a matrix of rows, read and written as fp32. It is made
// contiguous if it is not: what is written must go to a contiguous tensor.
class Rows {
 public:
  explicit Rows(const at::Tensor& tensor)
      : tensor_(tensor.contiguous()),
        type_(tensor.scalar_type()),
        width_(tensor.size(-1)),
        count_(width_ == 0 ? 0 : tensor_.numel() / width_),
        data_(tensor_.data_ptr()) {
    TORCH_CHECK_TYPE(type_ == at::kFloat || type_ == at::kBFloat16 || type_ == at::kHalf,
                     "activations must be float32, bfloat16 or float16, got ", type_);
  }

  int64_t count() const { return count_; }
  int64_t width() const { return width_; }
  bool is_fp32() const { return type_ == at::kFloat; }
  // Elements of the scratch that `read` and `write` need for a block.
  int64_t scratch(int64_t rows) const { return is_fp32() ? 0 : rows * width_; }

  // The rows themselves if they are fp32, else widened into `scratch`.
  const float* read(int64_t begin, int64_t rows, float* scratch) const {
    const int64_t offset = begin * width_, size = rows * width_;
    if (is_fp32()) {
      return static_cast<const float*>(data_) + offset;
    }
    if (type_ == at::kBFloat16) {
      widen(static_cast<const at::BFloat16*>(data_) + offset, scratch, size);
    } else {
      widen(static_cast<const at::Half*>(data_) + offset, scratch, size);
    }
    return scratch;
  }

  // Where a block is to be written: the rows themselves if they are fp32, else `scratch`, to be stored after.
  float* write(int64_t begin, float* scratch) {
    return is_fp32() ? static_cast<float*>(data_) + begin * width_ : scratch;
  }

  void store(int64_t begin, int64_t rows, const float* written) {
    const int64_t offset = begin * width_, size = rows * width_;
    if (type_ == at::kBFloat16) {
      narrow(written, static_cast<at::BFloat16*>(data_) + offset, size);
    } else if (type_ == at::kHalf) {
      narrow(written, static_cast<at::Half*>(data_) + offset, size);
    }
  }

 private:
  at::Tensor tensor_;
  at::ScalarType type_;
  int64_t width_, count_;
  void* data_;
};

// --- work over blocks --------------------------------------------------------------------------------------

// Rows of a block: enough that products run at full speed, few enough that a block of hidden states, every
// intermediate and the weights of a rung stay in 2 MiB of cache. Where the weights to a side state of `side`
// channels do not fit in it they are read once for each block, so blocks are larger. Fewer rows where each
// thread gets less than that.
inline int64_t block_rows(int64_t rows, int64_t side = 0) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return std::max<int64_t>(1, std::min<int64_t>(side < 256 ? 96 : 192, (rows + threads - 1) / threads));
}

// How many contiguous shares `blocks` pieces of work are cut into: one per thread that gets any.
inline int64_t share_count(int64_t blocks) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, blocks));
}

// Calls work(share, first, last) once for each of `shares` contiguous parts of range(blocks), each on one
// thread. The parts depend on `shares` and `blocks` alone, so sums kept per share and added in their order
// are the same in every run.
template <typename Work>
inline void for_each_share(int64_t shares, int64_t blocks, const Work& work) {
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      work(share, share * blocks / shares, (share + 1) * blocks / shares);
    }
  });
}

// sums (count,) += values
inline void add(const float* values, int64_t count, float* sums) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    sums[i] += values[i];
  }
}

// The same where many values are added one after the other: `lost`, zeros at first, holds what rounding took
// (Kahan's sum).
inline void add(const float* values, int64_t count, float* sums, float* lost) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i] - lost[i], sum = sums[i] + value;
    lost[i] = (sum - sums[i]) - value;
    sums[i] = sum;
  }
}

// Partial sums: one row of fp32 zeros per share, with what the shares gathered added up by `total`. Every so
// many blocks a share's sums are put aside and begin anew: long sums of fp32 lose digits.
class Partials {
 public:
  // `blocks` of all shares, if each is followed by `end_block`.
  Partials(int64_t shares, int64_t size, int64_t blocks = 0)
      : sums_(zeros_fp32({shares, size})), gathered_(shares) {
    if (blocks > shares * kTogether) {
      aside_ = zeros_fp32({shares, size});
    }
  }

  float* of(int64_t share) { return row(sums_, share); }

  // To be called after each block that a share has added.
  void end_block(int64_t share) {
    if (++gathered_[share] % kTogether == 0 && aside_.defined()) {
      add(of(share), sums_.size(1), row(aside_, share));
      std::fill_n(of(share), sums_.size(1), 0.0f);
    }
  }

  // The sum over shares, in their order, (size,); it is kept in the first share's place.
  float* total() {
    float* first = of(0);
    const int64_t shares = sums_.size(0), size = sums_.size(1);
    for (int64_t share = 0; share < shares; ++share) {
      if (share > 0) {
        add(of(share), size, first);
      }
      if (aside_.defined()) {
        add(row(aside_, share), size, first);
      }
    }
    return first;
  }

 private:
  static constexpr int64_t kTogether = 32;  // blocks, of about a hundred rows

  static float* row(const at::Tensor& sums, int64_t share) {
    return sums.data_ptr<float>() + share * sums.size(1);
  }

  at::Tensor sums_, aside_;
  std::vector<int64_t> gathered_;  // [shares], blocks
};

// A copy of `values`, which hold as many elements as `like`, in its shape and type.
inline at::Tensor tensor_like(const float* values, const at::Tensor& like) {
  at::Tensor result = empty_fp32(like.sizes());
  std::copy_n(values, like.numel(), result.data_ptr<float>());
  return result.to(like.scalar_type());
}

// --- fp32 rows ---------------------------------------------------------------------------------------------

// Sums are written out in vectors: what a compiler makes of a reduction depends on what is around it.
using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// Counts that are filled up to this multiple are whole vectors at every level.
constexpr int64_t kFill = 16;

inline int64_t filled(int64_t count) {
  return (count + kFill - 1) / kFill * kFill;
}

inline float sum_of_lanes(const Vec& lanes) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, lanes);
}

// The sum over i < width of what `add_vector(sum, i)` adds for kLanes places and `term(i)` is for one. Four
// sums apart: long sums of fp32 lose digits, and wait for each other.
template <typename AddVector, typename Term>
inline float sum_over(int64_t width, const AddVector& add_vector, const Term& term) {
  constexpr int64_t kApart = 4;
  Vec apart[kApart] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int64_t i = 0;
  for (; i + kApart * kLanes <= width; i += kApart * kLanes) {
    for (int64_t k = 0; k < kApart; ++k) {
      apart[k] = add_vector(apart[k], i + k * kLanes);
    }
  }
  for (; i + kLanes <= width; i += kLanes) {
    apart[0] = add_vector(apart[0], i);
  }
  float sum = sum_of_lanes((apart[0] + apart[1]) + (apart[2] + apart[3]));
  for (; i < width; ++i) {
    sum += term(i);
  }
  return sum;
}

inline float sum_of(const float* row, int64_t width) {
  return sum_over(
      width, [&](const Vec& sum, int64_t i) { return sum + Vec::loadu(row + i); },
      [&](int64_t i) { return row[i]; });
}

// The sum of a (b - centre).
inline float dot(const float* a, const float* b, int64_t width, float centre = 0) {
  const Vec centres(centre);
  return sum_over(
      width,
      [&](const Vec& sum, int64_t i) {
        return at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i) - centres, sum);
      },
      [&](int64_t i) { return a[i] * (b[i] - centre); });
}

// The sum of squares of a row's distances from `centre`.
inline float squares_around(const float* row, int64_t width, float centre) {
  const Vec centres(centre);
  return sum_over(
      width,
      [&](const Vec& sum, int64_t i) {
        const Vec distance = Vec::loadu(row + i) - centres;
        return at::vec::fmadd(distance, distance, sum);
      },
      [&](int64_t i) { return (row[i] - centre) * (row[i] - centre); });
}

// Mean of a row and the reciprocal of its standard deviation, the variance taken around the mean.
inline void row_moments(const float* row, int64_t width, float& mean, float& rstd) {
  mean = sum_of(row, width) / static_cast<float>(width);
  rstd = 1.0f / std::sqrt(squares_around(row, width, mean) / static_cast<float>(width) + NORM_EPS);
}

// e^x for x <= 0, to about one rounding; 0 below -87. Loops over it vectorise: no branch, no call.
inline float exp_of_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float power = shifted - kRound;
  const float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
  // e^rest by its Taylor series, |rest| <= ln(2) / 2
  float series = 1.0f / 5040;
  series = series * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest * rest + rest + 1.0f;
  uint32_t bits, exponent;
  std::memcpy(&bits, &series, sizeof(bits));
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  bits += exponent << 23;
  std::memcpy(&series, &bits, sizeof(bits));
  return x < -87.0f ? 0.0f : series;
}

// sums (width,) += the sum over rows of `block` (rows, width), every eighth row added up apart.
inline void add_column_sums(const float* block, int64_t rows, int64_t width, float* sums) {
  constexpr int64_t kApart = 8;
  const int64_t full = rows / kApart * kApart;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Vec apart[kApart];
    std::fill_n(apart, kApart, Vec(0.0f));
    for (int64_t t = 0; t < full; t += kApart) {
      for (int64_t k = 0; k < kApart; ++k) {
        apart[k] = apart[k] + Vec::loadu(block + (t + k) * width + i);
      }
    }
    for (int64_t t = full; t < rows; ++t) {
      apart[t - full] = apart[t - full] + Vec::loadu(block + t * width + i);
    }
    const Vec low = (apart[0] + apart[1]) + (apart[2] + apart[3]);
    const Vec high = (apart[4] + apart[5]) + (apart[6] + apart[7]);
    (Vec::loadu(sums + i) + (low + high)).store(sums + i);
  }
  for (; i < width; ++i) {
    float apart[kApart] = {};
    for (int64_t t = 0; t < rows; ++t) {
      apart[t % kApart] += block[t * width + i];
    }
    const float low = (apart[0] + apart[1]) + (apart[2] + apart[3]);
    sums[i] += low + ((apart[4] + apart[5]) + (apart[6] + apart[7]));
  }
}

}  // namespace meft
