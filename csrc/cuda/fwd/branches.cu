#include <algorithm>

#include "cuda/fwd/branches.h"

namespace nsa::cuda {

namespace {

int log2_ceil(int64_t x) {
  int log2 = 0;
  while ((int64_t{1} << log2) < x) ++log2;
  return log2;
}

/// Where the branches' outputs go. The gated sum needs those of all enabled branches; of the ones
/// that the caller does not keep, the last lies in the caller's `out` until the sum overwrites it.
struct BranchOutputs {
  OutView out[kNumBranches] = {};
  int last = -1;  // enabled branch, which forms the sum
  int64_t workspace_bytes = 0;

  BranchOutputs(const AttnFwd& call, void* workspace) {
    const AttnShape& shape = call.shape;
    int scratch = -1;
    for (int c = 0; c < kNumBranches; ++c) {
      if (!call.branch[c].enabled) continue;
      out[c] = call.branch[c].out;
      if (last >= 0 && call.gates.ptr && call.branch[last].out.ptr == nullptr) {
        if (scratch >= 0) place(scratch, shape, workspace);
        out[last] = call.out;
        scratch = last;
      }
      last = c;
    }
  }

 private:
  void place(int c, const AttnShape& shape, void* workspace) {
    out[c].ptr = workspace;
    out[c].head = shape.dim_v;
    out[c].seq = shape.heads_q * shape.dim_v;
    out[c].batch = shape.seqlen_q * out[c].seq;
    workspace_bytes += shape.total_q * out[c].seq * 2;
  }
};

}  // namespace

int64_t branch_workspace(const AttnFwd& call) {
  return BranchOutputs(call, nullptr).workspace_bytes;
}

void for_each_branch(const AttnFwd& call, void* workspace,
                     const std::function<void(const FwdParams&)>& launch) {
  const AttnShape& shape = call.shape;
  const BranchOutputs outputs(call, workspace);
  FwdParams p{};
  p.q = call.q;
  p.cu_seqlens_q = shape.cu_seqlens_q;
  p.cu_seqlens_k = shape.cu_seqlens_k;
  p.seqused_k = shape.seqused_k;
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
  int earlier = 0;
  for (int c = 0; c < kNumBranches; ++c) {
    const BranchFwd& branch = call.branch[c];
    if (!branch.enabled) continue;
    p.branch = c;
    p.k = branch.k;
    p.v = branch.v;
    p.out = outputs.out[c];
    p.lse = branch.lse;
    p.block_indices = c == kWindow ? View<int32_t>{} : call.block_indices;
    p.index_count = c == kWindow ? 0 : call.index_count;
    if (c == outputs.last) {
      p.gates = call.gates;
      p.gated_out = call.out;
    }
    p.has_output = p.out.ptr != nullptr || p.gates.ptr != nullptr;
    launch(p);
    if (call.gates.ptr && c != outputs.last) {
      p.earlier[earlier] = {p.out.ptr, p.out.batch, p.out.seq, p.out.head};
      p.earlier_branch[earlier++] = c;
    }
  }
}

}  // namespace nsa::cuda
