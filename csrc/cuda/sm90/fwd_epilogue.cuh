// From a warpgroup's accumulators to the rows of the outputs.
#pragma once

#include "cuda/device/tma.cuh"
#include "cuda/fwd/gates.cuh"
#include "cuda/sm90/fwd_softmax.cuh"

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

/// Brings what the gated sum will read of the earlier outputs' rows `row` and `row + 8` into L2.
template <class T, int kDimV>
__device__ __forceinline__ void prefetch_rows(const FwdParams& p, const Job& job, int row) {
  if (p.gates.ptr == nullptr) return;
  // The lanes of a quad: two halves of a row of each of two outputs.
  const int quad_lane = threadIdx.x % 4, column = quad_lane % 2 * 64;
  const InView& view = p.earlier[quad_lane / 2];
  if (view.ptr == nullptr || column >= kDimV) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = (row + 8 * half) >> p.log2_group;
    const int head = (row + 8 * half) & ((1 << p.log2_group) - 1);
    if (token < job.tokens && head < p.group)
      prefetch_l2(query_row<const T>(view, p, job, token, head) + column);
  }
}

/// Writes lse, output (`o`, to be divided by the row's sum) and gated sum of the rows `row` and
/// `row + 8` of the tile. kBatch: 16-byte chunks of a row of the gated sum that are read and
/// written at a time; more hide latency, and take registers.
template <class T, int kDimV, int kBatch>
__device__ __forceinline__ void write_rows(const FwdParams& p, const Job& job, int row,
                                           const float (&o)[kDimV / 2], const OnlineRows& stats) {
  constexpr int kChunks = kDimV / 32;  // of 16 bytes, a quarter of a row
  const int quad_lane = threadIdx.x % 4;
  uint4 chunks[2][kChunks];
  float lse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(stats.sum[half]);
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
    lse[half] = stats.lse2(half, sum) * kLn2;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* pair = o + (i * 4 + j) * 4 + 2 * half;
        w[j] = pack2<T>(pair[0] * scale, pair[1] * scale);
      }
      quad_transpose(w);
      chunks[half][i] = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
#pragma unroll 1  // two copies would push more out of the instruction cache than they save
  for (int half = 0; half < 2; ++half) {
    const int token = (row + 8 * half) >> p.log2_group;
    const int head = (row + 8 * half) & ((1 << p.log2_group) - 1);
    if (token < job.tokens && head < p.group) {
      if (p.lse.ptr && quad_lane == 0) *query_row<float>(p.lse, p, job, token, head) = lse[0];
      const int column = quad_lane * 8;
      if (p.has_output && p.gates.ptr == nullptr) {
        T* to = query_row<T>(p.out, p, job, token, head) + column;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) *reinterpret_cast<uint4*>(to + i * 32) = chunks[0][i];
      } else if (p.has_output) {
#pragma unroll
        for (int first = 0; first < kChunks; first += kBatch) {
          uint4 batch[kBatch];
#pragma unroll
          for (int i = 0; i < kBatch; ++i) batch[i] = chunks[0][first + i];
          store_chunks<T>(p, job, token, head, first * 32 + column, 32, batch);
        }
      }
    }
    lse[0] = lse[1];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) chunks[0][i] = chunks[1][i];
  }
}

}  // namespace nsa::cuda::sm90
