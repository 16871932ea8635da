// From a warpgroup's accumulators to the rows of the outputs.
#pragma once

#include "cuda/device/softmax.cuh"
#include "cuda/fwd/gates.cuh"

namespace nsa::cuda::sm90 {

/// Transposes the 4 x 4 words of a quad: lane q ends with word q of each lane, in the lanes' order.
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i | bit], bit);
      if (upper) {
        w[i] = received;
      } else {
        w[i | bit] = received;
      }
    }
  }
}

/// Writes lse, output and gated sum of the rows `row` and `row + 8` of the tile. kNormalize: `o` is
/// still to be divided by the row's sum. kBatch: 16-byte
/// chunks of a row that are read and written at a time; more hide latency, and take registers.
template <class T, int kDimV, bool kNormalize, int kBatch>
__device__ __forceinline__ void write_rows(const FwdParams& p, const Job& job, int row,
                                           const float (&o)[kDimV / 2], OnlineRow (&stats)[2]) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = (row + 8 * half) >> p.log2_group;
    const int head = (row + 8 * half) & ((1 << p.log2_group) - 1);
    const bool valid = token < job.tokens && head < p.group;
    float scale = 1.0f;
    if constexpr (kNormalize) {
      stats[half].merge_quad(p.scale_log2);
      scale = stats[half].sum > 0.0f ? 1.0f / stats[half].sum : 0.0f;
    }
    if (valid && p.lse.ptr && quad_lane == 0)
      *query_row<float>(p.lse, p, job, token, head) = stats[half].lse2(p.scale_log2) * kLn2;
    if (!p.has_output) continue;
#pragma unroll
    for (int first = 0; first < kDimV / 32; first += kBatch) {
      uint4 chunks[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* pair = o + ((first + i) * 4 + j) * 4 + 2 * half;
          w[j] = pack2<T>(pair[0] * scale, pair[1] * scale);
        }
        quad_transpose(w);
        chunks[i] = make_uint4(w[0], w[1], w[2], w[3]);
      }
      if (valid) store_chunks<T>(p, job, token, head, first * 32 + quad_lane * 8, 32, chunks);
    }
  }
}

}  // namespace nsa::cuda::sm90
