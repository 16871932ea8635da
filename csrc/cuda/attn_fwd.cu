// Attention forward: what the GPU takes, and which backend runs it.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "cuda/common.h"
#include "cuda/fwd/branches.h"
#include "cuda/instances/attn_instances.h"
#include "cuda/sm80/fwd.h"
#include "cuda/sm90/fwd.h"
#include "nsa/api.h"
#include "nsa/geometry.h"

namespace nsa::cuda {

namespace {

std::string text(int64_t value) { return std::to_string(value); }

void check_dims(const AttnShape& shape, std::vector<std::string>& reasons) {
#define NSA_MATCH(T, kDk, kDv) \
  if (shape.dim_qk == kDk && shape.dim_v == kDv) return;
  NSA_ATTN_INSTANCES(NSA_MATCH)
#undef NSA_MATCH
  std::string list;
#define NSA_LIST(T, kDk, kDv)           \
  if (std::is_same_v<T, __nv_bfloat16>) \
    list += (list.empty() ? "(" : ", (") + text(kDk) + ", " + text(kDv) + ")";
  NSA_ATTN_INSTANCES(NSA_LIST)
#undef NSA_LIST
  reasons.push_back("(Dk, Dv) must be one of " + list + " on CUDA, got (" + text(shape.dim_qk) +
                    ", " + text(shape.dim_v) + ")");
}

std::string join(const std::vector<std::string>& reasons) {
  std::string message;
  for (const std::string& reason : reasons) message += (message.empty() ? "" : "; ") + reason;
  return message;
}

bool wants_output(const AttnFwd& call) {
  bool wanted = call.gates.ptr != nullptr;
  for (const BranchFwd& branch : call.branch) wanted |= branch.enabled && branch.out.ptr != nullptr;
  return wanted;
}

/// A Dv that the instances pair with `dim_qk`: where no output is wanted any will do.
int64_t dim_v_of(int64_t dim_qk) {
#define NSA_MATCH(T, kDk, kDv) \
  if (dim_qk == kDk) return kDv;
  NSA_ATTN_INSTANCES(NSA_MATCH)
#undef NSA_MATCH
  return dim_qk;
}

ComputeCapability check_call(const AttnFwd& call) {
  const ComputeCapability capability;
  const std::vector<std::string> reasons =
      supports(call.shape, call.config, capability.major, capability.minor);
  if (!reasons.empty()) throw std::invalid_argument(join(reasons));

  const double scale = call.shape.softmax_scale;
  if (!(scale > 0) || !std::isfinite(scale))
    throw std::invalid_argument("softmax_scale must be positive and finite on CUDA");
  if (call.shape.seqlen_q > INT32_MAX || call.shape.seqlen_k > INT32_MAX)
    throw std::invalid_argument("sequences on CUDA are shorter than 2^31");
  if (call.index_count > 64)
    throw std::invalid_argument("block_indices holds at most 64 indices a row on CUDA");
  if (call.branch[kSelected].enabled && call.block_indices.ptr == nullptr)
    throw std::invalid_argument("the selected branch needs block_indices");

  const int64_t batch = call.shape.cu_seqlens_q ? 1 : call.shape.batch;
  const int64_t heads_q = call.shape.heads_q, heads_kv = call.shape.heads_kv;
  check_rows_aligned(call.q, "q", batch, heads_q);
  check_rows_aligned(call.out, "out", batch, heads_q);
  static constexpr const char* kNames[kNumBranches][3] = {{"k_cmp", "v_cmp", "out of k_cmp"},
                                                          {"k_slc", "v_slc", "out of k_slc"},
                                                          {"k_win", "v_win", "out of k_win"}};
  for (int c = 0; c < kNumBranches; ++c) {
    if (!call.branch[c].enabled) continue;
    check_rows_aligned(call.branch[c].k, kNames[c][0], batch, heads_kv);
    check_rows_aligned(call.branch[c].v, kNames[c][1], batch, heads_kv);
    check_rows_aligned(call.branch[c].out, kNames[c][2], batch, heads_q);
  }
  return capability;
}

/// Which backend runs each branch of a call: what is asked for, or the faster one. A ranking that
/// the Hopper kernels do not have is the portable kernels' even where Hopper is asked for.
class Dispatch {
 public:
  Dispatch(const AttnFwd& call, Backend backend, ComputeCapability capability)
      : shape_(call.shape), backend_(backend) {
#ifdef NSA_EXT_WITH_SM90
    refusals_ = sm90::fwd_unsupported(call, capability.major, capability.minor);
#else
    (void)capability;
    refusals_ = {"this build has no Hopper forward"};
#endif
  }

  /// Throws std::invalid_argument where the backend that is asked for does not take the call.
  void check() const {
    if (backend_ == Backend::kSm90 && !refusals_.empty())
      throw std::invalid_argument(join(refusals_));
  }
  int64_t workspace([[maybe_unused]] const FwdParams& branch) const {
#ifdef NSA_EXT_WITH_SM90
    if (on_hopper(branch)) return sm90::fwd_workspace(branch);
#endif
    return 0;
  }
  void launch(const FwdParams& branch, [[maybe_unused]] void* workspace,
              cudaStream_t stream) const {
#ifdef NSA_EXT_WITH_SM90
    if (on_hopper(branch)) return sm90::attn_fwd_branch(shape_, branch, workspace, stream);
#endif
    sm80::attn_fwd_branch(shape_, branch, stream);
  }

 private:
#ifdef NSA_EXT_WITH_SM90
  bool on_hopper(const FwdParams& branch) const {
    return backend_ != Backend::kSm80 && refusals_.empty() && sm90::fwd_takes(branch) &&
           (backend_ == Backend::kSm90 || sm90::fwd_pays(branch));
  }
#endif

  const AttnShape& shape_;
  const Backend backend_;
  std::vector<std::string> refusals_;
};

/// Where the workspace of a branch's kernel begins: behind the outputs of branches.
int64_t kernel_offset(const AttnFwd& call) {
  return round_up(branch_workspace(call), int64_t{256});
}

}  // namespace

std::vector<std::string> supports(const AttnShape& shape, const BlockConfig& config, int major,
                                  int minor) {
  std::vector<std::string> reasons;
  if (major < 8)
    reasons.push_back("the CUDA kernels need compute capability 8.0, got " + text(major) + "." +
                      text(minor));
  if (shape.dtype != DType::kBFloat16 && shape.dtype != DType::kFloat16)
    reasons.push_back("the CUDA kernels take bfloat16 and float16");
  check_dims(shape, reasons);
  if (shape.heads_kv < 1 || shape.heads_q % std::max<int64_t>(shape.heads_kv, 1) != 0) {
    reasons.push_back("Hkv must divide Hq, got " + text(shape.heads_q) + " and " +
                      text(shape.heads_kv));
  } else if (shape.heads_q / shape.heads_kv > 64 || shape.heads_q < shape.heads_kv) {
    reasons.push_back("G = Hq / Hkv must be 1 to 64 on CUDA, got " +
                      text(shape.heads_q / shape.heads_kv));
  }
  if (const char* error = config_error(config)) reasons.push_back(error);
  if (config.select_size != 32 && config.select_size != 64 && config.select_size != 128)
    reasons.push_back("select_size must be 32, 64 or 128 on CUDA, got " + text(config.select_size));
  if (config.block_stride % 16 != 0)
    reasons.push_back("block_stride must be a multiple of 16 on CUDA, got " +
                      text(config.block_stride));
  if (config.num_selected > 64)
    reasons.push_back("num_selected must be at most 64 on CUDA, got " + text(config.num_selected));
  return reasons;
}

int64_t attn_fwd_workspace(const AttnFwd& call, Backend backend) {
  const Dispatch dispatch(call, backend, ComputeCapability());
  int64_t most = 0;  // branches run one after the other
  for_each_branch(call, nullptr, [&](const FwdParams& branch) {
    most = std::max(most, dispatch.workspace(branch));
  });
  return kernel_offset(call) + most;
}

void attn_fwd(const AttnFwd& params, void* workspace, Stream stream, Backend backend) {
  if (params.shape.total_q == 0 || params.shape.heads_q == 0) return;
  AttnFwd call = params;
  if (!wants_output(call)) call.shape.dim_v = dim_v_of(call.shape.dim_qk);
  const Dispatch dispatch(call, backend, check_call(call));
  dispatch.check();
  void* const kernel_workspace = static_cast<char*>(workspace) + kernel_offset(call);
  for_each_branch(call, workspace, [&](const FwdParams& branch) {
    dispatch.launch(branch, kernel_workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace nsa::cuda
