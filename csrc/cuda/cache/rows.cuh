// Where the rows of a KV cache lie, on the device.
#pragma once

#include "cuda/common.h"
#include "cuda/device/ptx.cuh"
#include "nsa/cache.h"

namespace nsa::cuda::cache {

/// Rows start at multiples of 16 bytes. `outer` is the stride of batch or page.
template <class View>
void check_aligned(const View& view, const char* name, int64_t outer) {
  if (view.ptr == nullptr) return;
  if (reinterpret_cast<uintptr_t>(view.ptr) % 16 || view.seq % 8 || view.head % 8 || outer % 8)
    throw std::invalid_argument(std::string(name) + ": rows must start at multiples of 16 bytes");
}

inline void check_dims(const CacheShape& s) {
  if (s.dim_qk % 8 || s.dim_v % 8)
    throw std::invalid_argument("head dims must be multiples of 8 on CUDA");
}

inline void check_tokens(const CacheTokens& p) {
  check_dims(p.shape);
  for (int branch = 0; branch < kNumBranches; ++branch) {
    check_aligned(p.k[branch], "k", p.k[branch].batch);
    check_aligned(p.v[branch], "v", p.v[branch].batch);
    check_aligned(p.k_pages[branch], "k_pages", p.k_pages[branch].page);
    check_aligned(p.v_pages[branch], "v_pages", p.v_pages[branch].page);
  }
  check_aligned(p.tail_k, "tail_k", p.tail_k.batch);
  check_aligned(p.tail_v, "tail_v", p.tail_v.batch);
}

// Positions are below 2^31, and divisions of 64 bits slow.

__device__ __forceinline__ int first_incomplete(const CacheStep& step, const BlockConfig& c) {
  return step.old < c.block_size ? 0 : (step.old - c.block_size) / c.block_stride + 1;
}

/// The blocks that a step completes: first, first + 1, ..
struct NewBlocks {
  int first, count;
  __device__ __forceinline__ NewBlocks(const CacheStep& step, const BlockConfig& c)
      : first(first_incomplete(step, c)),
        count(first_incomplete({step.old + step.taken, 0, 0}, c) - first) {}
};

__device__ __forceinline__ int64_t page_of(const CacheShape& s, int64_t b, int64_t j) {
  const int64_t index = b * s.max_pages + j;
  return s.block_table ? s.block_table[index] : index;
}

/// Whether a sequence has pages for the tokens that it is offered, and for the blocks that they
/// complete. `threads` share the work, each gets the answer for its part.
__device__ __forceinline__ bool has_room(const CacheShape& s, int64_t b, const CacheStep& step,
                                         int thread = 0, int threads = 1) {
  const BlockConfig& c = s.config;
  const int64_t length = int64_t{step.old} + step.wanted;
  if (length > s.max_pages * c.select_size) return false;
  if (s.block_table == nullptr) return true;
  const int first = first_incomplete(step, c) * c.block_stride / c.select_size;
  for (int64_t j = first + thread; j * c.select_size < length; j += threads) {
    const int64_t page = page_of(s, b, j);
    if (page < 0 || page >= s.num_pages) return false;
  }
  return true;
}

/// What a sequence is offered; `taken` is open. Past L1: kernels overlap, and other blocks of
/// threads change the lengths beside this one.
template <class Params>
__device__ __forceinline__ CacheStep offered_step(const Params& p, int64_t b) {
  const int tokens = static_cast<int>(p.shape.tokens);
  const int wanted = p.counts ? min(max(p.counts[b], 0), tokens) : tokens;
  return {__ldcg(p.seqlens + b), 0, wanted};
}

/// A piece of 8 elements, of a row of all heads of K and then of V.
struct Column {
  bool values;
  int head, at;  // piece of the head
  __device__ __forceinline__ Column(int index, int heads, int pieces_k, int pieces_v)
      : values(index >= heads * pieces_k) {
    if (values) index -= heads * pieces_k;
    const int pieces = values ? pieces_v : pieces_k;
    head = index / pieces;
    at = index - head * pieces;
  }
};

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
template <class T>
__device__ __forceinline__ uint4* piece_of(const PagedOut& pages, int64_t page, int row, int head,
                                           int at) {
  return reinterpret_cast<uint4*>(static_cast<T*>(pages.ptr) + page * pages.page + row * pages.seq +
                                  head * pages.head) +
         at;
}

/// What a token that the tail lost reads as.
template <class T>
__device__ __forceinline__ uint4 nan_piece() {
  const uint32_t pair = pack2<T>(nanf(""), nanf(""));
  return make_uint4(pair, pair, pair, pair);
}

/// Piece `at` of a key rotated at `position`, in pairs (i, i + D/2).
template <class T>
__device__ __forceinline__ uint4 rotated(const uint4* key, int at, int pieces, float position,
                                         const float* inv_freq) {
  const int half = pieces * 4;  // elements; a piece of 8 may lie in both halves
  const T* elements = reinterpret_cast<const T*>(key);
  float values[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int i = at * 8 + e, pair = i < half ? i : i - half;
    float sin, cos;
    sincosf(position * inv_freq[pair], &sin, &cos);
    const float a = to_float(elements[pair]), b = to_float(elements[pair + half]);
    values[e] = i < half ? a * cos - b * sin : b * cos + a * sin;
  }
  return make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                    pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7]));
}

}  // namespace nsa::cuda::cache
