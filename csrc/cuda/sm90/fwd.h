// The attention forward on Hopper: sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "cuda/fwd/params.h"

namespace nsa::cuda::sm90 {

/// Why these kernels would not take a call that the portable ones take.
std::vector<std::string> fwd_unsupported(const AttnFwd& call, int major, int minor);

/// Whether the kernel of this branch is the faster one.
bool fwd_pays(const AttnShape& shape, const FwdParams& params);

/// One branch of a call that the instances cover.
void attn_fwd_branch(const AttnShape& shape, const FwdParams& params, cudaStream_t stream);

/// The same in one instance.
template <class T, int kDk, int kDv>
void launch_fwd(const AttnShape& shape, FwdParams params, cudaStream_t stream);

}  // namespace nsa::cuda::sm90
