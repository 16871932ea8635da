// The backward: dO . O of every row; one pass over chunks of queries, which finishes dq and sums dk
// and dv over the chunk's queries; and the sum of those partial sums. Chunks depend on the shape
// alone, so neither do gradients depend on the schedule. (A query-stationary pass for dq and a
// key-stationary one for dk and dv would need no partial sums, but 7 products instead of 5.)
// Include a target_*.h first.
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
      pack_rows(dtype, p.dout.ptr, {offset_of(p.dout, s.batch, row, head), 0}, 1, 1,
                plan.shape.dim_v, plan.ld_v, T(1), dout);
      T dots[kNumBranches] = {};
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!plan.enabled[branch]) continue;
        const InView& view = p.branch[branch].out;
        pack_rows(dtype, view.ptr, {offset_of(view, s.batch, row, head), 0}, 1, 1, plan.shape.dim_v,
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

/// A chunk of queries, tile by tile.
template <class T>
struct BwdTile {
  const BwdPlan& plan;
  TileRows<T> rows;
  T *q, *dout, *dq;
  RowTerms<T>* terms;
  T *scores, *grads, *visit_q, *visit_dout;
  const T **a, **b, **weights, **weight_grads;
  T **s, **ds, **c, **dk, **dv;
  const PartialGrads* partial = nullptr;  // of the branch in hand

  BwdTile(const BwdPlan& plan, Carver& carver) : plan(plan), rows(plan, carver) {
    const int64_t G = plan.group, tile = plan.tile_tokens * G;
    const int64_t batch = kRowBatch > G ? kRowBatch : G, keys = kBackwardKeyChunk;
    q = carver.take<T>(tile * plan.ld_qk);
    dout = carver.take<T>(tile * plan.ld_v);
    dq = carver.take<T>(tile * plan.ld_qk);
    terms = carver.take<RowTerms<T>>(tile);
    scores = carver.take<T>(batch * (keys + kLanes<T>));
    grads = carver.take<T>(batch * (keys + kLanes<T>));
    visit_q = carver.take<T>(kRowBatch * plan.ld_qk);
    visit_dout = carver.take<T>(kRowBatch * plan.ld_v);
    a = carver.take<const T*>(batch);
    b = carver.take<const T*>(batch);
    s = carver.take<T*>(batch);
    ds = carver.take<T*>(batch);
    c = carver.take<T*>(batch);
    weights = carver.take<const T*>(keys);
    weight_grads = carver.take<const T*>(keys);
    dk = carver.take<T*>(keys);
    dv = carver.take<T*>(keys);
  }

  void operator()(const Visit<T>& visit) {
    const int64_t n = visit.num_rows, ld_qk = plan.ld_qk, ld_v = plan.ld_v;
    // An odd number of cache lines where columns are read: a power of two would use few L1 sets.
    const int64_t stride = visit.count + kLanes<T>;
    for (int64_t r = 0; r < n; ++r) {
      a[r] = q + visit.rows[r] * ld_qk;
      b[r] = dout + visit.rows[r] * ld_v;
      c[r] = dq + visit.rows[r] * ld_qk;
      s[r] = scores + r * stride;
      ds[r] = grads + r * stride;
    }
    row_scores(a, n, plan.shape.dim_qk, visit.keys.keys_t, visit.stored, visit.count, s);
    row_scores(b, n, plan.shape.dim_v, visit.keys.values_t, visit.stored, visit.count, ds);
    for (int64_t r = 0; r < n; ++r) {
      weight_row(terms[visit.rows[r]], visit.spans[r], visit.count, s[r], ds[r]);
    }
    gemm(Product<T>{visit.count, ds, 1, visit.keys.keys, ld_qk, c, 0, nullptr}, n,
         ld_qk / kLanes<T>, Store::kAdd);

    const T *q_rows = a[0], *dout_rows = b[0];
    if (visit.rows[n - 1] - visit.rows[0] != n - 1) {
      for (int64_t r = 0; r < n; ++r) {
        copy_scaled(a[r], ld_qk, T(1), visit_q + r * ld_qk);
        copy_scaled(b[r], ld_v, T(1), visit_dout + r * ld_v);
      }
      q_rows = visit_q;
      dout_rows = visit_dout;
    }
    for (int64_t key = 0; key < visit.num_keys; ++key) {
      const int64_t row = visit.first_key + key - partial->first;
      weights[key] = scores + key;
      weight_grads[key] = grads + key;
      dk[key] = static_cast<T*>(partial->dk) + row * ld_qk;
      dv[key] = static_cast<T*>(partial->dv) + row * ld_v;
    }
    gemm(Product<T>{n, weights, stride, dout_rows, ld_v, dv, 0, nullptr}, visit.num_keys,
         ld_v / kLanes<T>, Store::kAdd);
    gemm(Product<T>{n, weight_grads, stride, q_rows, ld_qk, dk, 0, nullptr}, visit.num_keys,
         ld_qk / kLanes<T>, Store::kAdd);
  }

  void begin_branch(int branch, const QueryItem& tile, const PartialGrads* partials) {
    const Sequence& sequence = plan.sequences[tile.sequence];
    const int64_t G = plan.group;
    for (int64_t r = 0; r < tile.count * G; ++r) {
      terms[r] = row_terms<T>(plan, sequence, branch, tile.first + r / G, tile.head * G + r % G);
    }
    partial = partials + (branch == kWindow && plan.window_shares_grads ? kSelected : branch);
  }

  void run_tile(const QueryItem& tile, const PartialGrads* partials) {
    load_tile(plan, tile, plan.q, plan.shape.dim_qk, plan.ld_qk,
              T(plan.shape.softmax_scale * kLog2e), q);
    load_tile(plan, tile, plan.params->dout, plan.shape.dim_v, plan.ld_v, T(1), dout);
    for (int64_t i = 0; i < tile.count * plan.group * plan.ld_qk; ++i) dq[i] = 0;
    if (plan.enabled[kCompressed]) {
      begin_branch(kCompressed, tile, partials);
      for (int64_t first = 0; first < tile.count; first += plan.window_tokens) {
        const int64_t left = tile.count - first;
        const int64_t count = left < plan.window_tokens ? left : plan.window_tokens;
        visit_compressed(plan, tile, first, count, kBackwardKeyChunk, rows, *this);
      }
    }
    if (plan.enabled[kSelected]) {
      begin_branch(kSelected, tile, partials);
      visit_selected(plan, tile, kBackwardKeyChunk, rows, *this);
    }
    if (plan.enabled[kWindow]) {
      begin_branch(kWindow, tile, partials);
      for (int64_t first = 0; first < tile.count; first += plan.window_tokens) {
        const int64_t left = tile.count - first;
        const int64_t count = left < plan.window_tokens ? left : plan.window_tokens;
        visit_window(plan, tile, first, count, kBackwardKeyChunk, rows, *this);
      }
    }
    store_tile(plan, tile, plan.params->dq, plan.shape.dim_qk, plan.ld_qk,
               T(plan.shape.softmax_scale), dq);
  }

  void run(const QueryItem& chunk, const PartialGrads* partials) {
    for (int branch = 0; branch < kNumBranches; ++branch) {
      const PartialGrads& to = partials[branch];
      T *dk_rows = static_cast<T*>(to.dk), *dv_rows = static_cast<T*>(to.dv);
      for (int64_t i = 0; i < to.count * plan.ld_qk; ++i) dk_rows[i] = 0;
      for (int64_t i = 0; i < to.count * plan.ld_v; ++i) dv_rows[i] = 0;
    }
    for (int64_t first = 0; first < chunk.count; first += plan.tile_tokens) {
      const int64_t left = chunk.count - first;
      const int64_t count = left < plan.tile_tokens ? left : plan.tile_tokens;
      run_tile({chunk.sequence, chunk.head, chunk.first + first, count}, partials);
    }
  }
};

template <class T>
void bwd_item(const BwdPlan& plan, int64_t item, char* scratch) {
  Carver carver(scratch);
  BwdTile<T>(plan, carver).run(plan.items[item], plan.partials[item].branch);
}

/// Adds up the partial sums of some keys in order of the chunks and stores them.
template <class T>
void reduce_item(const BwdPlan& plan, const ReduceItem& item, char* scratch) {
  const Sequence& s = plan.sequences[item.sequence];
  const BranchBwd& out = plan.params->branch[item.branch];
  Carver carver(scratch);
  T* dk = carver.take<T>(plan.ld_qk);
  T* dv = carver.take<T>(plan.ld_v);
  const int64_t* items = plan.first_item + item.sequence * plan.shape.heads_kv + item.head;
  for (int64_t key = item.begin; key < item.end; ++key) {
    for (int64_t i = 0; i < plan.ld_qk; ++i) dk[i] = 0;
    for (int64_t i = 0; i < plan.ld_v; ++i) dv[i] = 0;
    for (int64_t chunk = items[0]; chunk < items[1]; ++chunk) {
      const PartialGrads& from = plan.partials[chunk].branch[item.branch];
      const int64_t row = key - from.first;
      if (row < 0 || row >= from.count) continue;
      const T* dk_row = static_cast<const T*>(from.dk) + row * plan.ld_qk;
      const T* dv_row = static_cast<const T*>(from.dv) + row * plan.ld_v;
      for (int64_t i = 0; i < plan.ld_qk; i += kLanes<T>) {
        store(dk + i, load(dk + i) + load(dk_row + i));
      }
      for (int64_t i = 0; i < plan.ld_v; i += kLanes<T>) {
        store(dv + i, load(dv + i) + load(dv_row + i));
      }
    }
    const int64_t row = (item.branch == kCompressed ? s.cmp_row : s.k_row) + key;
    // q carries softmax_scale * log2(e), of which dk wants the first factor.
    store_row(plan.shape.dtype, out.dk.ptr, offset_of(out.dk, s.batch, row, item.head),
              plan.shape.dim_qk, T(kLn2), dk);
    store_row(plan.shape.dtype, out.dv.ptr, offset_of(out.dv, s.batch, row, item.head),
              plan.shape.dim_v, T(1), dv);
  }
}

/// Two rows of values, or one of keys and one of values.
template <class T>
int64_t rows_scratch(const BwdPlan& plan) {
  Carver carver(nullptr);
  carver.take<T>(plan.ld_qk > plan.ld_v ? plan.ld_qk : plan.ld_v);
  carver.take<T>(plan.ld_v);
  return carver.size();
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
