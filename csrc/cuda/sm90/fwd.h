// The attention forward on Hopper: sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "cuda/sm80/fwd_params.h"
#include "nsa/params.h"

namespace nsa::cuda::sm90 {

/// Why these kernels would not take a call that the portable ones take.
std::vector<std::string> fwd_unsupported(int major, int minor);

/// One branch; `shape` gives the extents of the tensors.
template <class T, int kDk, int kDv>
void launch_fwd(const AttnShape& shape, sm80::FwdParams params, cudaStream_t stream);

/// All enabled branches, one kernel each.
void attn_fwd(const AttnFwd& call, void* workspace, cudaStream_t stream);

}  // namespace nsa::cuda::sm90
