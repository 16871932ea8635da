// The task list of a dK/dV launch. Keys differ in how many queries send them gradients (block 0 of
// a selection: all of them), so long keys are cut into tasks of at most `piece` queries, whose
// results are added up in order afterwards. Where the queries are taken slice by slice, the lists
// are cut there first, and the i-th piece of a key tile adds to what those of earlier slices left.
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
        // Cut from the end: key tiles that see the same last queries then have the same pieces.
        const int to = queries - (tasks - 1 - i) * plan.piece, from = max(0, to - plan.piece);
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

// ---- By slices ----------------------------------------------------------------------------------

/// Where the lists start.
__global__ void __launch_bounds__(kThreads) begin_lists(const InvertedIndex index, int lists) {
  Need before{0, 0, 0};
  for (int base = 0; base < lists; base += kThreads) {
    const int id = base + threadIdx.x;
    Need sum;
    const Need place = before + exclusive_scan({0, 0, id < lists ? index.count[id] : 0}, sum);
    before = before + sum;
    if (id < lists) index.begin[id] = place.entries;
  }
}

/// Queries of a sequence whose tiles are in a slice.
__device__ __forceinline__ QueryRange queries_of_slice(const Slices& slices, int slice, int head,
                                                       int batch, const Sequence& sequence) {
  const int first = head * slices.tiles.count;  // job
  const int begin = max(slice * slices.size, first);
  const int end = min((slice + 1) * slices.size, first + slices.tiles.count);
  if (begin >= end) return {0, 0};
  const int tile = slices.tiles.first(batch);
  const auto token = [&](int number) {
    return min(max(number - tile, 0) * slices.tiles.tile, sequence.q_len);
  };
  const int from = token(slices.number(end - 1)), to = token(slices.number(begin) + 1);
  return {from, to - from};
}

/// Entries of a list before the first one with at least this token.
__device__ __forceinline__ int entries_before(const int32_t* list, int count, int token) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (list_token(list[middle]) < token)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/// A thread cuts one list for one slice.
__global__ void __launch_bounds__(256)
    cut_lists(const __grid_constant__ AttnBwd p, const KeyPlan plan, const InvertedIndex index,
              const Slices slices) {
  const int lists = static_cast<int>(p.shape.heads_kv) * plan.groups.count;
  const int id = blockIdx.x * blockDim.x + threadIdx.x, slice = blockIdx.y;
  if (id >= lists) return;
  const TileMap::Place place = plan.groups.place(id % plan.groups.count);
  const Sequence sequence = load_sequence(p.shape, place.batch);
  const QueryRange queries =
      queries_of_slice(slices, slice, id / plan.groups.count, place.batch, sequence);
  int2 cut{0, 0};
  if (queries.count > 0) {
    const int32_t* list = index.queries + index.begin[id];
    const int count = index.count[id], from = entries_before(list, count, queries.begin);
    cut = {index.begin[id] + from,
           entries_before(list, count, queries.begin + queries.count) - from};
  }
  plan.cuts[slice * lists + id] = cut;
}

/// A key tile: part of a list's block.
struct KeyPart {
  int id, head;  // of its list
  TileMap::Place place;
  Sequence sequence;
  int key, keys;  // none past the end of the sequence

  __device__ __forceinline__ KeyPart(const AttnBwd& p, const KeyPlan& plan, int64_t tile)
      : id(static_cast<int>(tile / plan.parts)),
        head(id / plan.groups.count),
        place(plan.groups.place(id % plan.groups.count)),
        sequence(load_sequence(p.shape, place.batch)) {
    const int part = static_cast<int>(tile % plan.parts);
    key = place.index * plan.group_keys + part * plan.task_keys;
    keys = min(min(plan.task_keys, plan.group_keys - part * plan.task_keys),
               branch_length(sequence, plan.branch, p.config) - key);
  }
};

/// What a key tile gets from a slice.
struct SlicePart {
  int2 list;
  QueryRange range;
  int pieces;
};
__device__ __forceinline__ SlicePart slice_part(const AttnBwd& p, const KeyPlan& plan,
                                                const Slices& slices, const KeyPart& part,
                                                int slice, int piece) {
  const int lists = static_cast<int>(p.shape.heads_kv) * plan.groups.count;
  const QueryRange queries =
      queries_of_slice(slices, slice, part.head, part.place.batch, part.sequence);
  const QueryRange seen =
      range_queries(part.sequence, plan.range_branch, part.key, part.keys, p.config);
  const int begin = max(seen.begin, queries.begin);
  const int end = min(seen.begin + seen.count, queries.begin + queries.count);
  SlicePart x{plan.cuts[slice * lists + part.id], {begin, max(end - begin, 0)}, 0};
  x.pieces = ceil_div(x.list.y + x.range.count, piece);
  return x;
}
__device__ __forceinline__ int first_slice(const Slices& slices, int head) {
  return head * slices.tiles.count / slices.size;
}
__device__ __forceinline__ int last_slice(const Slices& slices, int head) {
  return ((head + 1) * slices.tiles.count - 1) / slices.size;
}

/// Slots of the key tiles: as many as the slice with the most pieces has. Where they do not all fit
/// the pieces grow, until every tile has one. One block of threads.
__global__ void __launch_bounds__(kThreads)
    plan_slots(const __grid_constant__ AttnBwd p, const KeyPlan plan, const Slices slices) {
  const int64_t tiles = p.shape.heads_kv * plan.groups.count * plan.parts;
  for (int piece = plan.piece;; piece = piece < INT32_MAX / 2 ? 2 * piece : INT32_MAX) {
    Need before{0, 0, 0};
    for (int64_t base = 0; base < tiles; base += kThreads) {
      const int64_t tile = base + threadIdx.x;
      int slots = 0;
      SplitTile split{};
      if (tile < tiles) {
        const KeyPart part(p, plan, tile);
        if (part.keys > 0) {
          int tasks = 0;
          for (int s = first_slice(slices, part.head); s <= last_slice(slices, part.head); ++s) {
            const int pieces = slice_part(p, plan, slices, part, s, piece).pieces;
            slots = max(slots, pieces);
            tasks += pieces;
          }
          if (tasks <= 1) slots = 0;
          split = SplitTile{part.place.batch, part.head, part.key, part.keys, 0, slots, 0, tasks};
        }
      }
      Need sum;
      split.slot = (before + exclusive_scan({0, slots, 0}, sum)).slots;
      before = before + sum;
      if (tile < tiles) plan.tiles[tile] = split;
    }
    if (before.slots <= plan.max_slots || piece == INT32_MAX) {
      if (threadIdx.x == 0) *plan.slice_piece = piece;
      return;
    }
  }
}

constexpr int kShortTask = 64;  // queries; shorter ones are not told apart

/// The tasks of a slice, a block of threads each.
__global__ void __launch_bounds__(kThreads)
    plan_slices(const __grid_constant__ AttnBwd p, const KeyPlan plan, const Slices slices) {
  const int slice = blockIdx.x, piece = *plan.slice_piece;
  const int per_head = plan.groups.count * plan.parts;
  const int first_job = slice * slices.size;
  const int last_job =
      min(first_job + slices.size, static_cast<int>(p.shape.heads_kv) * slices.tiles.count) - 1;
  const int64_t first = int64_t{slices.head(first_job)} * per_head;
  const int64_t end = int64_t{slices.head(last_job) + 1} * per_head;
  KeyTask* const tasks = plan.tasks + int64_t{slice} * plan.max_tasks;
  Need before{0, 0, 0};
  // The longest tasks first, by classes of length.
  for (int longest = piece, shortest; longest >= 0; longest = shortest) {
    shortest = longest >= kShortTask ? longest / 2 : -1;
    for (int64_t base = first; base < end; base += kThreads) {
      const int64_t tile = base + threadIdx.x;
      SlicePart x{};
      int number = 0, earlier = 0;  // tasks here, and the most that an earlier slice has
      SplitTile split{};
      const auto length = [&](int i) { return min(piece, x.list.y + x.range.count - i * piece); };
      const auto in_class = [&](int i) { return length(i) > shortest && length(i) <= longest; };
      int wanted = 0;
      if (tile < end) {
        const KeyPart part(p, plan, tile);
        split = plan.tiles[tile];
        if (part.keys > 0) {
          x = slice_part(p, plan, slices, part, slice, piece);
          number = x.pieces;
          // Keys that nobody sees get their zeros from the last slice.
          if (split.tasks == 0 && slice == last_slice(slices, part.head)) number = 1;
          for (int i = 0; i < number; ++i) wanted += in_class(i);
          if (split.slots > 0 && wanted > 0)
            for (int s = first_slice(slices, part.head); s < slice; ++s)
              earlier = max(earlier, slice_part(p, plan, slices, part, s, piece).pieces);
        }
      }
      Need sum;
      int place = (before + exclusive_scan({wanted, 0, 0}, sum)).tasks;
      before = before + sum;
      for (int i = 0; i < number; ++i) {
        if (!in_class(i)) continue;
        const int from = i * piece, to = from + length(i);
        const int list_from = min(from, x.list.y), list_to = min(to, x.list.y);
        tasks[place++] = KeyTask{split.batch,
                                 split.head,
                                 split.key,
                                 split.keys,
                                 x.list.x + list_from,
                                 list_to - list_from,
                                 x.range.begin + max(from - x.list.y, 0),
                                 max(to - x.list.y, 0) - max(from - x.list.y, 0),
                                 split.slots > 0 ? split.slot + i : -1,
                                 i < earlier,
                                 {}};
      }
    }
  }
  if (threadIdx.x == 0) plan.num_tasks[slice] = before.tasks;
}

}  // namespace

void launch_plan_key_tasks(const AttnBwd& p, const KeyPlan& plan, const InvertedIndex& index,
                           cudaStream_t stream) {
  launch_kernel(plan_key_tasks, "plan_key_tasks", 1, kThreads, 0, stream, p, plan, index);
}

void launch_begin_lists(const AttnBwd& p, const InvertedIndex& index, cudaStream_t stream) {
  launch_kernel(begin_lists, "begin_lists", 1, kThreads, 0, stream, index,
                static_cast<int>(p.shape.heads_kv * index.blocks.count));
}

void launch_plan_slices(const AttnBwd& p, const KeyPlan& plan, const InvertedIndex& index,
                        const Slices& slices, cudaStream_t stream) {
  const int64_t lists = p.shape.heads_kv * plan.groups.count;
  if (lists == 0) return;
  const dim3 grid(grid_size(ceil_div<int64_t>(lists, 256)), slices.count);
  launch_kernel(cut_lists, "cut_lists", grid, 256, 0, stream, p, plan, index, slices);
  launch_kernel(plan_slots, "plan_slots", 1, kThreads, 0, stream, p, plan, slices);
  launch_kernel(plan_slices, "plan_slices", slices.count, kThreads, 0, stream, p, plan, slices);
}

}  // namespace nsa::cuda::bwd
