#include "cpu/attn_setup.h"

namespace nsa::cpu {

namespace {

void check(const AttnFwd& params, const AttnPlan& plan) {
  const AttnShape& shape = params.shape;
  const BranchFwd& compressed = params.branch[kCompressed];
  if (compressed.enabled && params.block_indices.ptr) {
    require(params.index_count == params.config.num_selected,
            "index_count must be num_selected where block_indices are written");
  }
  if (shape.total_q == 0) return;
  require(!params.gates.ptr || params.out.ptr, "gates need out");
  require(params.gates.ptr || !params.out.ptr, "out needs gates");
  for (int branch = 0; branch < kNumBranches; ++branch) {
    const BranchFwd& b = params.branch[branch];
    if (!b.enabled || b.v.ptr) continue;
    const int64_t keys =
        branch == kCompressed
            ? num_compressed(shape.seqlen_k, params.config.block_size, params.config.block_stride)
            : shape.total_k;
    require(keys == 0 || (branch == kCompressed && !b.out.ptr && !plan.gates.ptr),
            "the values of a branch whose output is wanted are missing");
  }
}

}  // namespace

void attn_fwd(const AttnFwd& params, const Executor& executor) {
  FwdPlan plan{};
  take_call(plan, params);
  run_fwd(plan, executor);
}

void run_fwd(FwdPlan& plan, const Executor& executor) {
  const AttnFwd& params = *plan.params;
  plan.parts = kKeysT | kValues;
  AttnSetup setup(plan, executor, AttnSetup::Items::kTiles);
  check(params, plan);

  const AttnKernels& kernels = setup.kernels;
  const int64_t row = std::max(plan.ld_qk, plan.ld_v) * compute_size(params.shape.dtype);
  for_each_item(
      executor, static_cast<int64_t>(setup.pack_items.size()), row,
      [&](int64_t item, char* scratch) { kernels.pack(plan, setup.pack_items[item], scratch); });
  for_each_item(
      executor, static_cast<int64_t>(setup.items.size()), kernels.fwd_scratch(plan),
      [&](int64_t item, char* scratch) { kernels.fwd(plan, setup.items[item], scratch); });
}

}  // namespace nsa::cpu
