// The forward on Hopper: persistent blocks of a producer warpgroup, which loads tiles of K and V
// with TMA and prepares lists, consumer warpgroups of 64 query rows each, and one that ranks
// blocks.
#pragma once

#include "cuda/device/pdl.cuh"
#include "cuda/sm90/fwd_consumer.cuh"
#include "cuda/sm90/fwd_producer.cuh"
#include "cuda/sm90/fwd_ranker.cuh"

namespace nsa::cuda::sm90 {

template <class Shape>
__device__ __forceinline__ void run_block(const FwdArgs& args, char* smem) {
  const FwdBlock<Shape> block(args, smem);
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  // The next branch may start where multiprocessors have nothing left to do. A list needs what was
  // ranked; a range needs nothing of the branch before until it stores.
  launch_dependents();
  if (Shape::kWalk != Walk::kRange) wait_for_previous();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    lower_registers<Shape::kProducerRegisters>();
    if (threadIdx.x < 32) {
      Producer<Shape>(block).load_tiles();
    } else if constexpr (Shape::kWalk == Walk::kList) {
      Producer<Shape>(block).build_lists();
    }
  } else if (warpgroup <= Shape::kConsumers) {
    raise_registers<Shape::kConsumerRegisters>();
    Consumer<Shape>(block, warpgroup - 1).run();
  } else if constexpr (Shape::kRankers > 0) {
    lower_registers<Shape::kRankerRegisters>();
    Ranker<Shape>(block, threadIdx.x % 128 / 32).run();
  }
}

}  // namespace nsa::cuda::sm90
