// The choice of a token's selection blocks (eq. 9-11) from column sums: the softmax of the
// compressed branch summed over the heads of the group, a column per compressed token.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/topk.cuh"
#include "cuda/fwd/forced.cuh"
#include "cuda/fwd/job.cuh"

namespace nsa::cuda::sm80 {

/// Column sums kept from before a tile: a compressed token reaches at most l/d - 1 <= 7 strides
/// into the next block.
inline constexpr int kHalo = 8;

/// Sums v[i] over the lanes that differ in bits 2 .. kSteps + 1. Each step halves what a lane
/// keeps: of 16 values (n8 tile i / 2, column i % 2) a lane ends with 16 >> kSteps, those of the n8
/// tiles from the returned one on.
template <int kSteps, int kStep = 0>
__device__ __forceinline__ int scatter_sum(float (&v)[16], int lane) {
  if constexpr (kStep == kSteps) {
    return 0;
  } else {
    constexpr int kHalf = 8 >> kStep, kBit = 4 << kStep;
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = v[i], high = v[i + kHalf];
      v[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kBit);
    }
    return (upper ? kHalf / 2 : 0) + scatter_sum<kSteps, kStep + 1>(v, lane);
  }
}

// The sums over heads of 64 columns and a warp's 16 kGroups rows, from accumulator fragments.
// `sink(slot, n8, count, v)` takes those of this lane: v[2 i], v[2 i + 1] are the columns
// (lane & 3) * 2 and + 1 of n8 tile n8 + i, i < count. A slot is a token, or the share of a token
// that a row group of 16 (with several in a warp: the warp) holds.

/// Padded groups of 16 and more.
template <int kGroups, class Sink>
__device__ __forceinline__ void sum_heads_large(int log2_group, int warp,
                                                const float (&p)[kGroups][8][4], int lane,
                                                const Sink& sink) {
  float v[kGroups][16];
#pragma unroll
  for (int m = 0; m < kGroups; ++m) {
#pragma unroll
    for (int i = 0; i < 16; ++i) v[m][i] = p[m][i / 2][i % 2] + p[m][i / 2][2 + i % 2];
  }
  int n8 = 0;
  if (kGroups == 1 || log2_group == 4) {
#pragma unroll
    for (int m = 0; m < kGroups; ++m) n8 = scatter_sum<3>(v[m], lane);
#pragma unroll
    for (int m = 0; m < kGroups; ++m) sink(warp * kGroups + m, n8, 1, v[m]);
  } else {
#pragma unroll
    for (int m = 1; m < kGroups; ++m) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[0][i] += v[m][i];
    }
    n8 = scatter_sum<3>(v[0], lane);
    sink(warp, n8, 1, v[0]);
  }
}

/// Padded groups below 16: several tokens a row group.
template <int kGroups, class Sink>
__device__ __forceinline__ void sum_heads_small(int log2_group, int warp,
                                                const float (&p)[kGroups][8][4], int lane,
                                                const Sink& sink) {
#pragma unroll
  for (int m = 0; m < kGroups; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) v[i] = p[m][i / 2][2 * half + i % 2];
      const int token = ((warp * kGroups + m) * 16 + half * 8 + (lane >> 2)) >> log2_group;
      int n8;
      switch (log2_group) {
        case 0:
          n8 = scatter_sum<0>(v, lane);
          sink(token, n8, 8, v);
          break;
        case 1:
          n8 = scatter_sum<1>(v, lane);
          sink(token, n8, 4, v);
          break;
        case 2:
          n8 = scatter_sum<2>(v, lane);
          sink(token, n8, 2, v);
          break;
        default:
          n8 = scatter_sum<3>(v, lane);
          sink(token, n8, 1, v);
      }
    }
  }
}

/// Importance of the block whose first column is column(0): sum over the compressed tokens of
/// overlap * softmax. column(k) is the sum k strides further; k > -kHalo.
template <class Column>
__device__ __forceinline__ float block_score(const FwdParams& p, const Column& column) {
  const int strides = 1 << (p.select_shift - p.stride_shift);
  const int reach = p.config.block_size >> p.stride_shift;
  float score = 0.0f;
  for (int k = 1 - reach; k < strides; ++k)
    score += column(k) * static_cast<float>(k < 0 ? reach + k : min(reach, strides - k));
  return score;
}

/// One row of block_indices: the forced blocks and the list, ascending, padded with -1. Called by a
/// warp.
__device__ __forceinline__ void write_indices(const FwdParams& p, const Job& job, int token,
                                              const Forced& forced, const TopList& best, int lane) {
  const View<int32_t>& view = p.block_indices;
  int32_t* row =
      view.ptr + job.batch * view.batch + (job.row_q + token) * view.seq + job.head_kv * view.head;
  int chosen = 0;
  for (int base = 0; base < best.capacity(); base += 32) {
    const int index = base + lane < best.capacity() ? best.index(base + lane) : -1;
    chosen += __popc(__ballot_sync(0xffffffffu, index >= 0));
    if (index < 0) continue;
    int rank = forced.init;
    for (int i = 0; i < best.capacity(); ++i) {
      const int other = best.index(i);
      rank += other >= 0 && other < index;
    }
    row[rank] = index;
  }
  forced.write(row, chosen, p.index_count, lane);
}

}  // namespace nsa::cuda::sm80
