// What the forward and the backward of phi's kinds `mlp` and `linear` share: the first product,
// W1 vec(x) for all tokens of all heads, an implicit GEMM with k = r * D + column over the keys
// c*d + r of token c.
//
// The position encoding is folded into the bias: W1 vec(x + pos) + b1 = W1 vec(x) + (W1 vec(pos) +
// b1), one float32 vector per weight head. It costs nothing per token, and x + pos is never
// rounded.
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

/// bias[hw][n] = b1[n] + w1[n] . vec(pos), zero in the padding. One block per (hw, n).
template <class T>
__global__ void __launch_bounds__(256)
    mlp_bias_kernel(MlpSizes sizes, const T* w1, const T* b1, const T* pos, float* bias) {
  __shared__ float warp_sums[8];
  const int64_t hw = blockIdx.x / sizes.padded_hidden, n = blockIdx.x % sizes.padded_hidden;
  float sum = 0.f;
  if (pos && n < sizes.hidden) {
    w1 += (hw * sizes.hidden + n) * sizes.block_elements();
    pos += hw * sizes.block_elements();
#pragma unroll 8
    for (int64_t k = threadIdx.x; k < sizes.block_elements(); k += 256)
      sum = fmaf(to_float(w1[k]), to_float(pos[k]), sum);
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) sum += warp_sums[i];
  if (b1 && n < sizes.hidden) sum += to_float(b1[hw * sizes.hidden + n]);
  bias[blockIdx.x] = sum;
}

template <class T>
void mlp_bias(const MlpSizes& sizes, const void* w1, const void* b1, const void* pos, float* bias,
              cudaStream_t stream) {
  mlp_bias_kernel<T><<<grid_size(sizes.weight_heads * sizes.padded_hidden), 256, 0, stream>>>(
      sizes, static_cast<const T*>(w1), static_cast<const T*>(b1), static_cast<const T*>(pos),
      bias);
  check_launch("mlp_bias_kernel");
}

/// Rows of this tile of 128 tokens: where they start in x and in a compressed tensor.
struct TokenTile {
  int64_t x_offset[kBlockM];    // -1: the row holds no token
  int64_t out_offset[kBlockM];  // -1: there is no such row

  template <class X, class Out>
  __device__ __forceinline__ void fill(const Sequences& seqs, int64_t first, const View<X>& x,
                                       const View<Out>& out) {
    for (int i = threadIdx.x; i < kBlockM; i += kGemmThreads) {
      x_offset[i] = out_offset[i] = -1;
      if (first + i >= seqs.rows) continue;
      const TokenPosition at = token_position(seqs, first + i);
      if (at.used) x_offset[i] = at.batch * x.batch + at.key * x.seq;
      out_offset[i] = at.batch * out.batch + at.token * out.seq;
    }
    __syncthreads();
  }
};

/// Rows of the tile of 128 tokens that starts at `first`.
__device__ __forceinline__ int tile_rows(const Sequences& seqs, int64_t first) {
  return static_cast<int>(seqs.rows - first < kBlockM ? seqs.rows - first : int64_t{kBlockM});
}

/// The tile at (m_tile, head, n_tile) of a grid with n fastest, so that the blocks that read the
/// same rows of A run side by side.
struct TileIndex {
  int64_t m, head, n;
  __device__ __forceinline__ TileIndex(int64_t heads, int64_t n_tiles)
      : m(blockIdx.x / n_tiles / heads),
        head(blockIdx.x / n_tiles % heads),
        n(blockIdx.x % n_tiles) {}
};

/// A = vec(x) of 128 tokens, B = W1. The steps walk r = 0, d, 2d, .., 1, d + 1, ..: key c*d + r + d
/// of this token is key (c+1)*d + r of the next, so a step finds the keys of the step before in L2.
template <class T, int kBlockN>
struct HiddenProblem {
  const T* x;               // of this head
  const T* w1;              // of this weight head, at the first row of the tile
  const TokenTile* tokens;  // in shared memory
  int64_t x_seq;
  int w1_rows;
  int dim, block_size, block_stride;
  bool x_aligned, w1_aligned;
  int r = 0, column = 0;

  __device__ __forceinline__ int64_t steps() const {
    return int64_t{block_size} * ceil_div(dim, kBlockK);
  }
  __device__ __forceinline__ void load(uint32_t smem_a, uint32_t smem_b) {
    const T* x_step = x + r * x_seq + column;
    const T* w1_step = w1 + int64_t{r} * dim + column;
    load_operand<OperandTile<Major::kK, kBlockM>, T>(
        smem_a, dim - column, x_aligned, [&](int row, int) -> const T* {
          const int64_t offset = tokens->x_offset[row];
          return offset < 0 ? nullptr : x_step + offset;
        });
    load_operand<OperandTile<Major::kK, kBlockN>, T>(
        smem_b, dim - column, w1_aligned, [&](int row, int) -> const T* {
          return row < w1_rows ? w1_step + row * (int64_t{block_size} * dim) : nullptr;
        });
    column += kBlockK;
    if (column < dim) return;
    column = 0;
    r += block_stride;
    if (r >= block_size) r -= block_size - 1;
  }
};

/// What becomes of pre = W1 vec(x + pos) + b1.
enum class HiddenResult {
  kGelu,  // gelu(pre) to the workspace, in T
  kPre,   // pre to the workspace, in float32
  kOut,   // pre is phi's output (`linear`)
};

struct HiddenArgs {
  MlpSizes sizes;
  InView x;
  const void* w1;
  const float* bias;  // (Hw, padded_hidden)
  void* workspace;    // (heads, rows, padded_hidden)
  OutView out;        // kOut only
  bool x_aligned, w1_aligned, out_aligned;
};

__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
}

template <class T, int kBlockN, HiddenResult kResult>
__global__ void __launch_bounds__(kGemmThreads, 2) mlp_hidden_kernel(HiddenArgs args) {
  __shared__ TokenTile tokens;
  const MlpSizes& sizes = args.sizes;
  const TileIndex tile(sizes.heads, ceil_div<int64_t>(sizes.hidden, kBlockN));
  const int64_t hw = sizes.weight_head(tile.head);
  const int64_t first_row = tile.m * kBlockM, first_column = tile.n * kBlockN;
  tokens.fill(sizes.seqs, first_row, args.x, args.out);
  HiddenProblem<T, kBlockN> problem{
      static_cast<const T*>(args.x.ptr) + tile.head * args.x.head,
      static_cast<const T*>(args.w1) + (hw * sizes.hidden + first_column) * sizes.block_elements(),
      &tokens,
      args.x.seq,
      static_cast<int>(sizes.hidden - first_column),
      static_cast<int>(sizes.dim),
      sizes.seqs.block_size,
      sizes.seqs.block_stride,
      args.x_aligned,
      args.w1_aligned};
  gemm_tile<T, Major::kK, Major::kK, kBlockN>(
      problem.steps(), problem, [&](int row, int tile_column, float4 v) {
        const int64_t column = first_column + tile_column;
        if (column >= sizes.padded_hidden || tokens.out_offset[row] < 0) return;
        const float4 bias =
            __ldg(reinterpret_cast<const float4*>(args.bias + hw * sizes.padded_hidden + column));
        v = make_float4(v.x + bias.x, v.y + bias.y, v.z + bias.z, v.w + bias.w);
        const int64_t offset =
            (tile.head * sizes.seqs.rows + first_row + row) * sizes.padded_hidden + column;
        if constexpr (kResult == HiddenResult::kGelu) {
          *reinterpret_cast<uint2*>(static_cast<T*>(args.workspace) + offset) =
              make_uint2(pack2<T>(gelu(v.x), gelu(v.y)), pack2<T>(gelu(v.z), gelu(v.w)));
        } else if constexpr (kResult == HiddenResult::kPre) {
          *reinterpret_cast<float4*>(static_cast<float*>(args.workspace) + offset) = v;
        } else {
          if (tokens.x_offset[row] < 0) v = {};
          store4<T>(
              static_cast<T*>(args.out.ptr) + tokens.out_offset[row] + tile.head * args.out.head,
              column, sizes.dim_out, args.out_aligned, v);
        }
      });
}

template <class T, HiddenResult kResult>
void mlp_hidden(const HiddenArgs& args, cudaStream_t stream) {
  const MlpSizes& sizes = args.sizes;
  dispatch_block_n(sizes.hidden, [&](auto block_n) {
    constexpr int kBlockN = block_n.value;
    launch_gemm("mlp_hidden_kernel", mlp_hidden_kernel<T, kBlockN, kResult>,
                ceil_div<int64_t>(sizes.seqs.rows, kBlockM) * sizes.heads *
                    ceil_div<int64_t>(sizes.hidden, kBlockN),
                gemm_shared_bytes<Major::kK, Major::kK, kBlockN>(), stream, args);
  });
}

}  // namespace nsa::cuda::compress
