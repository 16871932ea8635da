// The query rows that a key-stationary task walks, in tiles of 64: one warp of the producer loads Q
// and dO, two others write what the score derivative needs of each row.
#pragma once

#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm90/bwd_tiles.cuh"

namespace nsa::cuda::bwd::sm90 {

/// Beside a tile of rows. Key ranges are relative to the task's first key.
struct RowTileInfo {
  float lse_log2[kRows], delta[kRows], gate[kRows];
  int key_begin[kRows], key_end[kRows];
  // Units of Slices where dS of a listed token goes; negative: nowhere.
  int grads[kRows];
  // Whether some row of the first and second half does not see all of the 64 keys of a warpgroup.
  int masked[2][2];
};

struct DkvLaunch {
  DkvArgs args;
  int multiprocessors;
  int log2_group;                   // of the padded group
  CUtensorMap q, dout;              // boxes of a tile's tokens, for ranges
  CUtensorMap q_token, dout_token;  // boxes of one token, for lists
  CUtensorMap k, v;
};

/// Which queries lie in which tile: first those of the task's range, then those of its list. Both
/// start a tile.
struct RowWalk {
  const KeyTask& task;
  const int32_t* list;
  int tokens;  // of a tile
  int range_tiles, tiles;

  __device__ __forceinline__ RowWalk(const DkvLaunch& launch, const KeyTask& task)
      : task(task),
        list(launch.args.list + task.list_begin),
        tokens(kRows >> launch.log2_group),
        range_tiles((task.token_count + tokens - 1) >> (6 - launch.log2_group)),
        tiles(range_tiles + ((task.list_count + tokens - 1) >> (6 - launch.log2_group))) {}

  /// Entry `slot` of a list tile, the last of the list first; -1 past its start.
  __device__ __forceinline__ int32_t entry(int tile, int slot) const {
    const int i = task.list_count - 1 - (tile - range_tiles) * tokens - slot;
    return i >= 0 ? __ldg(list + i) : -1;
  }
  __device__ __forceinline__ int range_begin(int tile) const {
    return task.token_begin + tile * tokens;
  }
  /// The same of any tile; those of the range have no rank.
  __device__ __forceinline__ int32_t entry_of_any(int tile, int slot) const {
    if (tile >= range_tiles) return entry(tile, slot);
    const int token = range_begin(tile) + slot;
    return token < task.token_begin + task.token_count ? token : -1;
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
  RingPosition<Shape::kStages> at;
  const auto open = [&]() {
    mbarrier_wait(smem_addr(&smem.empty[at.slot]), at.parity ^ 1);
    if (lane == 0) mbarrier_arrive_expect(smem_addr(&smem.full[at.slot]), Shape::kStageBytes);
    __syncwarp();
  };
  for (int tile = 0; tile < walk.range_tiles; ++tile) {
    open();
    if (lane == 0) {
      const uint32_t full = smem_addr(&smem.full[at.slot]), dst = smem_addr(smem.ring[at.slot]);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        tma_load(dst + panel * kPanelBytes, panel < kQPanels ? &launch.q : &launch.dout, full,
                 (panel < kQPanels ? panel : panel - kQPanels) * 64, 0, head,
                 first + walk.range_begin(tile), batch);
    }
    at.advance();
  }
  if constexpr (Shape::kList) {
    // Past the end of any tensor: a token that is not there reads as zeros.
    const int nowhere = static_cast<int>(launch.args.common.p.shape.total_q);
    const auto row_of = [&](int tile, int slot) {
      const int32_t entry = slot < walk.tokens ? walk.entry(tile, slot) : -1;
      return entry == -1 ? nowhere : first + list_token(entry);
    };
    int next = row_of(walk.range_tiles, lane);
    for (int tile = walk.range_tiles; tile < walk.tiles; ++tile) {
      int row = next;
      next = row_of(tile + 1, lane);
      open();
      for (int slot = lane; slot < walk.tokens; slot += 32) {
        if (slot != lane) row = row_of(tile, slot);
        const uint32_t full = smem_addr(&smem.full[at.slot]);
        const uint32_t dst = smem_addr(smem.ring[at.slot]) + (slot << (7 + launch.log2_group));
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
          tma_load(dst + panel * kPanelBytes,
                   panel < kQPanels ? &launch.q_token : &launch.dout_token, full,
                   (panel < kQPanels ? panel : panel - kQPanels) * 64, 0, head, row, batch);
      }
      at.advance();
    }
  }
}

/// The unit of dS of a token of the slice, for the keys of a task.
__device__ __forceinline__ int grads_unit(const DkvArgs& args, const KeyTask& task, int token,
                                          int rank) {
  const Slices& slices = args.slices;
  const int tile = token / slices.tiles.tile;
  const int job = slices.job(task.head, slices.tiles.first(task.batch) + tile);
  const int place =
      (job - args.slice * slices.size) * slices.tiles.tile + token - tile * slices.tiles.tile;
  const int part = task.key % args.plan.group_keys / kRows;
  return place * slices.units + rank * args.plan.parts + part;
}

/// Arrivals on a tile's `full` barrier: the loading warp's, the describing warps', and one of each
/// of their lanes when its copies have landed.
inline constexpr int kRowArrivals = 1 + 2 * kWarpArrivals + 64;

/// Two warps, a row a lane, half of the tile each: key ranges, and copies of the statistics, which
/// take as long as memory does and are not waited for here.
template <class Shape, class Smem>
__device__ void describe_rows(const DkvLaunch& launch, const RowWalk& walk,
                              const Sequence& sequence, int half, Smem& smem) {
  const AttnBwd& p = launch.args.common.p;
  const int row = half * 32 + threadIdx.x % 32, group = launch.args.common.group;
  const int slot = row >> launch.log2_group, head = row & ((1 << launch.log2_group) - 1);
  const auto entry_of = [&](int tile) {
    return head < group && tile < walk.tiles ? walk.entry_of_any(tile, slot) : -1;
  };
  RingPosition<Shape::kStages> at;
  int32_t next = entry_of(0);
  for (int tile = 0; tile < walk.tiles; ++tile) {
    const int32_t entry = next;
    const int token = entry == -1 ? -1 : list_token(entry);
    next = entry_of(tile + 1);
    const int branch =
        Shape::kList && tile >= walk.range_tiles ? int{kSelected} : launch.args.plan.range_branch;
    KeyRange keys{0, Shape::kTaskKeys};
    if (token >= 0) {
      keys = visible_keys(branch, sequence.position(token), p.config);
      keys = {keys.begin - walk.task.key, keys.end - walk.task.key};
    }
    mbarrier_wait(smem_addr(&smem.empty[at.slot]), at.parity ^ 1);
    RowTileInfo& info = smem.info[at.slot];
    if (token >= 0) {
      const RowStats* stats = launch.args.common.stats +
                              ((branch * p.shape.heads_kv + walk.task.head) * p.shape.total_q +
                               sequence.q_row + token) *
                                  group +
                              head;
      cp_async_4(smem_addr(&info.lse_log2[row]), &stats->lse_log2, true);
      cp_async_4(smem_addr(&info.delta[row]), &stats->delta, true);
      cp_async_4(smem_addr(&info.gate[row]), &stats->gate, true);
    } else {
      // A row that is not there has gate 0 and exponentials 0: it adds nothing.
      info.lse_log2[row] = INFINITY;
      info.delta[row] = info.gate[row] = 0.0f;
    }
    mbarrier_arrive_cp_async(smem_addr(&smem.full[at.slot]));
    info.key_begin[row] = keys.begin;
    info.key_end[row] = keys.end;
    if (Shape::kList && head == 0)
      info.grads[slot] = tile >= walk.range_tiles && token >= 0 && launch.args.slices.keep_ds()
                             ? grads_unit(launch.args, walk.task, token, list_rank(entry))
                             : -1;
#pragma unroll
    for (int w = 0; w < Shape::kTaskKeys / kRows; ++w) {
      const bool masked = __any_sync(
          kFullWarp, keys.begin > w * kRows || keys.end < min((w + 1) * kRows, walk.task.keys));
      if (threadIdx.x % 32 == 0) info.masked[half][w] = masked;
    }
    arrive_warp(smem.full[at.slot]);
    at.advance();
  }
}

}  // namespace nsa::cuda::bwd::sm90
