// Attention of a few new tokens over a KV cache, contiguous or paged. A page holds one selection
// block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "nsa/api.h"
#include "nsa/params.h"

namespace nsa {

/// K or V of a branch in pages: page p of the pool begins at ptr + p * page. A page holds l' raw
/// keys, or the l'/d compressed tokens that start in them.
struct PagedView {
  const void* ptr = nullptr;
  int64_t page = 0, seq = 0, head = 0;  // strides in elements; rows contiguous
};

/// Rows T * G of one kv head up to which decode_fwd is the way; longer chunks are attn_fwd's, with
/// seqused_k.
inline constexpr int64_t kMaxDecodeRows = 64;

/// Key s of sequence b is row s % l' of its page s / l', compressed token c row c % (l'/d) of its
/// page c / (l'/d): the same page. Table entries of pages that hold no key are never read. A query
/// at a negative position sees no key: out = 0, block_indices -1.
struct DecodeFwd {
  AttnShape shape;  // seqlen_q = T new tokens of every sequence, seqlen_k = max_pages * l'
                    // (capacity); cu_seqlens null
  BlockConfig config;
  const int32_t* seqlens_k;    // (B) keys of each sequence, its T new ones included (device memory)
  const int32_t* block_table;  // (B, max_pages) or null: page j of sequence b is b * max_pages + j
  int64_t max_pages;
  InView q;  // (B, T, Hq, Dk); query i of sequence b sits at position seqlens_k[b] - T + i
  PagedView k[kNumBranches], v[kNumBranches];
  InView gates;                 // (B, T, Hq, 3)
  OutView out;                  // (B, T, Hq, Dv)
  View<int32_t> block_indices;  // (B, T, Hkv, n), written; or null
};

namespace cpu {

void decode_fwd(const DecodeFwd& params, const Executor& executor);

}  // namespace cpu

namespace cuda {

/// Why a decode call would be refused on a GPU of compute capability `major`.`minor`; empty where
/// it would run.
std::vector<std::string> decode_supports(const AttnShape& shape, const BlockConfig& config,
                                         int major, int minor);
int64_t decode_fwd_workspace(const DecodeFwd& params);
void decode_fwd(const DecodeFwd& params, void* workspace, Stream stream);

}  // namespace cuda

}  // namespace nsa
