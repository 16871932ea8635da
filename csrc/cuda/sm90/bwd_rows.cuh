// The query rows that a key-stationary task walks, in tiles of 64: one warp of the producer loads Q
// and dO, two others write what the score derivative needs of each row.
#pragma once

#include <climits>

#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm90/bwd_tiles.cuh"

namespace nsa::cuda::bwd::sm90 {

/// Beside a tile of rows, in the order in which a thread reads them: with the rows 2 t and 2 t + 1
/// of 16 those 8 further on, which are those of the second describing warp.
struct RowTileInfo {
  alignas(16) float gated_lse_log2[kRows];
  float gate[kRows];
  int position[kRows];  // in the sequence
  // As accumulators: rows 2 t and 2 t + 1 of 8, and again. First those of the first warp.
  float minus_delta[2][kRows];
  struct alignas(8) Half {
    uint32_t masked;  // a bit a warpgroup: whether some row does not see all of its 64 keys
    int reach;        // of the keys (KeySight)
  };
  alignas(16) Half halves[2];

  /// Of a warp's row, in the arrays of a value a row.
  static __device__ __forceinline__ int place(int half, int row) {
    return row / 8 * 16 + row / 2 % 4 * 4 + half * 2 + row % 2;
  }
  // What the describing warps write is addressed as if the row's place was 0; their halves are then
  // the first, too.
  static constexpr int kSecondDelta = kRows - 2;
  static_assert(sizeof(Half) == 2 * sizeof(float));

  /// Warpgroups, a bit each.
  __device__ __forceinline__ uint32_t masked() const {
    const uint4 both = *reinterpret_cast<const uint4*>(halves);
    return both.x | both.z;
  }
  /// A warp: whether some gate is negative.
  __device__ __forceinline__ bool any_negative() const {
    const float2 own = reinterpret_cast<const float2*>(gate)[threadIdx.x % 32];
    return __any_sync(kFullWarp, fminf(own.x, own.y) < 0.0f);
  }
  /// What a thread of a quad has of 16 rows.
  template <class Four, class Rows>
  static __device__ __forceinline__ Four of_thread(const Rows& rows, int first_row) {
    return *reinterpret_cast<const Four*>(&rows[first_row + threadIdx.x % 4 * 4]);
  }
};

/// Who sees the keys of a task: key i the positions from `first` + i * `unit` on, `reach` of them.
struct KeySight {
  int first, unit, reach;

  __device__ __forceinline__ KeySight(int branch, int key, const BlockConfig& config)
      : first(key), unit(1), reach(branch == kWindow ? config.window : INT_MAX) {
    if (branch != kCompressed) return;
    unit = config.block_stride;
    first = key * unit + config.block_size - 1;
  }
};

struct DkvLaunch {
  DkvArgs args;
  int multiprocessors;
  int log2_group;                   // of the padded group
  CUtensorMap q, dout;              // boxes of a tile's tokens, for ranges
  CUtensorMap q_token, dout_token;  // boxes of one token, for lists
  CUtensorMap k, v;
};

/// Which queries lie in which tile: first those of the task's list, then those of its range. Both
/// start a tile.
struct RowWalk {
  const KeyTask& task;
  const int32_t* list;
  int tokens;  // of a tile
  int list_tiles, tiles;

  __device__ __forceinline__ RowWalk(const DkvLaunch& launch, const KeyTask& task)
      : task(task),
        list(launch.args.list + task.list_begin),
        tokens(kRows >> launch.log2_group),
        list_tiles((task.list_count + tokens - 1) >> (6 - launch.log2_group)),
        tiles(list_tiles + ((task.token_count + tokens - 1) >> (6 - launch.log2_group))) {}
};

/// One warp, by one lane: copies of the tiles of Q and dO. A list's tokens are loaded one by one;
/// the lanes read the list a tile ahead.
template <class Shape, class Smem>
__device__ void load_rows(const DkvLaunch& launch, const RowWalk& walk, const Sequence& sequence,
                          Smem& smem) {
  constexpr int kQPanels = Shape::kDimQk / 64, kPanels = kQPanels + Shape::kDimV / 64;
  const int lane = threadIdx.x % 32;
  const int batch = uniform(static_cast<int>(sequence.batch)), head = uniform(walk.task.head);
  const int first = static_cast<int>(sequence.q_first), tokens = walk.tokens;
  RingPosition<Shape::kStages> at(smem_addr(smem.full));
  const RingAddress<Shape::kStageBytes> ring(smem_addr(smem.ring), smem_addr(smem.full));
  const auto open = [&]() {
    mbarrier_wait(at.empty(), at.parity ^ 1);
    if (elect_lane()) mbarrier_arrive_expect(at.full, Shape::kStageBytes);
    __syncwarp();
  };
  const auto load = [&](const CUtensorMap& q, const CUtensorMap& dout, uint32_t to, int row) {
    const uint32_t dst = uniform(to), bar = uniform(at.full);
    row = uniform(row);
    if (elect_lane()) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        tma_load(dst + panel * kPanelBytes, panel < kQPanels ? &q : &dout, bar,
                 (panel < kQPanels ? panel : panel - kQPanels) * 64, 0, head, row, batch);
    }
    __syncwarp();
  };
  if constexpr (Shape::kList) {
    // Past the end of any tensor: a token that is not there reads as zeros.
    const int nowhere = static_cast<int>(launch.args.common.p.shape.total_q);
    const int32_t* const list = keep(walk.list);
    int i = walk.task.list_count - 1 - lane;  // the last of the list first
    const int chunk = min(tokens, 32);
    const auto read = [&]() {
      const int token = i >= 0 ? __ldg(list + i) : -1;
      i -= chunk;
      return token;
    };
    int next = read();
#pragma unroll 1
    for (int tile = uniform(walk.list_tiles); tile > 0; --tile) {
      uint32_t dst = ring.at(at.full);
      open();
#pragma unroll 1
      for (int left = tokens; left > 0; left -= chunk) {
        const int row = next < 0 ? nowhere : first + next;
        next = read();
#pragma unroll 1
        for (int slot = 0; slot < chunk; ++slot) {
          load(launch.q_token, launch.dout_token, dst, __shfl_sync(kFullWarp, row, slot));
          dst += 128 << launch.log2_group;
        }
      }
      at.advance();
    }
  }
  int row = first + walk.task.token_begin;
#pragma unroll 1
  for (int tile = uniform(walk.tiles - walk.list_tiles); tile > 0; --tile) {
    open();
    load(launch.q, launch.dout, ring.at(at.full), row);
    row += tokens;
    at.advance();
  }
}

/// Arrivals on a tile's `full` barrier: the loading warp's, the describing warps', and one of each
/// of their lanes when its copies have landed.
inline constexpr int kRowArrivals = 1 + 2 * kWarpArrivals + 64;

/// Two warps, a row a lane, 8 of 16 rows each: positions, and copies of the statistics, which
/// take as long as memory does and are not waited for here.
template <class Shape, class Smem>
__device__ void describe_rows(const DkvLaunch& launch, const RowWalk& walk,
                              const Sequence& sequence, int half, Smem& smem) {
  constexpr int kNowhere = INT_MIN / 2;
  const AttnBwd& p = launch.args.common.p;
  const int lane = keep(threadIdx.x % 32);
  const int row = lane / 8 * 16 + half * 8 + lane % 8, group = launch.args.common.group;
  const int slot = row >> launch.log2_group, head = row & ((1 << launch.log2_group) - 1);
  const auto row_bytes = static_cast<uint32_t>(group * sizeof(RowStats));  // of a token
  const int shift = sequence.position(0);
  const int second_delta = half * RowTileInfo::kSecondDelta;
  RingPosition<Shape::kStages> at(smem_addr(smem.full));
  const RingAddress<sizeof(RowTileInfo)> infos(
      smem_addr(smem.info) + RowTileInfo::place(half, lane) * sizeof(float), smem_addr(smem.full));
  // Walks the tiles of a branch; next_position() is negative for a row that is not there, or that
  // sees nothing.
  const auto describe = [&](int tiles, int branch, const auto& next_position) {
    const KeySight sight(branch, walk.task.key, p.config);
    const RowStats* const stats = keep(
        launch.args.common.stats +
        ((branch * p.shape.heads_kv + walk.task.head) * p.shape.total_q + sequence.q_row - shift) *
            group +
        head);
    // A row sees all 64 keys of the first warpgroup at `whole` positions from the last one's first
    // on.
    const int last = sight.first + (kRows - 1) * sight.unit;
    const uint32_t whole = max(sight.reach - (kRows - 1) * sight.unit, 0);
#pragma unroll 1
    for (; tiles > 0; --tiles) {
      const int position = next_position();
      mbarrier_wait(at.empty(), at.parity ^ 1);
      RowTileInfo& own = shared_object<RowTileInfo>(infos.at(at.full));
      float* const minus_delta = own.minus_delta[0] + second_delta;
      if (position >= 0) {
        const auto* const from = reinterpret_cast<const RowStats*>(
            reinterpret_cast<const char*>(stats) +
            uint64_t{static_cast<uint32_t>(position)} * row_bytes);
        cp_async_4(smem_addr(own.gated_lse_log2), &from->gated_lse_log2, true);
        cp_async_4(smem_addr(minus_delta), &from->minus_delta, true);
        cp_async_4(smem_addr(minus_delta + 2), &from->minus_delta, true);
        cp_async_4(smem_addr(own.gate), &from->gate, true);
      } else {
        // A row that is not there has gate 0 and exponentials 0: it adds nothing.
        own.gated_lse_log2[0] = INFINITY;
        minus_delta[0] = minus_delta[2] = own.gate[0] = 0.0f;
      }
      mbarrier_arrive_cp_async(uniform(at.full));
      own.position[0] = position;
      uint32_t masked = 0;
#pragma unroll
      for (int w = 0; w < Shape::kTaskKeys / kRows; ++w) {
        const int behind = position - last - w * kRows * sight.unit;
        masked |= static_cast<uint32_t>(__any_sync(
                      kFullWarp, position >= 0 && static_cast<uint32_t>(behind) >= whole))
                  << w;
      }
      if (lane == 0) own.halves[0] = {masked, sight.reach};
      mbarrier_arrive_warp(at.full, lane);
      at.advance();
    }
  };
  if constexpr (Shape::kList) {
    const int32_t* const list = keep(walk.list);
    // A tile ahead.
    int i = head < group ? walk.task.list_count - 1 - slot : -1;
    const auto read = [&]() {
      const int token = i >= 0 ? __ldg(list + i) : kNowhere;
      i -= walk.tokens;
      return token;
    };
    int next = read();
    describe(uniform(walk.list_tiles), kSelected, [&]() {
      const int token = next;
      next = read();
      return token + shift;
    });
  }
  int position = walk.task.token_begin + slot + shift;
  const int end = head < group ? walk.task.token_begin + walk.task.token_count + shift : 0;
  describe(uniform(walk.tiles - walk.list_tiles), launch.args.plan.range_branch, [&]() {
    const int own = position < end ? position : kNowhere;
    position += walk.tokens;
    return own;
  });
}

}  // namespace nsa::cuda::bwd::sm90
