// How the tiles of a branch are shared out. Lengths are known on the device only, so the grid is a
// fixed number of workers, and each finds its share by itself: the tiles of all units in a row, cut
// into pieces of equal length. A worker is one block of threads for each kv head (and row tile):
// the heads of a page are read at the same time.
//
// A piece may span several units, and a unit several pieces. Their intersection is a segment, and
// since every next segment raises the worker or the unit, worker + unit numbers them uniquely.
#pragma once

#include "cuda/common.h"
#include "cuda/decode/params.h"
#include "nsa/geometry.h"

namespace nsa::cuda::decode {

__device__ __forceinline__ int sequence_length(const DecodeParams& p, int b) {
  return min(max(p.seqlens_k[b], 0), p.max_pages << p.select_shift);
}

/// visible_compressed() of geometry.h by a shift: strides are powers of two here, and its 64-bit
/// divisions would be a good part of what a short call takes.
__device__ __forceinline__ int visible_tokens(const DecodeParams& p, int t) {
  const int past_first = t + 1 - p.config.block_size;
  return past_first < 0 ? 0 : (past_first >> p.stride_shift) + 1;
}

/// Where the pages of a sequence lie in the pool.
struct Pages {
  const int32_t* table;  // or null: consecutive pages
  int first;
  __device__ __forceinline__ int at(int j) const { return table ? table[j] : first + j; }
};
__device__ __forceinline__ Pages sequence_pages(const DecodeParams& p, int b) {
  const int64_t first = static_cast<int64_t>(b) * p.max_pages;
  return {p.block_table ? p.block_table + first : nullptr, static_cast<int>(first)};
}

__device__ __forceinline__ int units_per_sequence(const DecodeParams& p, int branch) {
  return branch == kCompressed ? 1 : p.tokens;
}

/// Tiles of unit i of a sequence.
__device__ __forceinline__ int unit_tiles(const DecodeParams& p, int branch, int seqlen, int i) {
  int keys;
  if (branch == kCompressed) {
    keys = visible_tokens(p, seqlen - 1);
  } else {
    const int t = seqlen - p.tokens + i;
    if (t < 0) return 0;
    keys = branch == kWindow
               ? min(p.config.window, t + 1)
               : min(p.config.num_selected, (t >> p.select_shift) + 1) << p.select_shift;
  }
  return ceil_div(keys, kTileKeys);
}

/// A tile of a unit: unit i of sequence b.
struct Cursor {
  int b, i, tile, tiles;

  __device__ __forceinline__ int unit(const DecodeParams& p, int branch) const {
    return b * units_per_sequence(p, branch) + i;
  }
  /// Goes to the next tile; true where that belongs to another unit. There must be one.
  __device__ __forceinline__ bool advance(const DecodeParams& p, int branch) {
    if (++tile < tiles) return false;
    tile = 0;
    do {
      if (++i == units_per_sequence(p, branch)) {
        i = 0;
        ++b;
      }
      tiles = unit_tiles(p, branch, sequence_length(p, b), i);
    } while (tiles == 0);
    return true;
  }
};

/// A worker takes at least so many tiles, where there are few: half the partial results of the
/// compressed branch to merge for a batch of 1. The window's time hides behind the selection.
__device__ __forceinline__ int min_tiles(int branch) {
  return branch == kCompressed ? 2 : branch == kWindow ? 4 : 1;
}

/// What a worker does: `tiles` tiles from `cursor` on.
struct Share {
  Cursor cursor;
  int tiles;
};

/// The workers that have a part of a unit: `count` from `first` on.
struct Span {
  int first, count;
};

/// Called by whole warps.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const DecodeParams& p, int branch, int lane)
      : p_(p), branch_(branch), lane_(lane) {
    total_ = 0;
#pragma unroll 1
    for (int base = 0; base < p.batch; base += 32) total_ += sequence_tiles(base + lane);
    total_ = __reduce_add_sync(0xffffffffu, total_);
    quota_ = max(min_tiles(branch), ceil_div(total_, p.workers[branch]));
  }

  __device__ __forceinline__ Share share(int worker) const {
    Share share{};
    share.tiles = max(0, min(quota_, total_ - worker * quota_));
    if (share.tiles > 0) share.cursor = find(worker * quota_);
    return share;
  }

  __device__ __forceinline__ Span span(int b, int i) const {
    int start = 0;
#pragma unroll 1
    for (int base = 0; base < b; base += 32)
      start += base + lane_ < b ? sequence_tiles(base + lane_) : 0;
    start = __reduce_add_sync(0xffffffffu, start);
    const int seqlen = sequence_length(p_, b);
#pragma unroll 1
    for (int earlier = 0; earlier < i; ++earlier) start += unit_tiles(p_, branch_, seqlen, earlier);
    const int tiles = unit_tiles(p_, branch_, seqlen, i);
    if (tiles == 0) return {0, 0};
    const int first = start / quota_;
    return {first, (start + tiles - 1) / quota_ - first + 1};
  }

 private:
  /// The tile that `skip` others precede.
  __device__ __forceinline__ Cursor find(int skip) const {
    Cursor cursor{};
#pragma unroll 1
    for (int base = 0;; base += 32) {
      const int before = skip;
      const int sum = inclusive_sum(sequence_tiles(base + lane_));
      const uint32_t beyond = __ballot_sync(0xffffffffu, sum > before);
      skip -= __shfl_sync(0xffffffffu, sum, 31);
      if (beyond == 0) continue;
      const int found = __ffs(beyond) - 1;
      cursor.b = base + found;
      const int earlier = __shfl_sync(0xffffffffu, sum, max(found - 1, 0));
      cursor.tile = before - (found > 0 ? earlier : 0);
      break;
    }
    const int seqlen = sequence_length(p_, cursor.b);
#pragma unroll 1
    for (;; ++cursor.i) {
      cursor.tiles = unit_tiles(p_, branch_, seqlen, cursor.i);
      if (cursor.tile < cursor.tiles) return cursor;
      cursor.tile -= cursor.tiles;
    }
  }
  __device__ __forceinline__ int sequence_tiles(int b) const {
    if (b >= p_.batch) return 0;
    const int seqlen = sequence_length(p_, b);
    int tiles = 0;
#pragma unroll 1
    for (int i = 0; i < units_per_sequence(p_, branch_); ++i)
      tiles += unit_tiles(p_, branch_, seqlen, i);
    return tiles;
  }
  __device__ __forceinline__ int inclusive_sum(int x) const {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, x, distance);
      if (lane_ >= distance) x += before;
    }
    return x;
  }

  const DecodeParams& p_;
  int branch_, lane_, total_, quota_;
};

/// Where a segment's partial results lie.
__device__ __forceinline__ int64_t slot(const DecodeParams& p, int branch, int worker, int unit,
                                        int head, int row_tile) {
  const int64_t index = static_cast<int64_t>(worker + unit) * p.heads_kv + head;
  return branch == kCompressed ? index * p.row_tiles + row_tile : index;
}

}  // namespace nsa::cuda::decode
