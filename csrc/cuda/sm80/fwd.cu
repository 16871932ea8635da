#include <stdexcept>
#include <type_traits>

#include "cuda/common.h"
#include "cuda/instances/attn_instances.h"
#include "cuda/sm80/fwd.h"

namespace nsa::cuda::sm80 {

void attn_fwd_branch(const AttnShape& shape, const FwdParams& params, cudaStream_t stream) {
#define NSA_LAUNCH(T, kDk, kDv)                                                        \
  if (shape.dim_qk == kDk && shape.dim_v == kDv &&                                     \
      shape.dtype == (std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16)) \
    return launch_fwd<T, kDk, kDv>(params, stream);
  NSA_ATTN_INSTANCES(NSA_LAUNCH)
#undef NSA_LAUNCH
  throw std::logic_error("no forward kernel for these head dims");  // supports() names them
}

}  // namespace nsa::cuda::sm80
