// The backward of phi's kinds `mlp` and `linear`: dpre and dx. See mlp_bwd.cuh.

#include "cuda/compress/mlp_bwd.cuh"
#include "nsa/api.h"

namespace nsa::cuda {
namespace compress {
namespace {

/// dout as (heads, rows, padded_out), rows without a token and the padding zeroed, so that nothing
/// after it needs to know about packed batches or strides; and where each token starts in x.
template <class T>
__global__ void __launch_bounds__(256)
    mlp_gather_dout_kernel(MlpSizes sizes, InView x, InView dout, bool aligned, T* gathered,
                           int64_t* x_offset) {
  const int64_t pieces = sizes.padded_out / 8;
  const int64_t index = blockIdx.x * int64_t{256} + threadIdx.x;
  if (index >= sizes.heads * sizes.seqs.rows * pieces) return;
  const int64_t column = index % pieces * 8, head_row = index / pieces;
  const int64_t head = head_row / sizes.seqs.rows, row = head_row % sizes.seqs.rows;
  const TokenPosition at = token_position(sizes.seqs, row);
  if (head == 0 && column == 0)
    x_offset[row] = at.used() ? at.batch * x.batch + at.key * x.seq : -1;
  uint4 piece = {};
  if (at.used()) {
    const T* src = static_cast<const T*>(dout.ptr) + at.batch * dout.batch + at.token * dout.seq +
                   head * dout.head + column;
    if (aligned && column + 8 <= sizes.dim_out) {
      piece = load8<T, true>(src);
    } else {
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(src);
      uint32_t values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = column + i < sizes.dim_out ? bits[i] : 0;
      piece = make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16,
                         values[4] | values[5] << 16, values[6] | values[7] << 16);
    }
  }
  *reinterpret_cast<uint4*>(gathered + head_row * sizes.padded_out + column) = piece;
}

/// A = dout, B = W2 with n = hidden contiguous.
template <class T, int kBlockN>
struct DhiddenProblem {
  const T* dout;  // of this head, at the first row of the tile
  const T* w2;    // of this weight head, at the first column of the tile
  int rows, dout_stride, w2_columns, w2_stride, k_end;
  bool w2_aligned;
  int k = 0;

  __device__ __forceinline__ void load(uint32_t smem_a, uint32_t smem_b) {
    load_operand<OperandTile<Major::kK, kBlockM>, T>(
        smem_a, dout_stride - k, true, [&](int row, int) -> const T* {
          return row < rows ? dout + int64_t{row} * dout_stride + k : nullptr;
        });
    load_operand<OperandTile<Major::kMN, kBlockN>, T>(
        smem_b, w2_columns, w2_aligned, [&](int row, int) -> const T* {
          return k + row < k_end ? w2 + int64_t{k + row} * w2_stride : nullptr;
        });
    k += kBlockK;
  }
};

/// dhidden = dout W2, in float32.
template <class T, int kBlockN>
__global__ void __launch_bounds__(kGemmThreads, 2)
    mlp_dhidden_kernel(MlpSizes sizes, const T* dout, const T* w2, float* dhidden,
                       bool w2_aligned) {
  const TileIndex tile(blockIdx.x, sizes.heads, ceil_div<int64_t>(sizes.hidden, kBlockN));
  const int64_t first_row = tile.m * kBlockM, first_column = tile.n * kBlockN;
  const int64_t head_row = tile.head * sizes.seqs.rows + first_row;
  DhiddenProblem<T, kBlockN> problem{
      dout + head_row * sizes.padded_out,
      w2 + sizes.weight_head(tile.head) * sizes.dim_out * sizes.hidden + first_column,
      tile_rows(sizes.seqs, first_row),
      static_cast<int>(sizes.padded_out),
      static_cast<int>(sizes.hidden - first_column),
      static_cast<int>(sizes.hidden),
      static_cast<int>(sizes.dim_out),
      w2_aligned};
  dhidden += head_row * sizes.padded_hidden + first_column;
  const int columns = static_cast<int>(sizes.padded_hidden - first_column);
  gemm_tile<T, Major::kK, Major::kMN, kBlockN>(
      ceil_div<int64_t>(sizes.dim_out, kBlockK), problem, [&](int row, int column, float4 v) {
        if (row < problem.rows && column < columns)
          *reinterpret_cast<float4*>(dhidden + row * sizes.padded_hidden + column) = v;
      });
}

/// dpre = dhidden * gelu'(pre) and hidden = gelu(pre). One thread for four columns.
template <class T>
__global__ void __launch_bounds__(256, 4)
    mlp_dpre_kernel(HiddenPartials partials, const float* dhidden, T* hidden, T* dpre) {
  const MlpSizes& sizes = partials.sizes;
  const int64_t pieces = sizes.padded_hidden / 4;
  const int64_t index = blockIdx.x * int64_t{256} + threadIdx.x;
  if (index >= sizes.heads * sizes.seqs.rows * pieces) return;
  const int64_t column = index % pieces * 4, head_row = index / pieces;
  const float4 x = partials.pre(head_row / sizes.seqs.rows, head_row % sizes.seqs.rows, column);
  const float4 grad = *reinterpret_cast<const float4*>(dhidden + index * 4);
  float4 value, derivative;
  gelu(x.x, value.x, derivative.x);
  gelu(x.y, value.y, derivative.y);
  gelu(x.z, value.z, derivative.z);
  gelu(x.w, value.w, derivative.w);
  *reinterpret_cast<uint2*>(hidden + index * 4) =
      make_uint2(pack2<T>(value.x, value.y), pack2<T>(value.z, value.w));
  *reinterpret_cast<uint2*>(dpre + index * 4) =
      make_uint2(pack2<T>(grad.x * derivative.x, grad.y * derivative.y),
                 pack2<T>(grad.z * derivative.z, grad.w * derivative.w));
}

// dx, over the segments of rows.cuh: for each r in [0, d)
//   dx[j*d + r] = sum_i dpre[j - i] W1[:, (i*d + r)*D : (i*d + r + 1)*D],
// a GEMM with k = (i, hidden). No two threads write one key. k is short (256 by default), so a
// block does several r in turn, where there is enough work for all SMs.

struct SegmentTile {
  int64_t dx_offset[kBlockM];  // of key j*d + r; -1: there is none
  int32_t row[kBlockM];        // of token j, where the sequence has it
  int32_t j[kBlockM], tokens[kBlockM];
};

template <class T, int kBlockN>
struct DxProblem {
  const MlpSizes& sizes;
  const SegmentTile& segments;
  const T* dpre;  // of this head
  const T* w1;    // of this weight head, at offset r and the first column of the tile
  int columns;
  bool w1_aligned;
  int i = 0, k = 0;

  __device__ __forceinline__ void load(uint32_t smem_a, uint32_t smem_b) {
    const int hidden = static_cast<int>(sizes.hidden);
    const int dpre_stride = static_cast<int>(sizes.padded_hidden);
    load_operand<OperandTile<Major::kK, kBlockM>, T>(
        smem_a, dpre_stride - k, true, [&](int row, int) -> const T* {
          const int token = segments.j[row] - i;
          if (token < 0 || token >= segments.tokens[row]) return nullptr;
          return dpre + int64_t{segments.row[row] - i} * dpre_stride + k;
        });
    const T* w1_step = w1 + i * (sizes.seqs.block_stride * sizes.dim) + k * sizes.block_elements();
    load_operand<OperandTile<Major::kMN, kBlockN>, T>(
        smem_b, columns, w1_aligned, [&](int row, int) -> const T* {
          return k + row < hidden ? w1_step + row * sizes.block_elements() : nullptr;
        });
    k += kBlockK;
    if (k < hidden) return;
    k = 0;
    ++i;
  }
};

template <class T, int kBlockN>
__global__ void __launch_bounds__(kGemmThreads, 2)
    mlp_dx_kernel(MlpSizes sizes, const T* dpre, const T* w1, OutView dx, bool w1_aligned,
                  bool dx_aligned) {
  __shared__ SegmentTile segments;
  const Sequences& seqs = sizes.seqs;
  // r fastest: the blocks that read the same dpre run side by side and write neighbouring keys.
  const int64_t n_tiles = ceil_div<int64_t>(sizes.dim, kBlockN);
  const int r = blockIdx.x % seqs.block_stride;
  int64_t rest = blockIdx.x / seqs.block_stride;
  const int64_t first_column = rest % n_tiles * kBlockN;
  rest /= n_tiles;
  const int64_t head = rest % sizes.heads, first_segment = rest / sizes.heads * kBlockM;
  for (int i = threadIdx.x; i < kBlockM; i += kGemmThreads) {
    segments.dx_offset[i] = -1;
    segments.tokens[i] = segments.j[i] = segments.row[i] = 0;
    if (first_segment + i >= num_segments(seqs)) continue;
    const SegmentPosition at = segment_position(seqs, first_segment + i);
    if (r < at.keys) segments.dx_offset[i] = at.batch * dx.batch + (at.key + r) * dx.seq;
    segments.row[i] = static_cast<int32_t>(at.row);
    segments.j[i] = static_cast<int32_t>(at.j);
    segments.tokens[i] = static_cast<int32_t>(at.tokens);
  }
  __syncthreads();
  const int64_t steps =
      seqs.block_size / seqs.block_stride * ceil_div<int64_t>(sizes.hidden, kBlockK);
  DxProblem<T, kBlockN> problem{
      sizes,
      segments,
      dpre + head * seqs.rows * sizes.padded_hidden,
      w1 + sizes.weight_head(head) * sizes.hidden * sizes.block_elements() + r * sizes.dim +
          first_column,
      static_cast<int>(sizes.dim - first_column),
      w1_aligned};
  T* dx_head = static_cast<T*>(dx.ptr) + head * dx.head;
  gemm_tile<T, Major::kK, Major::kMN, kBlockN>(
      steps, problem, [&](int row, int tile_column, float4 v) {
        const int64_t offset = segments.dx_offset[row];
        if (offset < 0) return;
        store4<T>(dx_head + offset, first_column + tile_column, sizes.dim, dx_aligned, v);
      });
}

MlpBwdWorkspace layout(const CompressMlpBwd& p, const MlpSizes& sizes, void* base) {
  WorkspaceCursor cursor(base);
  MlpBwdWorkspace w{};
  const int64_t head_rows = sizes.heads * sizes.seqs.rows;
  w.x_offset = cursor.take<int64_t>(sizes.seqs.rows);
  w.dout = cursor.take<uint16_t>(head_rows * sizes.padded_out);
  w.dpre = w.dout;
  w.splits = mlp_bwd_splits(sizes);
  if (p.w2) {
    w.partials = hidden_partials(sizes, cursor);
    w.dhidden = cursor.take<float>(head_rows * sizes.padded_hidden);
    w.hidden = cursor.take<uint16_t>(head_rows * sizes.padded_hidden);
    w.dpre = cursor.take<uint16_t>(head_rows * sizes.padded_hidden);
    w.w2_partial =
        cursor.take<float>(sizes.weight_heads * w.splits.w2 * sizes.dim_out * sizes.padded_hidden);
  }
  w.w1_partial =
      cursor.take<float>(sizes.weight_heads * w.splits.w1 * sizes.hidden * sizes.block_elements());
  w.column_partial = cursor.take<float>(sizes.heads * w.splits.column_chunks *
                                        std::max(sizes.padded_hidden, sizes.padded_out));
  w.db1 = cursor.take<float>(sizes.weight_heads * sizes.padded_hidden);
  w.bytes = cursor.bytes();
  return w;
}

template <class T>
void mlp_dpre(const CompressMlpBwd& p, const MlpSizes& sizes, const MlpBwdWorkspace& w,
              cudaStream_t stream) {
  dispatch_block_n(sizes.hidden, [&](auto block_n) {
    constexpr int kBlockN = block_n.value;
    launch_gemm("mlp_dhidden_kernel", mlp_dhidden_kernel<T, kBlockN>,
                ceil_div<int64_t>(sizes.seqs.rows, kBlockM) * sizes.heads *
                    ceil_div<int64_t>(sizes.hidden, kBlockN),
                gemm_shared_bytes<Major::kK, Major::kMN, kBlockN>(), stream, sizes,
                static_cast<const T*>(w.dout), static_cast<const T*>(p.w2), w.dhidden,
                is_aligned16(p.w2) && sizes.hidden % 8 == 0);
  });
  const int64_t threads = sizes.heads * sizes.seqs.rows * (sizes.padded_hidden / 4);
  if (threads == 0) return;
  mlp_dpre_kernel<T><<<grid_size(ceil_div<int64_t>(threads, 256)), 256, 0, stream>>>(
      w.partials, w.dhidden, static_cast<T*>(w.hidden), static_cast<T*>(w.dpre));
  check_launch("mlp_dpre_kernel");
}

template <class T>
void mlp_dx(const CompressMlpBwd& p, const MlpSizes& sizes, const MlpBwdWorkspace& w,
            cudaStream_t stream) {
  dispatch_block_n(sizes.dim, [&](auto block_n) {
    constexpr int kBlockN = block_n.value;
    const int64_t tiles = ceil_div<int64_t>(num_segments(sizes.seqs), kBlockM) * sizes.heads *
                          ceil_div<int64_t>(sizes.dim, kBlockN);
    launch_gemm("mlp_dx_kernel", mlp_dx_kernel<T, kBlockN>, tiles * sizes.seqs.block_stride,
                gemm_shared_bytes<Major::kK, Major::kMN, kBlockN>(), stream, sizes,
                static_cast<const T*>(w.dpre), static_cast<const T*>(p.w1), p.dx,
                is_aligned16(p.w1), rows_aligned16(p.dx));
  });
}

}  // namespace
}  // namespace compress

int64_t compress_mlp_bwd_workspace(const CompressMlpBwd& params) {
  return compress::layout(params, compress::mlp_sizes(params), nullptr).bytes;
}

void compress_mlp_bwd(const CompressMlpBwd& params, void* workspace, Stream cuda_stream) {
  using namespace compress;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const MlpSizes sizes = mlp_sizes(params);
  if (sizes.weight_heads == 0) return;  // no heads: every result is empty
  if (num_segments(sizes.seqs) > INT32_MAX)
    throw std::runtime_error("compress_mlp: more than 2^31 - 1 strides of keys");
  const MlpBwdWorkspace w = layout(params, sizes, workspace);
  dispatch_dtype(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (const int64_t pieces = sizes.heads * sizes.seqs.rows * (sizes.padded_out / 8)) {
      mlp_gather_dout_kernel<T><<<grid_size(ceil_div<int64_t>(pieces, 256)), 256, 0, stream>>>(
          sizes, params.x, params.dout, rows_aligned16(params.dout), static_cast<T*>(w.dout),
          w.x_offset);
      check_launch("mlp_gather_dout_kernel");
      if (params.w2) {
        mlp_hidden(params.shape.dtype, w.partials, params.x, params.w1, params.b1, params.pos,
                   stream);
        mlp_dpre<T>(params, sizes, w, stream);
      }
    }
    if (params.dx.ptr) mlp_dx<T>(params, sizes, w, stream);
  });
  mlp_bwd_weights(params, sizes, w, stream);
}

}  // namespace nsa::cuda
