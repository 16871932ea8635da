// The warp that loads tiles of K and V into the ring, and the warps that prepare lists of blocks.
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

  /// One warp. Tiles go out in the order in which the consumers take them: K(j + 1) before V(j),
  /// because the scores of a tile are issued ahead of the product with the V before.
  __device__ void load_tiles() {
    Job job;
    int64_t index = Block::before_first_job();
    while (block_.next_job(index, job)) {
      if constexpr (Shape::kWalk == Walk::kList) {
        Block::wait_full(block_.barriers.list_full, list_);
        const BlockList blocks(block_.p, block_.extra(), list_.slot);
        const int tiles = blocks.tiles();
        for (int i = 0; i < tiles; ++i) {
          uint32_t unused;
          load_pair(job, blocks.tile(i, unused));
        }
        Block::arrive(block_.barriers.list_empty, list_);
        list_.advance(kListBuffers);
      } else {
        const Range range(block_.p, job);
        const int tiles = range.template tiles<Shape>();
        const bool output = Shape::kWalk != Walk::kRank || block_.p.has_output;
        for (int i = 0; i < (output ? 2 * tiles : tiles); ++i) {
          // K0 K1 V0 K2 V1 ... K(n-1) V(n-2) V(n-1)
          const bool value = output && i > 0 && (i % 2 == 0 || i == 2 * tiles - 1);
          const int tile = value ? (i - 1) / 2 : output ? (i + 1) / 2 : i;
          load(job, value, range.begin + tile * kTileKeys);
        }
      }
    }
  }

  /// Warps 1-3 of the producer warpgroup: the block lists, one job ahead.
  __device__ void build_lists() {
    Job job;
    int64_t index = Block::before_first_job();
    while (block_.next_job(index, job)) {
      Block::wait_empty(block_.barriers.list_empty, list_);
      BlockList(block_.p, block_.extra(), list_.slot)
          .template build<32 * kListWarps>(block_.p, job, threadIdx.x - 32);
      Block::arrive(block_.barriers.list_full, list_);
      list_.advance(kListBuffers);
    }
  }

 private:
  /// A tile of K or V.
  __device__ __forceinline__ void load(const Job& job, bool value, int key) {
    const int panels = (value ? Shape::kDimV : Shape::kDimQk) / 64;
    Block::wait_empty(block_.barriers.empty, at_);
    const uint32_t full = uniform(smem_addr(&block_.barriers.full[at_.slot]));
    if (threadIdx.x == 0) mbarrier_arrive_expect(full, panels * Shape::kPanelBytes);
    copy(job, value, key, panels, full);
    at_.advance(block_.args.stages);
  }

  /// A K and its V, with one `full` barrier for both: the K's.
  __device__ __forceinline__ void load_pair(const Job& job, int key) {
    constexpr int kKPanels = Shape::kDimQk / 64, kVPanels = Shape::kDimV / 64;
    const uint32_t full = uniform(smem_addr(&block_.barriers.full[at_.slot]));
    Block::wait_empty(block_.barriers.empty, at_);
    if (threadIdx.x == 0) mbarrier_arrive_expect(full, (kKPanels + kVPanels) * Shape::kPanelBytes);
    copy(job, false, key, kKPanels, full);
    at_.advance(block_.args.stages);
    Block::wait_empty(block_.barriers.empty, at_);
    copy(job, true, key, kVPanels, full);
    at_.advance(block_.args.stages);
  }

  /// Copies a tile to the cursor's slot.
  __device__ __forceinline__ void copy(const Job& job, bool value, int key, int panels,
                                       uint32_t full) const {
    constexpr int kMost = (Shape::kDimQk > Shape::kDimV ? Shape::kDimQk : Shape::kDimV) / 64;
    const CUtensorMap* map = value ? &block_.args.v : &block_.args.k;
    // In uniform registers, where the copies want them: a thread by itself takes 50 instructions to
    // bring the arguments of each copy there.
    const uint32_t dst = uniform(block_.tile(at_));
    const int row = uniform(static_cast<int>(job.row_k) + key);
    const int head = uniform(job.head_kv), batch = uniform(job.batch);
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int panel = 0; panel < kMost; ++panel)
      if (panel < panels)
#pragma unroll
        for (int k = 0; k < Shape::kQuarters; ++k)
          tma_load(dst + panel * Shape::kPanelBytes + k * (Shape::kPanelBytes / Shape::kQuarters),
                   map, full, panel * 64, head, row + k, batch);
  }

  const Block& block_;
  Cursor at_, list_;
};

}  // namespace nsa::cuda::sm90
