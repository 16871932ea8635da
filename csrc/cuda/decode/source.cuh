// Which keys a tile of a branch holds, where they lie in the cache, and which rows see them.
#pragma once

#include "cuda/decode/importance.cuh"
#include "cuda/decode/schedule.cuh"

namespace nsa::cuda::decode {

/// The keys of a unit. Tile i holds those from begin + 64 i on; of the selected branch these count
/// along its list of blocks.
struct Unit {
  int b;
  Pages pages;
  int position;      // of the query: of the first one (compressed), or the only one
  int begin, end;    // only keys before `end` exist
  const int2* list;  // selected branch: blocks and their pages, `count` of them; else null
  int count;
};

/// Rows: the new tokens of a sequence times the heads of a group, from row_tile * rows on.
class CompressedSource {
 public:
  static constexpr bool kHasWeights = true;
  __device__ __forceinline__ CompressedSource(const DecodeParams& p, int head, int row_tile)
      : p_(p),
        head_(head),
        first_row_(row_tile * p.rows[kCompressed]),
        block_weights_(p, threadIdx.x % 32) {}

  __device__ __forceinline__ int branch() const { return kCompressed; }
  __device__ __forceinline__ int head() const { return head_; }
  __device__ __forceinline__ Unit unit(int b, int) const {
    const int seqlen = sequence_length(p_, b);
    return {b, sequence_pages(p_, b),          seqlen - p_.tokens,
            0, visible_tokens(p_, seqlen - 1), nullptr,
            0};
  }
  /// The index of a key; of 16 consecutive offsets from a multiple of 16 on the keys are
  /// consecutive.
  __device__ __forceinline__ int key(const Unit&, int offset) const { return offset; }
  /// The page of a key, or -1 where there is none.
  __device__ __forceinline__ int page(const Unit& unit, int offset) const {
    return offset < unit.end ? unit.pages.at(offset >> page_shift()) : -1;
  }
  /// log2 of the keys of a page: key `offset` is row offset mod 2^page_shift.
  __device__ __forceinline__ int page_shift() const { return p_.select_shift - p_.stride_shift; }

  /// The keys [lo, hi) that a row sees.
  __device__ __forceinline__ void bounds(const Unit& unit, int row, int& lo, int& hi) const {
    lo = 0;
    hi = row_exists(row) ? visible_tokens(p_, unit.position + (first_row_ + row) / p_.group) : 0;
  }
  __device__ __forceinline__ bool row_exists(int row) const {
    return first_row_ + row < p_.tokens * p_.group;
  }
  /// The new token and the head within the group of a row that exists.
  __device__ __forceinline__ int2 token_head(int, int row) const {
    const int index = first_row_ + row;
    return make_int2(index / p_.group, index % p_.group);
  }
  /// The row among those of the sequence and kv head.
  __device__ __forceinline__ int global_row(int row) const { return first_row_ + row; }
  __device__ __forceinline__ const BlockWeights& block_weights() const { return block_weights_; }

 private:
  const DecodeParams& p_;
  int head_, first_row_;
  BlockWeights block_weights_;
};

/// The window or the selected branch. Rows: the heads of one new token. One class for both, so that
/// one copy of the main loop serves them: instructions that are not yet in a multiprocessor's cache
/// cost a short call as much as its data.
class TokenSource {
 public:
  static constexpr bool kHasWeights = false;
  __device__ __forceinline__ TokenSource(const DecodeParams& p, int branch, int head)
      : p_(p), branch_(branch), head_(head) {}

  __device__ __forceinline__ int branch() const { return branch_; }
  __device__ __forceinline__ int head() const { return head_; }
  __device__ __forceinline__ Unit unit(int b, int i) const {
    const int t = sequence_length(p_, b) - p_.tokens + i;
    if (branch_ == kWindow)
      return {b, sequence_pages(p_, b), t, max(0, t + 1 - p_.config.window), t + 1, nullptr, 0};
    const int64_t row = (static_cast<int64_t>(b) * p_.tokens + i) * p_.heads_kv + head_;
    return {b,
            sequence_pages(p_, b),
            t,
            0,
            t + 1,
            p_.lists + row * p_.config.num_selected,
            min(p_.config.num_selected, (t >> p_.select_shift) + 1)};
  }
  __device__ __forceinline__ int key(const Unit& unit, int offset) const {
    if (unit.list == nullptr) return offset;
    const int entry = offset >> p_.select_shift;
    return entry < unit.count ? key_of(unit.list[entry].x, offset) : unit.end;
  }
  __device__ __forceinline__ int page(const Unit& unit, int offset) const {
    const int entry = offset >> p_.select_shift;
    if (unit.list == nullptr) return offset < unit.end ? unit.pages.at(entry) : -1;
    if (entry >= unit.count) return -1;
    const int2 block = unit.list[entry];
    return key_of(block.x, offset) < unit.end ? block.y : -1;
  }
  __device__ __forceinline__ int page_shift() const { return p_.select_shift; }
  __device__ __forceinline__ void bounds(const Unit& unit, int row, int& lo, int& hi) const {
    lo = unit.begin;
    hi = row_exists(row) ? unit.end : lo;
  }
  __device__ __forceinline__ bool row_exists(int row) const { return row < p_.group; }
  __device__ __forceinline__ int2 token_head(int i, int row) const { return make_int2(i, row); }

 private:
  __device__ __forceinline__ int key_of(int block, int offset) const {
    return (block << p_.select_shift) + (offset & ((1 << p_.select_shift) - 1));
  }
  const DecodeParams& p_;
  int branch_, head_;
};

}  // namespace nsa::cuda::decode
