// The thread that loads tiles of K and V into the ring, and the warps that prepare lists of blocks.
#pragma once

#include "cuda/sm90/fwd_block.cuh"
#include "cuda/sm90/fwd_list.cuh"

namespace nsa::cuda::sm90 {

template <class Shape>
class Producer {
  using Block = FwdBlock<Shape>;
  static constexpr int kTileKeys = Shape::kTileKeys;

 public:
  __device__ __forceinline__ explicit Producer(const Block& block) : block_(block) {}

  /// One thread. Tiles go out in the order in which the consumers take them: K(j + 1) before V(j),
  /// because the scores of a tile are issued ahead of the product with the V before.
  __device__ void load_tiles() {
    Job job;
    int64_t index = Block::before_first_job();
    while (block_.next_job(index, job)) {
      if constexpr (Shape::kWalk == Walk::kList) {
        Block::wait_full(block_.barriers.list_full, list_);
        const BlockList blocks(block_.extra(), block_.p.sort_size, list_.slot);
        const int tiles = blocks.tiles(block_.p);
        for (int j = 0; j < tiles; ++j) {
          const int key = blocks.tile_key(block_.p, j);
          load_k(job, key);
          load_v(job, key);
        }
        mbarrier_arrive(smem_addr(&block_.barriers.list_empty[list_.slot]));
        list_.advance(kListBuffers);
      } else {
        const Range range(block_.p, job);
        const int tiles = range.tiles(kTileKeys);
        if constexpr (Shape::kWalk == Walk::kRank) {
          for (int j = 0; j < tiles; ++j) load_k(job, range.begin + j * kTileKeys);
        }
        const bool values = Shape::kWalk == Walk::kRange || block_.p.has_output;
        if (tiles > 0) load_k(job, range.begin);
        for (int j = 0; j < tiles; ++j) {
          if (j + 1 < tiles) load_k(job, range.begin + (j + 1) * kTileKeys);
          if (values) load_v(job, range.begin + j * kTileKeys);
        }
      }
    }
  }

  /// Warps 1-3 of the producer warpgroup: the block lists, one job ahead.
  __device__ void build_lists() {
    constexpr int kThreads = 96;
    Job job;
    int64_t index = Block::before_first_job();
    while (block_.next_job(index, job)) {
      Block::wait_empty(block_.barriers.list_empty, list_);
      BlockList(block_.extra(), block_.p.sort_size, list_.slot)
          .template build<kThreads>(block_.p, job, threadIdx.x - 32);
      if (threadIdx.x == 32) mbarrier_arrive(smem_addr(&block_.barriers.list_full[list_.slot]));
      list_.advance(kListBuffers);
    }
  }

 private:
  template <int kDim>
  __device__ __forceinline__ void load(const CUtensorMap& map, const Job& job, int key) {
    Block::wait_empty(block_.barriers.empty, at_);
    const uint32_t bar = smem_addr(&block_.barriers.full[at_.slot]), dst = block_.tile(at_);
    mbarrier_arrive_expect(bar, kDim / 64 * Shape::kPanelBytes);
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel)
      tma_load(dst + panel * Shape::kPanelBytes, &map, bar, panel * 64, job.head_kv,
               static_cast<int>(job.row_k) + key, job.batch);
    at_.advance(block_.args.stages);
  }
  __device__ __forceinline__ void load_k(const Job& job, int key) {
    load<Shape::kDimQk>(block_.args.k, job, key);
  }
  __device__ __forceinline__ void load_v(const Job& job, int key) {
    load<Shape::kDimV>(block_.args.v, job, key);
  }

  const Block& block_;
  Cursor at_, list_;
};

}  // namespace nsa::cuda::sm90
