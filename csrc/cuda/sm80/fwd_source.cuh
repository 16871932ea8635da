// BlockSource policies of the forward main loop: which tiles of 64 keys a query tile visits, and
// which keys of a tile each token sees. A tile is two segments of 32 consecutive keys.
//
//   tiles()                how many tiles the block of threads walks
//   rows(tile, segment)    the keys to load into a segment; rows past them are zeros
//   view(tile)             the tile as the calling warp sees it
//   bounds(view, segment, token, lo, hi)   the token sees keys lo <= s < hi of the segment
#pragma once

#include "cuda/fwd/job.cuh"

namespace nsa::cuda::sm80 {

inline constexpr int kTileKeys = 64;
inline constexpr int kSegmentKeys = 32;

struct SegmentRows {
  int first, count;  // keys first, first + 1, ..; count may exceed the 32 rows or be negative
};

struct TileView {
  int base[2];       // first key of each segment
  uint32_t mask[2];  // tokens of the query tile that chose it (selected branch)
  uint32_t active;   // bit m: some row of the warp's m-th group of 16 rows may see a key
  bool masked;       // some row of those does not see the whole tile
};

/// The tokens that one warp's rows [row, row + rows) belong to.
struct WarpTokens {
  int first, count;
  __device__ __forceinline__ WarpTokens(const FwdParams& p, int row, int rows)
      : first(row >> p.log2_group), count(max(1, rows >> p.log2_group)) {}
};

/// One range of keys, a prefix (compressed) or a sliding window: every tile of it is visited.
template <int kGroups>
class RangeSource {
 public:
  static constexpr bool kSparse = false;
  static constexpr int64_t smem_bytes(const FwdParams&) { return 0; }

  __device__ __forceinline__ RangeSource(const FwdParams& p, const Job& job, int warp_row, char*)
      : p_(p), job_(job) {
    int unused;
    visible(0, begin_, unused);
    visible(job.tokens - 1, unused, end_);
    const WarpTokens tokens(p, warp_row, kGroups * 16);
    visible(tokens.first, first_lo_, first_hi_);
    visible(tokens.first + tokens.count - 1, last_lo_, last_hi_);
    if (tokens.first >= job.tokens) last_hi_ = 0;  // no such rows
  }
  __device__ __forceinline__ int tiles() const {
    return end_ <= begin_ ? 0 : (end_ - begin_ + kTileKeys - 1) / kTileKeys;
  }
  __device__ __forceinline__ SegmentRows rows(int tile, int segment) const {
    const int first = begin_ + tile * kTileKeys + segment * kSegmentKeys;
    return {first, end_ - first};
  }
  __device__ __forceinline__ TileView view(int tile) const {
    TileView view;
    view.base[0] = begin_ + tile * kTileKeys;
    view.base[1] = view.base[0] + kSegmentKeys;
    const int end = view.base[0] + kTileKeys;
    view.active = view.base[0] < last_hi_ && end > first_lo_ ? (1u << kGroups) - 1 : 0;
    view.masked = view.base[0] < last_lo_ || end > first_hi_;
    return view;
  }
  __device__ __forceinline__ void bounds(const TileView&, int, int token, int& lo, int& hi) const {
    visible(token, lo, hi);
  }

 private:
  /// Keys lo <= s < hi that a token sees; of one past the last token those of the last.
  __device__ __forceinline__ void visible(int token, int& lo, int& hi) const {
    const int t = job_.position(min(token, job_.tokens - 1));
    if (p_.branch == kCompressed) {
      lo = 0;
      const int past = t + 1 - p_.config.block_size;  // visible_compressed(t) without a division
      hi = past < 0 ? 0 : (past >> p_.stride_shift) + 1;
    } else {
      lo = max(0, t - p_.config.window + 1);
      hi = max(0, t + 1);
    }
  }

  const FwdParams& p_;
  const Job& job_;
  int begin_, end_;                              // of the block of threads
  int first_lo_, first_hi_, last_lo_, last_hi_;  // of the warp's first and last token
};

/// The blocks that the tokens of the query tile chose, each visited once: the sorted union of their
/// lists, with the tokens that chose it.
template <int kGroups>
class SelectedSource {
 public:
  static constexpr bool kSparse = true;
  static int64_t smem_bytes(const FwdParams& p) {
    return (p.sort_size + 1) * sizeof(uint2) + p.sort_size * sizeof(uint32_t) + 16;
  }

  /// Called by the whole block of threads; synchronises it.
  __device__ SelectedSource(const FwdParams& p, const Job& job, int warp_row, char* smem)
      : p_(p), job_(job), entries_(reinterpret_cast<uint2*>(smem)) {
    auto* keys = reinterpret_cast<uint32_t*>(entries_ + p.sort_size + 1);
    auto* count = reinterpret_cast<int*>(keys + p.sort_size);
    gather_keys(keys);
    sort_keys(keys);
    if (threadIdx.x < 32) merge_keys(keys, count);
    __syncthreads();
    tiles_ = p_.select_shift == 5 ? (*count + 1) / 2 : *count << (p_.select_shift - 6);
    const WarpTokens tokens(p, warp_row, kGroups * 16);
    first_ = job.position(tokens.first);
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      const WarpTokens group(p, warp_row + m * 16, 16);
      group_mask_[m] = group.first < 32 ? ((1u << group.count) - 1) << group.first : 0;
    }
  }
  __device__ __forceinline__ int tiles() const { return tiles_; }
  __device__ __forceinline__ SegmentRows rows(int tile, int segment) const {
    const uint2 entry = entries_[entry_of(tile, segment)];
    const int first = base_of(entry, tile) + (p_.select_shift == 5 ? 0 : segment * kSegmentKeys);
    return {first, entry.y != 0 ? job_.seqlen_k - first : 0};
  }
  __device__ __forceinline__ TileView view(int tile) const {
    TileView view;
    const uint2 first = entries_[entry_of(tile, 0)], second = entries_[entry_of(tile, 1)];
    view.base[0] = base_of(first, tile);
    view.base[1] = base_of(second, tile) + (p_.select_shift == 5 ? 0 : kSegmentKeys);
    view.mask[0] = first.y;
    view.mask[1] = second.y;
    view.active = 0;
    view.masked = max(view.base[0], view.base[1]) + kSegmentKeys - 1 > first_;
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      view.active |= ((first.y | second.y) & group_mask_[m]) != 0 ? 1u << m : 0;
      view.masked |= (~(first.y & second.y) & group_mask_[m]) != 0;
    }
    return view;
  }
  __device__ __forceinline__ void bounds(const TileView& view, int segment, int token, int& lo,
                                         int& hi) const {
    lo = 0;
    hi = (view.mask[segment] >> token) & 1 ? job_.position(token) + 1 : 0;
  }

 private:
  // A tile of 64 keys is a block of 64, half a block of 128, or two blocks of 32.
  __device__ __forceinline__ int entry_of(int tile, int segment) const {
    return p_.select_shift == 5 ? 2 * tile + segment : tile >> (p_.select_shift - 6);
  }
  __device__ __forceinline__ int base_of(uint2 entry, int tile) const {
    const int base = static_cast<int>(entry.x) << p_.select_shift;
    return p_.select_shift == 7 ? base + (tile & 1) * kTileKeys : base;
  }

  /// The indices of all tokens as block * 32 + token; absent ones, and blocks that lie past the
  /// token's own, as ~0.
  __device__ void gather_keys(uint32_t* keys) const {
    const int64_t blocks = num_select_blocks(job_.seqlen_k, p_.config.select_size);
    for (int i = threadIdx.x; i < p_.sort_size; i += blockDim.x) {
      const int token = i / p_.index_count, slot = i - token * p_.index_count;
      uint32_t key = ~0u;
      if (token < job_.tokens) {
        const View<int32_t>& view = p_.block_indices;
        const int block = view.ptr[job_.batch * view.batch + (job_.row_q + token) * view.seq +
                                   job_.head_kv * view.head + slot];
        if (block >= 0 && block < blocks && (block << p_.select_shift) <= job_.position(token))
          key = static_cast<uint32_t>(block) * 32 + token;
      }
      keys[i] = key;
    }
  }

  /// Bitonic sort, ascending.
  __device__ void sort_keys(uint32_t* keys) const {
    for (int run = 2; run <= p_.sort_size; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < p_.sort_size; i += blockDim.x) {
          const int partner = i ^ distance;
          if (partner < i) continue;
          const uint32_t a = keys[i], b = keys[partner];
          if ((a > b) == ((i & run) == 0)) {
            keys[i] = b;
            keys[partner] = a;
          }
        }
      }
    }
    __syncthreads();
  }

  /// One warp: entry (block, tokens) of each distinct block, and an empty entry after the last.
  __device__ void merge_keys(const uint32_t* keys, int* count) const {
    const int lane = threadIdx.x;
    uint32_t previous = ~0u;
    int merged = 0;
    for (int base = 0; base < p_.sort_size; base += 32) {
      const uint32_t key = base + lane < p_.sort_size ? keys[base + lane] : ~0u;
      const uint32_t block = key >> 5;
      uint32_t before = __shfl_up_sync(0xffffffffu, block, 1);
      if (lane == 0) before = previous;
      const bool valid = key != ~0u, head = valid && block != before;
      const uint32_t heads = __ballot_sync(0xffffffffu, head);
      const int entry = merged + __popc(heads & (0xffffffffu >> (31 - lane))) - 1;
      if (head) entries_[entry] = make_uint2(block, 0);
      __syncwarp();
      if (valid) atomicOr(&entries_[entry].y, 1u << (key & 31));
      merged += __popc(heads);
      previous = __shfl_sync(0xffffffffu, block, 31);
    }
    if (lane == 0) {
      entries_[merged] = make_uint2(0, 0);
      *count = merged;
    }
  }

  const FwdParams& p_;
  const Job& job_;
  uint2* entries_;
  int tiles_, first_;
  uint32_t group_mask_[kGroups];
};

}  // namespace nsa::cuda::sm80
