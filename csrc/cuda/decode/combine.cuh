// Merges the segments of the three branches and forms their gated sum (eq. 5): one block of threads
// for each row of the output. The order of the sum depends on the shares only.
#pragma once

#include "cuda/decode/pdl.cuh"
#include "cuda/decode/schedule.cuh"
#include "cuda/device/softmax.cuh"

namespace nsa::cuda::decode {

inline constexpr int kCombineWarps = 4;

/// The segments of a row in one branch: `count` of them, `step` rows of DecodeParams::partials
/// apart.
struct Segments {
  int64_t first;
  int count, step;
  float max, scale;  // of sum 2^(reference - max): gate / sum
};

template <int kBranch>
__device__ __forceinline__ Segments find_segments(const DecodeParams& p, int b, int token, int head,
                                                  int g) {
  const Span span =
      Schedule<kBranch>(p, threadIdx.x % 32).span(b, kBranch == kCompressed ? 0 : token);
  const int unit = kBranch == kCompressed ? b : b * p.tokens + token;
  const int row = kBranch == kCompressed ? token * p.group + g : g, rows = p.rows[kBranch];
  Segments segments{};
  segments.first = slot<kBranch>(p, span.first, unit, head, row / rows) * rows + row % rows;
  segments.count = span.count;
  segments.step = p.heads_kv * (kBranch == kCompressed ? p.row_tiles : 1) * rows;
  return segments;
}

/// Sets max and scale; called by a warp.
__device__ __forceinline__ void weigh_segments(const Partials& partials, float gate,
                                               Segments& segments) {
  const int lane = threadIdx.x % 32;
  float max = negative_infinity(), sum = 0.0f;
  for (int i = lane; i < segments.count; i += 32) {
    const float2 part = partials.sums[segments.first + int64_t{i} * segments.step];
    if (part.y == 0.0f) continue;
    const float new_max = fmaxf(max, part.x);
    sum = fmaf(sum, exp2f(max - new_max), part.y * exp2f(part.x - new_max));
    max = new_max;
  }
  segments.max = max;
  for (int distance = 16; distance > 0; distance /= 2)
    segments.max = fmaxf(segments.max, __shfl_xor_sync(0xffffffffu, segments.max, distance));
  sum = sum > 0.0f ? sum * exp2f(max - segments.max) : 0.0f;
  for (int distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  // A row that sees nothing adds nothing.
  segments.scale = sum > 0.0f ? gate / sum : 0.0f;
  if (sum == 0.0f) segments.count = 0;
}

template <class T, int kDv>
__global__ void __launch_bounds__(32 * kCombineWarps) combine_kernel(const DecodeParams p) {
  constexpr int kColumns = kDv / 32;
  static_assert(kColumns == 2 || kColumns == 4);
  __shared__ Segments segments[kNumBranches];
  __shared__ float sums[kCombineWarps][kDv];

  launch_dependents();
  const int head_q = blockIdx.x % p.heads_q, query = blockIdx.x / p.heads_q;
  const int token = query % p.tokens, b = query / p.tokens;
  const int head = head_q / p.group, g = head_q % p.group;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Segments mine{};
  if (warp == kCompressed) mine = find_segments<kCompressed>(p, b, token, head, g);
  if (warp == kSelected) mine = find_segments<kSelected>(p, b, token, head, g);
  if (warp == kWindow) mine = find_segments<kWindow>(p, b, token, head, g);
  wait_for_previous();

  if (warp < kNumBranches) {
    const T* gates = static_cast<const T*>(p.gates.ptr) + b * p.gates.batch + token * p.gates.seq +
                     head_q * p.gates.head;
    weigh_segments(p.partials[warp], to_float(gates[warp]), mine);
    if (lane == 0) segments[warp] = mine;
  }
  __syncthreads();

  float sum[kColumns] = {};
#pragma unroll
  for (int c = 0; c < kNumBranches; ++c) {
    const Segments parts = segments[c];
    const Partials& partials = p.partials[c];
#pragma unroll 4
    for (int i = warp; i < parts.count; i += kCombineWarps) {
      const int64_t row = parts.first + int64_t{i} * parts.step;
      const float2 part = partials.sums[row];
      const float* out = partials.out + row * kDv + lane * kColumns;
      float values[kColumns];
      if constexpr (kColumns == 4) {
        *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(out);
      } else {
        *reinterpret_cast<float2*>(values) = *reinterpret_cast<const float2*>(out);
      }
      const float weight = part.y > 0.0f ? parts.scale * exp2f(part.x - parts.max) : 0.0f;
#pragma unroll
      for (int k = 0; k < kColumns; ++k) sum[k] = fmaf(weight, values[k], sum[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kColumns; ++k) sums[warp][lane * kColumns + k] = sum[k];
  __syncthreads();

  const int column = 2 * threadIdx.x;
  if (column >= kDv) return;
  float2 total{};
#pragma unroll
  for (int i = 0; i < kCombineWarps; ++i) {
    total.x += sums[i][column];
    total.y += sums[i][column + 1];
  }
  T* out = static_cast<T*>(p.out.ptr) + b * p.out.batch + token * p.out.seq + head_q * p.out.head;
  *reinterpret_cast<uint32_t*>(out + column) = pack2<T>(total.x, total.y);
}

}  // namespace nsa::cuda::decode
