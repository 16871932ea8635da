#include <stdexcept>
#include <type_traits>

#include "cuda/common.h"
#include "cuda/instances/attn_instances.h"
#include "cuda/sm80/fwd.h"
#include "cuda/sm90/fwd.h"

namespace nsa::cuda::sm90 {

std::vector<std::string> fwd_unsupported(int major, int minor) {
  std::vector<std::string> reasons;
  if (major != 9 || minor != 0) reasons.push_back("the Hopper kernels need compute capability 9.0");
  return reasons;
}

void attn_fwd(const AttnFwd& call, void* workspace, cudaStream_t stream) {
  const AttnShape& shape = call.shape;
  sm80::for_each_branch(call, workspace, [&](const sm80::FwdParams& params) {
#define NSA_LAUNCH(T, kDk, kDv)                                                        \
  if (shape.dim_qk == kDk && shape.dim_v == kDv &&                                     \
      shape.dtype == (std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16)) \
    return launch_fwd<T, kDk, kDv>(shape, params, stream);
    NSA_ATTN_INSTANCES(NSA_LAUNCH)
#undef NSA_LAUNCH
    throw std::logic_error("no forward kernel for these head dims");  // supports() names them
  });
}

}  // namespace nsa::cuda::sm90
