// The query rows that a key-stationary task walks, in tiles of 64: one warp of the producer loads Q
// and dO, two others write what the score derivative needs of each row.
#pragma once

#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm90/bwd_tiles.cuh"

namespace nsa::cuda::bwd::sm90 {

/// Beside a tile of rows. Keys are counted from the walk's base_key.
struct alignas(16) RowTileInfo {  // rows are read two at a time
  float lse_log2[kRows], delta[kRows], gate[kRows];
  int key_begin[kRows], key_end[kRows];
  // Whether some row of the first and second half does not see all keys of a warpgroup.
  bool masked[2][2];
};

struct DkvLaunch {
  DkvArgs args;
  int multiprocessors;
  int log2_group;                   // of the padded group
  CUtensorMap q, dout;              // boxes of a tile's tokens, for ranges
  CUtensorMap q_token, dout_token;  // boxes of one token, for lists
  CUtensorMap k, v;
};

/// The tokens that a task walks, in tiles: those of its list, the last one first, then those of its
/// range, less the part of it that both tasks of a block of threads read together. Each of the
/// three starts a tile.
///
/// In the ring the tasks take turns while both have tiles of their own; then come the tiles that
/// both read, then what one of them has left. So a task's next tile is never more than two places
/// away. Every warp passes all places in order, those of the other task too: it waits for a parity,
/// which could otherwise be that of the use before the last.
///
/// It lies in shared memory: the warps that load have few registers.
struct RowWalk {
  struct Tokens {
    int begin, end;
  };
  const int32_t* list;
  const RowStats *list_stats, *range_stats;  // of the sequence's first token
  int list_count, list_tiles;
  Tokens range[2];  // the task's own, and the one that both read
  int tiles;        // that the task reads
  int turns;        // of each task
  int shared_end;   // place after the last that both read
  int places;       // of both tasks
  int task;         // 0 or 1
  bool rest;        // whether it has the places from shared_end on
  int batch, head, base_key;
  int first_row;  // of the sequence, along the seq axis
  int position;   // of the sequence's first token

  /// Whether the task's warps load this place; those that both read they load in turns.
  template <int kTasks>
  __device__ __forceinline__ bool loads(int place) const {
    return kTasks == 1 || (place < shared_end ? place % 2 == task : rest);
  }
  /// The next place that they load.
  template <int kTasks>
  __device__ __forceinline__ int following(int place) const {
    return loads<kTasks>(place + 1) ? place + 1 : place + 2;
  }
  __device__ __forceinline__ bool is_shared(int place) const {
    return place >= 2 * turns && place < shared_end;
  }
  /// The number of a place's tile in its range, less than 0 for those of the list.
  __device__ __forceinline__ int in_range(int place) const {
    if (is_shared(place)) return place - 2 * turns;
    return (place < 2 * turns ? place / 2 : place - shared_end + turns) - list_tiles;
  }
  /// Token `slot` of a list tile, which in_range() numbers; -1 past the list's start.
  __device__ __forceinline__ int listed(int number, int slot, int tokens) const {
    const int i = list_count - 1 - (number + list_tiles) * tokens - slot;
    return i >= 0 ? __ldg(list + i) : -1;
  }
  __device__ __forceinline__ int token(int place, int slot, int tokens) const {
    const int number = in_range(place);
    if (number < 0) return listed(number, slot, tokens);
    const Tokens& at = range[is_shared(place)];
    const int token = at.begin + number * tokens + slot;
    return token < at.end ? token : -1;
  }
  /// Whether a consumer passes a place of the other task before its tile.
  __device__ __forceinline__ bool passes_one(int tile) const {
    const int other = tile + task - 1;
    return other >= 0 && other < turns;
  }
  /// Places after the task's last tile.
  __device__ __forceinline__ int places_left() const {
    const int last = tiles - 1;
    return places - 1 - (last < turns ? 2 * last + (last < 0 ? 1 : task) : last + turns);
  }
};

/// The part of the ranges of a block's tasks that both consumer warpgroups read: with lists, what
/// two neighbours have in common.
template <bool kList>
__device__ __forceinline__ RowWalk::Tokens shared_tokens(const KeyTask* tasks, int count) {
  const KeyTask& a = tasks[0];
  const int end = a.token_begin + a.token_count;
  if (!kList) return {a.token_begin, end};
  if (count < 2) return {0, 0};
  const KeyTask& b = tasks[1];
  const bool any = a.batch == b.batch && a.head == b.head && a.token_begin <= b.token_begin &&
                   b.token_begin < end && end <= b.token_begin + b.token_count;
  return any ? RowWalk::Tokens{b.token_begin, end} : RowWalk::Tokens{0, 0};
}

/// One thread: the walk of tasks[number], one of the `count` tasks of a block of threads.
template <bool kList>
__device__ __forceinline__ void make_walk(const DkvLaunch& launch, const KeyTask* tasks, int count,
                                          int number, RowWalk& walk) {
  const AttnBwd& p = launch.args.common.p;
  const KeyTask& task = tasks[number];
  const Sequence sequence = load_sequence(p.shape, task.batch);
  const RowWalk::Tokens shared = shared_tokens<kList>(tasks, count);
  const bool joined = shared.begin < shared.end;
  const auto own_range = [&](int i) -> RowWalk::Tokens {
    const int begin = tasks[i].token_begin, end = begin + tasks[i].token_count;
    if (!joined) return {begin, end};
    return i == 0 ? RowWalk::Tokens{begin, shared.begin} : RowWalk::Tokens{shared.end, end};
  };
  const auto tiles_of = [&](int tokens) {
    return (tokens + (kRows >> launch.log2_group) - 1) >> (6 - launch.log2_group);
  };
  const auto own_tiles = [&](int i) {
    const RowWalk::Tokens range = own_range(i);
    return (kList ? tiles_of(tasks[i].list_count) : 0) + tiles_of(range.end - range.begin);
  };
  const auto stats = [&](int branch) {
    return launch.args.common.stats +
           ((branch * p.shape.heads_kv + task.head) * p.shape.total_q + sequence.q_row) *
               launch.args.common.group;
  };
  walk.list = launch.args.list + task.list_begin;
  walk.list_stats = stats(kSelected);
  walk.range_stats = stats(max(launch.args.plan.range_branch, 0));
  walk.list_count = kList ? task.list_count : 0;
  walk.list_tiles = tiles_of(walk.list_count);
  walk.range[0] = own_range(number);
  walk.range[1] = shared;
  const int own = own_tiles(number), other = count > 1 ? own_tiles(1 - number) : 0;
  const int shared_tiles = tiles_of(shared.end - shared.begin);
  walk.tiles = own + shared_tiles;
  walk.turns = min(own, other);
  walk.shared_end = 2 * walk.turns + shared_tiles;
  walk.places = own + other + shared_tiles;
  walk.task = number;
  walk.rest = own > other;
  walk.batch = static_cast<int>(sequence.batch);
  walk.head = task.head;
  walk.base_key = tasks[joined ? 0 : number].key;
  walk.first_row = static_cast<int>(sequence.q_first);
  walk.position = sequence.position(0);
}

/// One warp: copies of the tiles of Q and dO. A list's tokens are loaded one by one. It is read
/// three tiles ahead of the ring, and its rows are brought into L2 two tiles ahead: the ring is not
/// deep enough for what memory takes.
template <class Shape, class Smem>
__device__ void load_rows(const DkvLaunch& launch, const RowWalk& walk, Smem& smem) {
  constexpr int kQPanels = Shape::kDimQk / 64, kPanels = kQPanels + Shape::kDimV / 64;
  const int lane = threadIdx.x % 32, tokens = kRows >> launch.log2_group;
  const int batch = uniform(walk.batch), head = uniform(walk.head);
  // Past the end of any tensor: a token that is not there reads as zeros.
  const int nowhere = static_cast<int>(launch.args.common.p.shape.total_q);
  const auto token_of = [&](int number, int slot) {
    return slot < tokens ? walk.listed(number, slot, tokens) : -1;
  };
  const auto row_of = [&](int token) { return token < 0 ? nowhere : walk.first_row + token; };
  int next[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) next[i] = Shape::kList ? token_of(i - walk.list_tiles, lane) : 0;
  RingPosition<Shape::kStages> at;
  for (int place = 0; place < walk.places; ++place, at.advance()) {
    mbarrier_wait(smem_addr(&smem.empty[at.slot]), at.parity ^ 1);
    if (!walk.template loads<Shape::kTasks>(place)) continue;
    const uint32_t full = uniform(smem_addr(&smem.full[at.slot]));
    const uint32_t dst = uniform(smem_addr(smem.ring[at.slot]));
    const int number = walk.in_range(place);
    const bool listed = Shape::kList && number < 0;
    int token;
    if (listed) {
      token = next[0];
      next[0] = next[1];
      next[1] = next[2];
      next[2] = token_of(number + 3, lane);
    } else {
      token = walk.range[walk.is_shared(place)].begin + number * tokens;
    }
    if (lane == 0) mbarrier_arrive_expect(full, Shape::kStageBytes);
    if (listed) {
#pragma unroll 1
      for (int i = 0; i < tokens; ++i) {
        if (i == 32) token = token_of(number, 32 + lane);
        const int row = __shfl_sync(kFullWarp, row_of(token), i % 32);
        const uint32_t to = dst + (i << (7 + launch.log2_group));
        if (lane == 0) {
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel)
            tma_load(to + panel * kPanelBytes,
                     panel < kQPanels ? &launch.q_token : &launch.dout_token, full,
                     (panel < kQPanels ? panel : panel - kQPanels) * 64, 0, head, row, batch);
        }
      }
#pragma unroll 1
      for (int i = 0; i < min(tokens, 32); ++i) {
        const int row = __shfl_sync(kFullWarp, row_of(next[1]), i);
        if (lane == 0 && row < nowhere) {
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel)
            tma_prefetch(panel < kQPanels ? &launch.q_token : &launch.dout_token,
                         (panel < kQPanels ? panel : panel - kQPanels) * 64, 0, head, row, batch);
        }
      }
    } else {
      const int row = uniform(walk.first_row + token);
      if (lane == 0) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
          tma_load(dst + panel * kPanelBytes, panel < kQPanels ? &launch.q : &launch.dout, full,
                   (panel < kQPanels ? panel : panel - kQPanels) * 64, 0, head, row, batch);
      }
    }
    __syncwarp();
  }
}

/// Half tiles that a describing warp writes: with lists each task has one such warp, with ranges
/// there are two for the one task.
template <bool kList>
inline constexpr int kDescribedHalves = kList ? 2 : 1;

/// Arrivals on a tile's `full` barrier: the loading warp's, the describing warps', and one of each
/// of their lanes when its copies have landed.
template <bool kList>
inline constexpr int kRowArrivals = 1 + 2 / kDescribedHalves<kList> * (kWarpArrivals + 32);

/// One warp, a row a lane, half of the tile or one half after the other: key ranges, and copies of
/// the statistics, which take as long as memory does and are not waited for here.
template <class Shape, class Smem>
__device__ void describe_rows(const DkvLaunch& launch, const RowWalk& walk, int first_half,
                              Smem& smem) {
  constexpr int kHalves = kDescribedHalves<Shape::kList>;
  const BlockConfig& config = launch.args.common.p.config;
  const int group = launch.args.common.group, tokens = kRows >> launch.log2_group;
  const int first_row = first_half * 32 + threadIdx.x % 32;
  const auto head_of = [&](int row) { return row & ((1 << launch.log2_group) - 1); };
  const auto token_of = [&](int place, int row) {
    return head_of(row) < group && place < walk.places
               ? walk.token(place, row >> launch.log2_group, tokens)
               : -1;
  };
  int next[kHalves];
#pragma unroll
  for (int i = 0; i < kHalves; ++i)
    next[i] = token_of(walk.template following<Shape::kTasks>(-1), first_row + i * 32);
  RingPosition<Shape::kStages> at;
  for (int place = 0; place < walk.places; ++place, at.advance()) {
    mbarrier_wait(smem_addr(&smem.empty[at.slot]), at.parity ^ 1);
    if (!walk.template loads<Shape::kTasks>(place)) continue;
    const bool listed = Shape::kList && walk.in_range(place) < 0;
    const int branch = listed ? int{kSelected} : launch.args.plan.range_branch;
    const int following = walk.template following<Shape::kTasks>(place);
    RowTileInfo& info = smem.info[at.slot];
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      const int row = first_row + i * 32, token = next[i];
      next[i] = token_of(following, row);
      KeyRange keys{0, INT32_MAX};
      if (token >= 0) {
        keys = visible_keys(branch, token + walk.position, config);
        keys = {keys.begin - walk.base_key, keys.end - walk.base_key};
        const RowStats* stats =
            (listed ? walk.list_stats : walk.range_stats) + token * group + head_of(row);
        cp_async_4(smem_addr(&info.lse_log2[row]), &stats->lse_log2, true);
        cp_async_4(smem_addr(&info.delta[row]), &stats->delta, true);
        cp_async_4(smem_addr(&info.gate[row]), &stats->gate, true);
      } else {
        // A row that is not there has gate 0 and exponentials 0: it adds nothing.
        info.lse_log2[row] = INFINITY;
        info.delta[row] = info.gate[row] = 0.0f;
      }
      info.key_begin[row] = keys.begin;
      info.key_end[row] = keys.end;
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const KeyRange own = smem.keys[w];
        const bool masked = __any_sync(kFullWarp, keys.begin > own.begin || keys.end < own.end);
        if (threadIdx.x % 32 == 0) info.masked[first_half + i][w] = masked;
      }
    }
    mbarrier_arrive_cp_async(smem_addr(&smem.full[at.slot]));
    arrive_warp(smem.full[at.slot]);
  }
}

}  // namespace nsa::cuda::bwd::sm90
