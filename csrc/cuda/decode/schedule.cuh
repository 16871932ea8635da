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

template <int kBranch>
__device__ __forceinline__ int units_per_sequence(const DecodeParams& p) {
  return kBranch == kCompressed ? 1 : p.tokens;
}

/// Tiles of unit i of a sequence.
template <int kBranch>
__device__ __forceinline__ int unit_tiles(const DecodeParams& p, int seqlen, int i) {
  int keys;
  if constexpr (kBranch == kCompressed) {
    keys = static_cast<int>(
        visible_compressed(seqlen - 1, p.config.block_size, p.config.block_stride));
  } else {
    const int t = seqlen - p.tokens + i;
    if (t < 0) return 0;
    keys = kBranch == kWindow
               ? min(p.config.window, t + 1)
               : min(p.config.num_selected, (t >> p.select_shift) + 1) << p.select_shift;
  }
  return ceil_div(keys, kTileKeys);
}

/// A tile of a unit: unit i of sequence b.
template <int kBranch>
struct Cursor {
  int b, i, tile, tiles;

  __device__ __forceinline__ int unit(const DecodeParams& p) const {
    return b * units_per_sequence<kBranch>(p) + i;
  }
  /// Goes to the next tile; true where that belongs to another unit. There must be one.
  __device__ __forceinline__ bool advance(const DecodeParams& p) {
    if (++tile < tiles) return false;
    tile = 0;
    do {
      if (++i == units_per_sequence<kBranch>(p)) {
        i = 0;
        ++b;
      }
      tiles = unit_tiles<kBranch>(p, sequence_length(p, b), i);
    } while (tiles == 0);
    return true;
  }
};

/// The workers that have a part of a unit: `count` from `first` on.
struct Span {
  int first, count;
};

/// Called by whole warps.
template <int kBranch>
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const DecodeParams& p, int lane) : p_(p), lane_(lane) {
    total_ = 0;
    for (int base = 0; base < p.batch; base += 32) total_ += sequence_tiles(base + lane);
    total_ = __reduce_add_sync(0xffffffffu, total_);
    quota_ = max(1, ceil_div(total_, p.workers[kBranch]));
  }

  /// Tiles of a worker.
  __device__ __forceinline__ int tiles(int worker) const {
    return max(0, min(quota_, total_ - worker * quota_));
  }

  /// The first tile of a worker that has any.
  __device__ __forceinline__ Cursor<kBranch> first(int worker) const {
    int skip = worker * quota_;
    Cursor<kBranch> cursor{};
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
    for (;; ++cursor.i) {
      cursor.tiles = unit_tiles<kBranch>(p_, seqlen, cursor.i);
      if (cursor.tile < cursor.tiles) return cursor;
      cursor.tile -= cursor.tiles;
    }
  }

  __device__ __forceinline__ Span span(int b, int i) const {
    int start = 0;
    for (int base = 0; base < b; base += 32)
      start += base + lane_ < b ? sequence_tiles(base + lane_) : 0;
    start = __reduce_add_sync(0xffffffffu, start);
    const int seqlen = sequence_length(p_, b);
    for (int earlier = 0; earlier < i; ++earlier) start += unit_tiles<kBranch>(p_, seqlen, earlier);
    const int tiles = unit_tiles<kBranch>(p_, seqlen, i);
    if (tiles == 0) return {0, 0};
    const int first = start / quota_;
    return {first, (start + tiles - 1) / quota_ - first + 1};
  }

 private:
  __device__ __forceinline__ int sequence_tiles(int b) const {
    if (b >= p_.batch) return 0;
    const int seqlen = sequence_length(p_, b);
    int tiles = 0;
    for (int i = 0; i < units_per_sequence<kBranch>(p_); ++i)
      tiles += unit_tiles<kBranch>(p_, seqlen, i);
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
  int lane_, total_, quota_;
};

/// Where a segment's partial results lie.
template <int kBranch>
__device__ __forceinline__ int64_t slot(const DecodeParams& p, int worker, int unit, int head,
                                        int row_tile) {
  const int64_t index = static_cast<int64_t>(worker + unit) * p.heads_kv + head;
  return kBranch == kCompressed ? index * p.row_tiles + row_tile : index;
}

}  // namespace nsa::cuda::decode
