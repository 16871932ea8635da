// The backward of phi's kinds `mlp` and `linear`: gradients of the weights. See mlp_bwd.cuh.
//
// dW1 and dW2 are products over all tokens of the heads that share a weight. The tokens come in
// units of 64 rows of one head, one k step each; a block sums a range of units into a float32
// partial, and reduce_partials adds the partials.

#include "cuda/compress/mlp_bwd.cuh"
#include "cuda/compress/reduce.cuh"

namespace nsa::cuda::compress {

namespace {

constexpr int64_t kColumnRows = 256;  // rows of a partial column sum
// Blocks that the split aims at: two for each of the 132 SMs of an H100, one for dW2, whose
// partials would otherwise outweigh its operands.
constexpr int64_t kTargetBlocksW1 = 264, kTargetBlocksW2 = 132;

__host__ __device__ int64_t units_per_head(const MlpSizes& sizes) {
  return ceil_div<int64_t>(sizes.seqs.rows, kBlockK);
}
__host__ __device__ int64_t num_units(const MlpSizes& sizes) {
  return sizes.heads_per_weight() * units_per_head(sizes);
}

int64_t num_splits(const MlpSizes& sizes, int64_t tiles, int64_t target) {
  if (tiles == 0) return 0;
  return std::min(num_units(sizes), std::max<int64_t>(1, target / tiles));
}
int64_t w1_tiles(const MlpSizes& sizes) {
  return ceil_div<int64_t>(sizes.hidden, kBlockM) *
         ceil_div<int64_t>(sizes.dim, choose_block_n(sizes.dim)) * sizes.seqs.block_size;
}
int64_t w2_tiles(const MlpSizes& sizes) {
  return ceil_div<int64_t>(sizes.dim_out, kBlockM) *
         ceil_div<int64_t>(sizes.hidden, choose_block_n(sizes.hidden));
}

/// The walk over the units of a split.
struct Units {
  int64_t per_head, rows, head, row;

  __device__ __forceinline__ Units(const MlpSizes& sizes, int64_t hw, int64_t unit)
      : per_head(units_per_head(sizes)), rows(sizes.seqs.rows) {
    head = hw * sizes.heads_per_weight() + unit / per_head;
    row = unit % per_head * kBlockK;
  }
  __device__ __forceinline__ void next() {
    row += kBlockK;
    if (row < rows) return;
    row = 0;
    ++head;
  }
};

/// dW1: A = dpre, B = x[c*d + r], k = the rows. The offsets of the next unit's tokens are fetched
/// one step ahead, so that the copies of a step never wait for them.
template <class T, int kBlockN>
struct W1Problem {
  using TileB = OperandTile<Major::kMN, kBlockN>;
  static constexpr int kSweeps = TileB::kRows * 8 / kGemmThreads;

  Units units;
  const T* dpre;  // at the first column of the tile
  const T* x;     // at key offset r and the first column of the tile
  const int64_t* x_offset;
  int dpre_stride, dpre_columns;
  int64_t x_head;
  int x_columns;
  bool x_aligned;
  int64_t offsets[kSweeps];

  __device__ __forceinline__ void fetch_offsets() {
#pragma unroll
    for (int i = 0; i < kSweeps; ++i) {
      const int64_t row = units.row + i * (kGemmThreads / 8) + threadIdx.x / 8;
      offsets[i] = row < units.rows ? __ldg(x_offset + row) : -1;
    }
  }
  __device__ __forceinline__ void load(uint32_t smem_a, uint32_t smem_b) {
    const T* dpre_unit = dpre + (units.head * units.rows + units.row) * dpre_stride;
    const T* x_unit = x + units.head * x_head;
    load_operand<OperandTile<Major::kMN, kBlockM>, T>(
        smem_a, dpre_columns, true, [&](int row, int) -> const T* {
          return units.row + row < units.rows ? dpre_unit + int64_t{row} * dpre_stride : nullptr;
        });
    load_operand<TileB, T>(smem_b, x_columns, x_aligned, [&](int, int sweep) -> const T* {
      return offsets[sweep] < 0 ? nullptr : x_unit + offsets[sweep];
    });
    units.next();
    fetch_offsets();
  }
};

/// dW2: A = dout, B = gelu(pre), k = the rows.
template <class T, int kBlockN>
struct W2Problem {
  Units units;
  const T* dout;    // at the first column of the tile
  const T* hidden;  // at the first column of the tile
  int dout_stride, dout_columns, hidden_stride, hidden_columns;

  __device__ __forceinline__ void load(uint32_t smem_a, uint32_t smem_b) {
    const int64_t first = units.head * units.rows + units.row;
    load_operand<OperandTile<Major::kMN, kBlockM>, T>(
        smem_a, dout_columns, true, [&](int row, int) -> const T* {
          return units.row + row < units.rows ? dout + (first + row) * dout_stride : nullptr;
        });
    load_operand<OperandTile<Major::kMN, kBlockN>, T>(
        smem_b, hidden_columns, true, [&](int row, int) -> const T* {
          return units.row + row < units.rows ? hidden + (first + row) * hidden_stride : nullptr;
        });
    units.next();
  }
};

/// The range of units of a split.
struct UnitRange {
  int64_t begin, end;
  __device__ __forceinline__ UnitRange(const MlpSizes& sizes, int64_t split, int64_t splits)
      : begin(num_units(sizes) * split / splits), end(num_units(sizes) * (split + 1) / splits) {}
};

// Grid of both: (hw, split, m, n), n (with r for dW1) fastest, so that the blocks of a split, which
// read the same rows, run side by side.

template <class T, int kBlockN>
__global__ void __launch_bounds__(kGemmThreads, 2)
    mlp_dw1_kernel(MlpSizes sizes, const T* dpre, InView x, const int64_t* x_offset, int64_t splits,
                   float* partial, bool x_aligned) {
  const int64_t d_tiles = ceil_div<int64_t>(sizes.dim, kBlockN);
  const int64_t m_tiles = ceil_div<int64_t>(sizes.hidden, kBlockM);
  int64_t rest = blockIdx.x;
  const int64_t r = rest % sizes.seqs.block_size;
  rest /= sizes.seqs.block_size;
  const int64_t first_d = rest % d_tiles * kBlockN;
  rest /= d_tiles;
  const int64_t first_m = rest % m_tiles * kBlockM;
  rest /= m_tiles;
  const int64_t split = rest % splits, hw = rest / splits;
  const UnitRange range(sizes, split, splits);
  W1Problem<T, kBlockN> problem{Units(sizes, hw, range.begin),
                                dpre + first_m,
                                static_cast<const T*>(x.ptr) + r * x.seq + first_d,
                                x_offset,
                                static_cast<int>(sizes.padded_hidden),
                                static_cast<int>(sizes.padded_hidden - first_m),
                                x.head,
                                static_cast<int>(sizes.dim - first_d),
                                x_aligned,
                                {}};
  problem.fetch_offsets();
  partial += (hw * splits + split) * sizes.hidden * sizes.block_elements() + r * sizes.dim;
  gemm_tile<T, Major::kMN, Major::kMN, kBlockN>(
      range.end - range.begin, problem, [&](int row, int column, float4 v) {
        if (first_m + row >= sizes.hidden || first_d + column >= sizes.dim) return;
        *reinterpret_cast<float4*>(partial + (first_m + row) * sizes.block_elements() + first_d +
                                   column) = v;
      });
}

template <class T, int kBlockN>
__global__ void __launch_bounds__(kGemmThreads, 2)
    mlp_dw2_kernel(MlpSizes sizes, const T* dout, const T* hidden, int64_t splits, float* partial) {
  const int64_t n_tiles = ceil_div<int64_t>(sizes.hidden, kBlockN);
  const int64_t m_tiles = ceil_div<int64_t>(sizes.dim_out, kBlockM);
  const int64_t first_n = blockIdx.x % n_tiles * kBlockN;
  int64_t rest = blockIdx.x / n_tiles;
  const int64_t first_m = rest % m_tiles * kBlockM;
  rest /= m_tiles;
  const int64_t split = rest % splits, hw = rest / splits;
  const UnitRange range(sizes, split, splits);
  W2Problem<T, kBlockN> problem{Units(sizes, hw, range.begin),
                                dout + first_m,
                                hidden + first_n,
                                static_cast<int>(sizes.padded_out),
                                static_cast<int>(sizes.padded_out - first_m),
                                static_cast<int>(sizes.padded_hidden),
                                static_cast<int>(sizes.padded_hidden - first_n)};
  partial += (hw * splits + split) * sizes.dim_out * sizes.padded_hidden;
  gemm_tile<T, Major::kMN, Major::kMN, kBlockN>(
      range.end - range.begin, problem, [&](int row, int column, float4 v) {
        if (first_m + row >= sizes.dim_out || first_n + column >= sizes.padded_hidden) return;
        *reinterpret_cast<float4*>(partial + (first_m + row) * sizes.padded_hidden + first_n +
                                   column) = v;
      });
}

/// partial[head][chunk][column] = sum over the chunk's rows of matrix[head][row][column].
template <class T>
__global__ void __launch_bounds__(256)
    mlp_column_sums_kernel(const T* matrix, int64_t rows, int64_t width, int64_t chunks,
                           float* partial) {
  // 32 x 2 columns by 8 rows of threads.
  __shared__ float2 sums[8][32];
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  const int64_t tiles = ceil_div<int64_t>(width, 64);
  const int64_t column = blockIdx.x % tiles * 64 + 2 * x, head_chunk = blockIdx.x / tiles;
  const int64_t head = head_chunk / chunks, begin = head_chunk % chunks * kColumnRows;
  const int64_t end = begin + kColumnRows < rows ? begin + kColumnRows : rows;
  float2 sum = {};
  if (column < width) {
#pragma unroll 8
    for (int64_t row = begin + y; row < end; row += 8) {
      const float2 v = unpack2<T>(
          __ldg(reinterpret_cast<const uint32_t*>(matrix + (head * rows + row) * width + column)));
      sum.x += v.x;
      sum.y += v.y;
    }
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y || column >= width) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) {
    sum.x += sums[i][x].x;
    sum.y += sums[i][x].y;
  }
  *reinterpret_cast<float2*>(partial + head_chunk * width + column) = sum;
}

template <class T>
void column_sums(const void* matrix, const MlpSizes& sizes, int64_t width, int64_t chunks,
                 float* partial, cudaStream_t stream) {
  const int64_t blocks = sizes.heads * chunks * ceil_div<int64_t>(width, 64);
  if (blocks == 0) return;
  mlp_column_sums_kernel<T><<<grid_size(blocks), 256, 0, stream>>>(
      static_cast<const T*>(matrix), sizes.seqs.rows, width, chunks, partial);
  check_launch("mlp_column_sums_kernel");
}

/// Stores a bias gradient of padded width, in float32 for what follows and rounded for the caller.
template <class T>
struct StoreBias {
  float* sum;  // (Hw, padded), or null
  T* rounded;  // (Hw, width), or null
  int64_t padded, width;
  __device__ __forceinline__ void operator()(int64_t hw, int64_t column, float value) const {
    if (sum) sum[hw * padded + column] = value;
    if (rounded && column < width) rounded[hw * width + column] = static_cast<T>(value);
  }
};

/// dW1 = dpre^T vec(x) + (sum of dpre) vec(pos)^T.
template <class T>
struct StoreW1 {
  T* dw1;
  const T* pos;      // (Hw, l, D) or null
  const float* db1;  // (Hw, padded_hidden)
  int64_t hidden, padded_hidden, block_elements;
  __device__ __forceinline__ void operator()(int64_t hw, int64_t column, float sum) const {
    if (pos) {
      const int64_t n = column / block_elements, k = column % block_elements;
      sum = fmaf(db1[hw * padded_hidden + n], to_float(pos[hw * block_elements + k]), sum);
    }
    dw1[hw * hidden * block_elements + column] = static_cast<T>(sum);
  }
};

/// Drops the padding of w2_partial's rows.
template <class T>
struct StoreW2 {
  T* dw2;
  int64_t dim_out, hidden, padded_hidden;
  __device__ __forceinline__ void operator()(int64_t hw, int64_t column, float sum) const {
    const int64_t o = column / padded_hidden, n = column % padded_hidden;
    if (n < hidden) dw2[(hw * dim_out + o) * hidden + n] = static_cast<T>(sum);
  }
};

/// dpos[k] = sum_n db1[n] w1[n][k]: 32 columns by 8 threads that share the n.
template <class T>
__global__ void __launch_bounds__(256)
    mlp_dpos_kernel(MlpSizes sizes, const T* w1, const float* db1, T* dpos) {
  __shared__ float sums[8][32];
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  const int64_t k = blockIdx.x * int64_t{32} + x, hw = blockIdx.y;
  w1 += hw * sizes.hidden * sizes.block_elements();
  db1 += hw * sizes.padded_hidden;
  float sum = 0.f;
  if (k < sizes.block_elements()) {
#pragma unroll 8
    for (int64_t n = y; n < sizes.hidden; n += 8)
      sum = fmaf(db1[n], to_float(w1[n * sizes.block_elements() + k]), sum);
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y || k >= sizes.block_elements()) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) sum += sums[i][x];
  dpos[hw * sizes.block_elements() + k] = static_cast<T>(sum);
}

template <class T>
void bias_gradients(const CompressMlpBwd& p, const MlpSizes& sizes, const MlpBwdWorkspace& w,
                    cudaStream_t stream) {
  const int64_t chunks = w.splits.column_chunks;
  const int64_t count = sizes.heads_per_weight() * chunks;
  if (p.db1 || p.pos) {
    column_sums<T>(w.dpre, sizes, sizes.padded_hidden, chunks, w.column_partial, stream);
    reduce_partials(w.column_partial, sizes.weight_heads, count, sizes.padded_hidden,
                    StoreBias<T>{w.db1, static_cast<T*>(p.db1), sizes.padded_hidden, sizes.hidden},
                    stream);
  }
  if (p.db2) {
    column_sums<T>(w.dout, sizes, sizes.padded_out, chunks, w.column_partial, stream);
    reduce_partials(w.column_partial, sizes.weight_heads, count, sizes.padded_out,
                    StoreBias<T>{nullptr, static_cast<T*>(p.db2), sizes.padded_out, sizes.dim_out},
                    stream);
  }
  if (p.dpos) {
    const dim3 grid(grid_size(ceil_div<int64_t>(sizes.block_elements(), 32)),
                    grid_size(sizes.weight_heads));
    mlp_dpos_kernel<T><<<grid, 256, 0, stream>>>(sizes, static_cast<const T*>(p.w1), w.db1,
                                                 static_cast<T*>(p.dpos));
    check_launch("mlp_dpos_kernel");
  }
}

template <class T>
void weight_gradients(const CompressMlpBwd& p, const MlpSizes& sizes, const MlpBwdWorkspace& w,
                      cudaStream_t stream) {
  if (p.dw1) {
    dispatch_block_n(sizes.dim, [&](auto block_n) {
      constexpr int kBlockN = block_n.value;
      launch_gemm("mlp_dw1_kernel", mlp_dw1_kernel<T, kBlockN>,
                  sizes.weight_heads * w.splits.w1 * w1_tiles(sizes),
                  gemm_shared_bytes<Major::kMN, Major::kMN, kBlockN>(), stream, sizes,
                  static_cast<const T*>(w.dpre), p.x, static_cast<const int64_t*>(w.x_offset),
                  w.splits.w1, w.w1_partial, rows_aligned16(p.x));
    });
    reduce_partials(w.w1_partial, sizes.weight_heads, w.splits.w1,
                    sizes.hidden * sizes.block_elements(),
                    StoreW1<T>{static_cast<T*>(p.dw1), static_cast<const T*>(p.pos), w.db1,
                               sizes.hidden, sizes.padded_hidden, sizes.block_elements()},
                    stream);
  }
  if (p.dw2) {
    dispatch_block_n(sizes.hidden, [&](auto block_n) {
      constexpr int kBlockN = block_n.value;
      launch_gemm("mlp_dw2_kernel", mlp_dw2_kernel<T, kBlockN>,
                  sizes.weight_heads * w.splits.w2 * w2_tiles(sizes),
                  gemm_shared_bytes<Major::kMN, Major::kMN, kBlockN>(), stream, sizes,
                  static_cast<const T*>(w.dout), static_cast<const T*>(w.hidden), w.splits.w2,
                  w.w2_partial);
    });
    reduce_partials(
        w.w2_partial, sizes.weight_heads, w.splits.w2, sizes.dim_out * sizes.padded_hidden,
        StoreW2<T>{static_cast<T*>(p.dw2), sizes.dim_out, sizes.hidden, sizes.padded_hidden},
        stream);
  }
}

}  // namespace

MlpBwdSplits mlp_bwd_splits(const MlpSizes& sizes) {
  return {num_splits(sizes, sizes.weight_heads * w1_tiles(sizes), kTargetBlocksW1),
          num_splits(sizes, sizes.weight_heads * w2_tiles(sizes), kTargetBlocksW2),
          ceil_div<int64_t>(sizes.seqs.rows, kColumnRows)};
}

void mlp_bwd_weights(const CompressMlpBwd& params, const MlpSizes& sizes, const MlpBwdWorkspace& w,
                     cudaStream_t stream) {
  dispatch_dtype(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bias_gradients<T>(params, sizes, w, stream);
    weight_gradients<T>(params, sizes, w, stream);
  });
}

}  // namespace nsa::cuda::compress
