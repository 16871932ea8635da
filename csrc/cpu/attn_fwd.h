// The forward of a tile of queries. Include a target_*.h first.
#pragma once

#include "cpu/attn_tile.h"
#include "cpu/select.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// Keys between two returns to the accumulators of a weights-times-values product: with them a
/// panel of values (64 KiB) is used from L2 by all rows of a batch.
inline constexpr int64_t kValueDepth = 256;

template <class T>
struct FwdTile {
  const FwdPlan& plan;
  TileRows<T> rows;
  T *q, *o, *sum_out;  // (tile rows, ld): queries times scale, a branch's output, the gated sum
  T *max, *sum;        // running maximum (rows) and sums of weights (rows, lanes)
  T *scores, *rescale;
  const T** a;
  T **s, **c;
  T *cells, *importance;  // importance of compressed tokens spread to strides, and of blocks
  int64_t score_keys, score_stride = 0;

  FwdTile(const FwdPlan& plan, Carver& carver) : plan(plan), rows(plan, carver) {
    const int64_t G = plan.group, tile = plan.tile_tokens * G;
    const int64_t batch = kRowBatch > G ? kRowBatch : G;
    q = carver.take<T>(tile * plan.ld_qk);
    o = carver.take<T>(tile * plan.ld_v);
    sum_out = carver.take<T>(plan.gates.ptr ? tile * plan.ld_v : 0);
    max = carver.take<T>(tile);
    sum = carver.take<T>(tile * kLanes<T>);
    rescale = carver.take<T>(batch);
    a = carver.take<const T*>(batch);
    s = carver.take<T*>(batch);
    c = carver.take<T*>(batch);
    score_keys = round_up_lanes<T>(plan.max_compressed > 1 ? plan.max_compressed : 1);
    const int64_t compressed =
        plan.enabled[kCompressed] ? plan.compressed_tokens * G * score_keys : 0;
    const int64_t others = batch * kKeyChunk;
    scores = carver.take<T>(compressed > others ? compressed : others);
    cells = importance = nullptr;
    if (plan.enabled[kCompressed] && plan.block_indices.ptr) {
      const BlockConfig& config = plan.config;
      const int64_t strides = plan.max_select_blocks * (config.select_size / config.block_stride);
      const int64_t overlap = config.block_size / config.block_stride;
      cells = carver.take<T>(2 * (strides + score_keys + overlap + 2 * kLanes<T>));
      importance = carver.take<T>(plan.max_select_blocks + kLanes<T>);
    }
  }

  /// One step of the online softmax: scores, weights in their place, output.
  void operator()(const Visit<T>& visit) {
    score_stride = visit.count;
    for (int64_t r = 0; r < visit.num_rows; ++r) {
      a[r] = q + visit.rows[r] * plan.ld_qk;
      s[r] = scores + r * score_stride;
      c[r] = o + visit.rows[r] * plan.ld_v;
    }
    row_scores(a, visit.num_rows, plan.shape.dim_qk, visit.keys.keys_t, visit.stored, visit.count,
               s);
    for (int64_t r = 0; r < visit.num_rows; ++r) {
      softmax_row(s[r], visit.spans[r], visit.count, visit.rows[r], &rescale[r]);
    }
    if (!visit.keys.values) return;
    for (int64_t k = 0; k < visit.count; k += kValueDepth) {
      const int64_t depth = visit.count - k < kValueDepth ? visit.count - k : kValueDepth;
      const Product<T> product{depth,     s, 1, visit.keys.values + k * plan.ld_v,
                               plan.ld_v, c, 0, rescale};
      gemm(product, visit.num_rows, plan.ld_v / kLanes<T>, k ? Store::kAdd : Store::kScaleAdd);
      for (int64_t r = 0; r < visit.num_rows; ++r) s[r] += depth;
    }
    for (int64_t r = 0; r < visit.num_rows; ++r) s[r] -= visit.count;
  }

  NSA_CPU_INLINE void softmax_row(T* row, Span span, int64_t count, int64_t index, T* scale) {
    if (span.begin > 0 || span.end < count) mask_row(row, span, count);
    Vec<T> top = load(row);
    for (int64_t i = kLanes<T>; i < count; i += kLanes<T>) top = vmax(load(row + i), top);
    const T old_max = max[index], chunk_max = hmax<T>(top);
    const T new_max = chunk_max > old_max ? chunk_max : old_max;
    // A row that has seen no key yet subtracts 0: its weights are exp2(-inf) = 0.
    const T origin = new_max == -__builtin_inf() ? T(0) : new_max;
    const Vec<T> factor = vexp2<T>(splat<T>(old_max - origin));
    Vec<T> total = load(sum + index * kLanes<T>) * factor;
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const Vec<T> weight = vexp2<T>(load(row + i) - origin);
      store(row + i, weight);
      total += weight;
    }
    store(sum + index * kLanes<T>, total);
    max[index] = new_max;
    *scale = factor[0];
  }

  void begin_rows(int64_t first, int64_t count) {
    for (int64_t i = first * plan.ld_v; i < (first + count) * plan.ld_v; ++i) o[i] = 0;
    for (int64_t i = first; i < first + count; ++i) max[i] = -__builtin_inf();
    for (int64_t i = first * kLanes<T>; i < (first + count) * kLanes<T>; ++i) sum[i] = 0;
  }

  /// Normalises the tokens [first, first + count) of the tile, stores what the caller wants of the
  /// branch and adds it to the gated sum. Leaves 1 / sum in max.
  void end_rows(int branch, const QueryItem& item, int64_t first, int64_t count) {
    const Sequence& sequence = plan.sequences[item.sequence];
    const BranchFwd& out = plan.params->branch[branch];
    const DType dtype = plan.shape.dtype;
    const int64_t G = plan.group, dim = plan.shape.dim_v;
    for (int64_t r = first * G; r < (first + count) * G; ++r) {
      const int64_t i = item.first + r / G, head = item.head * G + r % G;
      const T total = hsum<T>(load(sum + r * kLanes<T>));
      const T inverse = total == 0 ? T(0) : 1 / total;
      T* row = o + r * plan.ld_v;
      if (out.out.ptr) {
        store_row(dtype, out.out.ptr, offset_of(out.out, sequence.batch, sequence.q_row + i, head),
                  dim, inverse, row);
      }
      if (plan.gates.ptr) {
        T gate;
        const int64_t at = offset_of(plan.gates, sequence.batch, sequence.q_row + i, head);
        load_row(dtype, plan.gates.ptr, at + branch, 1, inverse, &gate);
        T* sum_row = sum_out + r * plan.ld_v;
        for (int64_t e = 0; e < plan.ld_v; ++e) sum_row[e] += gate * row[e];
      }
      if (out.lse.ptr) {
        const T lse =
            total == 0 ? T(-__builtin_inf()) : T((max[r] + __builtin_log2(double(total))) * kLn2);
        static_cast<T*>(out.lse.ptr)[offset_of(out.lse, sequence.batch, sequence.q_row + i, head)] =
            lse;
      }
      max[r] = inverse;
    }
  }

  /// Importance of every block for one token (eq. 8-10) from the weights of its heads, and the
  /// blocks that it selects (eq. 11). `row` is the token's first row in the batch just visited.
  void select(const QueryItem& item, int64_t token, int64_t row) {
    const Sequence& sequence = plan.sequences[item.sequence];
    const BlockConfig& config = plan.config;
    const int64_t G = plan.group, i = item.first + token, t = sequence.position(i);
    const int64_t ratio = config.select_size / config.block_stride;
    const int64_t overlap = config.block_size / config.block_stride;
    const int64_t blocks = t < 0 ? 0 : t / config.select_size + 1;
    if (blocks > plan.index_count) {
      // A compressed token covers `overlap` strides and a block `ratio` of them: the weight of
      // token c in block j is the number of strides they share.
      const int64_t visible = visible_compressed(t, config.block_size, config.block_stride);
      const int64_t strides = round_up_lanes<T>(blocks * ratio);
      T* tokens = cells + overlap - 1;  // zeros before token 0
      T* shared = cells + overlap - 1 + strides + score_keys + kLanes<T>;
      for (int64_t k = 0; k < overlap - 1; ++k) cells[k] = 0;
      const int64_t end = round_up_lanes<T>(visible);
      for (int64_t k = 0; k < end; k += kLanes<T>) {
        Vec<T> total{};
        for (int64_t g = 0; g < G; ++g) {
          total += load(scores + (row + g) * score_stride + k) * max[token * G + g];
        }
        store(tokens + k, total);
      }
      for (int64_t k = end; k < strides; ++k) tokens[k] = 0;
      for (int64_t k = 0; k < strides; k += kLanes<T>) {
        Vec<T> total{};
        for (int64_t c = overlap - 1; c >= 0; --c) total += load(tokens + k - c);
        store(shared + k, total);
      }
      for (int64_t j = 0; j < blocks; ++j) {
        T total = 0;
        for (int64_t k = 0; k < ratio; ++k) total += shared[j * ratio + k];
        importance[j] = total >= 0 ? total : T(0);  // a NaN of bad inputs is least important
      }
    }
    const View<int32_t>& to = plan.params->block_indices;
    select_blocks(importance, t, config, plan.index_count,
                  to.ptr + offset_of(to, sequence.batch, sequence.q_row + i, item.head));
  }

  void run(const QueryItem& item) {
    const int64_t G = plan.group;
    load_tile(plan, item, plan.q, plan.shape.dim_qk, plan.ld_qk,
              T(plan.shape.softmax_scale * kLog2e), q);
    if (plan.gates.ptr) {
      for (int64_t i = 0; i < item.count * G * plan.ld_v; ++i) sum_out[i] = 0;
    }
    if (plan.enabled[kCompressed]) {
      const bool selects = plan.params->block_indices.ptr != nullptr;
      for (int64_t first = 0; first < item.count; first += plan.compressed_tokens) {
        const int64_t left = item.count - first;
        const int64_t count = left < plan.compressed_tokens ? left : plan.compressed_tokens;
        begin_rows(first * G, count * G);
        // All visible tokens in one visit: the weights stay for the importance.
        visit_compressed(plan, item, first, count, score_keys, rows, *this);
        end_rows(kCompressed, item, first, count);
        if (!selects) continue;
        for (int64_t token = 0; token < count; ++token) {
          select(item, first + token, token * G);
        }
      }
    }
    if (plan.enabled[kSelected]) {
      begin_rows(0, item.count * G);
      visit_selected(plan, item, kKeyChunk, rows, *this);
      end_rows(kSelected, item, 0, item.count);
    }
    if (plan.enabled[kWindow]) {
      for (int64_t first = 0; first < item.count; first += plan.window_tokens) {
        const int64_t left = item.count - first;
        const int64_t count = left < plan.window_tokens ? left : plan.window_tokens;
        begin_rows(first * G, count * G);
        visit_window(plan, item, first, count, kKeyChunk, rows, *this);
        end_rows(kWindow, item, first, count);
      }
    }
    if (plan.gates.ptr)
      store_tile(plan, item, plan.params->out, plan.shape.dim_v, plan.ld_v, T(1), sum_out);
  }
};

template <class T>
void fwd_item(const FwdPlan& plan, const QueryItem& item, char* scratch) {
  Carver carver(scratch);
  FwdTile<T>(plan, carver).run(item);
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
