// The Hopper kernels of the backward (sm_90a) as the host sees them. They replace the portable dQ
// and dK/dV kernels one by one; the rest of the backward is shared.
#pragma once

#include <cuda_runtime.h>

#include "cuda/sm80/bwd_params.h"

namespace nsa::cuda::bwd::sm90 {

/// Keys that a block of the dK/dV kernel owns: with lists, those of one selection block.
inline constexpr int kListTaskKeys = 64, kRangeTaskKeys = 128;

/// Consumer warpgroups of a dQ block, 64 query rows each: as many as shared memory and registers
/// hold.
constexpr int dq_consumers(int64_t dim_qk) { return dim_qk > 128 ? 2 : 3; }

/// log2 of G rounded up to a power of two: what a token takes of a tile's rows.
inline int log2_padded_group(int group) {
  int log2 = 0;
  while (1 << log2 < group) ++log2;
  return log2;
}

/// Query tokens of a dQ block.
inline int query_tile_tokens(int64_t dim_qk, int group) {
  const int tokens = dq_consumers(dim_qk) * (64 >> log2_padded_group(group));
  return tokens < kMaxTileTokens ? tokens : kMaxTileTokens;
}

/// dQ, the sum over the branches.
template <class T, int kDimQk, int kDimV>
void launch_bwd_dq(const DqArgs& args, cudaStream_t stream);

/// dK and dV of a plan's tasks, in place or as partial results.
template <class T, int kDimQk, int kDimV>
void launch_bwd_dkv(const DkvArgs& args, cudaStream_t stream);

}  // namespace nsa::cuda::bwd::sm90
