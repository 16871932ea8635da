// The attention forward on Hopper: sm_90a.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "cuda/fwd/params.h"

namespace nsa::cuda::sm90 {

/// Why these kernels would not take a call that the portable ones take.
std::vector<std::string> fwd_unsupported(const AttnFwd& call, int major, int minor);

/// Whether there is a kernel for this branch: any but a ranking whose lengths BlockScores does not
/// hold.
bool fwd_takes(const FwdParams& params);
/// Whether it is the faster one.
bool fwd_pays(const FwdParams& params);

/// Device memory that a launch for this branch needs, 256-byte aligned.
int64_t fwd_workspace(const FwdParams& params);

/// One branch of a call that the instances cover.
void attn_fwd_branch(const AttnShape& shape, const FwdParams& params, void* workspace,
                     cudaStream_t stream);

/// The same in one instance.
template <class T, int kDk, int kDv>
void launch_fwd(const AttnShape& shape, FwdParams params, void* workspace, cudaStream_t stream);

}  // namespace nsa::cuda::sm90
