// A ring of tiles in shared memory that all threads fill with cp.async and all warps read, each
// warp at its own pace. Two mbarriers guard a stage: `full` counts the threads whose copies have
// landed, `empty` the warps that are done reading.
#pragma once

#include "cuda/device/ptx.cuh"

namespace nsa::cuda {

/// Shared memory of the two barriers of a stage.
inline constexpr int kRingBarrierBytes = 16;

class TileRing {
 public:
  __device__ __forceinline__ TileRing(uint32_t tiles, int tile_bytes, uint32_t barriers, int stages)
      : tiles_(tiles), barriers_(barriers), tile_bytes_(tile_bytes), stages_(stages) {}

  /// One thread calls this; the block synchronises before the ring is used.
  __device__ void init_barriers(int threads, int warps) const {
    for (int i = 0; i < stages_; ++i) {
      mbarrier_init(barriers_ + i * kRingBarrierBytes, threads);
      mbarrier_init(barriers_ + i * kRingBarrierBytes + 8, warps * kWarpArrivals);
    }
  }

  /// Waits until every warp has released the tile that the next one replaces; returns where to copy
  /// it.
  __device__ __forceinline__ uint32_t begin_fill() const {
    mbarrier_wait(barriers_ + fill_stage_ * kRingBarrierBytes + 8, fill_parity_ ^ 1);
    return tiles_ + fill_stage_ * tile_bytes_;
  }
  __device__ __forceinline__ void end_fill() {
    mbarrier_arrive_cp_async(barriers_ + fill_stage_ * kRingBarrierBytes);
    advance(fill_stage_, fill_parity_);
  }

  /// Waits for the oldest unread tile; returns its address.
  __device__ __forceinline__ uint32_t wait() const {
    mbarrier_wait(barriers_ + read_stage_ * kRingBarrierBytes, read_parity_);
    return tiles_ + read_stage_ * tile_bytes_;
  }
  /// The calling warp is done with the tile that it waited for.
  __device__ __forceinline__ void release() {
    mbarrier_arrive_warp(barriers_ + read_stage_ * kRingBarrierBytes + 8);
    advance(read_stage_, read_parity_);
  }

 private:
  __device__ __forceinline__ void advance(int& stage, uint32_t& parity) const {
    if (++stage == stages_) {
      stage = 0;
      parity ^= 1;
    }
  }

  uint32_t tiles_, barriers_;
  int tile_bytes_, stages_;
  int fill_stage_ = 0, read_stage_ = 0;
  uint32_t fill_parity_ = 0, read_parity_ = 0;
};

}  // namespace nsa::cuda
