// Test tensors: a (batch, seq, heads, dim) tensor of any dtype in one of several memory layouts,
// read and written as double. Everything that is not written stays NaN, so that a kernel that reads
// padding or leaves an output element unwritten is found out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "nsa/params.h"

namespace testing {

using nsa::DType;

/// Sign, exponent and mantissa of a 16-bit format, spelled out: the oracle shares no code with the
/// kernels.
struct Format16 {
  int mantissa, min_exponent;
};
inline Format16 format16(DType dtype) {
  return dtype == DType::kBFloat16 ? Format16{7, -126} : Format16{10, -14};
}

inline double decode16(uint16_t bits, DType dtype) {
  const Format16 f = format16(dtype);
  const int exponent = (bits & 0x7fff) >> f.mantissa, bias = 1 - f.min_exponent;
  const int fraction = bits & ((1 << f.mantissa) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (0x7fff >> f.mantissa)) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, f.min_exponent - f.mantissa);
  return sign * std::ldexp(fraction + (1 << f.mantissa), exponent - bias - f.mantissa);
}

inline uint16_t encode16(double value, DType dtype) {
  const Format16 f = format16(dtype);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = (0x7fff >> f.mantissa) << f.mantissa;
  if (std::isnan(value)) return infinity | 1;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  const int exponent = std::max(std::ilogb(magnitude), f.min_exponent);
  // In units of the last place; the carry of a round-up into the next binade falls out of the sum.
  const double units = std::nearbyint(std::ldexp(magnitude, f.mantissa - exponent));
  const double bits = units + std::ldexp(exponent - f.min_exponent, f.mantissa);
  return sign | (bits >= infinity ? infinity : static_cast<uint16_t>(bits));
}

inline size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "?";
}

enum class Layout { kContiguous, kPadded, kHeadsFirst, kExpanded };

class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t batch, int64_t seq, int64_t heads, int64_t dim,
         Layout layout = Layout::kContiguous)
      : dtype_(dtype), batch_(batch), seq_(seq), heads_(heads), dim_(dim) {
    switch (layout) {
      case Layout::kContiguous:
        head_stride_ = dim;
        seq_stride_ = heads * dim;
        batch_stride_ = seq * seq_stride_;
        break;
      case Layout::kPadded:
        head_stride_ = dim + 3;
        seq_stride_ = heads * head_stride_ + 5;
        batch_stride_ = seq * seq_stride_ + 7;
        break;
      case Layout::kHeadsFirst:
        seq_stride_ = dim;
        head_stride_ = seq * dim;
        batch_stride_ = heads * head_stride_;
        break;
      case Layout::kExpanded:  // a gradient of a sum over batch and heads: inputs only
        seq_stride_ = dim;
        break;
    }
    const int64_t last =
        (batch - 1) * batch_stride_ + (seq - 1) * seq_stride_ + (heads - 1) * head_stride_ + dim;
    const bool empty = batch == 0 || seq == 0 || heads == 0 || dim == 0;
    bytes_.assign((empty ? 1 : last + 64) * size_of(dtype), 0);
    for (size_t i = 0; i < bytes_.size() / size_of(dtype); ++i) write(i, NAN);
  }

  double at(int64_t b, int64_t s, int64_t h, int64_t e) const { return read(index(b, s, h, e)); }
  void set(int64_t b, int64_t s, int64_t h, int64_t e, double value) {
    write(index(b, s, h, e), value);
  }

  void fill_random(std::mt19937& random, double scale) {
    std::normal_distribution<double> normal(0, scale);
    for (int64_t i = 0; i < size(); ++i) set_flat(i, normal(random));
  }

  int64_t size() const { return batch_ * seq_ * heads_ * dim_; }
  double flat(int64_t i) const {
    return at(i / dim_ / heads_ / seq_, i / dim_ / heads_ % seq_, i / dim_ % heads_, i % dim_);
  }
  /// Along the seq axis.
  int64_t position(int64_t i) const { return i / dim_ / heads_ % seq_; }
  void set_flat(int64_t i, double value) {
    set(i / dim_ / heads_ / seq_, i / dim_ / heads_ % seq_, i / dim_ % heads_, i % dim_, value);
  }

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  nsa::InView in() const { return {bytes_.data(), batch_stride_, seq_stride_, head_stride_}; }
  nsa::OutView out() { return {bytes_.data(), batch_stride_, seq_stride_, head_stride_}; }

  int64_t batch() const { return batch_; }
  int64_t seq() const { return seq_; }
  int64_t heads() const { return heads_; }
  int64_t dim() const { return dim_; }
  DType dtype() const { return dtype_; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

  /// Elements that hold a number; with a layout that has padding, more than size() of them means
  /// that a kernel wrote outside its tensor.
  int64_t written() const {
    int64_t count = 0;
    for (size_t i = 0; i < bytes_.size() / size_of(dtype_); ++i) count += !std::isnan(read(i));
    return count;
  }

 private:
  int64_t index(int64_t b, int64_t s, int64_t h, int64_t e) const {
    return b * batch_stride_ + s * seq_stride_ + h * head_stride_ + e;
  }
  template <class T>
  T load(int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void store(int64_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
  }
  double read(int64_t i) const {
    if (dtype_ == DType::kFloat64) return load<double>(i);
    if (dtype_ == DType::kFloat32) return load<float>(i);
    return decode16(load<uint16_t>(i), dtype_);
  }
  void write(int64_t i, double value) {
    if (dtype_ == DType::kFloat64) return store(i, value);
    if (dtype_ == DType::kFloat32) return store(i, static_cast<float>(value));
    store(i, encode16(value, dtype_));
  }

  DType dtype_ = DType::kFloat32;
  int64_t batch_ = 0, seq_ = 0, heads_ = 0, dim_ = 0;
  int64_t batch_stride_ = 0, seq_stride_ = 0, head_stride_ = 0;
  std::vector<unsigned char> bytes_;
};

/// Every element within what the dtype's one rounding and float32 accumulation allow of `expected`
/// (flat order, exact); `scale` is the size of the terms that were summed.
inline void check_close(const Tensor& got, const std::vector<double>& expected, double scale,
                        const std::string& what) {
  const DType dtype = got.dtype();
  const double rounding = dtype == DType::kFloat64    ? 0
                          : dtype == DType::kFloat32  ? 0
                          : dtype == DType::kBFloat16 ? 0x1p-8
                                                      : 0x1p-11;
  const double accumulation = (dtype == DType::kFloat64 ? 1e-13 : 4e-6) * scale;
  const double tiny = dtype == DType::kFloat16 ? 0x1p-25 : 0;
  double worst = 0;
  int64_t where = -1;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double allowed = rounding * std::fabs(expected[i]) + accumulation + tiny;
    const double error = std::fabs(got.flat(i) - expected[i]);
    if (!(error <= allowed) && !(error <= worst)) {
      worst = error;
      where = i;
    }
  }
  CHECK_MESSAGE(where < 0, what + "[" + std::to_string(where) +
                               "]: " + std::to_string(where < 0 ? 0 : got.flat(where)) +
                               " is not near " + std::to_string(where < 0 ? 0 : expected[where]) +
                               " (scale " + std::to_string(scale) + ")");
}

}  // namespace testing
