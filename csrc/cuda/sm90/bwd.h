// The Hopper kernels of the backward (sm_90a) as the host sees them. They replace the portable dQ
// and dK/dV kernels one by one; the rest of the backward is shared.
#pragma once

#include <cuda_runtime.h>

#include "cuda/sm80/bwd_params.h"

namespace nsa::cuda::bwd::sm90 {

/// Keys that a block of the dK/dV kernel owns: with lists, those of one selection block.
inline constexpr int kListTaskKeys = 64, kRangeTaskKeys = 128;

/// Query rows of a dQ block: two warpgroups of 64.
inline constexpr int kQueryTileRows = 128;

/// log2 of G rounded up to a power of two: what a token takes of a tile's rows.
inline int log2_padded_group(int group) {
  int log2 = 0;
  while (1 << log2 < group) ++log2;
  return log2;
}

/// Query tokens of a dQ block.
inline int query_tile_tokens(int group) {
  const int tokens = kQueryTileRows >> log2_padded_group(group);
  return tokens < kMaxTileTokens ? tokens : kMaxTileTokens;
}

/// dQ, the sum over the branches.
template <class T, int kDimQk, int kDimV>
void launch_bwd_dq(const DqArgs& args, cudaStream_t stream);

/// dK and dV of a plan's tasks, in place or as partial results.
template <class T, int kDimQk, int kDimV>
void launch_bwd_dkv(const DkvArgs& args, cudaStream_t stream);

}  // namespace nsa::cuda::bwd::sm90
