// What the launches of a decode call get: one struct for its four kernels.
#pragma once

#include "nsa/decode.h"

namespace nsa::cuda::decode {

/// Keys of a tile, the unit in which work is shared out and copied.
inline constexpr int kTileKeys = 64;
/// Compressed tokens of a chunk, for which block weights are stored: the k extent of one mma.
inline constexpr int kChunk = 16;

/// Selection blocks of a chunk: 2, 4, 8 or 16.
inline int64_t chunk_blocks(const BlockConfig& config) {
  return kChunk / (config.select_size / config.block_stride);
}
/// Chunks of a sequence of `max_pages` pages, in whole tiles.
inline int64_t padded_chunks(const BlockConfig& config, int64_t max_pages) {
  const int64_t per_tile = chunk_blocks(config) * (kTileKeys / kChunk);
  return (max_pages + per_tile - 1) / per_tile * (kTileKeys / kChunk);
}

/// The part of a branch that one block of threads computed: a segment of consecutive tiles of a
/// unit. Base-two softmax: `out` is sum 2^(score - reference) v, unnormalised.
struct Partials {
  float* out;    // (slots, rows, Dv)
  float2* sums;  // (slots, rows): reference, sum of 2^(score - reference)
};

/// A unit is what has its own list of tiles: a sequence (compressed branch, rows token * G + head)
/// or one of its new tokens (other branches, rows are the G heads).
struct DecodeParams {
  InView q;
  PagedView k[kNumBranches], v[kNumBranches];
  InView gates;
  OutView out;
  View<int32_t> block_indices;  // ptr may be null
  const int32_t* seqlens_k;
  const int32_t* block_table;  // may be null
  BlockConfig config;
  int32_t max_pages;
  int32_t batch, tokens, heads_q, heads_kv, group;  // B, T, Hq, Hkv, G
  int32_t select_shift, stride_shift;               // log2 of l' and d
  float scale_log2;                                 // softmax_scale * log2(e)

  int32_t rows[kNumBranches];     // rows of a block of threads: 16, 32 or 64
  int32_t row_tiles;              // such blocks that cover T * G rows (compressed)
  int32_t workers[kNumBranches];  // shares of the tiles, each taken by all kv heads side by side
  int32_t stages;                 // tiles of the ring
  int32_t chunks;                 // padded_chunks
  int32_t candidates;             // room for the best blocks before they are ranked

  Partials partials[kNumBranches];
  float* weights;   // (B, Hkv, T * G, chunks * 16 d / l'): per row and selection block the sum of
                    // overlap * 2^(score - reference) over the tokens of the block's own chunk
  float2* carries;  // (B, Hkv, T * G, chunks): the chunk's share in the block after it, reference
  int2* lists;      // (B, T, Hkv, n): block_indices and the pages where they lie
};

}  // namespace nsa::cuda::decode
