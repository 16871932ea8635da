// Which query tile a block of threads works on, and where its rows lie.
#pragma once

#include "cuda/fwd/params.h"
#include "nsa/geometry.h"

namespace nsa::cuda {

struct Job {
  int batch;  // index for the batch stride: 0 when packed
  int head_kv;
  int first;      // first token of the tile within its sequence
  int tokens;     // tokens of the tile that exist, at least 1
  int seqlen_k;   // raw keys
  int offset;     // position t of the tile's first token
  int64_t row_q;  // first row of the tile along the seq axis of q
  int64_t row_k;  // first row of the sequence along the seq axis of k and v

  __device__ __forceinline__ int position(int token) const { return offset + token; }
};

/// The job of block `index`, or false where a packed sequence is shorter than the longest. One kv
/// head at a time, so that its K and V stay in L2; within a sequence the late tiles first, which
/// see the most keys.
__device__ __forceinline__ bool make_job(const FwdParams& p, int64_t index, Job& job) {
  const int tile = p.tiles - 1 - static_cast<int>(index % p.tiles);
  const int64_t outer = index / p.tiles;
  const int b = static_cast<int>(outer % p.batch);
  job.head_kv = static_cast<int>(outer / p.batch);
  job.first = tile * p.tile_tokens;
  int seqlen_q = p.seqlen_q;
  job.seqlen_k = p.seqlen_k;
  int64_t start_q = 0, start_k = 0;
  job.batch = b;
  if (p.cu_seqlens_q) {
    job.batch = 0;
    start_q = p.cu_seqlens_q[b];
    start_k = p.cu_seqlens_k[b];
    seqlen_q = static_cast<int>(p.cu_seqlens_q[b + 1] - start_q);
    job.seqlen_k = static_cast<int>(p.cu_seqlens_k[b + 1] - start_k);
  }
  if (p.seqused_k) job.seqlen_k = p.seqused_k[b];
  job.tokens = min(p.tile_tokens, seqlen_q - job.first);
  if (job.tokens <= 0) return false;
  job.offset = job.first + job.seqlen_k - seqlen_q;
  job.row_q = start_q + job.first;
  job.row_k = p.branch == kCompressed ? packed_row(start_k, p.config.block_stride) : start_k;
  return true;
}

/// The element at (token of the tile, query head within the group) of a (B, Sq, Hq, ...) tensor.
template <class T, class V>
__device__ __forceinline__ T* query_row(const V& view, const FwdParams& p, const Job& job,
                                        int token, int head) {
  return static_cast<T*>(view.ptr) + job.batch * view.batch + (job.row_q + token) * view.seq +
         (static_cast<int64_t>(job.head_kv) * p.group + head) * view.head;
}

}  // namespace nsa::cuda
