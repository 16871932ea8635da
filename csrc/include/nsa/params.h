// One plain struct per operator: raw pointers, int64 strides counted in elements, a shape comment
// on every pointer. The letters are those of the paper (arXiv 2502.11089): B batch, Sq/Sk query/key
// length, Hq/Hkv heads, G = Hq / Hkv, Dk/Dv head dims, l compression block, d compression stride,
// l' selection block, n selected blocks, w window, Tc compressed tokens of a sequence, Hw leading
// dim of phi's weights (1: shared by the heads, or Hkv: one per head).
#pragma once

#include <cstdint>

namespace nsa {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

/// Strided view of a (batch, seq, heads, dim) tensor whose last dim is contiguous. In a packed
/// batch (cu_seqlens given) `seq` walks the rows of all sequences and `batch` is unused. A tensor
/// without a dim axis (lse) has unit elements.
template <class T>
struct View {
  T* ptr = nullptr;
  int64_t batch = 0, seq = 0, head = 0;  // strides in elements
};
using InView = View<const void>;
using OutView = View<void>;

/// The lengths of NSA's blocks; NSAConfig of the Python package. Validated by `config_error`
/// (geometry.h).
struct BlockConfig {
  int32_t block_size = 32;    // l
  int32_t block_stride = 16;  // d
  int32_t select_size = 64;   // l'
  int32_t num_selected = 16;  // n
  int32_t num_init = 1;       // first blocks always selected, counted in n
  int32_t num_local = 2;      // last blocks up to the query's own always selected, counted in n
  int32_t window = 512;       // w
};

/// phi over the blocks of one tensor, K or V: out[c] = phi(x[c*d : c*d+l)) (eq. 7).
struct CompressShape {
  DType dtype;
  int64_t batch;                     // B
  int64_t seqlen;                    // Sk; the maximum over the batch when packed
  int64_t total;                     // rows of x when packed, else B * Sk
  int64_t heads;                     // Hkv
  int64_t dim;                       // D of x
  int64_t weight_heads;              // Hw
  int32_t block_size, block_stride;  // l, d
  const int32_t* cu_seqlens;         // (B + 1), or null
};
// Compressed rows of a packed batch: token c of sequence b lies in row `cu_seqlens[b] / d + c` of
// total / d rows
// (`packed_row` in geometry.h). Rows that hold no token are zero.

/// kind `mean` (weight null) and `weighted`: out[c] = sum_r weight[r] * (x[c*d+r] + pos[r]).
struct CompressPoolFwd {
  CompressShape shape;
  InView x;            // (B, Sk, Hkv, D)
  const void* weight;  // (Hw, l) or null for 1/l
  const void* pos;     // (Hw, l, D) or null
  OutView out;         // (B, Tc, Hkv, D)
};
struct CompressPoolBwd {
  CompressShape shape;
  InView dout;         // (B, Tc, Hkv, D)
  InView x;            // (B, Sk, Hkv, D)
  const void* weight;  // (Hw, l) or null
  const void* pos;     // (Hw, l, D) or null
  OutView dx;          // (B, Sk, Hkv, D)
  void* dweight;       // (Hw, l) or null
  void* dpos;          // (Hw, l, D) or null
};

/// kind `mlp`: out[c] = w2 gelu(w1 vec(x + pos) + b1) + b2 with the erf gelu; kind `linear` (w2
/// null): w1 vec(x + pos) + b1.
struct CompressMlpFwd {
  CompressShape shape;
  int64_t hidden;   // rows of w1: hidden width, or D_out when linear
  int64_t dim_out;  // D_out
  InView x;         // (B, Sk, Hkv, D)
  const void* pos;  // (Hw, l, D) or null
  const void* w1;   // (Hw, hidden, l * D)
  const void* b1;   // (Hw, hidden) or null
  const void* w2;   // (Hw, D_out, hidden), null when linear
  const void* b2;   // (Hw, D_out) or null
  OutView out;      // (B, Tc, Hkv, D_out)
};
struct CompressMlpBwd {
  CompressShape shape;
  int64_t hidden, dim_out;
  InView dout;      // (B, Tc, Hkv, D_out)
  InView x;         // (B, Sk, Hkv, D)
  const void* pos;  // (Hw, l, D) or null
  const void* w1;   // (Hw, hidden, l * D)
  const void* b1;   // (Hw, hidden) or null
  const void* w2;   // (Hw, D_out, hidden), null when linear
  OutView dx;       // (B, Sk, Hkv, D)
  void* dpos;       // (Hw, l, D) or null, as pos
  void* dw1;        // (Hw, hidden, l * D)
  void* db1;        // (Hw, hidden) or null, as b1
  void* dw2;        // (Hw, D_out, hidden) or null, as w2
  void* db2;        // (Hw, D_out) or null
};

/// The sequences of an attention call. Query i of a sequence sits at position t = i + (Sk - Sq).
struct AttnShape {
  DType dtype;       // of q, k, v, gates, outputs; lse is float32, or float64 for float64
  int64_t batch;     // B
  int64_t seqlen_q;  // Sq; the maximum over the batch when packed
  int64_t seqlen_k;  // Sk in raw keys, for the compressed branch too; the maximum when packed
  int64_t total_q, total_k;     // rows of packed q and raw k, else B * Sq and B * Sk
  int64_t heads_q, heads_kv;    // Hq, Hkv
  int64_t dim_qk, dim_v;        // Dk, Dv
  const int32_t* cu_seqlens_q;  // (B + 1), or null; both or neither
  const int32_t* cu_seqlens_k;  // (B + 1), or null
  double softmax_scale;
  // (B), or null: Sk of each sequence, at most what seqlen_k or cu_seqlens_k say. Rows behind are
  // room of a cache, finite and never attended to. Forward only.
  const int32_t* seqused_k;
};

/// The three branches of NSA, in the order of `gates`. They differ in the keys that a query sees:
/// kCompressed: compressed tokens c with c*d + l - 1 <= t;  kSelected: keys s <= t of the blocks in
/// block_indices; kWindow: t - w < s <= t. A query that sees no key has out = 0 and lse = -inf.
enum Branch : int { kCompressed = 0, kSelected = 1, kWindow = 2, kNumBranches = 3 };

struct BranchFwd {
  bool enabled = false;
  InView k;     // (B, Sk, Hkv, Dk); compressed: (B, Tc, Hkv, Dk)
  InView v;     // (B, Sk, Hkv, Dv); compressed: (B, Tc, Hkv, Dv); null: this branch's output is not
                // wanted
  OutView out;  // (B, Sq, Hq, Dv) output of the branch alone, or null
  OutView lse;  // (B, Hq, Sq), packed (Hq, total_q): natural log; or null
};

/// Any subset of the branches, and their gated sum (eq. 5) where `gates` is given.
struct AttnFwd {
  AttnShape shape;
  BlockConfig config;
  InView q;  // (B, Sq, Hq, Dk)
  BranchFwd branch[kNumBranches];
  // (B, Sq, Hkv, n) int32, rows contiguous. With the compressed branch enabled and ptr set it is
  // written (eq. 8-11: ascending, unique, -1 padded) and then used by the selected branch; with the
  // selected branch alone it is read: order is free, an index outside [0, ceil(Sk / l')) counts as
  // absent, a repeated one counts once.
  View<int32_t> block_indices;
  int32_t index_count;  // n: entries of a row of block_indices
  InView gates;         // (B, Sq, Hq, 3), or null
  OutView out;          // (B, Sq, Hq, Dv) sum of gates[c] * out of branch c; null without gates
};

struct BranchBwd {
  bool enabled = false;
  InView k, v;  // as in the forward
  InView out;   // (B, Sq, Hq, Dv) the branch's own output
  InView lse;   // (B, Hq, Sq), packed (Hq, total_q)
  OutView dk;   // as k. Window: null adds dk, dv into the selected branch's (K and V are shared)
  OutView dv;   // as v
};

/// Gradients of AttnFwd. dO of branch c is gates[c] * dout, or dout without gates (then one branch
/// is enabled).
struct AttnBwd {
  AttnShape shape;
  BlockConfig config;
  InView q;     // (B, Sq, Hq, Dk)
  InView dout;  // (B, Sq, Hq, Dv)
  BranchBwd branch[kNumBranches];
  View<const int32_t>
      block_indices;    // (B, Sq, Hkv, n), read by the selected branch as in the forward
  int32_t index_count;  // n
  InView gates;         // (B, Sq, Hq, 3), or null
  OutView dq;           // (B, Sq, Hq, Dk) sum over the branches
  OutView dgates;       // (B, Sq, Hq, 3), or null
  bool deterministic;   // bit-reproducible gradients are required
};

}  // namespace nsa
