// The forward on Hopper: persistent blocks of a producer warpgroup, which loads tiles of K and V
// with TMA and prepares lists or ranks blocks, and consumer warpgroups of 64 query rows each.
#pragma once

#include "cuda/sm90/fwd_consumer.cuh"
#include "cuda/sm90/fwd_producer.cuh"
#include "cuda/sm90/fwd_ranker.cuh"

namespace nsa::cuda::sm90 {

template <class Shape>
__device__ __forceinline__ void run_block(const FwdArgs& args, char* smem) {
  const FwdBlock<Shape> block(args, smem);
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp >= 4) {
    raise_registers<Shape::kConsumerRegisters>();
    Consumer<Shape>(block, warp / 4 - 1).run();
    return;
  }
  lower_registers<Shape::kProducerRegisters>();
  if (warp == 0) {
    if (threadIdx.x == 0) Producer<Shape>(block).load_tiles();
  } else if constexpr (Shape::kWalk == Walk::kList) {
    Producer<Shape>(block).build_lists();
  } else if constexpr (Shape::kWalk == Walk::kRank) {
    Ranker<Shape>(block, warp - 1).run();
  }
}

}  // namespace nsa::cuda::sm90
