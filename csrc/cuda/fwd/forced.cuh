// The selection blocks that a query gets whatever their importance.
#pragma once

#include "cuda/fwd/params.h"

namespace nsa::cuda {

/// Forced blocks of the query at position t: [0, init) and [local, own].
struct Forced {
  int own, init, local;
  __device__ __forceinline__ Forced(const FwdParams& p, int t) {
    own = max(-1, t >> p.select_shift);
    init = min(p.config.num_init, own + 1);
    local = max(init, own + 1 - p.config.num_local);
  }
  /// Whether importance decides about the block.
  __device__ __forceinline__ bool leaves_open(int block) const {
    return block >= init && block < local;
  }
  __device__ __forceinline__ int capacity(int index_count) const {
    return index_count - init - (own + 1 - local);
  }
  /// What a row of block_indices holds beside its `chosen` blocks at [init, init + chosen): the
  /// forced ones, and -1. Called by a warp.
  __device__ __forceinline__ void write(int32_t* row, int chosen, int index_count, int lane) const {
    const int local_rank = init + chosen, total = local_rank + own + 1 - local;
    for (int i = lane; i < index_count; i += 32) {
      if (i < init) {
        row[i] = i;
      } else if (i >= total) {
        row[i] = -1;
      } else if (i >= local_rank) {
        row[i] = local + i - local_rank;
      }
    }
  }
};

}  // namespace nsa::cuda
