// Works out an AttnPlan and owns the memory that it points to.
#pragma once

#include <stdexcept>
#include <vector>

#include "cpu/attn_kernels.h"
#include "cpu/schedule.h"

namespace nsa::cpu {

/// The kernels for a dtype on this machine.
const AttnKernels& attn_kernels(DType dtype);

inline int64_t compute_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : 4; }

struct AttnSetup {
  const AttnKernels& kernels;
  std::vector<Sequence> sequences;
  std::vector<QueryItem> items;
  std::vector<int64_t> pack_first[kNumBranches], pack_count[kNumBranches], pack_base[kNumBranches];
  std::vector<PackItem> pack_items;
  std::vector<Buffer> buffers;

  /// Throws std::invalid_argument where the shape, the configuration of the enabled branches or
  /// cu_seqlens do not hold together. take_call() and plan.parts come first; fills in the rest.
  /// Items are tiles, for the forward, or chunks of tiles that depend on the shape alone.
  enum class Items { kTiles, kChunks };
  AttnSetup(AttnPlan& plan, const Executor& executor, Items kind);

 private:
  void check(const AttnPlan& plan) const;
  void add_sequences(AttnPlan& plan);
  void plan_tiles(AttnPlan& plan) const;
  void add_tiles(AttnPlan& plan, int num_threads);
  void add_chunks(AttnPlan& plan);
  void add_pack(AttnPlan& plan, int branch);
};

/// What the plans of the forward and the backward take over from their call as it is.
template <class Plan, class Params>
void take_call(Plan& plan, const Params& params) {
  plan.shape = params.shape;
  plan.config = params.config;
  plan.q = params.q;
  plan.gates = params.gates;
  for (int branch = 0; branch < kNumBranches; ++branch) {
    plan.enabled[branch] = params.branch[branch].enabled;
    plan.k[branch] = params.branch[branch].k;
    plan.v[branch] = params.branch[branch].v;
  }
  plan.block_indices = {params.block_indices.ptr, params.block_indices.batch,
                        params.block_indices.seq, params.block_indices.head};
  plan.index_count = params.index_count;
  plan.params = &params;
}

/// The forward of a plan that take_call() has begun and that says where the keys lie.
void run_fwd(FwdPlan& plan, const Executor& executor);

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace nsa::cpu
