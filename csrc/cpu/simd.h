// Vectors of the target's native width through GCC's vector extensions: the same source compiles to
// AVX-512, AVX2 and SSE2 or NEON. Include a target_*.h first.
#pragma once

#include <cstdint>
#include <cstring>

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
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = x;
  return v;
}

template <class V>
NSA_CPU_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}

/// Sum and maximum of the elements, by halving.
template <class T, int kBytes>
NSA_CPU_INLINE T reduce_sum(typename VectorOf<T, kBytes>::type v) {
  if constexpr (kBytes > 16) {
    typename VectorOf<T, kBytes / 2>::type lo, hi;
    std::memcpy(&lo, &v, kBytes / 2);
    std::memcpy(&hi, reinterpret_cast<const char*>(&v) + kBytes / 2, kBytes / 2);
    return reduce_sum<T, kBytes / 2>(lo + hi);
  } else if constexpr (sizeof(T) == 8) {
    return v[0] + v[1];
  } else {
    return (v[0] + v[1]) + (v[2] + v[3]);
  }
}

template <class T, int kBytes>
NSA_CPU_INLINE T reduce_max(typename VectorOf<T, kBytes>::type v) {
  if constexpr (kBytes > 16) {
    typename VectorOf<T, kBytes / 2>::type lo, hi;
    std::memcpy(&lo, &v, kBytes / 2);
    std::memcpy(&hi, reinterpret_cast<const char*>(&v) + kBytes / 2, kBytes / 2);
    return reduce_max<T, kBytes / 2>(vmax(lo, hi));
  } else if constexpr (sizeof(T) == 8) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    const T a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
}

template <class T>
NSA_CPU_INLINE T hsum(Vec<T> v) {
  return reduce_sum<T, NSA_CPU_VECTOR_BYTES>(v);
}

template <class T>
NSA_CPU_INLINE T hmax(Vec<T> v) {
  return reduce_max<T, NSA_CPU_VECTOR_BYTES>(v);
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
