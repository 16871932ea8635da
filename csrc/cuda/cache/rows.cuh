// Where the rows of a KV cache lie, on the device.
#pragma once

#include "cuda/common.h"
#include "nsa/cache.h"

namespace nsa::cuda::cache {

/// Rows start at multiples of 16 bytes. `outer` is the stride of batch or page.
template <class View>
void check_aligned(const View& view, const char* name, int64_t outer) {
  if (view.ptr == nullptr) return;
  if (reinterpret_cast<uintptr_t>(view.ptr) % 16 || view.seq % 8 || view.head % 8 || outer % 8)
    throw std::invalid_argument(std::string(name) + ": rows must start at multiples of 16 bytes");
}

inline void check_tokens(const CacheGather& p) {
  if (p.shape.dim_qk % 8 || p.shape.dim_v % 8)
    throw std::invalid_argument("head dims must be multiples of 8 on CUDA");
  check_aligned(p.k, "k", p.k.batch);
  check_aligned(p.v, "v", p.v.batch);
  check_aligned(p.tail_k, "tail_k", p.tail_k.batch);
  check_aligned(p.tail_v, "tail_v", p.tail_v.batch);
}

/// The blocks that a step completes: first, first + 1, ..
struct NewBlocks {
  int64_t first, count;
  __device__ __forceinline__ NewBlocks(const CacheStep& step, const BlockConfig& c)
      : first(num_compressed(step.old, c.block_size, c.block_stride)),
        count(num_compressed(step.length(), c.block_size, c.block_stride) - first) {}
};

__device__ __forceinline__ int64_t page_of(const CacheShape& s, int64_t b, int64_t j) {
  const int64_t index = b * s.max_pages + j;
  return s.block_table ? s.block_table[index] : index;
}

/// Whether a sequence has pages for new tokens, and for the blocks that they complete. `threads`
/// share the work, each gets the answer for its part.
__device__ __forceinline__ bool has_room(const CacheShape& s, int64_t b, int64_t old,
                                         int64_t length, int thread = 0, int threads = 1) {
  const BlockConfig& c = s.config;
  if (length > s.max_pages * c.select_size) return false;
  if (s.block_table == nullptr) return true;
  const int64_t first = num_compressed(old, c.block_size, c.block_stride) * c.block_stride;
  for (int64_t j = first / c.select_size + thread; j * c.select_size < length; j += threads) {
    const int64_t page = page_of(s, b, j);
    if (page < 0 || page >= s.num_pages) return false;
  }
  return true;
}

/// What a sequence is offered; `taken` is open.
__device__ __forceinline__ CacheStep offered_step(const CacheGather& p, int64_t b) {
  const int tokens = static_cast<int>(p.shape.tokens);
  const int wanted = p.counts ? min(max(p.counts[b], 0), tokens) : tokens;
  return {p.seqlens[b], 0, wanted};
}

/// Piece `at`, 8 elements, of a row of a (B, S, H, D) tensor.
template <class T>
__device__ __forceinline__ const uint4* piece_of(const InView& view, int64_t b, int64_t row,
                                                 int64_t head, int at) {
  return reinterpret_cast<const uint4*>(static_cast<const T*>(view.ptr) + b * view.batch +
                                        row * view.seq + head * view.head) +
         at;
}
template <class T>
__device__ __forceinline__ uint4* piece_of(const OutView& view, int64_t b, int64_t row,
                                           int64_t head, int at) {
  return reinterpret_cast<uint4*>(static_cast<T*>(view.ptr) + b * view.batch + row * view.seq +
                                  head * view.head) +
         at;
}

/// Where the token at `position` lies, piece `at` of its row: among the new ones or in the tail.
/// Null where the tail lost it.
template <class T>
__device__ __forceinline__ const uint4* token_piece(const CacheGather& p, const CacheStep& step,
                                                    int64_t b, int64_t position, bool values,
                                                    int64_t head, int at) {
  if (position >= step.old)
    return piece_of<T>(values ? p.v : p.k, b, step.row(position, p.shape.tokens), head, at);
  if (position < p.tail_start[b]) return nullptr;
  return piece_of<T>(values ? p.tail_v : p.tail_k, b, position % p.shape.tail, head, at);
}

}  // namespace nsa::cuda::cache
