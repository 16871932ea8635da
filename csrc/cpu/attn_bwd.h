// The backward: dO . O of every row, a query-stationary pass for dq and a key-stationary one for dk
// and dv. Each sums in an order of its own, so the gradients do not depend on the schedule; the
// price is that both recompute scores and weights. Include a target_*.h first.
#pragma once

#include "cpu/attn_tile.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// What the backward needs of a row of one branch: weights are exp2(score - lse) * gate, their
/// gradient is weight * (dout . v - dot).
template <class T>
struct RowTerms {
  T lse, dot, gate;
};

template <class T>
RowTerms<T> row_terms(const BwdPlan& plan, const Sequence& s, int branch, int64_t i, int64_t head) {
  const InView& lse = plan.params->branch[branch].lse;
  RowTerms<T> terms;
  const T value = static_cast<const T*>(lse.ptr)[offset_of(lse, s.batch, s.q_row + i, head)];
  // A row without visible keys: all its scores are -inf.
  terms.lse = value == -__builtin_inf() ? T(0) : T(value * kLog2e);
  terms.dot = static_cast<const T*>(
      plan.dots)[(branch * plan.rows + s.lse_row + i) * plan.shape.heads_q + head];
  terms.gate = 1;
  if (plan.gates.ptr) {
    const int64_t at = offset_of(plan.gates, s.batch, s.q_row + i, head);
    load_row(plan.shape.dtype, plan.gates.ptr, at + branch, 1, T(1), &terms.gate);
  }
  return terms;
}

/// Turns a row of scores into weights (times the gate) and a row of dout . v into their gradients.
template <class T>
NSA_CPU_INLINE void weight_row(const RowTerms<T>& terms, Span span, int64_t count, T* score,
                               T* grad) {
  if (span.begin > 0 || span.end < count) mask_row(score, span, count);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> weight = vexp2<T>(load(score + i) - terms.lse) * terms.gate;
    store(score + i, weight);
    store(grad + i, weight * (load(grad + i) - terms.dot));
  }
}

/// rowsum(dout * O_c) of the tokens of one item, every branch and head: dgates, and the term that
/// the softmax subtracts.
template <class T>
void dots_item(const BwdPlan& plan, const QueryItem& item, char* scratch) {
  const AttnBwd& p = *plan.params;
  const Sequence& s = plan.sequences[item.sequence];
  const DType dtype = plan.shape.dtype;
  Carver carver(scratch);
  T* dout = carver.take<T>(plan.ld_v);
  T* out = carver.take<T>(plan.ld_v);
  for (int64_t i = item.first; i < item.first + item.count; ++i) {
    for (int64_t g = 0; g < plan.group; ++g) {
      const int64_t head = item.head * plan.group + g, row = s.q_row + i;
      pack_rows(dtype, p.dout.ptr, offset_of(p.dout, s.batch, row, head), 0, 1, 1, plan.shape.dim_v,
                plan.ld_v, T(1), dout);
      T dots[kNumBranches] = {};
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!plan.enabled[branch]) continue;
        const InView& view = p.branch[branch].out;
        pack_rows(dtype, view.ptr, offset_of(view, s.batch, row, head), 0, 1, 1, plan.shape.dim_v,
                  plan.ld_v, T(1), out);
        Vec<T> total{};
        for (int64_t e = 0; e < plan.ld_v; e += kLanes<T>) total += load(dout + e) * load(out + e);
        dots[branch] = hsum<T>(total);
        static_cast<T*>(
            plan.dots)[(branch * plan.rows + s.lse_row + i) * plan.shape.heads_q + head] =
            dots[branch];
      }
      if (p.dgates.ptr) {
        store_row(dtype, p.dgates.ptr, offset_of(p.dgates, s.batch, row, head), kNumBranches, T(1),
                  dots);
      }
    }
  }
}

template <class T>
int64_t dots_scratch(const BwdPlan& plan) {
  Carver carver(nullptr);
  carver.take<T>(plan.ld_v);
  carver.take<T>(plan.ld_v);
  return carver.size();
}

/// The query-stationary pass: dq of a tile of queries.
template <class T>
struct DqTile {
  const BwdPlan& plan;
  TileRows<T> rows;
  T *q, *dout, *dq;
  RowTerms<T>* terms;
  T *scores, *grads;
  const T **a, **b;
  T **s, **ds, **c;

  DqTile(const BwdPlan& plan, Carver& carver) : plan(plan), rows(plan, carver) {
    const int64_t G = plan.group, tile = plan.tile_tokens * G;
    const int64_t batch = kRowBatch > G ? kRowBatch : G;
    q = carver.take<T>(tile * plan.ld_qk);
    dout = carver.take<T>(tile * plan.ld_v);
    dq = carver.take<T>(tile * plan.ld_qk);
    terms = carver.take<RowTerms<T>>(tile);
    scores = carver.take<T>(batch * kKeyChunk);
    grads = carver.take<T>(batch * kKeyChunk);
    a = carver.take<const T*>(batch);
    b = carver.take<const T*>(batch);
    s = carver.take<T*>(batch);
    ds = carver.take<T*>(batch);
    c = carver.take<T*>(batch);
  }

  void operator()(const Visit<T>& visit) {
    for (int64_t r = 0; r < visit.num_rows; ++r) {
      a[r] = q + visit.rows[r] * plan.ld_qk;
      b[r] = dout + visit.rows[r] * plan.ld_v;
      c[r] = dq + visit.rows[r] * plan.ld_qk;
      s[r] = scores + r * visit.count;
      ds[r] = grads + r * visit.count;
    }
    row_scores(a, visit.num_rows, plan.shape.dim_qk, visit.keys.keys_t, visit.stored, visit.count,
               s);
    row_scores(b, visit.num_rows, plan.shape.dim_v, visit.keys.values_t, visit.stored, visit.count,
               ds);
    for (int64_t r = 0; r < visit.num_rows; ++r) {
      weight_row(terms[visit.rows[r]], visit.spans[r], visit.count, s[r], ds[r]);
    }
    const Product<T> product{visit.count, ds, 1, visit.keys.keys, plan.ld_qk, c, 0, nullptr};
    gemm(product, visit.num_rows, plan.ld_qk / kLanes<T>, Store::kAdd);
  }

  void begin_branch(int branch, const QueryItem& item) {
    const Sequence& sequence = plan.sequences[item.sequence];
    const int64_t G = plan.group;
    for (int64_t r = 0; r < item.count * G; ++r) {
      terms[r] = row_terms<T>(plan, sequence, branch, item.first + r / G, item.head * G + r % G);
    }
  }

  void run(const QueryItem& item) {
    load_tile(plan, item, plan.q, plan.shape.dim_qk, plan.ld_qk,
              T(plan.shape.softmax_scale * kLog2e), q);
    load_tile(plan, item, plan.params->dout, plan.shape.dim_v, plan.ld_v, T(1), dout);
    for (int64_t i = 0; i < item.count * plan.group * plan.ld_qk; ++i) dq[i] = 0;
    if (plan.enabled[kCompressed]) {
      begin_branch(kCompressed, item);
      for (int64_t first = 0; first < item.count; first += plan.compressed_tokens) {
        const int64_t left = item.count - first;
        const int64_t count = left < plan.compressed_tokens ? left : plan.compressed_tokens;
        visit_compressed(plan, item, first, count, kKeyChunk, rows, *this);
      }
    }
    if (plan.enabled[kSelected]) {
      begin_branch(kSelected, item);
      visit_selected(plan, item, rows, *this);
    }
    if (plan.enabled[kWindow]) {
      begin_branch(kWindow, item);
      for (int64_t first = 0; first < item.count; first += plan.window_tokens) {
        const int64_t left = item.count - first;
        const int64_t count = left < plan.window_tokens ? left : plan.window_tokens;
        visit_window(plan, item, first, count, rows, *this);
      }
    }
    store_tile(plan, item, plan.params->dq, plan.shape.dim_qk, plan.ld_qk,
               T(plan.shape.softmax_scale), dq);
  }
};

/// The key-stationary pass: dk and dv of a tile of keys.
template <class T>
struct KeyTile {
  const BwdPlan& plan;
  BlockParts<T> keys{};
  T *q, *dout, *scores, *grads, *dk, *dv, *row;
  RowTerms<T>* terms;
  Span* spans;
  const T **a, **b, **weights, **weight_grads;
  T **s, **ds, **dk_rows, **dv_rows;

  KeyTile(const BwdPlan& plan, Carver& carver) : plan(plan) {
    keys.keys_t = carver.take<T>(kKeyTile * plan.shape.dim_qk);
    keys.values_t = carver.take<T>(kKeyTile * plan.shape.dim_v);
    q = carver.take<T>(kQueryBatch * plan.ld_qk);
    dout = carver.take<T>(kQueryBatch * plan.ld_v);
    scores = carver.take<T>(kQueryBatch * kKeyTile);
    grads = carver.take<T>(kQueryBatch * kKeyTile);
    // Together, as a partial sum is stored.
    dk = carver.take<T>(kKeyTile * (plan.ld_qk + plan.ld_v));
    dv = dk + kKeyTile * plan.ld_qk;
    row = carver.take<T>(plan.ld_qk > plan.ld_v ? plan.ld_qk : plan.ld_v);
    terms = carver.take<RowTerms<T>>(kQueryBatch);
    spans = carver.take<Span>(kQueryBatch);
    a = carver.take<const T*>(kQueryBatch);
    b = carver.take<const T*>(kQueryBatch);
    s = carver.take<T*>(kQueryBatch);
    ds = carver.take<T*>(kQueryBatch);
    weights = carver.take<const T*>(kKeyTile);
    weight_grads = carver.take<const T*>(kKeyTile);
    dk_rows = carver.take<T*>(kKeyTile);
    dv_rows = carver.take<T*>(kKeyTile);
  }

  /// Adds the queries of one branch: `list[begin..end)`, or without a list begin..end themselves.
  void add_queries(int branch, const KeyItem& item, const int32_t* list, int64_t begin,
                   int64_t end) {
    if (begin >= end) return;
    const Sequence& sequence = plan.sequences[item.sequence];
    const int64_t G = plan.group, count = round_up_lanes<T>(item.count);
    const BwdPlan& p = plan;
    pack_block(plan, branch, item.sequence, item.head, item.begin, count, item.count, keys, row);
    for (int64_t r = 0; r < kQueryBatch; ++r) {
      a[r] = q + r * p.ld_qk;
      b[r] = dout + r * p.ld_v;
      s[r] = scores + r * count;
      ds[r] = grads + r * count;
    }
    for (int64_t key = 0; key < item.count; ++key) {
      weights[key] = scores + key;
      weight_grads[key] = grads + key;
      dk_rows[key] = dk + key * p.ld_qk;
      dv_rows[key] = dv + key * p.ld_v;
    }
    const T q_scale = T(p.shape.softmax_scale * kLog2e);
    for (int64_t at = begin * G; at < end * G; at += kQueryBatch) {
      const int64_t rows = end * G - at < kQueryBatch ? end * G - at : kQueryBatch;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t index = (at + r) / G, head = item.head * G + (at + r) % G;
        const int64_t i = list ? list[index] : index;
        pack_rows(p.shape.dtype, p.q.ptr, offset_of(p.q, sequence.batch, sequence.q_row + i, head),
                  0, 1, 1, p.shape.dim_qk, p.ld_qk, q_scale, q + r * p.ld_qk);
        const InView& view = p.params->dout;
        pack_rows(p.shape.dtype, view.ptr,
                  offset_of(view, sequence.batch, sequence.q_row + i, head), 0, 1, 1, p.shape.dim_v,
                  p.ld_v, T(1), dout + r * p.ld_v);
        terms[r] = row_terms<T>(plan, sequence, branch, i, head);
        spans[r] = span(branch, sequence.position(i), item.begin);
      }
      row_scores(a, rows, p.shape.dim_qk, keys.keys_t, count, count, s);
      row_scores(b, rows, p.shape.dim_v, keys.values_t, count, count, ds);
      for (int64_t r = 0; r < rows; ++r) {
        if (at + kQueryBatch + r < end * G) prefetch_row(item, list, at + kQueryBatch + r);
        weight_row(terms[r], spans[r], count, s[r], ds[r]);
      }
      gemm(Product<T>{rows, weights, count, dout, p.ld_v, dv_rows, 0, nullptr}, item.count,
           p.ld_v / kLanes<T>, Store::kAdd);
      gemm(Product<T>{rows, weight_grads, count, q, p.ld_qk, dk_rows, 0, nullptr}, item.count,
           p.ld_qk / kLanes<T>, Store::kAdd);
    }
  }

  /// A row of the next batch: the queries of a list are scattered over all of q and dout.
  NSA_CPU_INLINE void prefetch_row(const KeyItem& item, const int32_t* list, int64_t at) const {
    const Sequence& sequence = plan.sequences[item.sequence];
    const int64_t index = at / plan.group, head = item.head * plan.group + at % plan.group;
    const int64_t row = sequence.q_row + (list ? list[index] : index);
    const int64_t size = dtype_size(plan.shape.dtype);
    const InView &q_view = plan.q, &dout_view = plan.params->dout;
    const char* q_row =
        static_cast<const char*>(q_view.ptr) + offset_of(q_view, sequence.batch, row, head) * size;
    const char* dout_row = static_cast<const char*>(dout_view.ptr) +
                           offset_of(dout_view, sequence.batch, row, head) * size;
    for (int64_t i = 0; i < plan.shape.dim_qk * size; i += 64) __builtin_prefetch(q_row + i, 0, 2);
    for (int64_t i = 0; i < plan.shape.dim_v * size; i += 64)
      __builtin_prefetch(dout_row + i, 0, 2);
  }

  Span span(int branch, int64_t t, int64_t begin) const {
    const BlockConfig& config = plan.config;
    if (branch == kCompressed) {
      return {0, visible_compressed(t, config.block_size, config.block_stride) - begin};
    }
    return {branch == kWindow ? t - config.window + 1 - begin : 0, t + 1 - begin};
  }

  /// Queries of a sequence at positions [begin, end).
  void add_positions(int branch, const KeyItem& item, int64_t begin, int64_t end) {
    const Sequence& s = plan.sequences[item.sequence];
    const int64_t first = begin - s.position(0), last = end - s.position(0);
    add_queries(branch, item, nullptr, first > 0 ? first : 0, last < s.len_q ? last : s.len_q);
  }

  void add_window(const KeyItem& item) {
    add_positions(kWindow, item, item.begin, item.begin + item.count - 1 + plan.config.window);
  }

  void run(const KeyItem& item) {
    const int64_t size = kKeyTile * (plan.ld_qk + plan.ld_v);
    T* partials = static_cast<T*>(plan.partials);
    for (int64_t i = 0; i < size; ++i) dk[i] = 0;
    if (item.branch == kCompressed) {
      const int64_t first = item.begin * plan.config.block_stride + plan.config.block_size - 1;
      add_positions(kCompressed, item, first, INT64_MAX / 2);
    } else if (item.branch == kSelected) {
      add_queries(kSelected, item, plan.tokens, item.list_begin, item.list_end);
      if (item.num_partials < 0) {
        for (int64_t i = 0; i < size; ++i) partials[item.partial * size + i] = dk[i];
        return;
      }
      for (int64_t slot = item.partial; slot < item.partial + item.num_partials; ++slot) {
        for (int64_t i = 0; i < size; ++i) dk[i] += partials[slot * size + i];
      }
      if (plan.window_shares_grads) add_window(item);
    } else {
      add_window(item);
    }
    const Sequence& s = plan.sequences[item.sequence];
    const BranchBwd& out = plan.params->branch[item.branch];
    const int64_t first = (item.branch == kCompressed ? s.cmp_row : s.k_row) + item.begin;
    for (int64_t key = 0; key < item.count; ++key) {
      // q carries softmax_scale * log2(e), of which dk wants the first factor.
      store_row(plan.shape.dtype, out.dk.ptr, offset_of(out.dk, s.batch, first + key, item.head),
                plan.shape.dim_qk, T(kLn2), dk + key * plan.ld_qk);
      store_row(plan.shape.dtype, out.dv.ptr, offset_of(out.dv, s.batch, first + key, item.head),
                plan.shape.dim_v, T(1), dv + key * plan.ld_v);
    }
  }
};

template <class T>
void dq_item(const BwdPlan& plan, const QueryItem& item, char* scratch) {
  Carver carver(scratch);
  DqTile<T>(plan, carver).run(item);
}

template <class T>
void key_item(const BwdPlan& plan, const KeyItem& item, char* scratch) {
  Carver carver(scratch);
  KeyTile<T>(plan, carver).run(item);
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
