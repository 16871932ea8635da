// The query rows that a key-stationary task walks, in tiles of 64: one warp of the producer loads Q
// and dO, two others write what the score derivative needs of each row.
#pragma once

#include "cuda/sm90/bwd_tiles.cuh"

namespace nsa::cuda::bwd::sm90 {

/// Beside a tile of rows. Key ranges are relative to the task's first key.
struct RowTileInfo {
  float lse_log2[kRows], delta[kRows], gate[kRows];
  int key_begin[kRows], key_end[kRows];
  // Whether some row of the first and second half does not see all of the 64 keys of a warpgroup.
  int masked[2][2];
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

/// Two warps, a row a lane, half of the tile each: statistics and key ranges, those of the next
/// tile asked for before this one's slot is waited for.
template <class Shape, class Smem>
__device__ void describe_rows(const DkvLaunch& launch, const RowWalk& walk,
                              const Sequence& sequence, int half, Smem& smem) {
  const AttnBwd& p = launch.args.common.p;
  const int row = half * 32 + threadIdx.x % 32, group = launch.args.common.group;
  const int slot = row >> launch.log2_group, head = row & ((1 << launch.log2_group) - 1);
  const auto branch_of = [&](int tile) {
    return Shape::kList && tile < walk.list_tiles ? int{kSelected} : launch.args.plan.range_branch;
  };
  struct Row {
    int token;
    float lse_log2, delta, gate;
  };
  const auto fetch = [&](int tile) {
    // A row that is not there has gate 0 and exponentials 0: it adds nothing.
    Row result{-1, INFINITY, 0.0f, 0.0f};
    if (head < group) result.token = walk.token(tile, slot);
    if (result.token < 0) return result;
    const int64_t token = (branch_of(tile) * p.shape.heads_kv + walk.task.head) * p.shape.total_q +
                          sequence.q_row + result.token;
    const float4 x =
        __ldg(reinterpret_cast<const float4*>(launch.args.common.stats + token * group + head));
    result.lse_log2 = x.x;
    result.delta = x.y;
    result.gate = x.z;
    return result;
  };
  RingPosition<Shape::kStages> at;
  Row next{};
  if (walk.tiles > 0) next = fetch(0);
  for (int tile = 0; tile < walk.tiles; ++tile) {
    const Row now = next;
    if (tile + 1 < walk.tiles) next = fetch(tile + 1);
    KeyRange keys{0, Shape::kTaskKeys};
    if (now.token >= 0) {
      keys = visible_keys(branch_of(tile), sequence.position(now.token), p.config);
      keys = {keys.begin - walk.task.key, keys.end - walk.task.key};
    }
    mbarrier_wait(smem_addr(&smem.empty[at.slot]), at.parity ^ 1);
    RowTileInfo& info = smem.info[at.slot];
    info.lse_log2[row] = now.lse_log2;
    info.delta[row] = now.delta;
    info.gate[row] = now.gate;
    info.key_begin[row] = keys.begin;
    info.key_end[row] = keys.end;
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
