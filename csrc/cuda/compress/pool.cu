// phi of kinds `mean` and `weighted`: out[c] = sum_r weight[r] * (x[c*d+r] + pos[r]).
//
// All of it is bound by memory. A thread owns 8 elements (16 bytes) of the head dim, D/8 threads
// ("lanes") a row, and a block of threads takes 256 / lanes rows ("slots") at a time. A key is read
// by l/d tokens; those reads after the first come from L1 or L2.

#include <algorithm>

#include "cuda/compress/reduce.cuh"
#include "cuda/compress/rows.cuh"
#include "nsa/api.h"

namespace nsa::cuda {
namespace compress {
namespace {

constexpr int kThreads = 256;
constexpr int kKeysPerSlot = 4;      // keys that a thread of pool_bwd_dx_kernel handles
constexpr int kRowsPerTile = 64;     // rows whose offsets pool_bwd_weight_kernel keeps at a time
constexpr int kOffsetsPerPass = 2;   // offsets r within a block that it sums at a time
constexpr int64_t kMinChunk = 16;    // rows of a partial sum: enough blocks to fill the GPU at
constexpr int64_t kMaxChunks = 512;  // short lengths, a bounded workspace at long ones

void check_shape(const CompressShape& shape) {
  if (shape.dim < 8 || shape.dim % 8 || shape.dim > 8 * kThreads)
    throw std::runtime_error("compress_pool: dim must be a multiple of 8 up to " +
                             std::to_string(8 * kThreads) + ", got " + std::to_string(shape.dim));
}

struct Tile {
  int lanes, slots;  // threads along the dim, rows at a time
  __device__ __forceinline__ int lane() const { return threadIdx.x % lanes; }
  __device__ __forceinline__ int slot() const { return threadIdx.x / lanes; }
};
Tile make_tile(int64_t dim) {
  const int lanes = static_cast<int>(dim / 8);
  return {lanes, kThreads / lanes};
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    pool_fwd_kernel(CompressPoolFwd p, Sequences seqs, Tile tile) {
  const CompressShape& shape = p.shape;
  const int64_t head = blockIdx.x % shape.heads;
  const int64_t row = blockIdx.x / shape.heads * tile.slots + tile.slot();
  if (tile.slot() >= tile.slots || row >= seqs.rows) return;
  const int64_t column = 8 * tile.lane();
  const TokenPosition at = token_position(seqs, row);

  float sum[8] = {};
  if (at.used) {
    const int64_t hw = shape.weight_heads == 1 ? 0 : head;
    const T* x = static_cast<const T*>(p.x.ptr) + at.batch * p.x.batch + at.key * p.x.seq +
                 head * p.x.head + column;
    const T* weight = p.weight ? static_cast<const T*>(p.weight) + hw * shape.block_size : nullptr;
    const T* pos =
        p.pos ? static_cast<const T*>(p.pos) + hw * shape.block_size * shape.dim + column : nullptr;
#pragma unroll 8
    for (int r = 0; r < shape.block_size; ++r) {
      float value[8];
      unpack8<T>(load8<T, kAligned>(x + r * p.x.seq), value);
      if (pos) {
        float shift[8];
        unpack8<T>(load8<T, kAligned>(pos + r * shape.dim), shift);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] += shift[i];
      }
      const float w = weight ? to_float(weight[r]) : 1.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(w, value[i], sum[i]);
    }
    if (!weight) {
      const float scale = 1.f / static_cast<float>(shape.block_size);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] *= scale;
    }
  }
  T* out = static_cast<T*>(p.out.ptr) + at.batch * p.out.batch + at.token * p.out.seq +
           head * p.out.head + column;
  store8<T, kAligned>(out, sum);
}

/// dx[s] = sum over the tokens c that cover key s of weight[s - c*d] * dout[c]: a gather, so that
/// no two threads write one key, and keys that no token covers become zero.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    pool_bwd_dx_kernel(CompressPoolBwd p, Sequences seqs, Tile tile) {
  const CompressShape& shape = p.shape;
  const int64_t head = blockIdx.x % shape.heads;
  const int64_t first = blockIdx.x / shape.heads * (tile.slots * kKeysPerSlot) + tile.slot();
  if (tile.slot() >= tile.slots) return;
  const int64_t column = 8 * tile.lane();
  const T* weight = p.weight ? static_cast<const T*>(p.weight) +
                                   (shape.weight_heads == 1 ? 0 : head) * shape.block_size
                             : nullptr;
  const float mean_weight = 1.f / static_cast<float>(shape.block_size);
#pragma unroll
  for (int i = 0; i < kKeysPerSlot; ++i) {
    const int64_t index = first + i * tile.slots;
    if (index >= seqs.keys) return;
    const KeyPosition at = key_position(seqs, index);
    const int64_t own = at.s / shape.block_stride;  // the last token that starts at or before s
    const int64_t begin =
        at.s < shape.block_size ? 0 : (at.s - shape.block_size) / shape.block_stride + 1;
    const int64_t end = own < at.tokens ? own + 1 : at.tokens;
    const T* dout = static_cast<const T*>(p.dout.ptr) + at.batch * p.dout.batch +
                    at.token * p.dout.seq + head * p.dout.head + column;
    float sum[8] = {};
    for (int64_t c = begin; c < end; ++c) {
      const int64_t r = at.s - c * shape.block_stride;
      const float w = weight ? to_float(weight[r]) : mean_weight;
      float value[8];
      unpack8<T>(load8<T, kAligned>(dout + c * p.dout.seq), value);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] = fmaf(w, value[j], sum[j]);
    }
    T* dx = static_cast<T*>(p.dx.ptr) + at.batch * p.dx.batch + at.key * p.dx.seq +
            head * p.dx.head + column;
    store8<T, kAligned>(dx, sum);
  }
}

/// Partial sums over the rows of a chunk: partial[head][chunk][0..l) = sum of dout[c] . x[c*d+r]
/// and [l..l+D) = sum of dout[c], from which pool_bwd_finish_kernel makes dweight and dpos.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3)
    pool_bwd_weight_kernel(CompressPoolBwd p, Sequences seqs, Tile tile, int64_t chunk,
                           int64_t num_chunks, float* partial) {
  __shared__ int64_t x_offset[kRowsPerTile], dout_offset[kRowsPerTile];
  __shared__ float lane_sums[kThreads];
  const CompressShape& shape = p.shape;
  const int64_t head = blockIdx.x % shape.heads, chunk_index = blockIdx.x / shape.heads;
  const int64_t chunk_begin = chunk_index * chunk;
  const int64_t chunk_end = chunk_begin + chunk < seqs.rows ? chunk_begin + chunk : seqs.rows;
  const int lane = tile.lane(), slot = tile.slot();
  const bool active = slot < tile.slots;
  const T* x = static_cast<const T*>(p.x.ptr) + head * p.x.head + 8 * lane;
  const T* dout = static_cast<const T*>(p.dout.ptr) + head * p.dout.head + 8 * lane;
  partial += (head * num_chunks + chunk_index) * (shape.block_size + shape.dim);

  const int num_offsets = p.dweight ? shape.block_size : 0;
  for (int first = 0; first == 0 || first < num_offsets; first += kOffsetsPerPass * tile.slots) {
    float sum[kOffsetsPerPass] = {}, dout_sum[8] = {};
    for (int64_t begin = chunk_begin; begin < chunk_end; begin += kRowsPerTile) {
      const int count = static_cast<int>(chunk_end - begin < kRowsPerTile ? chunk_end - begin
                                                                          : int64_t{kRowsPerTile});
      __syncthreads();
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const TokenPosition at = token_position(seqs, begin + i);
        x_offset[i] = at.used ? at.batch * p.x.batch + at.key * p.x.seq : -1;
        dout_offset[i] = at.batch * p.dout.batch + at.token * p.dout.seq;
      }
      __syncthreads();
      if (!active) continue;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const uint4 zero = {};
        const bool used = x_offset[i] >= 0;
        float grad[8];
        unpack8<T>(used ? load8<T, kAligned>(dout + dout_offset[i]) : zero, grad);
#pragma unroll
        for (int j = 0; j < 8; ++j) dout_sum[j] += grad[j];
#pragma unroll
        for (int k = 0; k < kOffsetsPerPass; ++k) {
          const int r = first + k * tile.slots + slot;
          const bool wanted = used && r < num_offsets;
          float value[8];
          unpack8<T>(wanted ? load8<T, kAligned>(x + x_offset[i] + r * p.x.seq) : zero, value);
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[k] = fmaf(grad[j], value[j], sum[k]);
        }
      }
    }
    if (first == 0 && slot == 0) {
#pragma unroll
      for (int j = 0; j < 8; ++j) partial[shape.block_size + 8 * lane + j] = dout_sum[j];
    }
#pragma unroll
    for (int k = 0; k < kOffsetsPerPass; ++k) {
      __syncthreads();
      lane_sums[threadIdx.x] = sum[k];
      __syncthreads();
      const int r = first + k * tile.slots + threadIdx.x;
      if (threadIdx.x < tile.slots && r < num_offsets) {
        float total = 0.f;
        for (int j = 0; j < tile.lanes; ++j) total += lane_sums[threadIdx.x * tile.lanes + j];
        partial[r] = total;
      }
    }
  }
}

/// From the totals over tokens (and over the heads that share the weights): dweight[r] = totals[r]
/// + pos[r] . sum(dout) and dpos[r] = weight[r] * sum(dout). One warp per (weight head, r).
template <class T>
__global__ void pool_bwd_finish_kernel(CompressPoolBwd p, const float* totals) {
  const CompressShape& shape = p.shape;
  const int64_t index = blockIdx.x, hw = index / shape.block_size, r = index % shape.block_size;
  totals += hw * (shape.block_size + shape.dim);
  const float* dout_sum = totals + shape.block_size;
  const float weight = p.weight ? to_float(static_cast<const T*>(p.weight)[index])
                                : 1.f / static_cast<float>(shape.block_size);
  float dot = 0.f;
  for (int64_t i = threadIdx.x; i < shape.dim; i += 32) {
    if (p.pos)
      dot = fmaf(to_float(static_cast<const T*>(p.pos)[index * shape.dim + i]), dout_sum[i], dot);
    if (p.dpos)
      static_cast<T*>(p.dpos)[index * shape.dim + i] = static_cast<T>(weight * dout_sum[i]);
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, mask);
  if (p.dweight && threadIdx.x == 0)
    static_cast<T*>(p.dweight)[index] = static_cast<T>(totals[r] + dot);
}

struct Chunks {
  int64_t size, count;
};
Chunks weight_chunks(int64_t rows) {
  const int64_t size = std::max(kMinChunk, ceil_div(rows, kMaxChunks));
  return {size, ceil_div(rows, size)};
}

struct PoolBwdWorkspace {
  float *partial, *totals;
  int64_t bytes;
};
PoolBwdWorkspace layout(const CompressPoolBwd& p, void* base) {
  WorkspaceCursor cursor(base);
  PoolBwdWorkspace w{};
  if (p.dweight || p.dpos) {
    const CompressShape& shape = p.shape;
    const int64_t columns = shape.block_size + shape.dim;
    w.partial =
        cursor.take<float>(shape.heads * weight_chunks(make_sequences(shape).rows).count * columns);
    w.totals = cursor.take<float>(shape.weight_heads * columns);
  }
  w.bytes = cursor.bytes();
  return w;
}

template <class Body>
void dispatch_aligned(bool aligned, Body&& body) {
  if (aligned)
    body(std::true_type{});
  else
    body(std::false_type{});
}

}  // namespace
}  // namespace compress

void compress_pool_fwd(const CompressPoolFwd& params, Stream stream) {
  using namespace compress;
  check_shape(params.shape);
  const Sequences seqs = make_sequences(params.shape);
  const Tile tile = make_tile(params.shape.dim);
  const int64_t blocks = ceil_div<int64_t>(seqs.rows, tile.slots) * params.shape.heads;
  if (blocks == 0) return;
  const bool aligned =
      rows_aligned16(params.x) && rows_aligned16(params.out) && is_aligned16(params.pos);
  dispatch_dtype(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_aligned(aligned, [&](auto is_aligned) {
      pool_fwd_kernel<T, is_aligned.value>
          <<<grid_size(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params, seqs,
                                                                                  tile);
    });
  });
  check_launch("pool_fwd_kernel");
}

int64_t compress_pool_bwd_workspace(const CompressPoolBwd& params) {
  return compress::layout(params, nullptr).bytes;
}

void compress_pool_bwd(const CompressPoolBwd& params, void* workspace, Stream cuda_stream) {
  using namespace compress;
  check_shape(params.shape);
  const CompressShape& shape = params.shape;
  if (shape.weight_heads == 0) return;  // no heads: every result is empty
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const Sequences seqs = make_sequences(shape);
  const Tile tile = make_tile(shape.dim);
  const bool aligned =
      rows_aligned16(params.x) && rows_aligned16(params.dout) && rows_aligned16(params.dx);
  const int64_t dx_blocks =
      params.dx.ptr ? ceil_div<int64_t>(seqs.keys, tile.slots * kKeysPerSlot) * shape.heads : 0;
  const PoolBwdWorkspace w = layout(params, workspace);
  dispatch_dtype(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_aligned(aligned, [&](auto is_aligned) {
      if (dx_blocks) {
        pool_bwd_dx_kernel<T, is_aligned.value>
            <<<grid_size(dx_blocks), kThreads, 0, stream>>>(params, seqs, tile);
        check_launch("pool_bwd_dx_kernel");
      }
      if (!params.dweight && !params.dpos) return;
      const Chunks chunks = weight_chunks(seqs.rows);
      if (const int64_t blocks = chunks.count * shape.heads) {
        pool_bwd_weight_kernel<T, is_aligned.value><<<grid_size(blocks), kThreads, 0, stream>>>(
            params, seqs, tile, chunks.size, chunks.count, w.partial);
        check_launch("pool_bwd_weight_kernel");
      }
      const int64_t columns = shape.block_size + shape.dim;
      reduce_partials(w.partial, shape.weight_heads,
                      shape.heads / shape.weight_heads * chunks.count, columns,
                      StoreSum<float>{w.totals, columns}, stream);
      pool_bwd_finish_kernel<T>
          <<<grid_size(shape.weight_heads * shape.block_size), 32, 0, stream>>>(params, w.totals);
      check_launch("pool_bwd_finish_kernel");
    });
  });
}

}  // namespace nsa::cuda
