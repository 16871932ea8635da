// The first product of phi's kinds `mlp` and `linear`: W1 vec(x) for all tokens of all heads, an
// implicit GEMM with k = r * D + column over the keys c*d + r of token c.
//
// The position encoding is folded into the bias: W1 vec(x + pos) + b1 = W1 vec(x) + (W1 vec(pos) +
// b1), one float32 vector per weight head. It costs nothing per token, and x + pos is never
// rounded.

#include <algorithm>

#include "cuda/compress/mlp.cuh"

namespace nsa::cuda::compress {

namespace {

// k = l * D is long (4096 by default) and tokens may be few: the k steps are split so that about
// two blocks run on each of the 132 SMs of an H100, in pieces of at least kMinSteps. A function of
// the shape alone, so that the bits don't depend on the GPU.
constexpr int64_t kTargetBlocks = 264, kMinSteps = 4;

int64_t num_steps(const MlpSizes& sizes) {
  return sizes.seqs.block_size * ceil_div<int64_t>(sizes.dim, kBlockK);
}
int64_t num_tiles(const MlpSizes& sizes) {
  return ceil_div<int64_t>(sizes.seqs.rows, kBlockM) * sizes.heads *
         ceil_div<int64_t>(sizes.hidden, choose_block_n(sizes.hidden));
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

/// A = vec(x) of 128 tokens, B = W1. The steps walk r = 0, d, 2d, .., 1, d + 1, ..: key c*d + r + d
/// of this token is key (c+1)*d + r of the next, so a step finds the keys of the step before in L2.
template <class T, int kBlockN>
struct HiddenProblem {
  const T* x;               // of this head
  const T* w1;              // of this weight head, at the first row of the tile
  const int64_t* x_offset;  // where each token starts in x, -1: the row holds none; shared memory
  int64_t x_seq;
  int w1_rows, dim, block_size, block_stride;
  bool x_aligned, w1_aligned;
  int r, column;

  __device__ __forceinline__ void load(uint32_t smem_a, uint32_t smem_b) {
    const T* x_step = x + r * x_seq + column;
    const T* w1_step = w1 + int64_t{r} * dim + column;
    load_operand<OperandTile<Major::kK, kBlockM>, T>(
        smem_a, dim - column, x_aligned, [&](int row, int) -> const T* {
          const int64_t offset = x_offset[row];
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

template <class T, int kBlockN>
__global__ void __launch_bounds__(kGemmThreads, 2)
    mlp_hidden_kernel(HiddenPartials out, int64_t steps, InView x, const T* w1, bool x_aligned,
                      bool w1_aligned) {
  __shared__ int64_t x_offset[kBlockM];
  const MlpSizes& sizes = out.sizes;
  const Sequences& seqs = sizes.seqs;
  const int64_t split = blockIdx.x % out.splits;
  const TileIndex tile(blockIdx.x / out.splits, sizes.heads,
                       ceil_div<int64_t>(sizes.hidden, kBlockN));
  const int64_t first_row = tile.m * kBlockM, first_column = tile.n * kBlockN;
  for (int i = threadIdx.x; i < kBlockM; i += kGemmThreads) {
    x_offset[i] = -1;
    if (first_row + i >= seqs.rows) continue;
    const TokenPosition at = token_position(seqs, first_row + i);
    if (at.used()) x_offset[i] = at.batch * x.batch + at.key * x.seq;
  }
  __syncthreads();
  const int begin = static_cast<int>(steps * split / out.splits);
  const int end = static_cast<int>(steps * (split + 1) / out.splits);
  const int steps_per_r = static_cast<int>(ceil_div<int64_t>(sizes.dim, kBlockK));
  const int overlap = seqs.block_size / seqs.block_stride, r_index = begin / steps_per_r;
  HiddenProblem<T, kBlockN> problem{
      static_cast<const T*>(x.ptr) + tile.head * x.head,
      w1 + (sizes.weight_head(tile.head) * sizes.hidden + first_column) * sizes.block_elements(),
      x_offset,
      x.seq,
      static_cast<int>(sizes.hidden - first_column),
      static_cast<int>(sizes.dim),
      seqs.block_size,
      seqs.block_stride,
      x_aligned,
      w1_aligned,
      r_index % overlap * seqs.block_stride + r_index / overlap,
      begin % steps_per_r * kBlockK};
  float* partial =
      out.partial +
      ((split * sizes.heads + tile.head) * seqs.rows + first_row) * sizes.padded_hidden +
      first_column;
  const int rows = tile_rows(seqs, first_row);
  const int columns = static_cast<int>(sizes.padded_hidden - first_column);
  gemm_tile<T, Major::kK, Major::kK, kBlockN>(
      end - begin, problem, [&](int row, int column, float4 v) {
        if (row < rows && column < columns)
          *reinterpret_cast<float4*>(partial + row * sizes.padded_hidden + column) = v;
      });
}

}  // namespace

HiddenPartials hidden_partials(const MlpSizes& sizes, WorkspaceCursor& cursor) {
  HiddenPartials p{sizes, 1, nullptr, nullptr};
  if (const int64_t tiles = num_tiles(sizes))
    p.splits = std::clamp<int64_t>(kTargetBlocks / tiles, 1,
                                   std::max<int64_t>(1, num_steps(sizes) / kMinSteps));
  p.bias = cursor.take<float>(p.bias_elements());
  p.partial = cursor.take<float>(p.partial_elements());
  return p;
}

void mlp_hidden(DType dtype, const HiddenPartials& out, const InView& x, const void* w1,
                const void* b1, const void* pos, cudaStream_t stream) {
  const MlpSizes& sizes = out.sizes;
  if (out.partial_elements() == 0) return;
  dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    mlp_bias_kernel<T><<<grid_size(out.bias_elements()), 256, 0, stream>>>(
        sizes, static_cast<const T*>(w1), static_cast<const T*>(b1), static_cast<const T*>(pos),
        out.bias);
    check_launch("mlp_bias_kernel");
    dispatch_block_n(sizes.hidden, [&](auto block_n) {
      constexpr int kBlockN = block_n.value;
      launch_gemm("mlp_hidden_kernel", mlp_hidden_kernel<T, kBlockN>, num_tiles(sizes) * out.splits,
                  gemm_shared_bytes<Major::kK, Major::kK, kBlockN>(), stream, out, num_steps(sizes),
                  x, static_cast<const T*>(w1), rows_aligned16(x), is_aligned16(w1));
    });
  });
}

}  // namespace nsa::cuda::compress
