// Storing new tokens in a KV cache. Beside pages of raw keys and of compressed tokens (decode.h) a
// sequence has a tail: a ring of the last R raw tokens of the compressed branch, from which blocks
// complete later. Position p lies in slot p % R.
//
// T tokens are stored in three steps: cache_gather lines up the tail and the new tokens, phi
// compresses them, cache_append stores everything. On CUDA cache_store does all of it for a step of
// decode. No length is read by the host.
#pragma once

#include <cstdint>

#include "nsa/api.h"
#include "nsa/geometry.h"
#include "nsa/params.h"

namespace nsa {

struct CacheShape {
  DType dtype;
  int64_t batch;               // B
  int64_t tokens;              // T: rows of the new tokens
  int64_t heads;               // Hkv
  int64_t dim_qk, dim_v;       // Dk, Dv
  int64_t tail;                // R, at least l
  int64_t max_pages;           // of a sequence: its capacity is max_pages * l'
  int64_t num_pages;           // of the pool
  const int32_t* block_table;  // (B, max_pages) or null: page j of sequence b is b * max_pages + j
  BlockConfig config;
};

/// What one call does to a sequence. The new tokens are the last `wanted` of the T rows; all of
/// them are taken, or none where they find no room.
struct CacheStep {
  int32_t old, taken, wanted;  // length before, tokens stored, tokens offered

  NSA_HOST_DEVICE int64_t length() const { return static_cast<int64_t>(old) + taken; }
  /// Row of the new token at position p >= old.
  NSA_HOST_DEVICE int64_t row(int64_t p, int64_t tokens) const { return tokens - wanted + p - old; }
};

/// Blocks that T new tokens complete at most.
NSA_HOST_DEVICE int64_t max_new_blocks(int64_t tokens, const BlockConfig& c) {
  return (tokens + c.block_stride - 1) / c.block_stride;
}
/// Rows that these blocks cover.
NSA_HOST_DEVICE int64_t gathered_rows(int64_t tokens, const BlockConfig& c) {
  return tokens == 0 ? 0 : (max_new_blocks(tokens, c) - 1) * c.block_stride + c.block_size;
}

/// Rows [c0*d, c0*d + rows) of each sequence, c0 the first block that is not complete. Zero where
/// no new block is complete; NaN where the tail lost a token that a block needs (a sequence was
/// shortened by more than R - l tokens).
struct CacheGather {
  CacheShape shape;
  InView k, v;                // (B, T, Hkv, D) raw tokens of the compressed branch
  InView tail_k, tail_v;      // (B, R, Hkv, D)
  const int32_t* counts;      // (B), or null: new tokens of each sequence, else T
  const int32_t* seqlens;     // (B)
  const int32_t* tail_start;  // (B) first position that the tail holds
  OutView out_k, out_v;       // (B, gathered_rows, Hkv, D)
  CacheStep* steps;           // (B) written
};

/// Where a tensor's pages are written; as PagedView.
struct PagedOut {
  void* ptr = nullptr;
  int64_t page = 0, seq = 0, head = 0;
};

/// New tokens, and the cache that they go to.
struct CacheTokens {
  CacheShape shape;
  InView k[kNumBranches];     // (B, T, Hkv, Dk) raw tokens; those of kCompressed go to the tail.
  InView v[kNumBranches];     // Window: null where it shares the selected branch's pages
  const void* rope_inv_freq;  // (Dk / 2) float32 (float64 for float64) or null: compressed key c
                              // is rotated by c*d * rope_inv_freq[i], in pairs (i, i + Dk / 2)
  PagedOut k_pages[kNumBranches], v_pages[kNumBranches];
  OutView tail_k, tail_v;  // (B, R, Hkv, D)
  int32_t* seqlens;        // (B) advanced
  int32_t* tail_start;     // (B) advanced
  int32_t* dropped;        // (B) grows by the tokens that found no room
};

struct CacheAppend : CacheTokens {
  const CacheStep* steps;  // (B)
  InView k_cmp, v_cmp;     // (B, max_new_blocks, Hkv, D): blocks c0, c0 + 1, ..
};

/// All of storing for T <= d: a step of decode completes a block of few sequences, often of none,
/// and only for those phi is computed.
struct CacheStore : CacheTokens {
  const int32_t* counts;  // as in CacheGather
  int64_t weight_heads;   // Hw
};

/// phi of kinds `mlp` and `linear` (w2 null: hidden is Dk or Dv), as in CompressMlpFwd.
struct PhiWeights {
  int64_t hidden;
  const void *pos, *w1, *b1, *w2, *b2;
};
struct CacheStoreMlp : CacheStore {
  PhiWeights phi_k, phi_v;
};

/// phi of kinds `mean` and `weighted`, as in CompressPoolFwd.
struct PoolWeights {
  const void *weight, *pos;
};
struct CacheStorePool : CacheStore {
  PoolWeights phi_k, phi_v;
};

namespace cpu {

void cache_gather(const CacheGather& params, const Executor& executor);
void cache_append(const CacheAppend& params, const Executor& executor);

}  // namespace cpu

namespace cuda {

void cache_gather(const CacheGather& params, Stream stream);
void cache_append(const CacheAppend& params, Stream stream);
int64_t cache_store_mlp_workspace(const CacheStoreMlp& params);
void cache_store_mlp(const CacheStoreMlp& params, void* workspace, Stream stream);
void cache_store_pool(const CacheStorePool& params, Stream stream);

}  // namespace cuda

}  // namespace nsa
