// Which keys a tile of a branch holds, where they lie in the cache, and which rows see them.
#pragma once

#include "cuda/decode/importance.cuh"
#include "cuda/decode/schedule.cuh"

namespace nsa::cuda::decode {

/// A key index that no row sees.
inline constexpr int kNoKey = 1 << 30;

/// What the keys of a unit are.
struct Unit {
  int b;
  int position;     // of its query: of the first one (compressed), or the only one
  int begin, end;   // keys: [begin, end); selected: `begin` is unused
  const int* list;  // selected: blocks, `count` of them
  int count;
};

/// What the sources share. Rows of a block of threads are counted from 0.
class SourceBase {
 public:
  __device__ __forceinline__ SourceBase(const DecodeParams& p, int head) : p_(p), head_(head) {}
  __device__ __forceinline__ int head() const { return head_; }

 protected:
  __device__ __forceinline__ int physical(int b, int page) const {
    const int64_t index = static_cast<int64_t>(b) * p_.max_pages + page;
    return p_.block_table ? p_.block_table[index] : static_cast<int>(index);
  }
  const DecodeParams& p_;
  int head_;
};

class CompressedSource : public SourceBase {
 public:
  static constexpr Branch kBranch = kCompressed;
  __device__ __forceinline__ CompressedSource(const DecodeParams& p, int head, int row_tile)
      : SourceBase(p, head),
        first_row_(row_tile * p.rows[kCompressed]),
        block_weights_(p, threadIdx.x % 32) {}

  __device__ __forceinline__ Unit unit(int b, int) const {
    const int seqlen = sequence_length(p_, b);
    return {b, seqlen - p_.tokens, 0, visible(seqlen - 1), nullptr, 0};
  }
  /// The page of key `i` of a tile, or -1 where there is none.
  __device__ __forceinline__ int page(const Unit& unit, int tile, int i) const {
    const int c = tile * kTileKeys + i;
    return c < unit.end ? physical(unit.b, c >> strides_shift()) : -1;
  }
  __device__ __forceinline__ int row_in_page(const Unit&, int, int i) const {
    return i & ((1 << strides_shift()) - 1);
  }
  /// The index of key `i` of a tile; the 16 keys from a multiple of 16 on are consecutive.
  __device__ __forceinline__ int key(const Unit&, int tile, int i) const {
    return tile * kTileKeys + i;
  }
  /// The keys [lo, hi) that a row sees.
  __device__ __forceinline__ void bounds(const Unit& unit, int row, int& lo, int& hi) const {
    const int index = first_row_ + row;
    lo = 0;
    hi = row_exists(row) ? visible(unit.position + index / p_.group) : 0;
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
  __device__ __forceinline__ int strides_shift() const { return p_.select_shift - p_.stride_shift; }
  __device__ __forceinline__ int visible(int t) const {
    return static_cast<int>(visible_compressed(t, p_.config.block_size, p_.config.block_stride));
  }
  int first_row_;
  BlockWeights block_weights_;
};

/// Rows are the heads of one new token.
class TokenSource : public SourceBase {
 public:
  using SourceBase::SourceBase;
  __device__ __forceinline__ int row_in_page(const Unit& unit, int tile, int i) const {
    return (unit.begin + tile * kTileKeys + i) & ((1 << p_.select_shift) - 1);
  }
  __device__ __forceinline__ void bounds(const Unit& unit, int row, int& lo, int& hi) const {
    lo = unit.begin;
    hi = row_exists(row) ? unit.end : lo;
  }
  __device__ __forceinline__ bool row_exists(int row) const { return row < p_.group; }
  __device__ __forceinline__ int2 token_head(int i, int row) const { return make_int2(i, row); }
};

class WindowSource : public TokenSource {
 public:
  static constexpr Branch kBranch = kWindow;
  using TokenSource::TokenSource;

  __device__ __forceinline__ Unit unit(int b, int i) const {
    const int t = sequence_length(p_, b) - p_.tokens + i;
    return {b, t, max(0, t + 1 - p_.config.window), t + 1, nullptr, 0};
  }
  __device__ __forceinline__ int page(const Unit& unit, int tile, int i) const {
    const int s = key(unit, tile, i);
    return s < unit.end ? physical(unit.b, s >> p_.select_shift) : -1;
  }
  __device__ __forceinline__ int key(const Unit& unit, int tile, int i) const {
    return unit.begin + tile * kTileKeys + i;
  }
};

class SelectedSource : public TokenSource {
 public:
  static constexpr Branch kBranch = kSelected;
  using TokenSource::TokenSource;

  __device__ __forceinline__ Unit unit(int b, int i) const {
    const int t = sequence_length(p_, b) - p_.tokens + i;
    const int64_t row = (static_cast<int64_t>(b) * p_.tokens + i) * p_.heads_kv + head_;
    return {b,
            t,
            0,
            t + 1,
            p_.lists + row * p_.config.num_selected,
            min(p_.config.num_selected, (t >> p_.select_shift) + 1)};
  }
  __device__ __forceinline__ int page(const Unit& unit, int tile, int i) const {
    const int s = key(unit, tile, i);
    return s < unit.end ? physical(unit.b, s >> p_.select_shift) : -1;
  }
  __device__ __forceinline__ int key(const Unit& unit, int tile, int i) const {
    const int offset = tile * kTileKeys + i, entry = offset >> p_.select_shift;
    if (entry >= unit.count) return kNoKey;
    return (unit.list[entry] << p_.select_shift) + (offset & ((1 << p_.select_shift) - 1));
  }
};

}  // namespace nsa::cuda::decode
