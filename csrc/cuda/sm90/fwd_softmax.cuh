// Softmax over the accumulators of a consumer warpgroup, in base two, relative to references that
// scores may exceed: most tiles need neither the maximum of a whole row nor a multiplication of
// what came before.
#pragma once

#include <climits>

#include "cuda/device/softmax.cuh"

namespace nsa::cuda::sm90 {

/// The rows g and g + 8 of a warp's 16. The four lanes of a quad share a row.
struct OnlineRows {
  // Of the scaled scores, near the row's maximum; 0 for a row that has seen nothing.
  float reference[2] = {};
  float sum[2] = {};  // of the exponentials, this lane's share

  /// From the raw scores of a walk's first tile to exponents; -inf, a masked score, stays.
  template <int kScores>
  __device__ __forceinline__ void first_exponents(float (&s)[kScores], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = quad_max(lane_max(s, half));
      reference[half] = most == negative_infinity() ? 0.0f : most * scale_log2;
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = fmaf(s[i], scale_log2, -reference[i / 2 % 2]);
  }
  /// As first_exponents, of a later tile. Where some row of the warp has exponents beyond 8, raises
  /// its reference, returns true and gives the factors for what came before. `unseen`: some row may
  /// have seen nothing yet, so that a reference is due whatever its scores are.
  template <int kScores>
  __device__ __forceinline__ bool exponents(float (&s)[kScores], float scale_log2,
                                            float (&factor)[2], bool& unseen) {
    // As integers, of which three are compared at once, what is below 0 is in reverse order, but
    // below 8.
    int most[4] = {INT_MIN, INT_MIN, INT_MIN, INT_MIN};
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      s[i] = fmaf(s[i], scale_log2, -reference[i / 2 % 2]);
      most[i % 4] = max(most[i % 4], __float_as_int(s[i]));
    }
    const bool holds =
        max(max(most[0], most[1]), max(most[2], most[3])) <= __float_as_int(kMostExponent);
    const bool raised = __any_sync(0xffffffffu, unseen || !holds);
    if (raised) raise(s, factor, unseen);
    return raised;
  }

  /// log2 of the sum of 2^(scaled score), of what is a row's whole sum: -inf for a row that saw
  /// nothing.
  __device__ __forceinline__ float lse2(int half, float whole_sum) const {
    return whole_sum > 0.0f ? reference[half] + log2f(whole_sum) : negative_infinity();
  }

 private:
  static constexpr float kMostExponent = 8.0f;

  /// The greatest of a row that this lane has.
  template <int kScores>
  static __device__ __forceinline__ float lane_max(const float (&s)[kScores], int half) {
    float most = s[2 * half];
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i)
      most = fmaxf(most, fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]));
    return most;
  }
  template <int kScores>
  __device__ __forceinline__ void raise(float (&s)[kScores], float (&factor)[2], bool& unseen) {
    unseen = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = quad_max(lane_max(s, half));
      const bool first = quad_sum(sum[half]) == 0.0f;
      // Others' rows change nothing of a row that holds, not even by the rounding of a factor.
      const bool rises = most > kMostExponent || (first && most != negative_infinity());
      const float shift = rises ? most : 0.0f;
      unseen = unseen || (first && !rises);
      factor[half] = first ? 1.0f : exp2_approx(-shift);
      reference[half] += shift;
      sum[half] *= factor[half];
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i) {
        s[4 * i + 2 * half] -= shift;
        s[4 * i + 2 * half + 1] -= shift;
      }
    }
    unseen = __any_sync(0xffffffffu, unseen);
  }
};

}  // namespace nsa::cuda::sm90
