// Rows of any dtype to and from the compute type: double for float64, float for the others
// (T below, always that of the dtype). Include
// a target_*.h first.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"
#include "nsa/params.h"

namespace nsa::cpu::NSA_CPU_TARGET {

NSA_CPU_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
}

NSA_CPU_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
}

NSA_CPU_INLINE float from_bfloat16(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }

/// Round to nearest, ties to even; a NaN stays one, made quiet.
NSA_CPU_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40;
  return static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

NSA_CPU_INLINE float from_float16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  // Exponent bias 15 to 127, and infinity's exponent 31 to 255.
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00 ? (224u << 23) : (112u << 23));
  const uint32_t subnormal = bits_of(static_cast<float>(magnitude) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x0400 ? subnormal : normal));
}

/// Round to nearest, ties to even; subnormals kept, overflow to infinity, a NaN stays one, made
/// quiet.
NSA_CPU_INLINE uint16_t to_float16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000;
  const uint32_t magnitude = u & 0x7fffffff;
  const uint32_t rounded = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The spacing of floats in [0.5, 1) is that of float16's subnormals, 2^-24: the addition rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  uint32_t h = magnitude < 0x38800000 ? subnormal : rounded;  // 2^-14, the least normal
  h = magnitude >= 0x477ff000 ? 0x7c00 : h;                   // 65520, half a step past the largest
  h = magnitude > 0x7f800000 ? nan : h;
  return static_cast<uint16_t>(sign | h);
}

inline int64_t dtype_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

/// dst[i] = scale * src[i] where nothing is converted. src and dst do not overlap.
template <class T>
NSA_CPU_INLINE void copy_scaled(const T* src, int64_t n, T scale, T* dst) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(dst + i, load(src + i) * scale);
  for (; i < n; ++i) dst[i] = src[i] * scale;
}

/// dst[i] = scale * src[offset + i] in the compute type, i < n.
template <class T>
void load_row(DType dtype, const void* src, int64_t offset, int64_t n, T scale, T* __restrict dst) {
  if (dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32)) {
    copy_scaled(static_cast<const T*>(src) + offset, n, scale, dst);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(src) + offset;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<T>(from_bfloat16(p[i])) * scale;
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = static_cast<T>(from_float16(p[i])) * scale;
  }
}

/// dst[offset + i] = scale * src[i], rounded once, i < n.
template <class T>
void store_row(DType dtype, void* dst, int64_t offset, int64_t n, T scale,
               const T* __restrict src) {
  if (dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32)) {
    copy_scaled(src, n, scale, static_cast<T*>(dst) + offset);
    return;
  }
  uint16_t* p = static_cast<uint16_t*>(dst) + offset;
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) p[i] = to_bfloat16(static_cast<float>(src[i] * scale));
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = to_float16(static_cast<float>(src[i] * scale));
  }
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
