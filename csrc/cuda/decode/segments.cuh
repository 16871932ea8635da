// The partial results of a row, one for each segment, and their common softmax.
#pragma once

#include "cuda/decode/schedule.cuh"
#include "cuda/device/softmax.cuh"

namespace nsa::cuda::decode {

/// The segments of a row in one branch: `count` of them, `step` rows of the branch's partial
/// results apart.
struct Segments {
  int64_t first;
  int count, step;
};

/// Of head g of a group, for one new token. Called by a warp.
__device__ __forceinline__ Segments row_segments(const DecodeParams& p, int branch, int b,
                                                 int token, int head, int g) {
  const bool dense = branch == kCompressed;
  const Span span = Schedule(p, branch, threadIdx.x % 32).span(b, dense ? 0 : token);
  const int unit = dense ? b : b * p.tokens + token;
  const int row = dense ? token * p.group + g : g, rows = p.rows[branch];
  return {slot(p, branch, span.first, unit, head, row / rows) * rows + row % rows, span.count,
          p.heads_kv * (dense ? p.row_tiles : 1) * rows};
}

/// The common softmax of a row's segments; a warp works on it together.
class RowSum {
 public:
  /// The first loads are on their way when this returns.
  __device__ __forceinline__ RowSum(const float2* sums, const Segments& segments)
      : sums_(sums), segments_(segments), first_(load(threadIdx.x % 32)) {}

  /// log2 of the sum over the segments, and so what turns 2^reference into a share of the softmax;
  /// +inf for a row that sees nothing.
  __device__ __forceinline__ float lse2() const {
    float max = first_.y > 0.0f ? first_.x : negative_infinity(), sum = first_.y;
#pragma unroll 1
    for (int i = threadIdx.x % 32 + 32; i < segments_.count; i += 32) {
      const float2 part = load(i);
      if (part.y == 0.0f) continue;
      const float new_max = fmaxf(max, part.x);
      sum = fmaf(sum, exp2_approx(max - new_max), part.y * exp2_approx(part.x - new_max));
      max = new_max;
    }
    float all_max = max;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      all_max = fmaxf(all_max, __shfl_xor_sync(0xffffffffu, all_max, distance));
    sum = sum > 0.0f ? sum * exp2_approx(max - all_max) : 0.0f;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return sum > 0.0f ? all_max + log2f(sum) : -negative_infinity();
  }

 private:
  __device__ __forceinline__ float2 load(int i) const {
    return i < segments_.count ? sums_[segments_.first + int64_t{i} * segments_.step] : float2{};
  }
  const float2* sums_;
  Segments segments_;
  float2 first_;
};

}  // namespace nsa::cuda::decode
