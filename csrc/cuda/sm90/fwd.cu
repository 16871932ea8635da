#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/common.h"
#include "cuda/instances/attn_instances.h"
#include "cuda/sm90/fwd.h"
#include "cuda/sm90/fwd_scores.cuh"
#include "cuda/sm90/tensor_map.h"

namespace nsa::cuda::sm90 {

namespace {

bool ranking(const FwdParams& p) { return p.branch == kCompressed && p.block_indices.ptr; }

}  // namespace

std::vector<std::string> fwd_unsupported(const AttnFwd& call, int major, int minor) {
  std::vector<std::string> reasons;
  if (major != 9 || minor != 0) reasons.push_back("the Hopper kernels need compute capability 9.0");
  const AttnShape& shape = call.shape;
  // Tiles are loaded whole: what lies past a sequence's keys must at least be finite.
  if (shape.seqused_k) reasons.push_back("the Hopper kernels take no seqused_k");
  const int64_t batch = shape.cu_seqlens_q ? 1 : shape.batch;
  bool maps = can_map(call.q, batch, shape.heads_q);
  for (const BranchFwd& branch : call.branch)
    if (branch.enabled)
      maps = maps && can_map(branch.k, batch, shape.heads_kv) &&
             (branch.v.ptr == nullptr || can_map(branch.v, batch, shape.heads_kv));
  if (!maps) reasons.push_back("the Hopper kernels need strides from 1 to 2^39 elements");
  return reasons;
}

bool fwd_takes(const FwdParams& p) { return !ranking(p) || ranks(p); }

bool fwd_pays(const FwdParams& p) {
  // Measured on an H100 (docs/kernels/forward.md), the ranking from 2048 keys on, where the jobs'
  // beginnings and ends are half of it; groups below 4 have not been measured.
  constexpr int kRankingFrom = 2048, kSmallestLog2Group = 2;
  if (ranking(p) && p.seqlen_k < kRankingFrom) return false;
  return p.log2_group >= kSmallestLog2Group || !(ranking(p) || p.branch == kSelected);
}

int64_t fwd_workspace(const FwdParams& p) {
  if (!ranking(p)) return 0;
  const int64_t tokens = BlockScores::kRows >> p.log2_group;
  const int64_t jobs = ceil_div<int64_t>(p.seqlen_q, tokens) * p.batch * p.heads_kv;
  return std::min<int64_t>(jobs, multiprocessor_count()) *
         BlockScores::bytes(BlockScores::tiles(p));
}

void attn_fwd_branch(const AttnShape& shape, const FwdParams& params, void* workspace,
                     cudaStream_t stream) {
#define NSA_LAUNCH(T, kDk, kDv)                                                        \
  if (shape.dim_qk == kDk && shape.dim_v == kDv &&                                     \
      shape.dtype == (std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16)) \
    return launch_fwd<T, kDk, kDv>(shape, params, workspace, stream);
  NSA_ATTN_INSTANCES(NSA_LAUNCH)
#undef NSA_LAUNCH
  throw std::logic_error("no forward kernel for these head dims");  // supports() names them
}

}  // namespace nsa::cuda::sm90
