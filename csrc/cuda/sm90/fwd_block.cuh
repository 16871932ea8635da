// What the warps of a Hopper forward block share: the layout of shared memory, its barriers, the
// order of the jobs.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/fwd/job.cuh"
#include "cuda/sm90/fwd_args.h"

namespace nsa::cuda::sm90 {

inline constexpr int kMaxStages = 16;
inline constexpr int kListBuffers = 2;
inline constexpr int kScoreBuffers = 2;
// Warps 1-3 of the producer warpgroup make lists of blocks.
inline constexpr int kRankingWarps = 4, kListWarps = 3;

/// A position in a ring: which slot, and the parity of its phase.
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

/// Shared memory: the barriers, Q of each consumer, the ring of K and V tiles, then what the walk
/// keeps beside them.
template <class Shape>
struct FwdBlock {
  static constexpr int kConsumers = Shape::kConsumers, kConsumerWarps = 4 * kConsumers;
  static constexpr int kTileKeys = Shape::kTileKeys;

  struct Barriers {
    uint64_t full[kMaxStages], empty[kMaxStages];
    uint64_t q_full[kConsumers];
    uint64_t list_full[kListBuffers], list_empty[kListBuffers];
    uint64_t scores_full[kScoreBuffers], scores_empty[kScoreBuffers];
    Job jobs[kConsumerWarps];
  };
  static constexpr int kBarrierBytes = 1024;  // keeps the swizzled tiles at multiples of 1024
  static_assert(sizeof(Barriers) <= kBarrierBytes);
  static constexpr int kFixedBytes = kBarrierBytes + kConsumers * Shape::kQueryBytes;
  /// The 1024 more are for aligning the base.
  static int64_t smem_bytes(int stages, int64_t extra) {
    return 1024 + kFixedBytes + int64_t{stages} * Shape::kTileBytes + extra;
  }

  const FwdArgs& args;
  const FwdParams& p;
  char* const smem;
  Barriers& barriers;

  __device__ __forceinline__ FwdBlock(const FwdArgs& args, char* raw)
      : args(args),
        p(args.p),
        smem(raw + (-smem_addr(raw) & 1023)),  // so that the compiler sees shared memory
        barriers(*reinterpret_cast<Barriers*>(smem)) {}

  /// One thread; the block synchronises afterwards.
  __device__ void init_barriers() const {
    const auto init = [](uint64_t& barrier, int count) {
      mbarrier_init(smem_addr(&barrier), count);
    };
    for (int i = 0; i < args.stages; ++i) {
      init(barriers.full[i], 1);
      init(barriers.empty[i], kConsumerWarps * kWarpArrivals);
    }
    for (uint64_t& barrier : barriers.q_full) init(barrier, 1);
    for (int i = 0; i < kListBuffers; ++i) {
      init(barriers.list_full[i], kListWarps * kWarpArrivals);
      // And the warp that loads the blocks.
      init(barriers.list_empty[i], (kConsumerWarps + 1) * kWarpArrivals);
    }
    for (int i = 0; i < kScoreBuffers; ++i) {
      init(barriers.scores_full[i], kConsumerWarps * kWarpArrivals);
      init(barriers.scores_empty[i], kRankingWarps * kWarpArrivals);
    }
    fence_barrier_init();
  }

  __device__ __forceinline__ uint32_t q_tile(int consumer) const {
    return smem_addr(smem) + kBarrierBytes + consumer * Shape::kQueryBytes;
  }
  __device__ __forceinline__ uint32_t tile(const Cursor& at) const {
    return smem_addr(smem) + kFixedBytes + at.slot * Shape::kTileBytes;
  }
  __device__ __forceinline__ char* extra() const {
    return smem + kFixedBytes + args.stages * Shape::kTileBytes;
  }

  /// Waits for the phase of `at`; wait_empty for the phase before, which counts as complete where
  /// there was none.
  __device__ __forceinline__ static void wait_full(uint64_t* full, const Cursor& at) {
    mbarrier_wait(smem_addr(full + at.slot), at.parity);
  }
  __device__ __forceinline__ static void wait_empty(uint64_t* empty, const Cursor& at) {
    mbarrier_wait(smem_addr(empty + at.slot), at.parity ^ 1);
  }
  /// One arrival of the calling warp, for all that its lanes did before.
  __device__ __forceinline__ static void arrive(uint64_t* barrier, const Cursor& at) {
    mbarrier_arrive_warp(smem_addr(barrier + at.slot));
  }

  /// Moves `index` on to the block's next job that has tokens; false when there is none left.
  /// Starts from blockIdx.x - gridDim.x.
  __device__ __forceinline__ bool next_job(int64_t& index, Job& job) const {
    for (index += gridDim.x; index < args.jobs; index += gridDim.x)
      if (make_job(p, index, job)) return true;
    return false;
  }
  static __device__ __forceinline__ int64_t before_first_job() {
    return static_cast<int64_t>(blockIdx.x) - gridDim.x;
  }

  /// Loads a consumer's 64 rows of Q. One thread; the consumer no longer reads what was there.
  __device__ __forceinline__ void load_q(const Job& job, int consumer) const {
    const uint32_t bar = smem_addr(&barriers.q_full[consumer]);
    mbarrier_arrive_expect(bar, Shape::kQueryBytes);
#pragma unroll
    for (int panel = 0; panel < Shape::kDimQk / 64; ++panel)
      tma_load(q_tile(consumer) + panel * 8192, &args.q, bar, panel * 64, 0, job.head_kv,
               static_cast<int>(job.row_q) + consumer * (64 >> p.log2_group), job.batch);
  }
};

/// Keys [begin, end) that a tile of queries walks (kRange, kRank).
struct Range {
  int begin, end;
  __device__ __forceinline__ Range(const FwdParams& p, const Job& job) {
    int unused;
    visible(p, job.position(0), begin, unused);
    visible(p, job.position(job.tokens - 1), unused, end);
  }
  /// The query at position t sees keys lo <= s < hi.
  static __device__ __forceinline__ void visible(const FwdParams& p, int t, int& lo, int& hi) {
    if (p.branch == kCompressed) {
      lo = 0;
      hi = static_cast<int>(visible_compressed(t, p.config.block_size, p.config.block_stride));
    } else {
      lo = max(0, t - p.config.window + 1);
      hi = max(0, t + 1);
    }
  }
  /// kRank: the tile of the block into which the last compressed token reaches, too.
  template <class Shape>
  __device__ __forceinline__ int tiles() const {
    constexpr int kLast = Shape::kWalk == Walk::kRank ? 0 : 1;
    return end <= begin ? 0 : (end - begin - kLast) / Shape::kTileKeys + 1;
  }
};

}  // namespace nsa::cuda::sm90
