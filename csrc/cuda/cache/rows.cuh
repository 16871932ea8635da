// Where the rows of a KV cache lie, on the device.
#pragma once

#include "cuda/common.h"
#include "nsa/cache.h"

namespace nsa::cuda::cache {

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

/// Whether a sequence has pages for new tokens, and for the blocks that they complete: the threads'
/// answers together.
__device__ __forceinline__ bool has_room(const CacheShape& s, int64_t b, int64_t old,
                                         int64_t length) {
  const BlockConfig& c = s.config;
  if (length > s.max_pages * c.select_size) return false;
  if (s.block_table == nullptr) return true;
  const int64_t first = num_compressed(old, c.block_size, c.block_stride) * c.block_stride;
  for (int64_t j = first / c.select_size + threadIdx.x; j * c.select_size < length;
       j += blockDim.x) {
    const int64_t page = page_of(s, b, j);
    if (page < 0 || page >= s.num_pages) return false;
  }
  return true;
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

}  // namespace nsa::cuda::cache
