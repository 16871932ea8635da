// What the forward and the backward of phi's kinds `mlp` and `linear` share: sizes, the bias, and
// the first product, whose result both read as float32 partial sums.
#pragma once

#include <algorithm>

#include "cuda/compress/gemm.cuh"
#include "cuda/compress/rows.cuh"
#include "nsa/params.h"

namespace nsa::cuda::compress {

/// phi's sizes. Hidden vectors and dout are kept in the workspace as (heads, rows, padded width).
struct MlpSizes {
  Sequences seqs;
  int64_t heads, weight_heads, dim, hidden, dim_out;
  int64_t padded_hidden, padded_out;  // multiples of 8: rows of whole 16-byte pieces

  __host__ __device__ int64_t block_elements() const { return seqs.block_size * dim; }
  __host__ __device__ int64_t heads_per_weight() const {
    return weight_heads ? heads / weight_heads : 0;
  }
  __device__ int64_t weight_head(int64_t head) const { return weight_heads == 1 ? 0 : head; }
};

template <class Params>
MlpSizes mlp_sizes(const Params& p) {
  const CompressShape& shape = p.shape;
  if (shape.dim < 8 || shape.dim % 8)
    throw std::runtime_error("compress_mlp: dim must be a multiple of 8, got " +
                             std::to_string(shape.dim));
  return {make_sequences(shape),
          shape.heads,
          shape.weight_heads,
          shape.dim,
          p.hidden,
          p.dim_out,
          round_up<int64_t>(p.hidden, 8),
          round_up<int64_t>(p.dim_out, 8)};
}

template <class... Params, class... Args>
void launch_gemm(const char* name, void (*kernel)(Params...), int64_t blocks, int shared_bytes,
                 cudaStream_t stream, const Args&... args) {
  if (blocks == 0) return;
  allow_shared_memory(kernel, shared_bytes);
  kernel<<<grid_size(blocks), kGemmThreads, shared_bytes, stream>>>(args...);
  check_launch(name);
}

/// Calls body(std::integral_constant<int, kBlockN>) with the tile width for `columns`.
template <class Body>
void dispatch_block_n(int64_t columns, Body&& body) {
  if (choose_block_n(columns) == 64)
    body(std::integral_constant<int, 64>{});
  else
    body(std::integral_constant<int, 128>{});
}

/// Rows of the tile of 128 tokens that starts at `first`.
__device__ __forceinline__ int tile_rows(const Sequences& seqs, int64_t first) {
  return static_cast<int>(seqs.rows - first < kBlockM ? seqs.rows - first : int64_t{kBlockM});
}

/// Tile `index` of (m, head, n) tiles with n fastest, so that the blocks that read the same rows of
/// A run side by side.
struct TileIndex {
  int64_t m, head, n;
  __device__ __forceinline__ TileIndex(int64_t index, int64_t heads, int64_t n_tiles)
      : m(index / n_tiles / heads), head(index / n_tiles % heads), n(index % n_tiles) {}
};

/// pre = W1 vec(x + pos) + b1 as the backward and the forward read it: a bias and float32 partial
/// sums over k, few enough to be added where they are used.
struct HiddenPartials {
  MlpSizes sizes;
  int64_t splits;
  float* bias;     // (Hw, padded_hidden): b1 + W1 vec(pos), zero in the padding
  float* partial;  // (splits, heads, rows, padded_hidden)

  int64_t bias_elements() const { return sizes.weight_heads * sizes.padded_hidden; }
  int64_t partial_elements() const {
    return splits * sizes.heads * sizes.seqs.rows * sizes.padded_hidden;
  }
  /// pre of columns column .. column + 3 (a multiple of 4, below padded_hidden).
  __device__ __forceinline__ float4 pre(int64_t head, int64_t row, int64_t column) const {
    const int64_t stride = sizes.heads * sizes.seqs.rows * sizes.padded_hidden;
    const float* src = partial + (head * sizes.seqs.rows + row) * sizes.padded_hidden + column;
    float4 sum = __ldg(reinterpret_cast<const float4*>(
        bias + sizes.weight_head(head) * sizes.padded_hidden + column));
    for (int64_t i = 0; i < splits; ++i, src += stride) {
      const float4 v = *reinterpret_cast<const float4*>(src);
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    return sum;
  }
};

HiddenPartials hidden_partials(const MlpSizes& sizes, WorkspaceCursor& cursor);

/// Computes them.
void mlp_hidden(DType dtype, const HiddenPartials& out, const InView& x, const void* w1,
                const void* b1, const void* pos, cudaStream_t stream);

/// x Phi(x) and its derivative Phi(x) + x phi(x), with the normal distribution Phi, its density
/// phi.
__device__ __forceinline__ void gelu(float x, float& value, float& derivative) {
  const float cdf = 0.5f * (1.f + erff(x * 0.70710678118654752f));
  value = x * cdf;
  derivative = fmaf(x * 0.39894228040143268f, __expf(-0.5f * x * x), cdf);
}

}  // namespace nsa::cuda::compress
