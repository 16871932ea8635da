// The portable attention forward: sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <functional>

#include "cuda/sm80/fwd_params.h"
#include "nsa/params.h"

namespace nsa::cuda::sm80 {

/// Calls launch(params) for each enabled branch, with all that does not depend on tile shapes.
void for_each_branch(const AttnFwd& call, void* workspace,
                     const std::function<void(const FwdParams&)>& launch);

/// The workspace that for_each_branch needs.
int64_t branch_workspace(const AttnFwd& call);

/// All enabled branches of a call whose shape the instances cover, one kernel each.
void attn_fwd(const AttnFwd& call, void* workspace, cudaStream_t stream);

/// One branch. Fills in what depends on the tile shapes: tile_tokens, tiles, stages, sort_size.
template <class T, int kDk, int kDv>
void launch_fwd(FwdParams params, cudaStream_t stream);

}  // namespace nsa::cuda::sm80
