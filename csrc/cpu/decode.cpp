// Decode over a KV cache: the forward, with keys that lie in pages.
#include "nsa/decode.h"

#include "cpu/attn_setup.h"

namespace nsa::cpu {

namespace {

/// Entries of pages that hold no key are never read; the others are checked by the caller.
std::vector<int32_t> pages_in_order(const DecodeFwd& params) {
  std::vector<int32_t> table(params.shape.batch * params.max_pages);
  for (std::size_t page = 0; page < table.size(); ++page) table[page] = static_cast<int32_t>(page);
  return table;
}

}  // namespace

void decode_fwd(const DecodeFwd& params, const Executor& executor) {
  require(params.max_pages >= 1, "a cache has at least one page a sequence");
  require(params.seqlens_k || params.shape.batch == 0, "seqlens_k is missing");
  AttnFwd call{};
  call.shape = params.shape;
  call.shape.seqlen_k = params.max_pages * params.config.select_size;
  call.shape.total_q = call.shape.batch * call.shape.seqlen_q;
  call.shape.total_k = call.shape.batch * call.shape.seqlen_k;
  call.shape.cu_seqlens_q = call.shape.cu_seqlens_k = nullptr;
  call.shape.seqused_k = params.seqlens_k;
  call.config = params.config;
  call.q = params.q;
  call.gates = params.gates;
  call.out = params.out;
  for (int branch = 0; branch < kNumBranches; ++branch) {
    const PagedView &k = params.k[branch], &v = params.v[branch];
    call.branch[branch].enabled = true;
    call.branch[branch].k = {k.ptr, k.page, k.seq, k.head};
    call.branch[branch].v = {v.ptr, v.page, v.seq, v.head};
  }
  call.index_count = params.config.num_selected;
  call.block_indices = params.block_indices;
  std::vector<int32_t> block_indices;
  if (!call.block_indices.ptr) {
    const int64_t n = call.index_count, heads = params.shape.heads_kv;
    block_indices.resize(call.shape.total_q * heads * n);
    call.block_indices = {block_indices.data(), call.shape.seqlen_q * heads * n, heads * n, n};
  }

  FwdPlan plan{};
  take_call(plan, call);
  const std::vector<int32_t> in_order =
      params.block_table ? std::vector<int32_t>{} : pages_in_order(params);
  plan.block_table = params.block_table ? params.block_table : in_order.data();
  plan.max_pages = params.max_pages;
  run_fwd(plan, executor);
}

}  // namespace nsa::cpu
