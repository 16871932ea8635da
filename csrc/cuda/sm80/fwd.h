// The portable attention forward: sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include "cuda/fwd/params.h"

namespace nsa::cuda::sm80 {

/// One branch of a call that the instances cover.
void attn_fwd_branch(const AttnShape& shape, const FwdParams& params, cudaStream_t stream);

/// The same in one instance. Fills in what depends on the tile shapes: tile_tokens, tiles, stages,
/// sort_size.
template <class T, int kDk, int kDv>
void launch_fwd(FwdParams params, cudaStream_t stream);

}  // namespace nsa::cuda::sm80
