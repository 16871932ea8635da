// The choice of the selected blocks, from the weights that the compressed branch left.
#pragma once

#include <cuda_runtime.h>

#include "cuda/decode/params.h"

namespace nsa::cuda::decode {

/// Entries of the longest list of candidates (DecodeParams::candidates).
int32_t select_candidates(const BlockConfig& config, int64_t max_pages);

/// Shared memory of the kernel: it grows with the capacity.
int64_t select_shared_bytes(const BlockConfig& config, int64_t max_pages);

void launch_select(const DecodeParams& params, cudaStream_t stream);

}  // namespace nsa::cuda::decode
