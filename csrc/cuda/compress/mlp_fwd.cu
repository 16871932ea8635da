// phi of kinds `mlp` and `linear`, forward: out = W2 gelu(W1 vec(x + pos) + b1) + b2.

#include "cuda/compress/mlp.cuh"
#include "nsa/api.h"

namespace nsa::cuda {
namespace compress {
namespace {

/// hidden = gelu(pre) in T, (heads, rows, padded_hidden); or, for `linear`, out = pre. One thread
/// for four columns.
template <class T, bool kLinear>
__global__ void __launch_bounds__(256, 4)
    mlp_activation_kernel(HiddenPartials partials, T* hidden, OutView out, bool out_aligned) {
  const MlpSizes& sizes = partials.sizes;
  const int64_t pieces = sizes.padded_hidden / 4;
  const int64_t index = blockIdx.x * int64_t{256} + threadIdx.x;
  if (index >= sizes.heads * sizes.seqs.rows * pieces) return;
  const int64_t column = index % pieces * 4, head_row = index / pieces;
  const int64_t head = head_row / sizes.seqs.rows, row = head_row % sizes.seqs.rows;
  float4 v = partials.pre(head, row, column);
  if constexpr (kLinear) {
    const TokenPosition at = token_position(sizes.seqs, row);
    if (!at.used()) v = {};
    store4<T>(
        static_cast<T*>(out.ptr) + at.batch * out.batch + at.token * out.seq + head * out.head,
        column, sizes.dim_out, out_aligned, v);
  } else {
    float derivative;
    gelu(v.x, v.x, derivative);
    gelu(v.y, v.y, derivative);
    gelu(v.z, v.z, derivative);
    gelu(v.w, v.w, derivative);
    *reinterpret_cast<uint2*>(hidden + head_row * sizes.padded_hidden + column) =
        make_uint2(pack2<T>(v.x, v.y), pack2<T>(v.z, v.w));
  }
}

/// A = gelu(pre), B = W2, both with k = hidden contiguous.
template <class T, int kBlockN>
struct OutProblem {
  const T* hidden;  // of this head, at the first row of the tile
  const T* w2;      // of this weight head, at the first row of the tile
  int rows, hidden_stride, w2_rows, w2_stride;
  bool w2_aligned;
  int column = 0;

  __device__ __forceinline__ void load(uint32_t smem_a, uint32_t smem_b) {
    load_operand<OperandTile<Major::kK, kBlockM>, T>(
        smem_a, hidden_stride - column, true, [&](int row, int) -> const T* {
          return row < rows ? hidden + int64_t{row} * hidden_stride + column : nullptr;
        });
    load_operand<OperandTile<Major::kK, kBlockN>, T>(
        smem_b, w2_stride - column, w2_aligned, [&](int row, int) -> const T* {
          return row < w2_rows ? w2 + int64_t{row} * w2_stride + column : nullptr;
        });
    column += kBlockK;
  }
};

template <class T, int kBlockN>
__global__ void __launch_bounds__(kGemmThreads, 2)
    mlp_out_kernel(MlpSizes sizes, const T* hidden, const T* w2, const T* b2, OutView out,
                   bool w2_aligned, bool out_aligned) {
  __shared__ int64_t out_offset[kBlockM];  // -1: there is no such row
  __shared__ bool used[kBlockM];           // false: it holds no token, and is zero
  const TileIndex tile(blockIdx.x, sizes.heads, ceil_div<int64_t>(sizes.dim_out, kBlockN));
  const int64_t hw = sizes.weight_head(tile.head);
  const int64_t first_row = tile.m * kBlockM, first_column = tile.n * kBlockN;
  for (int i = threadIdx.x; i < kBlockM; i += kGemmThreads) {
    out_offset[i] = -1;
    used[i] = false;
    if (first_row + i >= sizes.seqs.rows) continue;
    const TokenPosition at = token_position(sizes.seqs, first_row + i);
    out_offset[i] = at.batch * out.batch + at.token * out.seq;
    used[i] = at.used();
  }
  __syncthreads();
  OutProblem<T, kBlockN> problem{
      hidden + (tile.head * sizes.seqs.rows + first_row) * sizes.padded_hidden,
      w2 + (hw * sizes.dim_out + first_column) * sizes.hidden,
      tile_rows(sizes.seqs, first_row),
      static_cast<int>(sizes.padded_hidden),
      static_cast<int>(sizes.dim_out - first_column),
      static_cast<int>(sizes.hidden),
      w2_aligned};
  // Relative to the first column of the tile.
  T* out_head = static_cast<T*>(out.ptr) + tile.head * out.head + first_column;
  const T* bias = b2 ? b2 + hw * sizes.dim_out + first_column : nullptr;
  gemm_tile<T, Major::kK, Major::kK, kBlockN>(
      ceil_div<int64_t>(sizes.hidden, kBlockK), problem, [&](int row, int column, float4 v) {
        if (out_offset[row] < 0) return;
        float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (bias && column + i < problem.w2_rows) values[i] += to_float(bias[column + i]);
          if (!used[row]) values[i] = 0.f;
        }
        store4<T>(out_head + out_offset[row], column, problem.w2_rows, out_aligned,
                  make_float4(values[0], values[1], values[2], values[3]));
      });
}

struct MlpFwdWorkspace {
  HiddenPartials partials;
  void* hidden;  // (heads, rows, padded_hidden) of the inputs' dtype; none when linear
  int64_t bytes;
};
MlpFwdWorkspace layout(const CompressMlpFwd& p, const MlpSizes& sizes, void* base) {
  WorkspaceCursor cursor(base);
  MlpFwdWorkspace w{};
  w.partials = hidden_partials(sizes, cursor);
  if (p.w2) w.hidden = cursor.take<uint16_t>(sizes.heads * sizes.seqs.rows * sizes.padded_hidden);
  w.bytes = cursor.bytes();
  return w;
}

template <class T, bool kLinear>
void mlp_activation(const MlpFwdWorkspace& w, const OutView& out, cudaStream_t stream) {
  const MlpSizes& sizes = w.partials.sizes;
  const int64_t threads = sizes.heads * sizes.seqs.rows * (sizes.padded_hidden / 4);
  if (threads == 0) return;
  mlp_activation_kernel<T, kLinear><<<grid_size(ceil_div<int64_t>(threads, 256)), 256, 0, stream>>>(
      w.partials, static_cast<T*>(w.hidden), out, rows_aligned16(out));
  check_launch("mlp_activation_kernel");
}

}  // namespace
}  // namespace compress

int64_t compress_mlp_fwd_workspace(const CompressMlpFwd& params) {
  return compress::layout(params, compress::mlp_sizes(params), nullptr).bytes;
}

void compress_mlp_fwd(const CompressMlpFwd& params, void* workspace, Stream cuda_stream) {
  using namespace compress;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const MlpSizes sizes = mlp_sizes(params);
  if (sizes.seqs.rows == 0 || sizes.heads == 0 || sizes.dim_out == 0) return;
  const MlpFwdWorkspace w = layout(params, sizes, workspace);
  mlp_hidden(params.shape.dtype, w.partials, params.x, params.w1, params.b1, params.pos, stream);
  dispatch_dtype(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!params.w2) return mlp_activation<T, true>(w, params.out, stream);
    mlp_activation<T, false>(w, params.out, stream);
    dispatch_block_n(sizes.dim_out, [&](auto block_n) {
      constexpr int kBlockN = block_n.value;
      launch_gemm("mlp_out_kernel", mlp_out_kernel<T, kBlockN>,
                  ceil_div<int64_t>(sizes.seqs.rows, kBlockM) * sizes.heads *
                      ceil_div<int64_t>(sizes.dim_out, kBlockN),
                  gemm_shared_bytes<Major::kK, Major::kK, kBlockN>(), stream, sizes,
                  static_cast<const T*>(w.hidden), static_cast<const T*>(params.w2),
                  static_cast<const T*>(params.b2), params.out,
                  is_aligned16(params.w2) && sizes.hidden % 8 == 0, rows_aligned16(params.out));
    });
  });
}

}  // namespace nsa::cuda
