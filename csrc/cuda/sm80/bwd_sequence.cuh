// Sequences of a batch on the device: where their rows lie, and which keys a position sees.
#pragma once

#include "cuda/sm80/bwd_params.h"

namespace nsa::cuda::bwd {

struct Sequence {
  int64_t batch;             // along the batch axis; 0 when packed
  int64_t q_first, k_first;  // along the seq axis; 0 unless packed
  int64_t q_row;             // the first query's row among those of all sequences
  int q_len, k_len;

  __device__ __forceinline__ int position(int i) const { return i + k_len - q_len; }
  template <class T>
  __device__ __forceinline__ T* queries(const View<T>& view) const {
    return offset(view, q_first);
  }
  template <class T>
  __device__ __forceinline__ T* keys(const View<T>& view) const {
    return offset(view, k_first);
  }

 private:
  template <class T>
  __device__ __forceinline__ T* offset(const View<T>& view, int64_t row) const {
    return view.ptr + batch * view.batch + row * view.seq;
  }
};

__device__ __forceinline__ Sequence load_sequence(const AttnShape& shape, int b) {
  if (!shape.cu_seqlens_q)
    return {b,
            0,
            0,
            b * shape.seqlen_q,
            static_cast<int>(shape.seqlen_q),
            static_cast<int>(shape.seqlen_k)};
  const int q = shape.cu_seqlens_q[b], k = shape.cu_seqlens_k[b];
  return {0, q, k, q, shape.cu_seqlens_q[b + 1] - q, shape.cu_seqlens_k[b + 1] - k};
}

/// A view with the element type that the kernel works in.
template <class T>
__device__ __forceinline__ View<const T> typed(const InView& view) {
  return {static_cast<const T*>(view.ptr), view.batch, view.seq, view.head};
}
template <class T>
__device__ __forceinline__ View<T> typed(const OutView& view) {
  return {static_cast<T*>(view.ptr), view.batch, view.seq, view.head};
}

/// Row 0 of the keys that a branch of the sequence attends to: raw keys, or its compressed tokens.
template <class T>
__device__ __forceinline__ T* branch_keys(const View<T>& view, Sequence sequence, int branch,
                                          const BlockConfig& config) {
  if (branch == kCompressed) sequence.k_first = packed_row(sequence.k_first, config.block_stride);
  return sequence.keys(view);
}
__device__ __forceinline__ int branch_length(const Sequence& sequence, int branch,
                                             const BlockConfig& config) {
  return branch == kCompressed ? static_cast<int>(num_compressed(sequence.k_len, config.block_size,
                                                                 config.block_stride))
                               : sequence.k_len;
}

/// Keys [begin, end) that position t sees; of the selected branch, those of the chosen blocks
/// within. Empty for t < 0.
struct KeyRange {
  int begin, end;
};
__device__ __forceinline__ KeyRange visible_keys(int branch, int t, const BlockConfig& config) {
  if (branch == kCompressed)
    return {0, static_cast<int>(visible_compressed(t, config.block_size, config.block_stride))};
  return {branch == kWindow ? max(0, t - config.window + 1) : 0, t + 1};
}

struct QueryRange {
  int begin, count;
};

/// Queries of the sequence to which some of the keys [key, key + keys) may be visible in a branch.
__device__ __forceinline__ QueryRange range_queries(const Sequence& sequence, int branch, int key,
                                                    int keys, const BlockConfig& config) {
  if (branch < 0) return {0, 0};
  int64_t first = key, last = sequence.k_len - 1;  // positions
  if (branch == kCompressed)
    first = static_cast<int64_t>(key) * config.block_stride + config.block_size - 1;
  else
    last = static_cast<int64_t>(key) + keys - 2 + config.window;
  const int64_t shift = sequence.k_len - sequence.q_len;
  const int64_t begin = max(first - shift, int64_t{0});
  const int64_t end = min(last - shift + 1, static_cast<int64_t>(sequence.q_len));
  return {static_cast<int>(begin), static_cast<int>(max(end - begin, int64_t{0}))};
}

}  // namespace nsa::cuda::bwd
