// Weights of the selection blocks (eq. 9), unnormalised, of one chunk of compressed tokens: another
// product on the tensor cores, of the chunk's probabilities with the constant matrix of overlaps.
#pragma once

#include "cuda/decode/params.h"
#include "cuda/device/ptx.cuh"
#include "nsa/geometry.h"

namespace nsa::cuda::decode {

/// Chunks start with a selection block. Column j of the matrix is block j of the chunk, and the
/// column after the last one is the next chunk's first block, into which the last tokens reach.
class BlockWeights {
 public:
  __device__ __forceinline__ BlockWeights(const DecodeParams& p, int lane)
      : blocks_(kChunk >> (p.select_shift - p.stride_shift)), column_((lane & 3) * 2) {
    const int token = (lane & 3) * 2, block = lane >> 2;
    BlockConfig strides{};  // lengths in units of d
    strides.block_size = p.config.block_size >> p.stride_shift;
    strides.block_stride = 1;
    strides.select_size = 1 << (p.select_shift - p.stride_shift);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int c = token + 8 * k, j = block + 8 * n;
        overlaps_[n][k] =
            pack2<bf16>(overlap_weight(c, j, strides), overlap_weight(c + 1, j, strides));
      }
    }
  }

  /// p: the chunk's probabilities, two n8 tiles of accumulators; reference of rows g and g + 8.
  /// weights, carries: where the row of this lane's quad starts; null: a row that does not exist.
  __device__ __forceinline__ void store(const float (&p0)[4], const float (&p1)[4],
                                        const float (&reference)[2], float* const (&weights)[2],
                                        float2* const (&carries)[2], int chunk) const {
    // The rounding of one bf16 (2^-9) would reorder blocks; two of them leave 2^-17, over the whole
    // range of float32.
    uint32_t high[4], low[4];
    const float p[8] = {p0[0], p0[1], p0[2], p0[3], p1[0], p1[1], p1[2], p1[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = pack2<bf16>(p[2 * i], p[2 * i + 1]);
      const float2 rounded = unpack2<bf16>(high[i]);
      low[i] = pack2<bf16>(p[2 * i] - rounded.x, p[2 * i + 1] - rounded.y);
    }
    float sums[2][4] = {};
    mma_16816<bf16>(sums[0], low, overlaps_[0][0], overlaps_[0][1]);
    mma_16816<bf16>(sums[0], high, overlaps_[0][0], overlaps_[0][1]);
    if (blocks_ >= 8) {
      mma_16816<bf16>(sums[1], low, overlaps_[1][0], overlaps_[1][1]);
      mma_16816<bf16>(sums[1], high, overlaps_[1][0], overlaps_[1][1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (weights[half] == nullptr) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = column_ + 8 * n;
        const float2 pair = make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
        if (column < blocks_)
          *reinterpret_cast<float2*>(weights[half] + chunk * blocks_ + column) = pair;
        if (column == blocks_) carries[half][chunk] = make_float2(pair.x, reference[half]);
      }
      // Blocks of one token each: l = d = l', nothing is carried.
      if (blocks_ == kChunk && column_ == 0)
        carries[half][chunk] = make_float2(0.0f, reference[half]);
    }
  }

 private:
  int blocks_, column_;
  uint32_t overlaps_[2][2];
};

}  // namespace nsa::cuda::decode
