// What the driver of an attention call works out before any kernel runs: sequences, packed keys,
// work items. Kernels of every instruction set read these plain structs; include this before a
// target_*.h.
#pragma once

#include <cstdint>

#include "cpu/index.h"
#include "nsa/geometry.h"
#include "nsa/params.h"

namespace nsa::cpu {

/// Rows, that is (token, head) pairs, that go through the micro-kernel together: enough to use a
/// panel of keys from L1 often, few enough that scores and weights stay in L2.
inline constexpr int64_t kRowBatch = 64;
/// Keys of a visit at most, a whole number of panels.
inline constexpr int64_t kKeyChunk = 512;

/// The backward visits fewer: it also reads weights by columns, and 64 rows of 128 stay in L1 and
/// L2.
inline constexpr int64_t kBackwardKeyChunk = 128;

struct Sequence {
  int64_t batch;                  // index along the batch stride; 0 when packed
  int64_t q_row, k_row, cmp_row;  // first rows; 0 when not packed
  int64_t len_q, len_k, len_cmp;  // Sq, Sk, Tc
  int64_t lse_row;                // first row of the (B * Sq or total_q) rows of all sequences
  const int32_t* pages;           // pages of its keys in a pool; null: rows follow each other
  int64_t position(int64_t i) const { return i + len_k - len_q; }  // t of query i
};

/// Element offset of row `row`, head `head` of a (batch, seq, heads, dim) view.
template <class T>
inline int64_t offset_of(const View<T>& view, int64_t batch, int64_t row, int64_t head) {
  return batch * view.batch + row * view.seq + head * view.head;
}

/// Rows of a tensor, evenly spaced or in pages of `page_rows`.
struct RowWalk {
  int64_t first, stride;           // element offset of row 0 (of its page), and from row to row
  const int32_t* pages = nullptr;  // row r lies in page pages[(row + r) / page_rows]
  int64_t row = 0, page_rows = 1, page_stride = 0;

  int64_t at(int64_t r) const {
    if (!pages) return first + r * stride;
    return first + pages[(row + r) / page_rows] * page_stride + (row + r) % page_rows * stride;
  }
};

/// Operands that a pass needs of a branch's keys and values, in the compute type.
enum PackParts : int {
  kKeysT = 1,    // panels of the transposed keys: scores
  kValues = 2,   // values as rows: output
  kValuesT = 4,  // panels of the transposed values: gradient of the weights
  kKeys = 8,     // keys as rows: gradient of the queries
};

/// Keys of one branch, copied once into the layout of the micro-kernel: blocks of `block` keys,
/// rounded up with zeros to `padded`, a whole number of vectors. A transposed block is a row of
/// panels, each (dim, width) with width = kPanel but for the last one's rest; blocks of whole
/// panels follow each other without a seam.
struct KeyPack {
  int64_t block = 0, padded = 0;
  void* part[4] = {};              // of kKeysT, kValues, kValuesT, kKeys; null: not packed
  const int64_t* first = nullptr;  // by sequence: its first packed block
  const int64_t* count = nullptr;  // by sequence: blocks of one head
  const int64_t* base = nullptr;   // by sequence: blocks of the sequences before it, all heads

  /// Position of a block in units of `padded` keys.
  int64_t slot(int64_t sequence, int64_t head, int64_t block_index) const {
    return base[sequence] + head * count[sequence] + block_index - first[sequence];
  }
};

struct PackItem {
  int32_t branch;
  int64_t sequence, head, begin, end;  // blocks
};

/// Queries [first, first + count) of one kv head, with all its query heads: a tile, or a chunk of
/// tiles.
struct QueryItem {
  int64_t sequence, head, first, count;
};

/// What forward and backward have in common.
struct AttnPlan {
  AttnShape shape;
  BlockConfig config;
  int64_t group;        // G
  int64_t ld_qk, ld_v;  // Dk and Dv rounded up to whole vectors
  const Sequence* sequences;
  int64_t num_sequences;
  InView q, gates;
  bool enabled[kNumBranches];
  InView k[kNumBranches], v[kNumBranches];
  // Of a paged cache: (B, max_pages), null without; a view's batch stride goes from page to page.
  const int32_t* block_table;
  int64_t max_pages;
  KeyPack pack[kNumBranches];
  bool selected_resident;  // else a tile packs the blocks that it visits: a decode step
  int parts;               // PackParts of the query-stationary pass
  View<const int32_t> block_indices;
  int32_t index_count;
  const QueryItem* items;
  int64_t tile_tokens;        // most tokens of an item
  int64_t window_tokens;      // tokens that go through the window together
  int64_t compressed_tokens;  // and through the compressed branch
  int64_t max_compressed;     // Tc of the longest sequence
  int64_t max_select_blocks;  // blocks of the longest sequence

  /// Rows of K or V of a branch from row `begin` of a sequence on.
  RowWalk rows(const InView& view, int branch, const Sequence& s, int64_t head,
               int64_t begin) const {
    if (s.pages) {
      const int64_t page_rows = branch == kCompressed ? config.select_size / config.block_stride
                                                      : int64_t{config.select_size};
      return {head * view.head, view.seq, s.pages, begin, page_rows, view.batch};
    }
    const int64_t first = branch == kCompressed ? s.cmp_row : s.k_row;
    return {offset_of(view, s.batch, first + begin, head), view.seq};
  }

  SelectedRows selected_rows(const Sequence& s, int64_t head, int64_t first, int64_t rows) const {
    return {block_indices.ptr + offset_of(block_indices, s.batch, s.q_row + first, head),
            block_indices.seq, rows, s.position(first), index_count};
  }
};

struct FwdPlan : AttnPlan {
  const AttnFwd* params;
};

/// Sums of dk and dv over the queries of one chunk, for the keys [first, first + count) of a
/// branch: rows of ld_qk and of ld_v elements.
struct PartialGrads {
  int64_t first, count;
  void *dk, *dv;
};

struct ChunkGrads {
  PartialGrads branch[kNumBranches];
};

/// Keys [begin, end) of a branch, whose partial sums are added up and stored.
struct ReduceItem {
  int32_t branch;
  int64_t sequence, head, begin, end;
};

struct BwdPlan : AttnPlan {
  const AttnBwd* params;
  bool window_shares_grads;  // the window's dk, dv are added to the selected branch's
  void* dots;                // (3, rows, Hq) rowsum(dout * O_c) in the compute type
  int64_t rows;              // B * Sq or total_q
  // By item; those of a (sequence, head) follow each other in order of the queries.
  const ChunkGrads* partials;
  const int64_t* first_item;  // by sequence * Hkv + head, and one more: its items
};

}  // namespace nsa::cpu
