// Merges the segments of the three branches and forms their gated sum (eq. 5): one block of threads
// for each row of the output. The order of the sum depends on the shares only.
#pragma once

#include <type_traits>

#include "cuda/decode/segments.cuh"
#include "cuda/device/pdl.cuh"

namespace nsa::cuda::decode {

template <class T, int kDv, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps == 8 ? 2 : 12)
    combine_kernel(const __grid_constant__ DecodeParams p) {
  constexpr int kColumns = kDv / 32;           // of a lane
  constexpr int kBatch = kWarps == 8 ? 8 : 2;  // segments that a warp loads at a time
  static_assert(kWarps >= kNumBranches && (kColumns == 2 || kColumns == 4));
  using Vector = std::conditional_t<kColumns == 4, float4, float2>;
  struct Branch {
    Segments segments;
    float gate, lse2;
  };
  __shared__ Branch branches[kNumBranches];
  __shared__ __align__(16) float partial_sums[kWarps][kDv];

  launch_dependents();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head_q = blockIdx.x % p.heads_q, query = blockIdx.x / p.heads_q;
  const int token = query % p.tokens, b = query / p.tokens;
  Branch mine{};
  if (warp < kNumBranches)
    mine.segments = row_segments(p, warp, b, token, head_q / p.group, head_q % p.group);
  wait_for_previous();
  if (warp < kNumBranches) {
    const RowSum row_sum(p.partials[warp].sums, mine.segments);
    mine.gate = to_float(static_cast<const T*>(
        p.gates.ptr)[b * p.gates.batch + token * p.gates.seq + head_q * p.gates.head + warp]);
    mine.lse2 = row_sum.lse2();
    if (lane == 0) branches[warp] = mine;
  }
  __syncthreads();

  alignas(16) float sum[kColumns] = {};
  // Segments of all branches in a row.
  const int end_compressed = branches[kCompressed].segments.count;
  const int end_selected = end_compressed + branches[kSelected].segments.count;
  const int end = end_selected + branches[kWindow].segments.count;
#pragma unroll 1
  for (int base = warp; base < end; base += kBatch * kWarps) {
    alignas(16) float values[kBatch][kColumns];
    float2 parts[kBatch];
    float gates[kBatch], lse2[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = base + k * kWarps;
      parts[k] = {};
      *reinterpret_cast<Vector*>(values[k]) = {};
      gates[k] = lse2[k] = 0.0f;
      if (i >= end) continue;
      const int c = i < end_compressed ? kCompressed : i < end_selected ? kSelected : kWindow;
      const int first = c == kCompressed ? 0 : c == kSelected ? end_compressed : end_selected;
      const Branch& branch = branches[c];
      const int64_t at = branch.segments.first + int64_t{i - first} * branch.segments.step;
      parts[k] = p.partials[c].sums[at];
      *reinterpret_cast<Vector*>(values[k]) =
          *reinterpret_cast<const Vector*>(p.partials[c].out + at * kDv + lane * kColumns);
      gates[k] = branch.gate;
      lse2[k] = branch.lse2;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      // A segment in which the row sees nothing has no reference.
      const float weight = parts[k].y > 0.0f ? gates[k] * exp2_approx(parts[k].x - lse2[k]) : 0.0f;
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        sum[column] = fmaf(weight, values[k][column], sum[column]);
    }
  }
  *reinterpret_cast<Vector*>(&partial_sums[warp][lane * kColumns]) =
      *reinterpret_cast<const Vector*>(sum);
  __syncthreads();

  const int column = 2 * threadIdx.x;
  if (column >= kDv) return;
  float2 total{};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    total.x += partial_sums[i][column];
    total.y += partial_sums[i][column + 1];
  }
  T* out = static_cast<T*>(p.out.ptr) + b * p.out.batch + token * p.out.seq + head_q * p.out.head;
  *reinterpret_cast<uint32_t*>(out + column) = pack2<T>(total.x, total.y);
}

template <class T, int kDv>
void launch_combine(const DecodeParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t{p.batch} * p.tokens * p.heads_q;
  // Few rows have many segments each, and many rows few.
  const int warps = rows <= 512 ? 8 : 4;
  launch_overlapping(warps == 8 ? combine_kernel<T, kDv, 8> : combine_kernel<T, kDv, 4>,
                     "decode combine_kernel", grid_size(rows), 32 * warps, 0, stream, p);
}

}  // namespace nsa::cuda::decode
