// The task list of a dK/dV launch. Keys differ in how many queries send them gradients (block 0 of
// a selection: all of them), so long keys are cut into tasks of at most `piece` queries, whose
// results are added up in order afterwards.
#include "cuda/sm80/bwd_kernels.h"
#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm80/bwd_sequence.cuh"

namespace nsa::cuda::bwd {
namespace {

constexpr int kThreads = 1024;

/// What one thread's group of keys needs.
struct Need {
  int tasks, slots, entries;
};
__device__ __forceinline__ Need operator+(const Need& a, const Need& b) {
  return {a.tasks + b.tasks, a.slots + b.slots, a.entries + b.entries};
}

/// Sum over the threads before this one; `total` over all.
__device__ Need exclusive_scan(Need x, Need& total) {
  __shared__ Need warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto scan_warp = [&](Need sum) {
    for (int step = 1; step < 32; step *= 2) {
      const Need other{__shfl_up_sync(kFullWarp, sum.tasks, step),
                       __shfl_up_sync(kFullWarp, sum.slots, step),
                       __shfl_up_sync(kFullWarp, sum.entries, step)};
      if (lane >= step) sum = sum + other;
    }
    return sum;
  };
  const Need inclusive = scan_warp(x);
  __syncthreads();  // the previous scan's readers are done
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  if (warp == 0) warps[lane] = scan_warp(warps[lane]);
  __syncthreads();
  total = warps[kThreads / 32 - 1];
  const Need before = warp == 0 ? Need{} : warps[warp - 1];
  return {before.tasks + inclusive.tasks - x.tasks, before.slots + inclusive.slots - x.slots,
          before.entries + inclusive.entries - x.entries};
}

/// One block of threads; a thread takes one group of keys of one head at a time.
__global__ void __launch_bounds__(kThreads)
    plan_key_tasks(const __grid_constant__ AttnBwd p, const KeyPlan plan,
                   const InvertedIndex index) {
  const int64_t total = p.shape.heads_kv * plan.groups.count;
  Need before{0, 0, 0};
  for (int64_t base = 0; base < total; base += kThreads) {
    const int64_t id = base + threadIdx.x;
    const int head = static_cast<int>(id / plan.groups.count);
    Sequence sequence{};
    TileMap::Place place{0, 0};
    int length = 0, list = 0;
    if (id < total) {
      place = plan.groups.place(static_cast<int>(id % plan.groups.count));
      sequence = load_sequence(p.shape, place.batch);
      length = branch_length(sequence, plan.branch, p.config);
      if (plan.has_list) list = index.count[id];
    }
    const auto key_of = [&](int part) {
      return place.index * plan.group_keys + part * plan.task_keys;
    };
    const auto keys_of = [&](int part) {
      return min(min(plan.task_keys, plan.group_keys - part * plan.task_keys),
                 length - key_of(part));
    };
    const auto tasks_of = [&](int queries) { return max(1, ceil_div(queries, plan.piece)); };

    Need need{0, 0, list};
    for (int part = 0; part < plan.parts && keys_of(part) > 0; ++part) {
      const int tasks = tasks_of(
          list +
          range_queries(sequence, plan.range_branch, key_of(part), keys_of(part), p.config).count);
      need.tasks += tasks;
      if (tasks > 1) need.slots += tasks;
    }
    Need sum;
    Need place_of = before + exclusive_scan(need, sum);
    before = before + sum;
    if (id >= total) continue;
    if (plan.has_list) index.begin[id] = place_of.entries;
    for (int part = 0; part < plan.parts; ++part) {
      const int key = key_of(part), keys = keys_of(part);
      SplitTile& tile = plan.tiles[id * plan.parts + part];
      if (keys <= 0) {
        tile = SplitTile{};
        tile.task = place_of.tasks;
        continue;
      }
      const QueryRange range = range_queries(sequence, plan.range_branch, key, keys, p.config);
      const int queries = list + range.count, tasks = tasks_of(queries);
      tile = SplitTile{place.batch,           head,           key,  keys, place_of.slots,
                       tasks > 1 ? tasks : 0, place_of.tasks, tasks};
      for (int i = 0; i < tasks; ++i) {
        // Ranges are cut from the end: key tiles that see the same last queries then have the same
        // pieces. Lists are cut evenly: tasks next to each other may share a block of threads.
        const auto cut = [&](int i) {
          return plan.has_list ? static_cast<int>(int64_t{queries} * i / tasks)
                               : max(0, queries - (tasks - i) * plan.piece);
        };
        const int from = cut(i), to = cut(i + 1);
        const int list_from = min(from, list), list_to = min(to, list);
        plan.tasks[place_of.tasks++] = KeyTask{place.batch,
                                               head,
                                               key,
                                               keys,
                                               place_of.entries + list_from,
                                               list_to - list_from,
                                               range.begin + max(from - list, 0),
                                               max(to - list, 0) - max(from - list, 0),
                                               tasks > 1 ? place_of.slots++ : -1,
                                               {}};
      }
    }
  }
  if (threadIdx.x == 0) *plan.num_tasks = before.tasks;
}

}  // namespace

void launch_plan_key_tasks(const AttnBwd& p, const KeyPlan& plan, const InvertedIndex& index,
                           cudaStream_t stream) {
  launch_kernel(plan_key_tasks, "plan_key_tasks", 1, kThreads, 0, stream, p, plan, index);
}

}  // namespace nsa::cuda::bwd
