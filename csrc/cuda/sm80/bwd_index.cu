// The selection as the backward needs it: who chose a block (key-stationary dK/dV), and what the
// tokens of a query tile chose together (query-stationary dQ). Both are the same bits every time.
#include <algorithm>

#include "cuda/device/tma.cuh"
#include "cuda/sm80/bwd_kernels.h"
#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm80/bwd_sequence.cuh"

namespace nsa::cuda::bwd {
namespace {

/// Up to 64 selected blocks of a (query, kv head), two a lane; -1 where absent, out of range,
/// wholly past the query's position, or a repetition.
struct LaneBlocks {
  int block[2];
};

__device__ __forceinline__ LaneBlocks load_blocks(const int32_t* row, int count, int lane) {
  return {{lane < count ? row[lane] : -1, lane + 32 < count ? row[lane + 32] : -1}};
}

__device__ __forceinline__ LaneBlocks unique_blocks(LaneBlocks x, int count, int lane,
                                                    int num_candidates) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (x.block[i] < 0 || x.block[i] >= num_candidates) x.block[i] = -1;
    if (i == 1 && count <= 32) break;  // all of them absent
    const uint32_t same = __match_any_sync(kFullWarp, x.block[i]);
    if (lane != __ffs(same) - 1) x.block[i] = -1;
  }
  if (count > 32) {
    const int second = x.block[1];
#pragma unroll 8
    for (int i = 0; i < 32; ++i)
      if (second == __shfl_sync(kFullWarp, x.block[0], i)) x.block[1] = -1;
  }
  return x;
}

/// How many of the row's blocks come before each of a lane's.
__device__ __forceinline__ LaneBlocks ranks_of(const LaneBlocks& x, int count) {
  LaneBlocks rank{{0, 0}};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int i = 0; i < min(32, count - 32 * j); ++i) {
      const int other = __shfl_sync(kFullWarp, x.block[j], i);
#pragma unroll
      for (int k = 0; k < 2; ++k) rank.block[k] += other >= 0 && other < x.block[k];
    }
  }
  return rank;
}

/// Candidates of position t: blocks 0 .. t / l'.
__device__ __forceinline__ int num_candidates(int t, const BlockConfig& config) {
  return t < 0 ? 0 : t / config.select_size + 1;
}

constexpr int kAhead = 8;  // rows whose blocks are asked for together
constexpr int kMaxWalkWarps = 4;
constexpr int kMaxSharedCursors = 12 * 1024;  // 48 KB

/// A warp walks one chunk of query rows in order and keeps a cursor for every block: first to
/// count, then, the cursors turned into places of the lists, to write them. Blocks of a row differ,
/// so its lanes touch different cursors. They are in shared memory where they fit: a row's turn is
/// as long as a read and a write of them.
template <bool kFill>
__global__ void __launch_bounds__(32 * kMaxWalkWarps)
    walk_selection(const __grid_constant__ AttnBwd p, const InvertedIndex index,
                   bool shared_cursors) {
  int32_t* const cursors = reinterpret_cast<int32_t*>(dynamic_shared_memory());
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  if (warp >= p.shape.heads_kv * index.chunks) return;
  const int64_t head = warp / index.chunks;
  const int num_blocks = index.blocks.count;
  int32_t* const saved = index.cursor + warp * num_blocks;
  int32_t* const cursor = shared_cursors ? cursors + threadIdx.x / 32 * num_blocks : saved;
#pragma unroll 8
  for (int i = lane; i < num_blocks; i += 32)
    cursor[i] = kFill ? saved[i] + index.begin[head * num_blocks + i] : 0;
  __syncwarp();
  const int64_t first = (warp % index.chunks) * index.chunk_rows;
  const int64_t last = min(first + index.chunk_rows, p.shape.total_q);
  const View<const int32_t> view{p.block_indices.ptr, p.block_indices.batch, p.block_indices.seq,
                                 p.block_indices.head};
  const auto walk = [&](Sequence sequence, int b) {
    const auto load = [&](int64_t row) -> LaneBlocks {
      if (row >= last) return {{-1, -1}};
      int64_t offset = row * view.seq;
      if (!p.shape.cu_seqlens_q) {
        const int batch = static_cast<int>(row) / static_cast<int>(p.shape.seqlen_q);
        offset = batch * view.batch + (row - batch * p.shape.seqlen_q) * view.seq;
      }
      return load_blocks(view.ptr + offset + head * view.head, p.index_count, lane);
    };
    int i = static_cast<int>(first - sequence.q_row);
    LaneBlocks next[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) next[j] = load(first + j);
    for (int64_t base = first; base < last; base += kAhead) {
      LaneBlocks current[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        current[j] = next[j];
        next[j] = load(base + kAhead + j);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (base + j >= last) return;
        while (i >= sequence.q_len) {
          if (++b >= p.shape.batch) return;  // rows past the last sequence
          i -= sequence.q_len;
          sequence = load_sequence(p.shape, b);
        }
        const LaneBlocks blocks = unique_blocks(current[j], p.index_count, lane,
                                                num_candidates(sequence.position(i), p.config));
        LaneBlocks ranks{};
        if (kFill) {
          ranks = ranks_of(blocks, p.index_count);
          const int chosen = __popc(__ballot_sync(kFullWarp, blocks.block[0] >= 0)) +
                             __popc(__ballot_sync(kFullWarp, blocks.block[1] >= 0));
          if (lane == 0)
            index.chosen[head * p.shape.total_q + base + j] = static_cast<uint8_t>(chosen);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (blocks.block[k] < 0) continue;
          int32_t& place = cursor[index.blocks.first(b) + blocks.block[k]];
          if (kFill) index.queries[place] = list_entry(i, ranks.block[k]);
          ++place;
        }
        ++i;
        __syncwarp();
      }
    }
  };
  // The sequence that holds the chunk's first row: the last one that starts at or before it.
  int b = 0;
  if (p.shape.cu_seqlens_q) {
    int high = static_cast<int>(p.shape.batch) - 1;
    while (b < high) {
      const int middle = (b + high + 1) / 2;
      if (p.shape.cu_seqlens_q[middle] <= first)
        b = middle;
      else
        high = middle - 1;
    }
  } else {
    b = static_cast<int>(first / p.shape.seqlen_q);
  }
  walk(load_sequence(p.shape, b), b);
  if (kFill || !shared_cursors) return;
  __syncwarp();
#pragma unroll 8
  for (int i = lane; i < num_blocks; i += 32) saved[i] = cursor[i];
}

template <bool kFill>
void launch_walk_selection(const AttnBwd& p, const InvertedIndex& index, cudaStream_t stream) {
  const int64_t warps = p.shape.heads_kv * index.chunks;
  if (warps == 0) return;
  const int blocks = index.blocks.count;
  const bool shared_cursors = blocks <= kMaxSharedCursors;
  const int per_block = shared_cursors
                            ? std::clamp(kMaxSharedCursors / std::max(blocks, 1), 1, kMaxWalkWarps)
                            : kMaxWalkWarps;
  launch_kernel(walk_selection<kFill>, "walk_selection",
                grid_size(ceil_div<int64_t>(warps, per_block)), 32 * per_block,
                shared_cursors ? int64_t{4} * per_block * blocks : 0, stream, p, index,
                shared_cursors);
}

/// A thread turns one block's counts per chunk into offsets.
__global__ void __launch_bounds__(32) scan_chunks(const InvertedIndex index) {
  const int block = blockIdx.x * 32 + threadIdx.x;
  const int64_t head = blockIdx.y, num_blocks = index.blocks.count;
  if (block >= num_blocks) return;
  int32_t* cursor = index.cursor + head * index.chunks * num_blocks + block;
  int sum = 0;
  constexpr int kBatch = 32;  // chunks that are read together
  for (int base = 0; base < index.chunks; base += kBatch) {
    int counts[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      counts[i] = base + i < index.chunks ? cursor[(base + i) * num_blocks] : 0;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + i < index.chunks) cursor[(base + i) * num_blocks] = sum;
      sum += counts[i];
    }
  }
  index.count[head * num_blocks + block] = sum;
}

constexpr int kSpan = 1024;  // blocks whose token masks are in shared memory at a time
constexpr int kUnionThreads = 128;

__global__ void __launch_bounds__(kUnionThreads)
    unite_selection(const __grid_constant__ DqArgs args, UnionBlock* blocks, int32_t* counts) {
  __shared__ uint32_t masks[2][kSpan];
  __shared__ int warp_counts[kUnionThreads / 32];
  const AttnBwd& p = args.common.p;
  const int64_t tile = blockIdx.x;
  const int64_t head = tile / args.tiles.count;
  const TileMap::Place place = args.tiles.place(static_cast<int>(tile % args.tiles.count));
  const Sequence sequence = load_sequence(p.shape, place.batch);
  const int first = place.index * args.tile_tokens;
  const int tokens = min(args.tile_tokens, sequence.q_len - first);
  if (tokens <= 0) return;
  UnionBlock* out = blocks + tile * args.tile_tokens * p.index_count;
  const int32_t* lists = sequence.queries(p.block_indices) + head * p.block_indices.head;
  const int end = num_candidates(sequence.position(first + tokens - 1), p.config);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int written = 0;
  for (int base = 0; base < end; base += kSpan) {
    for (int i = thread; i < kSpan; i += kUnionThreads) masks[0][i] = masks[1][i] = 0;
    __syncthreads();
    for (int i = thread; i < tokens * p.index_count; i += kUnionThreads) {
      const int token = i / p.index_count;
      const int block = lists[(first + token) * p.block_indices.seq + i - token * p.index_count];
      if (block >= base && block < base + kSpan &&
          block < num_candidates(sequence.position(first + token), p.config))
        atomicOr(&masks[token / 32][block - base], 1u << (token % 32));
    }
    __syncthreads();
    for (int sweep = 0; sweep < kSpan && base + sweep < end; sweep += kUnionThreads) {
      const int i = sweep + thread;
      const uint32_t low = masks[0][i], high = masks[1][i];
      const uint32_t ballot = __ballot_sync(kFullWarp, (low | high) != 0);
      if (lane == 0) warp_counts[warp] = __popc(ballot);
      __syncthreads();
      int position = written + __popc(ballot & ((1u << lane) - 1));
#pragma unroll
      for (int w = 0; w < kUnionThreads / 32; ++w) {
        if (w < warp) position += warp_counts[w];
        written += warp_counts[w];
      }
      if (low | high) out[position] = UnionBlock{base + i, {low, high}, 0};
      __syncthreads();
    }
  }
  if (thread == 0) counts[tile] = written;
}

}  // namespace

void launch_count_selection(const AttnBwd& p, const InvertedIndex& index, cudaStream_t stream) {
  launch_walk_selection<false>(p, index, stream);
  if (index.blocks.count == 0) return;
  const dim3 grid(ceil_div(index.blocks.count, 32), static_cast<unsigned>(p.shape.heads_kv));
  launch_kernel(scan_chunks, "scan_chunks", grid, 32, 0, stream, index);
}

void launch_fill_selection(const AttnBwd& p, const InvertedIndex& index, cudaStream_t stream) {
  launch_walk_selection<true>(p, index, stream);
}

void launch_union_selection(const DqArgs& args, UnionBlock* blocks, int32_t* counts,
                            cudaStream_t stream) {
  const int64_t tiles = args.common.p.shape.heads_kv * args.tiles.count;
  if (tiles == 0) return;
  launch_kernel(unite_selection, "unite_selection", grid_size(tiles), kUnionThreads, 0, stream,
                args, blocks, counts);
}

}  // namespace nsa::cuda::bwd
