// The blocks that the tokens of a query tile chose, each once, with the tokens that chose it: made
// by warps of the producer, one job ahead of the consumers, in one of several buffers.
#pragma once

#include "cuda/fwd/job.cuh"

namespace nsa::cuda::sm90 {

class BlockList {
 public:
  __host__ __device__ static constexpr int64_t buffer_bytes(int sort_size) {
    return sort_size * 12 + 16;
  }

  __device__ __forceinline__ BlockList(const FwdParams& p, char* smem, int buffer)
      : select_shift_(p.select_shift),
        tiles_shift_(max(0, p.select_shift - 6)),
        count_(reinterpret_cast<int*>(smem + buffer * buffer_bytes(p.sort_size))),
        entries_(reinterpret_cast<uint2*>(count_ + 4)),
        keys_(reinterpret_cast<uint32_t*>(entries_ + p.sort_size)) {}

  /// Tiles of 64 keys: a block of 32 fills half of one, a block of 128 takes two.
  __device__ __forceinline__ int tiles() const { return *count_ << tiles_shift_; }
  /// The first key of a tile, and the tokens that chose its block: bit k for token k of the query
  /// tile. Any tile up to tiles().
  __device__ __forceinline__ int tile(int tile, uint32_t& tokens) const {
    const uint2 entry = entries_[tile >> tiles_shift_];
    tokens = entry.y;
    return static_cast<int>(entry.x) + (tile & ((1 << tiles_shift_) - 1)) * 64;
  }
  __device__ __forceinline__ uint32_t tokens(int tile) const {
    return entries_[tile >> tiles_shift_].y;
  }
  /// The bits of the tokens of `count` rows of the query tile, a power of two of them.
  __device__ __forceinline__ static uint32_t row_tokens(const FwdParams& p, int row, int count) {
    const int tokens = max(count >> p.log2_group, 1), first = row >> p.log2_group;
    if (first >= 32) return 0;
    return (tokens < 32 ? (1u << tokens) - 1 : ~0u) << first;
  }

  /// Called by kThreads threads, whole warps; complete when all have returned, of which the first
  /// warp is the last. All readers of what the buffer held, those who built it too, are done.
  template <int kThreads>
  __device__ void build(const FwdParams& p, const Job& job, int thread) const {
    gather<kThreads>(p, job, thread);
    sort<kThreads>(p.sort_size, thread);
    if (thread < 32) merge(p.sort_size, thread);
  }

 private:
  static constexpr int kBarrier = 8;

  /// Keys block * 32 + token; absent indices, and blocks past the token's own, are ~0.
  template <int kThreads>
  __device__ void gather(const FwdParams& p, const Job& job, int thread) const {
    const int64_t blocks = num_select_blocks(job.seqlen_k, p.config.select_size);
    const View<int32_t>& view = p.block_indices;
    const int32_t* rows =
        view.ptr + job.batch * view.batch + job.row_q * view.seq + job.head_kv * view.head;
    for (int i = thread; i < p.sort_size; i += kThreads) {
      const int token = i / p.index_count, slot = i - token * p.index_count;
      uint32_t key = ~0u;
      if (token < job.tokens) {
        const int block = rows[token * view.seq + slot];
        if (block >= 0 && block < blocks && block <= job.position(token) / p.config.select_size &&
            job.position(token) >= 0)
          key = static_cast<uint32_t>(block) * 32 + token;
      }
      keys_[i] = key;
    }
  }

  /// Bitonic, ascending.
  template <int kThreads>
  __device__ void sort(int size, int thread) const {
    for (int run = 2; run <= size; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) {
        named_barrier_sync(kBarrier, kThreads);
        for (int pair = thread; pair < size / 2; pair += kThreads) {
          const int i = 2 * pair - (pair & (distance - 1)), partner = i + distance;
          const uint32_t a = keys_[i], b = keys_[partner];
          if ((a > b) == ((i & run) == 0)) {
            keys_[i] = b;
            keys_[partner] = a;
          }
        }
      }
    }
    named_barrier_sync(kBarrier, kThreads);
  }

  /// One warp: equal blocks become one entry.
  __device__ void merge(int size, int lane) const {
    uint32_t previous = ~0u;
    int merged = 0;
    for (int base = 0; base < size; base += 32) {
      const uint32_t key = base + lane < size ? keys_[base + lane] : ~0u;
      const uint32_t block = key >> 5;
      uint32_t before = __shfl_up_sync(0xffffffffu, block, 1);
      if (lane == 0) before = previous;
      const bool valid = key != ~0u, head = valid && block != before;
      const uint32_t heads = __ballot_sync(0xffffffffu, head);
      const int entry = merged + __popc(heads & (0xffffffffu >> (31 - lane))) - 1;
      if (head) entries_[entry] = make_uint2(block << select_shift_, 0);
      __syncwarp();
      if (valid) atomicOr(&entries_[entry].y, 1u << (key & 31));
      merged += __popc(heads);
      previous = __shfl_sync(0xffffffffu, block, 31);
    }
    if (lane == 0) *count_ = merged;
  }

  const int select_shift_, tiles_shift_;
  int* count_;
  uint2* entries_;  // first key, tokens
  uint32_t* keys_;
};

/// Walks the tiles of a list that some of `tokens` chose. A warp, 32 tiles at a time.
class WantedTiles {
 public:
  __device__ __forceinline__ WantedTiles(const BlockList& list, uint32_t tokens)
      : list_(list), tokens_(tokens), tiles_(list.tiles()) {}

  /// The next one; tiles() of the list when there is none.
  __device__ __forceinline__ int next() {
    while (wanted_ == 0) {
      base_ += 32;
      if (base_ >= tiles_) return tiles_;
      const int tile = base_ + static_cast<int>(threadIdx.x % 32);
      const bool wants = tile < tiles_ && (list_.tokens(tile) & tokens_);
      wanted_ = __ballot_sync(0xffffffffu, wants);
    }
    const int bit = __ffs(wanted_) - 1;
    wanted_ &= wanted_ - 1;
    return base_ + bit;
  }

 private:
  const BlockList& list_;
  const uint32_t tokens_;
  const int tiles_;
  int base_ = -32;
  uint32_t wanted_ = 0;
};

}  // namespace nsa::cuda::sm90
