// The query rows that a key-stationary task walks, in tiles of 64: one warp of the producer loads Q
// and dO, another writes what the score derivative needs of each row.
#pragma once

#include "cuda/sm90/bwd_tiles.cuh"

namespace nsa::cuda::bwd::sm90 {

/// Beside a tile of rows. Key ranges are relative to the task's first key.
struct RowTileInfo {
  float lse_log2[kRows], delta[kRows], gate[kRows];
  int key_begin[kRows], key_end[kRows];
  int masked[2];  // whether some row does not see all of the 64 keys of a warpgroup
};

struct DkvLaunch {
  DkvArgs args;
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

  /// Token `slot` of a list tile; -1 past the end.
  __device__ __forceinline__ int listed(int tile, int slot) const {
    const int i = tile * tokens + slot;
    return i < task.list_count ? __ldg(list + i) : -1;
  }
  __device__ __forceinline__ int range_begin(int tile) const {
    return task.token_begin + (tile - list_tiles) * tokens;
  }
  __device__ __forceinline__ int token(int tile, int slot) const {
    if (tile < list_tiles) return listed(tile, slot);
    const int token = range_begin(tile) + slot;
    return token < task.token_begin + task.token_count ? token : -1;
  }
};

/// One warp: copies of the tiles of Q and dO. A list's tokens are loaded one by one, by as many
/// lanes.
template <class Shape, class Smem>
__device__ void load_rows(const DkvLaunch& launch, const RowWalk& walk, const Sequence& sequence,
                          Smem& smem) {
  constexpr int kQPanels = Shape::kDimQk / 64, kPanels = kQPanels + Shape::kDimV / 64;
  const int lane = threadIdx.x % 32;
  const int batch = static_cast<int>(sequence.batch), head = walk.task.head;
  const int first = static_cast<int>(sequence.q_first);
  // Past the end of any tensor: a token that is not there reads as zeros.
  const int nowhere = static_cast<int>(launch.args.common.p.shape.total_q);
  RingPosition<Shape::kStages> at;
  for (int tile = 0; tile < walk.tiles; ++tile) {
    mbarrier_wait(smem_addr(&smem.empty[at.slot]), at.parity ^ 1);
    const uint32_t full = smem_addr(&smem.full[at.slot]), dst = smem_addr(smem.ring[at.slot]);
    if (lane == 0) mbarrier_arrive_expect(full, Shape::kStageBytes);
    __syncwarp();
    if (Shape::kList && tile < walk.list_tiles) {
      for (int box = lane; box < walk.tokens * kPanels; box += 32) {
        const int slot = box / kPanels, panel = box % kPanels;
        const int token = walk.listed(tile, slot);
        const bool is_q = panel < kQPanels;
        tma_load(dst + panel * kPanelBytes + slot * (kPanelBytes / walk.tokens),
                 is_q ? &launch.q_token : &launch.dout_token, full,
                 (is_q ? panel : panel - kQPanels) * 64, 0, head,
                 token < 0 ? nowhere : first + token, batch);
      }
    } else if (lane < kPanels) {
      const bool is_q = lane < kQPanels;
      tma_load(dst + lane * kPanelBytes, is_q ? &launch.q : &launch.dout, full,
               (is_q ? lane : lane - kQPanels) * 64, 0, head, first + walk.range_begin(tile),
               batch);
    }
    at.advance();
  }
}

/// One warp, two rows a lane: statistics and key ranges, those of the next tile asked for before
/// this one's slot is waited for.
template <class Shape, class Smem>
__device__ void describe_rows(const DkvLaunch& launch, const RowWalk& walk,
                              const Sequence& sequence, Smem& smem) {
  const AttnBwd& p = launch.args.common.p;
  const int lane = threadIdx.x % 32, group = launch.args.common.group;
  struct Row {
    int token;
    float lse_log2, delta, gate;
  };
  const auto branch_of = [&](int tile) {
    return Shape::kList && tile < walk.list_tiles ? int{kSelected} : launch.args.plan.range_branch;
  };
  const auto fetch = [&](int tile, Row(&rows)[2]) {
    const RowStats* stats =
        launch.args.common.stats +
        ((branch_of(tile) * p.shape.heads_kv + walk.task.head) * p.shape.total_q + sequence.q_row) *
            group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane + 32 * i, head = row & ((1 << launch.log2_group) - 1);
      // A row that is not there has gate 0 and exponentials 0: it adds nothing.
      rows[i] = {-1, INFINITY, 0.0f, 0.0f};
      if (head >= group) continue;
      rows[i].token = walk.token(tile, row >> launch.log2_group);
      if (rows[i].token < 0) continue;
      const float4 x = __ldg(reinterpret_cast<const float4*>(
          stats + static_cast<int64_t>(rows[i].token) * group + head));
      rows[i].lse_log2 = x.x;
      rows[i].delta = x.y;
      rows[i].gate = x.z;
    }
  };
  RingPosition<Shape::kStages> at;
  Row next[2];
  if (walk.tiles > 0) fetch(0, next);
  for (int tile = 0; tile < walk.tiles; ++tile) {
    const Row rows[2] = {next[0], next[1]};
    if (tile + 1 < walk.tiles) fetch(tile + 1, next);
    mbarrier_wait(smem_addr(&smem.empty[at.slot]), at.parity ^ 1);
    RowTileInfo& info = smem.info[at.slot];
    bool masked[2] = {false, false};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane + 32 * i;
      info.lse_log2[row] = rows[i].lse_log2;
      info.delta[row] = rows[i].delta;
      info.gate[row] = rows[i].gate;
      KeyRange keys{0, Shape::kTaskKeys};
      if (rows[i].token >= 0) {
        keys = visible_keys(branch_of(tile), sequence.position(rows[i].token), p.config);
        keys = {keys.begin - walk.task.key, keys.end - walk.task.key};
      }
      info.key_begin[row] = keys.begin;
      info.key_end[row] = keys.end;
#pragma unroll
      for (int w = 0; w < Shape::kTaskKeys / kRows; ++w)
        masked[w] |= keys.begin > w * kRows || keys.end < min((w + 1) * kRows, walk.task.keys);
    }
    const bool first = __any_sync(kFullWarp, masked[0]), second = __any_sync(kFullWarp, masked[1]);
    if (lane == 0) {
      info.masked[0] = first;
      info.masked[1] = second;
    }
    arrive_warp(smem.full[at.slot]);
    at.advance();
  }
}

}  // namespace nsa::cuda::bwd::sm90
