// The exact gelu, x * Phi(x) with Phi(x) = (1 + erf(x / sqrt(2))) / 2, and its derivative
// Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi). Include a target_*.h first.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/exp2.h"

namespace nsa::cpu::NSA_CPU_TARGET {

template <class T>
struct Normal {
  Vec<T> cumulative;  // Phi(x)
  Vec<T> density;     // exp(-x^2 / 2) / sqrt(2 pi)
};

inline constexpr double kInvSqrt2Pi = 0.398942280401432677940;
inline constexpr double kSqrtHalf = 0.707106781186547524401;

// Phi(-|x|) = exp(-x^2 / 2) * t * p(t) with t = 1 / (1 + 0.3 |x| / sqrt(2)): a minimax fit of
// erfcx(z) / (2 t) over z in [0, 10], relative error 2e-8. Unlike (1 + erf) / 2 it doesn't cancel:
// the lower tail keeps its relative precision.
inline constexpr float kErfcx[] = {0.0845940039f, 0.0853576362f,  0.0741694272f,
                                   0.107463583f,  -0.0473265685f, 0.273861647f,
                                   -0.256140381f, 0.242782205f,   -0.0647615716f};

NSA_CPU_INLINE Normal<float> normal(Vec<float> x) {
  const Vec<float> magnitude = x < 0 ? -x : x;
  const Vec<float> bell = vexp2<float>(x * x * static_cast<float>(-0.5 * kLog2e));
  const Vec<float> t = 1.0f / (magnitude * static_cast<float>(0.3 * kSqrtHalf) + 1.0f);
  Vec<float> p = t * kErfcx[8] + kErfcx[7];
#pragma GCC unroll 8
  for (int i = 6; i >= 0; --i) p = p * t + kErfcx[i];
  const Vec<float> tail = bell * t * p;
  return {x < 0 ? tail : 1.0f - tail, bell * static_cast<float>(kInvSqrt2Pi)};
}

/// float64 is for checking gradients: the C library's functions, element by element.
NSA_CPU_INLINE Normal<double> normal(Vec<double> x) {
  Normal<double> result;
  for (int i = 0; i < kLanes<double>; ++i) {
    result.cumulative[i] = 0.5 * std::erfc(-kSqrtHalf * x[i]);
    result.density[i] = kInvSqrt2Pi * std::exp(-0.5 * x[i] * x[i]);
  }
  return result;
}

/// x[i] = gelu(x[i]) for n whole vectors of elements.
template <class T>
void gelu_row(int64_t n, T* x) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> v = load(x + i);
    store(x + i, v * normal(v).cumulative);
  }
}

/// The same, and grad[i] *= gelu'(x[i]).
template <class T>
void gelu_backward_row(int64_t n, T* x, T* grad) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> v = load(x + i);
    const Normal<T> phi = normal(v);
    store(x + i, v * phi.cumulative);
    store(grad + i, load(grad + i) * (phi.cumulative + v * phi.density));
  }
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
