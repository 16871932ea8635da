// The query rows that a key-stationary task walks, in tiles of 64: one warp of the producer loads Q
// and dO, two others write what the score derivative needs of each row.
#pragma once

#include <climits>

#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm90/bwd_tiles.cuh"

namespace nsa::cuda::bwd::sm90 {

/// Beside a tile of rows.
struct RowTileInfo {
  float lse_log2[kRows], minus_delta[kRows], gate[kRows];
  // Where the rows are in their sequence. In the order in which a thread reads them: with the
  // columns 2 t and 2 t + 1 of 16 those 8 further on.
  alignas(16) int position[kRows];
  int reach;  // of the keys (KeySight)
  // Whether some row of each half, or of both, does not see all of the 64 keys of a warpgroup.
  union {
    bool half[2];
    uint16_t any;
  } masked[2];

  /// Of a row among those in that order.
  static __device__ __forceinline__ int place(int row) {
    return (row & ~15) | (row / 2 % 4 * 4 + row / 8 % 2 * 2 + row % 2);
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

  /// Token `slot` of a list tile, the last of the list first; -1 past its start.
  __device__ __forceinline__ int listed(int tile, int slot) const {
    const int i = task.list_count - 1 - tile * tokens - slot;
    return i >= 0 ? __ldg(list + i) : -1;
  }
  __device__ __forceinline__ int range_begin(int tile) const {
    return task.token_begin + (tile - list_tiles) * tokens;
  }
};

/// One warp: copies of the tiles of Q and dO. A list's tokens are loaded one by one, by as many
/// lanes, which read the list a tile ahead.
template <class Shape, class Smem>
__device__ void load_rows(const DkvLaunch& launch, const RowWalk& walk, const Sequence& sequence,
                          Smem& smem) {
  constexpr int kQPanels = Shape::kDimQk / 64, kPanels = kQPanels + Shape::kDimV / 64;
  const int lane = threadIdx.x % 32;
  const int batch = static_cast<int>(sequence.batch), head = walk.task.head;
  const int first = static_cast<int>(sequence.q_first);
  RingPosition<Shape::kStages> at(smem_addr(smem.full));
  const RingAddress<Shape::kStageBytes> ring(smem_addr(smem.ring), at.first);
  const auto open = [&]() {
    mbarrier_wait(at.empty(), at.parity ^ 1);
    if (lane == 0) mbarrier_arrive_expect(at.full, Shape::kStageBytes);
    __syncwarp();
  };
  if constexpr (Shape::kList) {
    // Past the end of any tensor: a token that is not there reads as zeros.
    const int nowhere = static_cast<int>(launch.args.common.p.shape.total_q);
    const auto row_of = [&](int tile, int slot) {
      const int token = slot < walk.tokens ? walk.listed(tile, slot) : -1;
      return token < 0 ? nowhere : first + token;
    };
    int next = row_of(0, lane);
    for (int tile = 0; tile < walk.list_tiles; ++tile) {
      int row = next;
      next = row_of(tile + 1, lane);
      open();
      for (int slot = lane; slot < walk.tokens; slot += 32) {
        if (slot != lane) row = row_of(tile, slot);
        const uint32_t dst = ring.at(at.full) + (slot << (7 + launch.log2_group));
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
          tma_load(dst + panel * kPanelBytes,
                   panel < kQPanels ? &launch.q_token : &launch.dout_token, at.full,
                   (panel < kQPanels ? panel : panel - kQPanels) * 64, 0, head, row, batch);
      }
      at.advance();
    }
  }
  for (int tile = Shape::kList ? walk.list_tiles : 0; tile < walk.tiles; ++tile) {
    open();
    if (lane == 0) {
      const uint32_t dst = ring.at(at.full);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        tma_load(dst + panel * kPanelBytes, panel < kQPanels ? &launch.q : &launch.dout, at.full,
                 (panel < kQPanels ? panel : panel - kQPanels) * 64, 0, head,
                 first + walk.range_begin(tile), batch);
    }
    at.advance();
  }
}

/// Arrivals on a tile's `full` barrier: the loading warp's, the describing warps', and one of each
/// of their lanes when its copies have landed.
inline constexpr int kRowArrivals = 1 + 2 * kWarpArrivals + 64;

/// Two warps, a row a lane, half of the tile each: positions, and copies of the statistics, which
/// take as long as memory does and are not waited for here.
template <class Shape, class Smem>
__device__ void describe_rows(const DkvLaunch& launch, const RowWalk& walk,
                              const Sequence& sequence, int half, Smem& smem) {
  constexpr int kKeyTiles = Shape::kTaskKeys / kRows;
  const AttnBwd& p = launch.args.common.p;
  const int row = half * 32 + threadIdx.x % 32, group = launch.args.common.group;
  const int slot = row >> launch.log2_group, head = row & ((1 << launch.log2_group) - 1);
  const int shift = sequence.position(0), keys = walk.task.keys;
  RingPosition<Shape::kStages> at(smem_addr(smem.full));
  const RingAddress<sizeof(RowTileInfo)> infos(smem_addr(smem.info), at.first);
  // Walks the tiles of a branch; next_token() is -1 for a row that is not there.
  const auto describe = [&](int tiles, int branch, const auto& next_token) {
    const KeySight sight(branch, walk.task.key, p.config);
    const RowStats* const stats =
        launch.args.common.stats +
        ((branch * p.shape.heads_kv + walk.task.head) * p.shape.total_q + sequence.q_row) * group +
        head;
    // A row sees all 64 keys of a warpgroup where it is `whole` positions from the last one's first
    // on.
    int last[kKeyTiles];
    uint32_t whole[kKeyTiles];
#pragma unroll
    for (int w = 0; w < kKeyTiles; ++w) {
      const int span = (min((w + 1) * kRows, keys) - 1) * sight.unit;
      last[w] = sight.first + span - shift;
      whole[w] = max(sight.reach - (span - w * kRows * sight.unit), 0);
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int token = next_token();
      mbarrier_wait(at.empty(), at.parity ^ 1);
      RowTileInfo& info = shared_object<RowTileInfo>(infos.at(at.full));
      if (token >= 0) {
        const RowStats* const from = stats + static_cast<int64_t>(token) * group;
        cp_async_4(smem_addr(&info.lse_log2[row]), &from->lse_log2, true);
        cp_async_4(smem_addr(&info.minus_delta[row]), &from->minus_delta, true);
        cp_async_4(smem_addr(&info.gate[row]), &from->gate, true);
      } else {
        // A row that is not there has gate 0 and exponentials 0: it adds nothing.
        info.lse_log2[row] = INFINITY;
        info.minus_delta[row] = info.gate[row] = 0.0f;
      }
      mbarrier_arrive_cp_async(at.full);
      info.position[RowTileInfo::place(row)] = token + shift;
#pragma unroll
      for (int w = 0; w < kKeyTiles; ++w) {
        const bool masked =
            __any_sync(kFullWarp, token >= 0 && static_cast<uint32_t>(token - last[w]) >= whole[w]);
        if (threadIdx.x % 32 == 0) info.masked[w].half[half] = masked;
      }
      if (threadIdx.x % 32 == 0) info.reach = sight.reach;
      mbarrier_arrive_warp(at.full);
      at.advance();
    }
  };
  if constexpr (Shape::kList) {
    // A tile ahead.
    const bool real = head < group;
    int i = walk.task.list_count - 1 - slot;
    const auto read = [&]() {
      const int token = real && i >= 0 ? __ldg(walk.list + i) : -1;
      i -= walk.tokens;
      return token;
    };
    int next = read();
    describe(walk.list_tiles, kSelected, [&]() {
      const int token = next;
      next = read();
      return token;
    });
  }
  int token = walk.task.token_begin + slot;
  const int end = head < group ? walk.task.token_begin + walk.task.token_count : 0;
  describe(walk.tiles - walk.list_tiles, launch.args.plan.range_branch, [&]() {
    const int own = token < end ? token : -1;
    token += walk.tokens;
    return own;
  });
}

}  // namespace nsa::cuda::bwd::sm90
