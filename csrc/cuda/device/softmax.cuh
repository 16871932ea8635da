// Softmax over the accumulator fragments of mma.m16n8k16, in base two: scores are multiplied by
// softmax_scale * log2(e) inside the exponent. A lane holds 2 columns of each n8 tile in rows g and
// g + 8 of a group of 16; the four lanes of a quad share a row.
#pragma once

#include "cuda/device/ptx.cuh"

namespace nsa::cuda {

inline constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ int quad_max(int x) {
  x = max(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return max(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// Running maximum of the raw scores and running sum of a row's exponentials. The sum is this
/// lane's share of the row.
struct OnlineRow {
  float max = negative_infinity();
  float sum = 0.0f;

  /// Takes a new maximum; returns by what earlier exponentials are to be multiplied.
  __device__ __forceinline__ float raise(float new_max, float scale_log2, float& reference) {
    new_max = fmaxf(max, new_max);
    reference = new_max == negative_infinity() ? 0.0f : new_max * scale_log2;
    const float factor = exp2_approx(fmaf(max, scale_log2, -reference));
    max = new_max;
    sum *= factor;
    return factor;
  }
  /// What to subtract from scaled scores in the exponent: the scaled maximum, 0 where the row has
  /// seen nothing.
  __device__ __forceinline__ float reference(float scale_log2) const {
    return max == negative_infinity() ? 0.0f : max * scale_log2;
  }
  /// Merges the shares of the quad, which may have different maxima.
  __device__ __forceinline__ void merge_quad(float scale_log2) {
    float reference;
    raise(quad_max(max), scale_log2, reference);
    sum = quad_sum(sum);
  }
  /// log2 of the sum of 2^(scaled score): -inf for a row that saw nothing.
  __device__ __forceinline__ float lse2(float scale_log2) const {
    return sum > 0.0f ? fmaf(max, scale_log2, log2f(sum)) : negative_infinity();
  }
};

}  // namespace nsa::cuda
