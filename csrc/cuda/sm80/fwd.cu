#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/common.h"
#include "cuda/instances/attn_instances.h"
#include "cuda/sm80/fwd.h"

namespace nsa::cuda::sm80 {

namespace {

int log2_ceil(int64_t x) {
  int log2 = 0;
  while ((int64_t{1} << log2) < x) ++log2;
  return log2;
}

void launch(const AttnShape& shape, const FwdParams& params, cudaStream_t stream) {
#define NSA_LAUNCH(T, kDk, kDv)                                                        \
  if (shape.dim_qk == kDk && shape.dim_v == kDv &&                                     \
      shape.dtype == (std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16)) \
    return launch_fwd<T, kDk, kDv>(params, stream);
  NSA_ATTN_INSTANCES(NSA_LAUNCH)
#undef NSA_LAUNCH
  throw std::logic_error("no forward kernel for these head dims");  // supports() names them
}

}  // namespace

void for_each_branch(const AttnFwd& call, const std::function<void(const FwdParams&)>& launch) {
  const AttnShape& shape = call.shape;
  FwdParams p{};
  p.q = call.q;
  p.cu_seqlens_q = shape.cu_seqlens_q;
  p.cu_seqlens_k = shape.cu_seqlens_k;
  p.batch = static_cast<int32_t>(shape.batch);
  p.seqlen_q = static_cast<int32_t>(shape.seqlen_q);
  p.seqlen_k = static_cast<int32_t>(shape.seqlen_k);
  p.heads_kv = static_cast<int32_t>(shape.heads_kv);
  p.group = static_cast<int32_t>(shape.heads_q / shape.heads_kv);
  p.log2_group = log2_ceil(p.group);
  p.scale_log2 = static_cast<float>(shape.softmax_scale * 1.4426950408889634);
  p.config = call.config;
  p.config.window = std::min(p.config.window, std::max(p.seqlen_k, 1));  // no sum overflows
  p.select_shift = log2_ceil(p.config.select_size);
  p.stride_shift = log2_ceil(p.config.block_stride);
  p.gates = call.gates;
  p.gated_out = call.out;
  for (int c = 0; c < kNumBranches; ++c) {
    const BranchFwd& branch = call.branch[c];
    if (!branch.enabled) continue;
    p.branch = c;
    p.k = branch.k;
    p.v = branch.v;
    p.out = branch.out;
    p.lse = branch.lse;
    p.block_indices = c == kWindow ? View<int32_t>{} : call.block_indices;
    p.index_count = c == kWindow ? 0 : call.index_count;
    launch(p);
    p.accumulate = true;
  }
}

void attn_fwd(const AttnFwd& call, cudaStream_t stream) {
  for_each_branch(call, [&](const FwdParams& p) { launch(call.shape, p, stream); });
}

}  // namespace nsa::cuda::sm80
