// Tile shapes of the portable forward, how a launch fits them into the device's shared memory, and
// the launch.
#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>

#include "cuda/common.h"
#include "cuda/sm80/fwd.h"
#include "cuda/sm80/fwd_kernel.cuh"

namespace nsa::cuda::sm80 {

// Dense tiles: 4 warps of 32 rows. A warp that owns 32 rows reads each fragment of K and V from
// shared memory once for two products; with 16 rows mma.sync would wait for shared memory (160 of
// 128 bytes a clock). 255 registers, two blocks on an SM.
template <class T, int kDk, int kDv, bool kSelect>
using DenseTraits = FwdTraits<T, kDk, kDv, 2, 4, 2, RangeSource, kSelect>;

// Gathered tiles: most blocks are wanted by one token of the query tile only. 8 warps of 16 rows (a
// token when G = 16) that each skip what their token did not choose, over a deep ring.
template <class T, int kDk, int kDv>
using GatherTraits = FwdTraits<T, kDk, kDv, 1, 8, 1, SelectedSource, false>;

struct SharedMemoryLimits {
  int per_block, per_sm;
  SharedMemoryLimits() {
    int device;
    NSA_CUDA_CHECK(cudaGetDevice(&device));
    NSA_CUDA_CHECK(
        cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    NSA_CUDA_CHECK(
        cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  }
  /// What each of `blocks` resident blocks may use; 1 KB of each is the system's.
  int64_t of(int blocks) const { return std::min(per_block, per_sm / blocks - 1024); }
};

struct Stages {
  int k, v;
};

/// Ring depths in order of preference.
template <class Traits>
inline constexpr auto kStageChoices = [] {
  if constexpr (Traits::Source::kSparse) {
    return std::array<Stages, 6>{{{6, 6}, {5, 5}, {4, 4}, {3, 3}, {2, 2}, {1, 1}}};
  } else {
    return std::array<Stages, 3>{{{2, 2}, {1, 2}, {1, 1}}};
  }
}();

/// Chooses tile_tokens and the ring depths so that the kernel fits; returns its shared memory.
template <class Traits>
int64_t plan_shared_memory(FwdParams& p) {
  const SharedMemoryLimits limits;
  const int rows_tokens = Traits::kRows >> p.log2_group;
  // Token membership is a 32-bit mask.
  p.tile_tokens = Traits::Source::kSparse ? std::min(rows_tokens, 32) : rows_tokens;
  for (; p.tile_tokens >= 1; p.tile_tokens /= 2) {
    p.sort_size = 1;
    while (p.sort_size < p.tile_tokens * p.index_count) p.sort_size *= 2;
    for (int blocks = Traits::kBlocksPerSm; blocks >= 1; --blocks) {
      for (const Stages stages : kStageChoices<Traits>) {
        p.stages_k = stages.k;
        p.stages_v = stages.v;
        for (p.score_shift = Traits::kSelect ? 2 : 0; p.score_shift >= 0; --p.score_shift) {
          const int64_t bytes = FwdSmem<Traits>::bytes(p);
          if (bytes <= limits.of(blocks)) return bytes;
        }
      }
    }
  }
  throw std::runtime_error("attention forward: not even one token fits into shared memory");
}

template <class Traits>
void launch_kernel(FwdParams p, cudaStream_t stream) {
  const int64_t bytes = plan_shared_memory<Traits>(p);
  p.tiles = ceil_div(p.seqlen_q, p.tile_tokens);
  const int64_t blocks = int64_t{p.tiles} * p.batch * p.heads_kv;
  if (blocks == 0) return;
  auto* kernel = attn_fwd_kernel<Traits>;
  allow_shared_memory(kernel, bytes);
  kernel<<<grid_size(blocks), Traits::kThreads, bytes, stream>>>(p);
  check_launch("attn_fwd_kernel");
}

template <class T, int kDk, int kDv>
void launch_fwd(FwdParams p, cudaStream_t stream) {
  if (p.branch == kSelected) {
    launch_kernel<GatherTraits<T, kDk, kDv>>(p, stream);
  } else if (p.branch == kCompressed && p.block_indices.ptr != nullptr) {
    launch_kernel<DenseTraits<T, kDk, kDv, true>>(p, stream);
  } else {
    launch_kernel<DenseTraits<T, kDk, kDv, false>>(p, stream);
  }
}

}  // namespace nsa::cuda::sm80
