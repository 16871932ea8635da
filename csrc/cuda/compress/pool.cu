// phi of kinds `mean` and `weighted`: out[c] = sum_r weight[r] * (x[c*d+r] + pos[r]).
//
// All of it is bound by memory. A thread owns 8 elements (16 bytes) of the head dim, D/8 threads
// ("lanes") a row, and a block of threads takes 256 / lanes rows ("slots") at a time. Tokens side
// by side read the keys they share at nearly the same time, so memory sees every key once and L2
// l/d times; a thread that carried the sums of several tokens along, to read each key once, was
// slower (its neighbour's first key had left L2 when it got there).

#include <algorithm>

#include "cuda/compress/reduce.cuh"
#include "cuda/compress/rows.cuh"
#include "nsa/api.h"

namespace nsa::cuda {
namespace compress {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 8;            // loads of a thread in flight
constexpr int kRowsPerTile = 64;     // rows whose offsets pool_bwd_weight_kernel keeps at a time
constexpr int kOffsetsPerPass = 2;   // offsets r within a block that it sums at a time
constexpr int kRowBatch = 4;         // rows whose loads it has in flight
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

/// What a thread needs of its head: x, the weights, and sum_r weight[r] * pos[r], which all tokens
/// share. All threads of the block construct it together.
template <class T, bool kAligned>
struct PoolHead {
  const T* x;       // from this lane's column on
  const T* weight;  // (l) or null
  T* out;           // from this lane's column on
  float scale;      // of the sum
  bool has_shift;
  float shift[8];

  __device__ __forceinline__ PoolHead(const CompressPoolFwd& p, int64_t head, const Tile& tile) {
    const CompressShape& shape = p.shape;
    const int64_t first = (shape.weight_heads == 1 ? 0 : head) * shape.block_size;
    const int column = 8 * tile.lane();
    x = static_cast<const T*>(p.x.ptr) + head * p.x.head + column;
    weight = p.weight ? static_cast<const T*>(p.weight) + first : nullptr;
    out = static_cast<T*>(p.out.ptr) + head * p.out.head + column;
    scale = weight ? 1.f : 1.f / static_cast<float>(shape.block_size);
    has_shift = p.pos != nullptr;
    if (has_shift) sum_pos(static_cast<const T*>(p.pos) + first * shape.dim + column, shape, tile);
  }
  __device__ __forceinline__ float weight_of(int r) const {
    return weight ? to_float(weight[r]) : 1.f;
  }
  /// The slots share the offsets r; their sums are added in order.
  __device__ __forceinline__ void sum_pos(const T* pos, const CompressShape& shape,
                                          const Tile& tile) {
    __shared__ float sums[kThreads][8];
    float sum[8] = {};
    if (tile.slot() < tile.slots) {
      for (int r = tile.slot(); r < shape.block_size; r += tile.slots) {
        float value[8];
        unpack8<T>(load8<T, kAligned>(pos + r * shape.dim), value);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = fmaf(weight_of(r), value[i], sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[threadIdx.x][i] = sum[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; ++i) shift[i] = 0.f;
    for (int slot = 0; slot < tile.slots; ++slot) {
#pragma unroll
      for (int i = 0; i < 8; ++i) shift[i] += sums[slot * tile.lanes + tile.lane()][i];
    }
  }
  /// Writes a token, or zeros where `used` is false.
  __device__ __forceinline__ void store(int64_t offset, bool used, float (&sum)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum[i] = used ? scale * (has_shift ? sum[i] + shift[i] : sum[i]) : 0.f;
    store8<T, kAligned>(out + offset, sum);
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
    pool_fwd_kernel(CompressPoolFwd p, Sequences seqs, Tile tile) {
  const PoolHead<T, kAligned> head(p, blockIdx.x % p.shape.heads, tile);
  const int64_t row = blockIdx.x / p.shape.heads * tile.slots + tile.slot();
  if (tile.slot() >= tile.slots || row >= seqs.rows) return;
  const TokenPosition at = token_position(seqs, row);
  const T* x = head.x + at.batch * p.x.batch + at.key * p.x.seq;
  const int count = at.used() ? p.shape.block_size : 0;
  float sum[8] = {};
  for (int first = 0; first < count; first += kBatch) {
    uint4 keys[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      keys[i] = first + i < count ? load8<T, kAligned>(x + (first + i) * p.x.seq) : uint4{};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= count) break;
      const float w = head.weight_of(first + i);
      float key[8];
      unpack8<T>(keys[i], key);
#pragma unroll
      for (int k = 0; k < 8; ++k) sum[k] = fmaf(w, key[k], sum[k]);
    }
  }
  head.store(at.batch * p.out.batch + at.token * p.out.seq, at.used(), sum);
}

/// dx[s] = sum over the tokens c that cover key s of weight[s - c*d] * dout[c], for the keys of a
/// segment: a gather, so that no two threads write one key, and keys that no token covers become
/// zero. The overlap l/d is a template argument where it is 1 or 2 (else 0): then a segment reads
/// each dout once.
template <class T, bool kAligned, int kOverlap>
__global__ void __launch_bounds__(kThreads, 4)
    pool_bwd_dx_kernel(CompressPoolBwd p, Sequences seqs, Tile tile) {
  const CompressShape& shape = p.shape;
  const int64_t head = blockIdx.x % shape.heads;
  const int64_t segment = blockIdx.x / shape.heads * tile.slots + tile.slot();
  if (tile.slot() >= tile.slots || segment >= num_segments(seqs)) return;
  const int64_t column = 8 * tile.lane();
  const T* weight = p.weight ? static_cast<const T*>(p.weight) +
                                   (shape.weight_heads == 1 ? 0 : head) * shape.block_size
                             : nullptr;
  const float mean_weight = 1.f / static_cast<float>(shape.block_size);
  const SegmentPosition at = segment_position(seqs, segment);
  const int d = shape.block_stride;
  const T* dout = static_cast<const T*>(p.dout.ptr) + at.batch * p.dout.batch +
                  at.token * p.dout.seq + head * p.dout.head + column;
  T* dx = static_cast<T*>(p.dx.ptr) + at.batch * p.dx.batch + at.key * p.dx.seq + head * p.dx.head +
          column;
  // Token j - i, or zeros where the sequence has none.
  const auto load_grad = [&](int i, float (&grad)[8]) {
    const bool exists = at.j >= i && at.j - i < at.tokens;
    unpack8<T>(exists ? load8<T, kAligned>(dout - i * p.dout.seq) : uint4{}, grad);
  };
  const auto add = [&](const float (&grad)[8], int r, float (&sum)[8]) {
    const float w = weight ? to_float(weight[r]) : mean_weight;
#pragma unroll
    for (int k = 0; k < 8; ++k) sum[k] = fmaf(w, grad[k], sum[k]);
  };
  if constexpr (kOverlap > 0) {
    float grad[kOverlap][8];
#pragma unroll
    for (int i = 0; i < kOverlap; ++i) load_grad(i, grad[i]);
#pragma unroll 4
    for (int r = 0; r < at.keys; ++r) {
      float sum[8] = {};
#pragma unroll
      for (int i = 0; i < kOverlap; ++i) add(grad[i], i * d + r, sum);
      store8<T, kAligned>(dx + r * p.dx.seq, sum);
    }
  } else {
    for (int r = 0; r < at.keys; ++r) {
      float sum[8] = {}, grad[8];
      for (int i = 0; i < shape.block_size / d; ++i) {
        load_grad(i, grad);
        add(grad, i * d + r, sum);
      }
      store8<T, kAligned>(dx + r * p.dx.seq, sum);
    }
  }
}

/// Partial sums over the rows of a chunk: partial[head][chunk][0..l) = sum of dout[c] . x[c*d+r]
/// and [l..l+D) = sum of dout[c], from which pool_bwd_finish_kernel makes dweight and dpos.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)
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
        x_offset[i] = at.used() ? at.batch * p.x.batch + at.key * p.x.seq : -1;
        dout_offset[i] = at.batch * p.dout.batch + at.token * p.dout.seq;
      }
      __syncthreads();
      if (!active) continue;
      for (int first_row = 0; first_row < count; first_row += kRowBatch) {
        uint4 grads[kRowBatch], keys[kRowBatch][kOffsetsPerPass];
#pragma unroll
        for (int i = 0; i < kRowBatch; ++i) {
          const bool used = first_row + i < count && x_offset[first_row + i] >= 0;
          grads[i] = used ? load8<T, kAligned>(dout + dout_offset[first_row + i]) : uint4{};
#pragma unroll
          for (int k = 0; k < kOffsetsPerPass; ++k) {
            const int r = first + k * tile.slots + slot;
            keys[i][k] = used && r < num_offsets
                             ? load8<T, kAligned>(x + x_offset[first_row + i] + r * p.x.seq)
                             : uint4{};
          }
        }
#pragma unroll
        for (int i = 0; i < kRowBatch; ++i) {
          float grad[8];
          unpack8<T>(grads[i], grad);
#pragma unroll
          for (int j = 0; j < 8; ++j) dout_sum[j] += grad[j];
#pragma unroll
          for (int k = 0; k < kOffsetsPerPass; ++k) {
            float key[8];
            unpack8<T>(keys[i][k], key);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[k] = fmaf(grad[j], key[j], sum[k]);
          }
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

/// Calls body(kAligned, kOverlap) as integral constants.
template <class Body>
void dispatch_rows(bool aligned, const CompressShape& shape, Body&& body) {
  const int overlap = shape.block_size / shape.block_stride;
  if (!aligned)
    body(std::false_type{}, std::integral_constant<int, 0>{});
  else if (overlap == 1)
    body(std::true_type{}, std::integral_constant<int, 1>{});
  else if (overlap == 2)
    body(std::true_type{}, std::integral_constant<int, 2>{});
  else
    body(std::true_type{}, std::integral_constant<int, 0>{});
}

}  // namespace
}  // namespace compress

void compress_pool_fwd(const CompressPoolFwd& params, Stream cuda_stream) {
  using namespace compress;
  check_shape(params.shape);
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  const Sequences seqs = make_sequences(params.shape);
  const Tile tile = make_tile(params.shape.dim);
  if (seqs.rows == 0 || params.shape.heads == 0) return;
  const bool aligned =
      rows_aligned16(params.x) && rows_aligned16(params.out) && is_aligned16(params.pos);
  const unsigned blocks = grid_size(ceil_div<int64_t>(seqs.rows, tile.slots) * params.shape.heads);
  dispatch_dtype(params.shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (aligned)
      pool_fwd_kernel<T, true><<<blocks, kThreads, 0, stream>>>(params, seqs, tile);
    else
      pool_fwd_kernel<T, false><<<blocks, kThreads, 0, stream>>>(params, seqs, tile);
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
      params.dx.ptr ? ceil_div<int64_t>(num_segments(seqs), tile.slots) * shape.heads : 0;
  const PoolBwdWorkspace w = layout(params, workspace);
  dispatch_dtype(shape.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dispatch_rows(aligned, shape, [&](auto kAligned, auto kOverlap) {
      if (dx_blocks) {
        pool_bwd_dx_kernel<T, kAligned.value, kOverlap.value>
            <<<grid_size(dx_blocks), kThreads, 0, stream>>>(params, seqs, tile);
        check_launch("pool_bwd_dx_kernel");
      }
      if (!params.dweight && !params.dpos) return;
      const Chunks chunks = weight_chunks(seqs.rows);
      if (const int64_t blocks = chunks.count * shape.heads) {
        pool_bwd_weight_kernel<T, kAligned.value><<<grid_size(blocks), kThreads, 0, stream>>>(
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
