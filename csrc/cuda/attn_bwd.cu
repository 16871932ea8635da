// Host side of the attention backward: which kernels run, in which order, on which workspace.
#include <algorithm>
#include <type_traits>

#include "cuda/common.h"
#include "cuda/instances/attn_instances.h"
#include "cuda/sm80/bwd_kernels.h"
#include "cuda/sm90/bwd.h"
#include "cuda/sm90/tensor_map.h"
#include "nsa/api.h"
#include "nsa/geometry.h"

namespace nsa::cuda {
namespace bwd {
namespace {

// About 12 tasks for each block of threads that an H100 runs at a time (of the portable kernel 2 on
// each of 132 SMs, of the Hopper one 1): the last ones to finish then cost little. A task of fewer
// than 4096 rows would spend too much of its time on its keys and results, and partial results take
// memory: at 65536 tokens 200 MB.
constexpr int64_t kTargetTasks = 3072, kHopperTargetTasks = 1536, kMinSplits = 1024;
constexpr int64_t kMinTaskRows = 4096;
constexpr int64_t kMinChunkRows = 64, kSortingWarps = 1024;

// dS of a slice (Slices) takes at most this much, or what one query tile needs. Smaller slices cost
// more: each key tile that it sees reads and writes its sums once a slice.
#ifdef NSA_EMULATION
constexpr int64_t kSliceBytes = 64 << 10;
#else
constexpr int64_t kSliceBytes = 256 << 20;
#endif
constexpr int64_t kSliceTaskRows = 16384, kExtraSlots = 256;

/// Which kernels of a call are those for Hopper.
struct Hopper {
  bool dq = false, ranges = false, lists = false;
  bool keep_ds = false;  // of the selected branch, from dK/dV to dQ (Slices)
};

/// Everything that the kernels of one call get, on one workspace.
struct Job {
  BwdArgs common;
  Hopper hopper;
  bool selected, shared_window;
  InvertedIndex index{};
  DqArgs dq{};
  Slices slices{};
  UnionBlock* union_blocks = nullptr;
  int32_t* union_counts = nullptr;
  int num_plans = 0;
  KeyPlan plans[kNumBranches];
  int64_t bytes;
};

/// Query tiles by slices.
Slices make_slices(const AttnBwd& p, const Hopper& hopper, const TileMap& tiles,
                   WorkspaceCursor& workspace) {
  const AttnShape& s = p.shape;
  const int64_t jobs = s.heads_kv * tiles.count;
  Slices slices{tiles};
  slices.size = static_cast<int>(jobs);
  slices.count = 1;
  if (!hopper.keep_ds || jobs == 0) return slices;
  const int64_t padded_group = int64_t{1} << sm90::log2_padded_group(s.heads_q / s.heads_kv);
  slices.units = static_cast<int>(p.index_count * ceil_div<int64_t>(p.config.select_size, 64));
  slices.unit_bytes = static_cast<int>(padded_group * 64 * 2);
  const int64_t tile_bytes = int64_t{tiles.tile} * slices.units * slices.unit_bytes;
  int64_t size = std::clamp<int64_t>(kSliceBytes / tile_bytes, 1, jobs);
  // Whole rounds of dQ.
  const int64_t round = multiprocessor_count();
  if (size > round && size < jobs) size = size / round * round;
  slices.size = static_cast<int>(size);
  slices.count = static_cast<int>(ceil_div(jobs, size));
  slices.grads = workspace.take<char>(size * tile_bytes);
  return slices;
}

/// Queries that the key tiles of a plan have in all, at most.
int64_t count_queries(const AttnBwd& p, const KeyPlan& plan) {
  const AttnShape& s = p.shape;
  const int64_t tiles = s.heads_kv * plan.groups.count * plan.parts;
  int64_t queries = 0;
  if (plan.has_list) queries += s.total_q * p.index_count * s.heads_kv * plan.parts;
  if (plan.range_branch == kWindow)
    queries += tiles * std::min<int64_t>(s.seqlen_q, int64_t{p.config.window} + plan.task_keys);
  if (plan.range_branch == kCompressed) {
    if (s.cu_seqlens_q) return tiles * s.seqlen_q;
    for (int64_t tile = 0; tile < plan.groups.per_sequence; ++tile) {
      const int64_t first = tile * plan.task_keys * p.config.block_stride + p.config.block_size - 1;
      const int64_t unseen = std::max<int64_t>(0, first - (s.seqlen_k - s.seqlen_q));
      queries += std::max<int64_t>(0, s.seqlen_q - unseen) * s.batch * s.heads_kv;
    }
  }
  return queries;
}

/// The dK/dV work of `branch`. The window may ride on the selected branch's keys.
KeyPlan make_plan(const AttnBwd& p, int branch, bool shared_window, const Hopper& hopper,
                  const Slices& slices, WorkspaceCursor& workspace, int64_t& partial_floats) {
  const AttnShape& s = p.shape;
  const BlockConfig& c = p.config;
  KeyPlan plan{};
  plan.branch = branch;
  plan.has_list = branch == kSelected;
  plan.range_branch = branch != kSelected ? branch : shared_window ? int{kWindow} : -1;
  const bool on_hopper = plan.has_list ? hopper.lists : hopper.ranges;
  plan.task_keys = !on_hopper      ? kTaskKeys
                   : plan.has_list ? sm90::kListTaskKeys
                                   : sm90::kRangeTaskKeys;
  plan.group_keys = plan.has_list ? c.select_size : plan.task_keys;
  plan.parts = ceil_div(plan.group_keys, plan.task_keys);
  if (branch == kCompressed)
    plan.groups = make_tile_map(s.cu_seqlens_k, s.batch,
                                num_compressed(s.seqlen_k, c.block_size, c.block_stride),
                                s.total_k / c.block_stride, c.block_stride, plan.group_keys);
  else
    plan.groups = make_tile_map(s.cu_seqlens_k, s.batch, s.seqlen_k, s.total_k, 1, plan.group_keys);
  const int64_t tiles = s.heads_kv * plan.groups.count * plan.parts;
  const int64_t queries = count_queries(p, plan), group = s.heads_q / s.heads_kv;
  const int64_t splits =
      std::max((on_hopper ? kHopperTargetTasks : kTargetTasks) - tiles, kMinSplits);
  const int64_t piece =
      round_up<int64_t>(std::max(ceil_div(queries, splits), ceil_div(kMinTaskRows, group)), 32);
  plan.piece = static_cast<int>(std::min<int64_t>(piece, INT32_MAX / 64 * 32));
  const int64_t full_pieces = queries / plan.piece;
  plan.max_tasks = static_cast<int>(grid_size(tiles + full_pieces));
  // Only keys with more than `piece` queries are split, into less than twice their full pieces.
  plan.max_slots = static_cast<int>(std::min(tiles + full_pieces, 2 * full_pieces));
  int64_t longest = plan.has_list ? s.seqlen_q : 0;  // queries of one key tile, at most
  if (plan.range_branch == kCompressed) longest += s.seqlen_q;
  if (plan.range_branch == kWindow)
    longest += std::min<int64_t>(s.seqlen_q, int64_t{c.window} + plan.task_keys);
  plan.max_pieces = static_cast<int>(std::max<int64_t>(1, ceil_div<int64_t>(longest, plan.piece)));
  if (plan.has_list && slices.keep_ds()) {
    // Of a slice: tiles of the heads that it has a part of, and full pieces.
    const int64_t heads = std::min<int64_t>(s.heads_kv, (slices.size - 2) / slices.tiles.count + 2);
    const int64_t slice_tiles = heads * plan.groups.count * plan.parts;
    const int64_t slice_tokens = int64_t{slices.size} * slices.tiles.tile;
    plan.piece = static_cast<int>(round_up<int64_t>(ceil_div(kSliceTaskRows, group), 32));
    const int64_t slice_queries =
        std::min(slice_tokens * p.index_count * plan.parts, queries) +
        (plan.range_branch < 0 ? 0 : slice_tiles * (c.window + plan.task_keys));
    plan.max_tasks = static_cast<int>(grid_size(slice_tiles + slice_queries / plan.piece));
    plan.max_slots = static_cast<int>(tiles + kExtraSlots);
    plan.cuts = workspace.take<int2>(slices.count * s.heads_kv * plan.groups.count);
    plan.slice_piece = workspace.take<int>(1);
  }
  const int64_t slice_count = plan.has_list ? slices.count : 1;
  plan.tasks = workspace.take<KeyTask>(slice_count * plan.max_tasks);
  plan.num_tasks = workspace.take<int>(slice_count);
  plan.tiles = workspace.take<SplitTile>(tiles);
  partial_floats =
      std::max(partial_floats, int64_t{plan.max_slots} * plan.task_keys * (s.dim_qk + s.dim_v));
  return plan;
}

Job make_job(const AttnBwd& p, const Hopper& hopper, void* memory) {
  const AttnShape& s = p.shape;
  const int64_t group = s.heads_q / s.heads_kv;
  WorkspaceCursor workspace(memory);
  Job job{};
  job.common = BwdArgs{p, workspace.take<RowStats>(kNumBranches * s.total_q * s.heads_q),
                       static_cast<int>(group)};
  job.hopper = hopper;
  job.selected = p.branch[kSelected].enabled;
  job.shared_window = p.branch[kWindow].enabled && !p.branch[kWindow].dk.ptr;
  job.dq.common = job.common;
  job.dq.tile_tokens = hopper.dq ? sm90::query_tile_tokens(s.dim_qk, job.common.group)
                                 : query_tile_tokens(s.dim_qk, job.common.group);
  job.dq.tiles =
      make_tile_map(s.cu_seqlens_q, s.batch, s.seqlen_q, s.total_q, 1, job.dq.tile_tokens);
  if (job.selected) {
    InvertedIndex& index = job.index;
    index.blocks =
        make_tile_map(s.cu_seqlens_k, s.batch, s.seqlen_k, s.total_k, 1, p.config.select_size);
    // Cursors take no more memory than the lists themselves.
    const int64_t chunk = std::max({kMinChunkRows, ceil_div(s.total_q * s.heads_kv, kSortingWarps),
                                    index.blocks.count / p.index_count + int64_t{1}});
    index.chunk_rows = static_cast<int>(chunk);
    index.chunks = static_cast<int>(ceil_div(s.total_q, chunk));
    const int64_t lists = s.heads_kv * index.blocks.count;
    const int64_t entries = s.total_q * s.heads_kv * p.index_count;
    if (entries > INT32_MAX) throw std::runtime_error("more than 2^31 - 1 selected blocks");
    index.cursor = workspace.take<int32_t>(lists * index.chunks);
    index.count = workspace.take<int32_t>(lists);
    index.begin = workspace.take<int32_t>(lists);
    index.queries = workspace.take<int32_t>(entries);
    index.chosen = workspace.take<uint8_t>(s.heads_kv * s.total_q);
    const int64_t tiles = s.heads_kv * job.dq.tiles.count;
    job.union_blocks = workspace.take<UnionBlock>(tiles * job.dq.tile_tokens * p.index_count);
    job.union_counts = workspace.take<int32_t>(tiles);
    job.dq.union_blocks = job.union_blocks;
    job.dq.union_counts = job.union_counts;
  }
  job.slices = make_slices(p, hopper, job.dq.tiles, workspace);
  job.slices.chosen = job.index.chosen;
  job.dq.slices = job.slices;
  int64_t partial_floats = 0;
  for (int c = 0; c < kNumBranches; ++c)
    if (p.branch[c].enabled && !(c == kWindow && job.shared_window))
      job.plans[job.num_plans++] =
          make_plan(p, c, job.shared_window, hopper, job.slices, workspace, partial_floats);
  // One after the other, the plans use the same memory.
  float* partial = workspace.take<float>(partial_floats);
  for (KeyPlan& plan : job.plans) plan.partial = partial;
  job.bytes = workspace.bytes();
  return job;
}

struct Kernels {
  void (*dq)(const DqArgs&, cudaStream_t);
  void (*ranges)(const DkvArgs&, cudaStream_t);
  void (*lists)(const DkvArgs&, cudaStream_t);
};

/// The instances for the call's head dims; null ones where there are none.
template <class T>
Kernels find_kernels(const AttnShape& s, const Hopper& hopper) {
#ifdef NSA_EXT_WITH_SM90
#define NSA_BWD_PICK(kHopper, kName, kDk, kDv) \
  hopper.kHopper ? sm90::kName<T, kDk, kDv> : kName<T, kDk, kDv>
#else
#define NSA_BWD_PICK(kHopper, kName, kDk, kDv) kName<T, kDk, kDv>
#endif
#define NSA_BWD_FIND(kType, kDk, kDv)                                \
  if (std::is_same_v<T, kType> && s.dim_qk == kDk && s.dim_v == kDv) \
    return {NSA_BWD_PICK(dq, launch_bwd_dq, kDk, kDv),               \
            NSA_BWD_PICK(ranges, launch_bwd_dkv, kDk, kDv),          \
            NSA_BWD_PICK(lists, launch_bwd_dkv, kDk, kDv)};
  NSA_ATTN_INSTANCES(NSA_BWD_FIND)
#undef NSA_BWD_FIND
#undef NSA_BWD_PICK
  return {};
}

#ifdef NSA_EXT_WITH_SM90
/// Why the Hopper kernels would not take a call that the portable ones take; null where they would.
const char* hopper_unsupported(const AttnBwd& p) {
  const ComputeCapability device;
  if (device.major != 9 || device.minor != 0)
    return "the Hopper kernels need compute capability 9.0";
  const AttnShape& s = p.shape;
  const auto reaches = [&](const InView& view, int64_t heads) {
    return cuda::sm90::can_map(view, s.cu_seqlens_q ? 1 : s.batch, heads);
  };
  bool all = reaches(p.q, s.heads_q) && reaches(p.dout, s.heads_q);
  for (const BranchBwd& branch : p.branch)
    if (branch.enabled) all = all && reaches(branch.k, s.heads_kv) && reaches(branch.v, s.heads_kv);
  return all ? nullptr : "the Hopper kernels need strides from 1 to 2^39 elements";
}
#endif

/// The rule by which a call's kernels are chosen. The Hopper kernels take more shapes than these,
/// but only these have been timed against the portable ones: 1.4 to 1.6 times as fast on an H100
/// (docs/kernels/backward.md).
Hopper choose_kernels([[maybe_unused]] const AttnBwd& p, Backend backend) {
  if (backend == Backend::kSm80) return {};
#ifdef NSA_EXT_WITH_SM90
  const AttnShape& s = p.shape;
  Hopper all{true, true, true};
  all.keep_ds = p.branch[kSelected].enabled && s.total_q > 0 && s.total_k > 0;
  const char* reason = hopper_unsupported(p);
  if (backend == Backend::kSm90) {
    if (reason) throw std::invalid_argument(reason);
    return all;
  }
  const int64_t group = s.heads_q / s.heads_kv;
  const bool timed = group >= 8 && group <= 16;
  return timed && !reason ? all : Hopper{};
#else
  if (backend == Backend::kSm90) throw std::invalid_argument("this build has no Hopper kernels");
  return {};
#endif
}

void check(const AttnBwd& p) {
  const AttnShape& s = p.shape;
  if (s.seqused_k) throw std::invalid_argument("the backward takes no seqused_k");
  if (s.heads_q / s.heads_kv > kMaxGroup)
    throw std::invalid_argument("more than 64 query heads to a key-value head");
  if (p.branch[kSelected].enabled && (p.index_count < 1 || p.index_count > kMaxIndexCount))
    throw std::invalid_argument("the number of selected blocks must be 1 to 64");
  if (p.branch[kWindow].enabled && !p.branch[kWindow].dk.ptr && !p.branch[kSelected].enabled &&
      s.total_k > 0)
    throw std::invalid_argument("the window's dk and dv need a place");
  if (s.seqlen_q >= 1 << kListTokenBits)
    throw std::invalid_argument("a sequence of 2^26 queries or more");
  const int64_t batch = s.cu_seqlens_q ? 1 : s.batch;
  check_rows_aligned(p.q, "q", batch, s.heads_q);
  check_rows_aligned(p.dout, "dout", batch, s.heads_q);
  check_rows_aligned(p.dq, "dq", batch, s.heads_q);
  for (const BranchBwd& branch : p.branch) {
    if (!branch.enabled) continue;
    check_rows_aligned(branch.out, "out", batch, s.heads_q);
    check_rows_aligned(branch.k, "k", batch, s.heads_kv);
    check_rows_aligned(branch.v, "v", batch, s.heads_kv);
    check_rows_aligned(branch.dk, "dk", batch, s.heads_kv);
    check_rows_aligned(branch.dv, "dv", batch, s.heads_kv);
  }
}

template <class T>
void run(const AttnBwd& p, const Hopper& hopper, void* memory, cudaStream_t stream) {
  const Kernels kernels = find_kernels<T>(p.shape, hopper);
  if (!kernels.dq) throw std::invalid_argument("no backward kernel for these head dims");
  const Job job = make_job(p, hopper, memory);
  if (p.shape.total_q > 0) launch_bwd_preprocess<T>(job.common, stream);
  if (job.selected) {
    launch_count_selection(p, job.index, stream);
    launch_union_selection(job.dq, job.union_blocks, job.union_counts, stream);
  }
  const bool keep_ds = job.slices.keep_ds();
  if (!keep_ds) kernels.dq(job.dq, stream);
  if (p.branch[kCompressed].enabled && p.shape.cu_seqlens_k)
    launch_zero_unused_rows<T>(job.common, stream);
  for (int i = 0; i < job.num_plans; ++i) {
    DkvArgs args{job.common, job.plans[i], job.index.queries, job.slices};
    if (args.plan.has_list && keep_ds) {
      launch_begin_lists(p, job.index, stream);
      launch_fill_selection(p, job.index, stream);
      launch_plan_slices(p, args.plan, job.index, job.slices, stream);
      DqArgs dq = job.dq;
      for (int slice = 0; slice < job.slices.count; ++slice) {
        args.slice = dq.slice = slice;
        kernels.lists(args, stream);
        kernels.dq(dq, stream);
      }
    } else {
      launch_plan_key_tasks(p, args.plan, job.index, stream);
      if (args.plan.has_list) launch_fill_selection(p, job.index, stream);
      (args.plan.has_list ? kernels.lists : kernels.ranges)(args, stream);
    }
    launch_bwd_sum<T>(args, stream);
  }
}

}  // namespace
}  // namespace bwd

int64_t attn_bwd_workspace(const AttnBwd& params, Backend backend) {
  return bwd::make_job(params, bwd::choose_kernels(params, backend), nullptr).bytes;
}

void attn_bwd(const AttnBwd& params, void* workspace, Stream stream, Backend backend) {
  if (params.shape.batch == 0 || params.shape.heads_q == 0) return;
  bwd::check(params);
  const bwd::Hopper hopper = bwd::choose_kernels(params, backend);
  dispatch_dtype(params.shape.dtype, [&](auto tag) {
    bwd::run<typename decltype(tag)::type>(params, hopper, workspace,
                                           static_cast<cudaStream_t>(stream));
  });
}

}  // namespace nsa::cuda
