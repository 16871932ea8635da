// Which keys a tile of queries visits, branch by branch: the one traversal behind the
// query-stationary passes of forward and backward. Include a target_*.h first.
#pragma once

#include "cpu/attn_plan.h"
#include "cpu/dtype.h"
#include "cpu/exp2.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// Hands out aligned pieces of a scratch block; counts them when it has none.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + size_ : nullptr;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }
  int64_t size() const { return size_; }

 private:
  char* base_;
  int64_t size_ = 0;
};

/// Bytes that a tile takes from its scratch.
template <class Tile, class Plan>
int64_t tile_scratch(const Plan& plan) {
  Carver carver(nullptr);
  Tile tile(plan, carver);
  return carver.size();
}

/// Visible keys of a row within a visit.
struct Span {
  int64_t begin, end;
};

/// Some rows of a tile against some keys.
template <class T>
struct Visit {
  const int32_t* rows;  // of the tile: token * G + head of the group
  const Span* spans;
  int64_t num_rows;
  BlockParts<T> keys;
  int64_t first_key, num_keys;
  int64_t stored;  // keys up to the end of the last panel, which sets the panels' widths
  int64_t count;   // num_keys, rounded up to whole vectors
};

/// C[r][0..count) = A[r] . packed^T over `dim`.
template <class T>
void row_scores(const T* const* a, int64_t rows, int64_t dim, const T* packed, int64_t stored,
                int64_t count, T* const* c) {
  for (int64_t n = 0; n < count; n += kPanel<T>) {
    const int64_t width = stored - n < kPanel<T> ? stored - n : kPanel<T>;
    const int64_t left = count - n < width ? count - n : width;
    const Product<T> product{dim, a, 1, packed + n * dim, width, c, n, nullptr};
    gemm_panel(product, rows, left / kLanes<T>, Store::kOverwrite);
  }
}

/// Scores outside the span become -inf, weights zero.
template <class T>
NSA_CPU_INLINE void mask_row(T* row, Span span, int64_t count) {
  for (int64_t i = 0; i < (span.begin < count ? span.begin : count); ++i) {
    row[i] = -__builtin_inf();
  }
  for (int64_t i = span.end > 0 ? span.end : 0; i < count; ++i) row[i] = -__builtin_inf();
}

/// Rows of the tile, and scratch of the traversal.
template <class T>
struct TileRows {
  int32_t* rows;
  Span* spans;
  int64_t* list_begin;
  int32_t* list_seen;
  int32_t* list;
  T* pack_row;
  BlockParts<T> block;  // a block packed on the spot

  TileRows(const AttnPlan& plan, Carver& carver) {
    const int64_t batch = kRowBatch > plan.group ? kRowBatch : plan.group;
    const int64_t dims = plan.ld_qk > plan.ld_v ? plan.ld_qk : plan.ld_v;
    rows = carver.take<int32_t>(batch);
    spans = carver.take<Span>(batch);
    pack_row = carver.take<T>(dims);
    const bool lists = plan.enabled[kSelected];
    list_begin = carver.take<int64_t>(lists ? plan.max_select_blocks + 1 : 0);
    list_seen = carver.take<int32_t>(lists ? plan.max_select_blocks : 0);
    list = carver.take<int32_t>(lists ? plan.tile_tokens * plan.index_count : 0);
    const int64_t keys = lists && !plan.selected_resident ? plan.pack[kSelected].padded : 0;
    block = {};
    if (keys) {
      if (plan.parts & kKeysT) block.keys_t = carver.take<T>(keys * plan.shape.dim_qk);
      if (plan.parts & kValues) block.values = carver.take<T>(keys * plan.ld_v);
      if (plan.parts & kValuesT) block.values_t = carver.take<T>(keys * plan.shape.dim_v);
      if (plan.parts & kKeys) block.keys = carver.take<T>(keys * plan.ld_qk);
    }
  }
};

/// Keys [begin, begin + count) of a branch whose blocks are whole panels; begin is one's start.
template <class T>
Visit<T> dense_visit(const AttnPlan& plan, int branch, const QueryItem& item, int64_t begin,
                     int64_t count) {
  const KeyPack& pack = plan.pack[branch];
  const int64_t slot = pack.slot(item.sequence, item.head, begin / pack.block);
  Visit<T> visit{};
  visit.keys = parts_at<T>(plan, pack, slot, begin % pack.block);
  visit.first_key = begin;
  visit.num_keys = count;
  visit.count = round_up_lanes<T>(count);
  visit.stored = (visit.count + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
  return visit;
}

/// Visits the compressed tokens that the tokens [first, first + count) of the tile see, all of them
/// at once where max_keys allows.
template <class T, class Visitor>
void visit_compressed(const AttnPlan& plan, const QueryItem& item, int64_t first, int64_t count,
                      int64_t max_keys, TileRows<T>& tile, Visitor& visitor) {
  const Sequence& s = plan.sequences[item.sequence];
  const int64_t G = plan.group, l = plan.config.block_size, d = plan.config.block_stride;
  const int64_t t = s.position(item.first + first);
  const int64_t visible = visible_compressed(t + count - 1, l, d);
  for (int64_t begin = 0; begin < visible; begin += max_keys) {
    const int64_t keys = visible - begin < max_keys ? visible - begin : max_keys;
    Visit<T> visit = dense_visit<T>(plan, kCompressed, item, begin, keys);
    for (int64_t r = 0; r < count * G; ++r) {
      tile.rows[r] = static_cast<int32_t>(first * G + r);
      tile.spans[r] = {0, visible_compressed(t + r / G, l, d) - begin};
    }
    visit.rows = tile.rows;
    visit.spans = tile.spans;
    visit.num_rows = count * G;
    visitor(visit);
  }
}

/// Visits the window of the tokens [first, first + count) of the tile. Its chunks start at a panel
/// and depend on the tokens alone, so the sums do not depend on how queries were cut into tiles.
template <class T, class Visitor>
void visit_window(const AttnPlan& plan, const QueryItem& item, int64_t first, int64_t count,
                  int64_t max_keys, TileRows<T>& tile, Visitor& visitor) {
  const Sequence& s = plan.sequences[item.sequence];
  const int64_t G = plan.group, w = plan.config.window;
  const int64_t t = s.position(item.first + first), last = t + count - 1;
  const int64_t oldest = t - w + 1 > 0 ? t - w + 1 : 0;
  for (int64_t begin = oldest / kPanel<T> * kPanel<T>; begin <= last; begin += max_keys) {
    const int64_t keys = last + 1 - begin < max_keys ? last + 1 - begin : max_keys;
    Visit<T> visit = dense_visit<T>(plan, kWindow, item, begin, keys);
    for (int64_t r = 0; r < count * G; ++r) {
      const int64_t at = t + r / G - begin;
      tile.rows[r] = static_cast<int32_t>(first * G + r);
      tile.spans[r] = {at - w + 1, at + 1};
    }
    visit.rows = tile.rows;
    visit.spans = tile.spans;
    visit.num_rows = count * G;
    visitor(visit);
  }
}

/// Visits the selected blocks of all tokens of the tile, block by block in ascending order, so that
/// a block is read once for all tokens of the tile that chose it.
template <class T, class Visitor>
void visit_selected(const AttnPlan& plan, const QueryItem& item, int64_t max_keys,
                    TileRows<T>& tile, Visitor& visitor) {
  const Sequence& s = plan.sequences[item.sequence];
  const KeyPack& pack = plan.pack[kSelected];
  const int64_t G = plan.group, size = plan.config.select_size;
  const int64_t blocks = num_select_blocks(s.len_k, plan.config.select_size);
  const int64_t t = s.position(item.first);
  invert(plan.selected_rows(s, item.head, item.first, item.count), plan.config.select_size, blocks,
         tile.list_begin, tile.list_seen, tile.list);
  for (int64_t j = 0; j < blocks; ++j) {
    const int32_t* list = tile.list + tile.list_begin[j];
    const int64_t rows = (tile.list_begin[j + 1] - tile.list_begin[j]) * G;
    if (rows == 0) continue;
    const int64_t keys = s.len_k - j * size < size ? s.len_k - j * size : size;
    if (!plan.selected_resident) {
      pack_block(plan, kSelected, item.sequence, item.head, j * size, pack.padded, keys, tile.block,
                 tile.pack_row);
    }
    for (int64_t row = 0; row < rows; row += kRowBatch) {
      const int64_t num_rows = rows - row < kRowBatch ? rows - row : kRowBatch;
      for (int64_t begin = 0; begin < keys; begin += max_keys) {
        Visit<T> visit{};
        if (plan.selected_resident) {
          visit.keys = parts_at<T>(plan, pack, pack.slot(item.sequence, item.head, j), begin);
        } else {
          visit.keys = tile.block;
          if (visit.keys.keys_t) visit.keys.keys_t += begin * plan.shape.dim_qk;
          if (visit.keys.values) visit.keys.values += begin * plan.ld_v;
          if (visit.keys.values_t) visit.keys.values_t += begin * plan.shape.dim_v;
          if (visit.keys.keys) visit.keys.keys += begin * plan.ld_qk;
        }
        visit.stored = pack.padded - begin;
        visit.num_keys = keys - begin < max_keys ? keys - begin : max_keys;
        visit.first_key = j * size + begin;
        visit.count = round_up_lanes<T>(visit.num_keys);
        for (int64_t r = 0; r < num_rows; ++r) {
          const int64_t token = list[(row + r) / G];
          tile.rows[r] = static_cast<int32_t>(token * G + (row + r) % G);
          const int64_t seen = t + token - j * size + 1;  // of the block's keys
          tile.spans[r] = {0, (seen < keys ? seen : keys) - begin};
        }
        visit.rows = tile.rows;
        visit.spans = tile.spans;
        visit.num_rows = num_rows;
        visitor(visit);
      }
    }
  }
}

/// Rows of a (B, Sq, Hq, dim) tensor that belong to the tile, padded with zeros to `ld`.
template <class T>
void load_tile(const AttnPlan& plan, const QueryItem& item, const InView& view, int64_t dim,
               int64_t ld, T scale, T* dst) {
  const Sequence& s = plan.sequences[item.sequence];
  const int64_t G = plan.group;
  for (int64_t i = 0; i < item.count; ++i) {
    const int64_t at = offset_of(view, s.batch, s.q_row + item.first + i, item.head * G);
    pack_rows(plan.shape.dtype, view.ptr, {at, view.head}, G, G, dim, ld, scale, dst + i * G * ld);
  }
}

/// Writes the tile's rows of a (B, Sq, Hq, dim) tensor.
template <class T>
void store_tile(const AttnPlan& plan, const QueryItem& item, const OutView& view, int64_t dim,
                int64_t ld, T scale, const T* src) {
  const Sequence& s = plan.sequences[item.sequence];
  const int64_t G = plan.group;
  for (int64_t r = 0; r < item.count * G; ++r) {
    const int64_t at =
        offset_of(view, s.batch, s.q_row + item.first + r / G, item.head * G + r % G);
    store_row(plan.shape.dtype, view.ptr, at, dim, scale, src + r * ld);
  }
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
