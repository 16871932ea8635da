// What the kernels of the backward share, portable and Hopper: their arguments, and how rows and
// key tiles are numbered.
//
// A query row is a (token, query head) pair. The rows of one kv head lie token after token, the G
// heads of its group side by side: row = token * G + g.
#pragma once

#include <cstdint>

#include "cuda/common.h"
#include "nsa/geometry.h"
#include "nsa/params.h"

namespace nsa::cuda::bwd {

inline constexpr int kMaxGroup = 64;       // G
inline constexpr int kMaxIndexCount = 64;  // n
inline constexpr int kTaskKeys = 64;       // keys that one block of the portable dK/dV kernel owns
inline constexpr int kMaxTileTokens = 64;  // tokens of a query tile: bits of UnionBlock's mask

/// Warps of a dQ block that own 16 query rows each. With the one that copies keys they are 12 warps
/// of 168 registers, or, where dQ takes 96 of them, 8 warps of 255: a ninth warp would bring the
/// limit down to 168 as well.
constexpr int query_tile_warps(int64_t dim_qk) { return dim_qk > 128 ? 7 : 11; }

/// Query tokens of a dQ block.
inline int query_tile_tokens(int64_t dim_qk, int group) {
  const int tokens = query_tile_warps(dim_qk) * 16 / group;
  return tokens < kMaxTileTokens ? tokens : kMaxTileTokens;
}

/// What the score derivative of a row needs in one branch:
/// dS = p * gate * (dout V^T - delta) with p = exp2(scale_log2 * score - lse_log2).
struct alignas(16) RowStats {
  float lse_log2;     // +inf for a row that sees no key, so that p is 0
  float minus_delta;  // -rowsum(dout * out of the branch): minus the gradient of the gate
  float gate;
  float gated_lse_log2;  // lse_log2 - log2 |gate|: the exponent of p * |gate|
};

/// Cuts every sequence into tiles of `tile` items and numbers them from the first sequence to the
/// last; an item is `unit` rows of cu_seqlens. In a packed batch the numbering has gaps, so that
/// the number of tiles follows from sizes the host knows: floor(a / L) + ceil(s / L) <= floor((a +
/// s) / L) + 1.
struct TileMap {
  const int32_t* cu_seqlens;  // or null
  int batch;
  int unit, tile;
  int per_sequence;  // tiles of a sequence when not packed
  int count;         // numbers in use, gaps included

  struct Place {
    int batch, index;
  };
  /// Number of the first tile of sequence b.
  NSA_HOST_DEVICE int first(int b) const {
    return cu_seqlens ? cu_seqlens[b] / unit / tile + b : b * per_sequence;
  }
  /// The sequence that tile `number` belongs to, and its place there, past the end in a gap.
  NSA_HOST_DEVICE Place place(int number) const {
    if (!cu_seqlens) return {number / per_sequence, number % per_sequence};
    int low = 0, high = batch - 1;  // the last b with first(b) <= number
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first(middle) <= number)
        low = middle;
      else
        high = middle - 1;
    }
    return {low, number - first(low)};
  }
};

/// `seqlen` items in the longest sequence, `total` in all.
inline TileMap make_tile_map(const int32_t* cu_seqlens, int64_t batch, int64_t seqlen,
                             int64_t total, int64_t unit, int64_t tile) {
  TileMap map{cu_seqlens, static_cast<int>(batch), static_cast<int>(unit), static_cast<int>(tile)};
  map.per_sequence = static_cast<int>(ceil_div(seqlen, tile));
  const int64_t count = cu_seqlens ? total / tile + batch : batch * map.per_sequence;
  if (count > INT32_MAX / 2) throw std::runtime_error("too many tiles for one launch");
  map.count = static_cast<int>(count);
  return map;
}

/// A selection block that some token of a query tile chose, and which of the tile's tokens did.
struct alignas(16) UnionBlock {
  int block;
  uint32_t tokens[2];
  uint32_t unused;
};

/// Which (query, kv head) pairs chose a selection block: stable counting sort of block_indices.
/// Lists hold query indices within their sequence, ascending.
struct InvertedIndex {
  TileMap blocks;          // selection blocks of all sequences
  int chunk_rows, chunks;  // query rows that one warp sorts, and how many such pieces there are
  int32_t* cursor;         // (Hkv, chunks, blocks): counts, then where the chunk's entries start
  int32_t* count;          // (Hkv, blocks)
  int32_t* begin;          // (Hkv, blocks): where the list starts in `queries`
  int32_t* queries;        // (total_q * Hkv * n)
};

/// Work of one block of the dK/dV kernel: up to task_keys keys, and the queries that send them
/// gradients: a piece of the selection's list, then a range of tokens.
struct alignas(16) KeyTask {
  int batch, head;
  int key, keys;
  int list_begin, list_count;
  int token_begin, token_count;
  int slot;  // of `partial`, or -1: the only task of its keys, writes dK and dV itself
  int unused[3];
};

/// A key tile and its tasks; with more than one, its gradient is the sum of their partial results.
struct alignas(16) SplitTile {
  int batch, head;
  int key, keys;
  int slot, slots;  // slots is 0 where there is nothing to add up
  int task, tasks;  // the tile's tasks: task, task + 1, ...
};

/// The dK/dV work of one kernel launch, laid out on the device by `plan_key_tasks`.
struct KeyPlan {
  TileMap groups;    // runs of group_keys keys
  int task_keys;     // keys of a task, at most
  int group_keys;    // select_size where lists are walked, else task_keys
  int parts;         // key tiles of a group
  int branch;        // whose K, V, dK, dV
  bool has_list;     // walk the inverted index,
  int range_branch;  // then the tokens that see the keys in this branch; -1: none
  int piece;         // queries of a task, at most
  int max_tasks, max_slots;
  int max_pieces;  // tasks of one key tile, at most
  KeyTask* tasks;
  int* num_tasks;
  SplitTile* tiles;  // (Hkv, groups, parts)
  float* partial;    // (slots, task_keys * (Dk + Dv))
};

struct BwdArgs {
  AttnBwd p;
  RowStats* stats;  // (branch, Hkv, total_q, G)
  int group;        // G
};

struct DqArgs {
  BwdArgs common;
  TileMap tiles;  // of tile_tokens query tokens
  int tile_tokens;
  const UnionBlock* union_blocks;  // (Hkv, tiles, tile_tokens * n)
  const int32_t* union_counts;     // (Hkv, tiles)
  int stages;                      // of the ring of key tiles
};

struct DkvArgs {
  BwdArgs common;
  KeyPlan plan;
  const int32_t* list;
};

}  // namespace nsa::cuda::bwd
