// What a launch of the portable forward kernel gets.
#pragma once

#include "nsa/params.h"

namespace nsa::cuda {

/// One branch of an attention call, over one grid: a block of threads takes `tile_tokens` whole
/// tokens times the G heads of one kv head as the rows of its query tile: row = token *
/// padded_group + head.
struct FwdParams {
  InView q, k, v;
  OutView out, lse;  // of the branch, or null
  bool has_output;   // else only lse or block_indices are wanted
  // The last branch of a call forms the gated sum (eq. 5) from all outputs.
  InView gates;       // (B, Sq, Hq, 3), or null
  OutView gated_out;  // may be where an earlier output lies
  InView earlier[2];  // outputs of earlier branches; null: none
  int32_t earlier_branch[2];
  View<int32_t> block_indices;  // (B, Sq, Hkv, n): written (compressed) or read (selected), or null
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_k;
  int32_t batch, seqlen_q, seqlen_k, heads_kv;
  int32_t branch;              // enum Branch
  int32_t group;               // G
  int32_t log2_group;          // of padded_group, the next power of two
  int32_t tile_tokens;         // at most the rows of the tile / padded_group
  int32_t tiles;               // query tiles of the longest sequence
  int32_t index_count;         // n
  int32_t stages_k, stages_v;  // tiles in shared memory
  int32_t score_shift;         // log2 of the tiles whose block scores are formed at a time
  int32_t sort_size;           // power of two that holds the index_count * tile_tokens indices
  int32_t select_shift;        // log2 l'
  int32_t stride_shift;        // log2 d
  float scale_log2;            // softmax_scale * log2(e): softmax in base two
  BlockConfig config;
};

}  // namespace nsa::cuda
