// The gated sum of the branches (eq. 5), formed as the last branch of a call stores its output.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/fwd/job.cuh"

namespace nsa::cuda {

/// values += factor * chunk, where a chunk is 8 elements.
template <class T>
__device__ __forceinline__ void add_scaled(float (&values)[8], float factor, uint4 chunk) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(words[i]);
    values[2 * i] = fmaf(factor, pair.x, values[2 * i]);
    values[2 * i + 1] = fmaf(factor, pair.y, values[2 * i + 1]);
  }
}

/// Stores kChunks chunks of a row, at elements `column`, column + step, ..., of the branch's own
/// output, and of the gated sum. Every output is rounded to T once and the sum once more, whether
/// the branches' are kept or not. The sum may lie where an earlier output lies, so that the
/// compiler must not move reads ahead of stores: all are made before the first store.
template <class T, int kChunks>
__device__ __forceinline__ void store_chunks(const FwdParams& p, const Job& job, int token,
                                             int head, int column, int step,
                                             const uint4 (&chunks)[kChunks]) {
  const bool gated = p.gates.ptr != nullptr;
  float gate = 0.0f, earlier_gate[2] = {};
  uint4 earlier[2][kChunks];
  // What only some paths write occupies its registers wherever the compiler cannot rule out a use:
  // 32 of them throughout the loop over the keys.
  if constexpr (kChunks > 1)
    for (auto& row : earlier)
      for (uint4& chunk : row) chunk = uint4{};
  if (gated) {
    const T* gates = query_row<const T>(p.gates, p, job, token, head);
    gate = to_float(gates[p.branch]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (p.earlier[i].ptr == nullptr) continue;
      earlier_gate[i] = to_float(gates[p.earlier_branch[i]]);
      const T* row = query_row<const T>(p.earlier[i], p, job, token, head) + column;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        earlier[i][c] = *reinterpret_cast<const uint4*>(row + c * step);
    }
  }
  if (p.out.ptr) {
    T* row = query_row<T>(p.out, p, job, token, head) + column;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) *reinterpret_cast<uint4*>(row + c * step) = chunks[c];
  }
  if (!gated) return;
  T* row = query_row<T>(p.gated_out, p, job, token, head) + column;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    float sum[8] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (p.earlier[i].ptr) add_scaled<T>(sum, earlier_gate[i], earlier[i][c]);
    add_scaled<T>(sum, gate, chunks[c]);
    *reinterpret_cast<uint4*>(row + c * step) =
        make_uint4(pack2<T>(sum[0], sum[1]), pack2<T>(sum[2], sum[3]), pack2<T>(sum[4], sum[5]),
                   pack2<T>(sum[6], sum[7]));
  }
}

}  // namespace nsa::cuda
