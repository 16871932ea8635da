// Vectors of the target's native width through GCC's vector extensions: the same source compiles to
// AVX-512, AVX2 and SSE2 or NEON. Include a target_*.h first.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define NSA_CPU_INLINE inline __attribute__((always_inline))

namespace nsa::cpu::NSA_CPU_TARGET {

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
  // For loads and stores at any address.
  typedef T loose __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
};

template <class T>
struct FloatTraits;
template <>
struct FloatTraits<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23, kMinExponent = -126;
};
template <>
struct FloatTraits<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52, kMinExponent = -1022;
};

template <class T>
using Vec = typename VectorOf<T, NSA_CPU_VECTOR_BYTES>::type;
template <class T>
using IntVec = typename VectorOf<typename FloatTraits<T>::Int, NSA_CPU_VECTOR_BYTES>::type;

/// Elements of a vector.
template <class T>
inline constexpr int kLanes = NSA_CPU_VECTOR_BYTES / static_cast<int>(sizeof(T));

/// n rounded up to whole vectors.
template <class T>
constexpr int64_t round_up_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
NSA_CPU_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T, NSA_CPU_VECTOR_BYTES>::loose*>(p);
}

template <class T>
NSA_CPU_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T, NSA_CPU_VECTOR_BYTES>::loose*>(p) = v;
}

template <class T>
NSA_CPU_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // exact, -0 included, and a single broadcast
}

template <class V>
NSA_CPU_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}

/// The elements rotated down by `kShift` places.
template <class T, int kShift, int... kLane>
NSA_CPU_INLINE Vec<T> rotate(Vec<T> v, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (kLane + kShift) % kLanes<T>...);
#else
  return __builtin_shuffle(v, IntVec<T>{(kLane + kShift) % kLanes<T>...});
#endif
}

/// Sum and maximum of the elements, by halving.
template <class T, int kShift = kLanes<T> / 2>
NSA_CPU_INLINE T hsum(Vec<T> v) {
  v += rotate<T, kShift>(v, std::make_integer_sequence<int, kLanes<T>>());
  if constexpr (kShift > 1) {
    return hsum<T, kShift / 2>(v);
  } else {
    return v[0];
  }
}

template <class T, int kShift = kLanes<T> / 2>
NSA_CPU_INLINE T hmax(Vec<T> v) {
  v = vmax(v, rotate<T, kShift>(v, std::make_integer_sequence<int, kLanes<T>>()));
  if constexpr (kShift > 1) {
    return hmax<T, kShift / 2>(v);
  } else {
    return v[0];
  }
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
