// Vectorised 2^x for softmax weights. Include a target_*.h first.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace nsa::cpu::NSA_CPU_TARGET {

inline constexpr double kLn2 = 0.693147180559945309417;
inline constexpr double kLog2e = 1.44269504088896340736;

// Taylor coefficients ln(2)^k / k!. On |f| <= 1/2 the first omitted term is below 6e-9 for degree 7
// and 4e-18 for degree 13: under a tenth of the last bit of float and double.
template <class T>
struct Exp2Series {
  static constexpr int kDegree = sizeof(T) == 8 ? 13 : 7;
  T c[kDegree + 1];
  constexpr Exp2Series() : c() {
    double term = 1;
    for (int k = 0; k <= kDegree; ++k) {
      c[k] = static_cast<T>(term);
      term *= kLn2 / (k + 1);
    }
  }
};

/// 2^x for x below the largest exponent; zero under the smallest normal number, -inf included.
template <class T>
NSA_CPU_INLINE Vec<T> vexp2(Vec<T> x) {
  using Traits = FloatTraits<T>;
  using Series = Exp2Series<T>;
  constexpr Series series{};
  // Adding 1.5 * 2^mantissa rounds x to a whole number and leaves it in the low mantissa bits.
  constexpr T magic = T(3) * (typename Traits::Int{1} << (Traits::kMantissaBits - 1));
  const Vec<T> shifted = x + magic;
  const Vec<T> f = x - (shifted - magic);
  Vec<T> p = f * series.c[Series::kDegree] + series.c[Series::kDegree - 1];
#pragma GCC unroll 16
  for (int k = Series::kDegree - 2; k >= 0; --k) p = p * f + series.c[k];
  // Unsigned, because the sum wraps around for the x whose result is then zeroed.
  using Bits = typename VectorOf<std::make_unsigned_t<typename Traits::Int>, sizeof(x)>::type;
  const Vec<T> result = (Vec<T>)((Bits)p + ((Bits)shifted << Traits::kMantissaBits));
  return x < T(Traits::kMinExponent) ? Vec<T>{} : result;
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
