// Schemas and registration. Functional but for cache_append and
// cache_store_*, never returning scratch; an absent
// optional result has shape (0,). Fake kernels and autograd are registered in nsa_ext/_ops.py.
#include <torch/csrc/stable/library.h>

#include "torch/ops.h"
#include "torch/runtime.h"

// Runs of arguments that several schemas share.
#define NSA_SEQLENS \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
#define NSA_BLOCKS "Tensor? cu_seqlens, SymInt max_seqlen, int block_size, int block_stride"
#define NSA_NEW_TOKENS                                                                       \
  "Tensor k, Tensor v, Tensor tail_k, Tensor tail_v, Tensor state, Tensor? counts, Tensor? " \
  "block_table, SymInt num_pages, int[] config"
#define NSA_CACHE                                                                                \
  "Tensor(a!) state, Tensor(b!) k_pages, Tensor(c!) v_pages, Tensor(d!)? k_win_pages, "          \
  "Tensor(e!)? v_win_pages, Tensor(f!) k_cmp_pages, Tensor(g!) v_cmp_pages, Tensor(h!) tail_k, " \
  "Tensor(i!) tail_v"
#define NSA_FRESH "Tensor k, Tensor v, Tensor? k_win, Tensor? v_win, Tensor k_raw, Tensor v_raw"
#define NSA_SCALE "float softmax_scale, bool deterministic"

STABLE_TORCH_LIBRARY(nsa_ext, m) {
  m.def("compress_pool_fwd(Tensor x, Tensor? weight, Tensor? pos, " NSA_BLOCKS ") -> Tensor");
  m.def("compress_pool_bwd(Tensor dout, Tensor x, Tensor? weight, Tensor? pos, " NSA_BLOCKS
        ") -> (Tensor dx, Tensor dweight, Tensor dpos)");
  m.def(
      "compress_mlp_fwd(Tensor x, Tensor? pos, Tensor w1, Tensor? b1, Tensor? w2, Tensor? "
      "b2, " NSA_BLOCKS ") -> Tensor");
  m.def(
      "compress_mlp_bwd(Tensor dout, Tensor x, Tensor? pos, Tensor w1, Tensor? b1, Tensor? w2, "
      "Tensor? b2, " NSA_BLOCKS
      ") -> (Tensor dx, Tensor dpos, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2)");
  m.def("compressed_attn_fwd(Tensor q, Tensor k_cmp, Tensor v_cmp, " NSA_SEQLENS
        ", int[] config, " NSA_SCALE ") -> (Tensor out, Tensor lse, Tensor block_indices)");
  m.def(
      "compressed_attn_bwd(Tensor dout, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor out, Tensor "
      "lse, " NSA_SEQLENS ", int[] config, " NSA_SCALE
      ") -> (Tensor dq, Tensor dk_cmp, Tensor dv_cmp)");
  m.def("select_blocks(Tensor q, Tensor k_cmp, " NSA_SEQLENS
        ", int[] config, float softmax_scale) -> Tensor");
  m.def("selected_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor block_indices, " NSA_SEQLENS
        ", int select_size, " NSA_SCALE ") -> (Tensor out, Tensor lse)");
  m.def(
      "selected_attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor block_indices, " NSA_SEQLENS ", int select_size, " NSA_SCALE
      ") -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("window_attn_fwd(Tensor q, Tensor k, Tensor v, " NSA_SEQLENS ", int window, " NSA_SCALE
        ") -> (Tensor out, Tensor lse)");
  m.def(
      "window_attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, " NSA_SEQLENS ", int window, " NSA_SCALE ") -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "sparse_attn_fwd(Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor? "
      "k_win, "
      "Tensor? v_win, Tensor gates, " NSA_SEQLENS
      ", int[] config, float softmax_scale, bool save_branches, bool deterministic) -> "
      "(Tensor out, Tensor branch_out, Tensor branch_lse, Tensor block_indices)");
  m.def(
      "sparse_attn_bwd(Tensor dout, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor "
      "v_slc, Tensor? k_win, "
      "Tensor? v_win, Tensor gates, Tensor branch_out, Tensor branch_lse, Tensor "
      "block_indices, " NSA_SEQLENS ", int[] config, " NSA_SCALE
      ") -> (Tensor dq, Tensor dk_cmp, Tensor dv_cmp, Tensor dk_slc, Tensor dv_slc, Tensor dk_win, "
      "Tensor dv_win, "
      "Tensor dgates)");
  // `steps`, by sequence: its length, the tokens taken and those offered. cache_store_*, which CUDA
  // alone has, are cache_gather, phi and cache_append in one.
  m.def("cache_gather(" NSA_NEW_TOKENS ") -> (Tensor k_rows, Tensor v_rows, Tensor steps)");
  m.def("cache_append(" NSA_CACHE ", Tensor steps, " NSA_FRESH
        ", Tensor k_cmp, Tensor v_cmp, Tensor? block_table, Tensor? rope_inv_freq, int[] config) "
        "-> ()");
  m.def("cache_store_mlp(" NSA_CACHE ", " NSA_FRESH
        ", Tensor? counts, Tensor? block_table, Tensor? rope_inv_freq, int[] config, Tensor? "
        "k_pos, Tensor k_w1, Tensor? k_b1, Tensor? k_w2, Tensor? k_b2, Tensor? v_pos, Tensor v_w1, "
        "Tensor? v_b1, Tensor? v_w2, Tensor? v_b2) -> ()");
  m.def("cache_store_pool(" NSA_CACHE ", " NSA_FRESH
        ", Tensor? counts, Tensor? block_table, Tensor? rope_inv_freq, int[] config, Tensor? "
        "k_weight, Tensor? k_pos, Tensor? v_weight, Tensor? v_pos) -> ()");
  m.def(
      "decode_fwd(Tensor q, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor k_pages, Tensor "
      "v_pages, Tensor? k_win_pages, Tensor? v_win_pages, Tensor gates, Tensor seqlens, Tensor? "
      "block_table, int[] config, float softmax_scale) -> (Tensor out, Tensor block_indices)");
  m.def("max_decode_rows() -> int");
  m.def("build_info() -> str");
  m.def("set_cuda_backend(str name) -> str");
  m.def(
      "supports(str device, str dtype, int heads_q, int heads_kv, int dim_qk, int dim_v, int[] "
      "config, "
      "int capability) -> str");
}

namespace {

void register_kernels(torch::stable::detail::StableLibrary& m) {
  using namespace nsa::binding;
  m.impl("compress_pool_fwd", TORCH_BOX(&compress_pool_fwd));
  m.impl("compress_pool_bwd", TORCH_BOX(&compress_pool_bwd));
  m.impl("compress_mlp_fwd", TORCH_BOX(&compress_mlp_fwd));
  m.impl("compress_mlp_bwd", TORCH_BOX(&compress_mlp_bwd));
  m.impl("compressed_attn_fwd", TORCH_BOX(&compressed_attn_fwd));
  m.impl("compressed_attn_bwd", TORCH_BOX(&compressed_attn_bwd));
  m.impl("select_blocks", TORCH_BOX(&select_blocks));
  m.impl("selected_attn_fwd", TORCH_BOX(&selected_attn_fwd));
  m.impl("selected_attn_bwd", TORCH_BOX(&selected_attn_bwd));
  m.impl("window_attn_fwd", TORCH_BOX(&window_attn_fwd));
  m.impl("window_attn_bwd", TORCH_BOX(&window_attn_bwd));
  m.impl("sparse_attn_fwd", TORCH_BOX(&sparse_attn_fwd));
  m.impl("sparse_attn_bwd", TORCH_BOX(&sparse_attn_bwd));
  m.impl("cache_gather", TORCH_BOX(&cache_gather));
  m.impl("cache_append", TORCH_BOX(&cache_append));
  m.impl("decode_fwd", TORCH_BOX(&decode_fwd));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nsa_ext, CPU, m) { register_kernels(m); }

#ifdef NSA_EXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(nsa_ext, CUDA, m) {
  register_kernels(m);
  m.impl("cache_store_mlp", TORCH_BOX(&nsa::binding::cache_store_mlp));
  m.impl("cache_store_pool", TORCH_BOX(&nsa::binding::cache_store_pool));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(nsa_ext, CompositeExplicitAutograd, m) {
  using namespace nsa::binding;
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("max_decode_rows", TORCH_BOX(&max_decode_rows));
  m.impl("set_cuda_backend", TORCH_BOX(&set_cuda_backend));
  m.impl("supports", TORCH_BOX(&supports));
}
