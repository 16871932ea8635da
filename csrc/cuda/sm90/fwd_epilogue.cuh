// From a warpgroup's accumulators to the rows of the outputs.
#pragma once

#include "cuda/device/softmax.cuh"
#include "cuda/sm80/fwd_job.cuh"

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
/// still to be divided by the row's sum.
template <class T, int kDimV, bool kNormalize>
__device__ __forceinline__ void write_rows(const sm80::FwdParams& p, const sm80::Job& job, int row,
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
      *sm80::query_row<float>(p.lse, p, job, token, head) = stats[half].lse2(p.scale_log2) * kLn2;
    if (p.v.ptr == nullptr) continue;
    const bool write = valid && p.out.ptr, gated = valid && p.gates.ptr;
    const float gate =
        gated ? to_float(sm80::query_row<const T>(p.gates, p, job, token, head)[p.branch]) : 0.0f;
    T* out = write ? sm80::query_row<T>(p.out, p, job, token, head) : nullptr;
    T* sum = gated ? sm80::query_row<T>(p.gated_out, p, job, token, head) : nullptr;
#pragma unroll
    for (int chunk = 0; chunk < kDimV / 32; ++chunk) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = o + (chunk * 4 + i) * 4 + 2 * half;
        w[i] = pack2<T>(pair[0] * scale, pair[1] * scale);
      }
      quad_transpose(w);
      const int column = chunk * 32 + quad_lane * 8;
      if (write) *reinterpret_cast<uint4*>(out + column) = make_uint4(w[0], w[1], w[2], w[3]);
      if (gated) {
        auto* target = reinterpret_cast<uint4*>(sum + column);
        const uint4 old = p.accumulate ? *target : make_uint4(0, 0, 0, 0);
        const uint32_t earlier[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 mine = unpack2<T>(w[i]), other = unpack2<T>(earlier[i]);
          w[i] = pack2<T>(fmaf(gate, mine.x, other.x), fmaf(gate, mine.y, other.y));
        }
        *target = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

}  // namespace nsa::cuda::sm90
