// Host side of the attention backward: which kernels run, in which order, on which workspace.
#include <algorithm>
#include <type_traits>

#include "cuda/common.h"
#include "cuda/instances/attn_instances.h"
#include "cuda/sm80/bwd_kernels.h"
#include "nsa/api.h"
#include "nsa/geometry.h"

namespace nsa::cuda {
namespace bwd {
namespace {

// About 12 tasks for each block of threads that an H100 runs at a time (2 on each of 132 SMs): the
// last ones to finish then cost little. A task of fewer than 4096 rows would spend too much of its
// time on its keys and results, and partial results take memory: at 65536 tokens 200 MB.
constexpr int64_t kTargetTasks = 3072, kMinSplits = 1024, kMinTaskRows = 4096;
constexpr int64_t kMinChunkRows = 256;  // 1024 warps sort the lists of 65536 queries x 4 heads

/// Everything that the kernels of one call get, on one workspace.
struct Job {
  BwdArgs common;
  bool selected, shared_window;
  InvertedIndex index{};
  DqArgs dq{};
  UnionBlock* union_blocks = nullptr;
  int32_t* union_counts = nullptr;
  int num_plans = 0;
  KeyPlan plans[kNumBranches];
  int64_t bytes;
};

/// Queries that the key tiles of a plan have in all, at most.
int64_t count_queries(const AttnBwd& p, const KeyPlan& plan) {
  const AttnShape& s = p.shape;
  const int64_t tiles = s.heads_kv * plan.groups.count * plan.parts;
  int64_t queries = 0;
  if (plan.has_list) queries += s.total_q * p.index_count * s.heads_kv * plan.parts;
  if (plan.range_branch == kWindow)
    queries += tiles * std::min<int64_t>(s.seqlen_q, int64_t{p.config.window} + kTaskKeys);
  if (plan.range_branch == kCompressed) {
    if (s.cu_seqlens_q) return tiles * s.seqlen_q;
    for (int64_t tile = 0; tile < plan.groups.per_sequence; ++tile) {
      const int64_t first = tile * kTaskKeys * p.config.block_stride + p.config.block_size - 1;
      const int64_t unseen = std::max<int64_t>(0, first - (s.seqlen_k - s.seqlen_q));
      queries += std::max<int64_t>(0, s.seqlen_q - unseen) * s.batch * s.heads_kv;
    }
  }
  return queries;
}

/// The dK/dV work of `branch`. The window may ride on the selected branch's keys.
KeyPlan make_plan(const AttnBwd& p, int branch, bool shared_window, WorkspaceCursor& workspace,
                  int64_t& partial_floats) {
  const AttnShape& s = p.shape;
  const BlockConfig& c = p.config;
  KeyPlan plan{};
  plan.branch = branch;
  plan.has_list = branch == kSelected;
  plan.range_branch = branch != kSelected ? branch : shared_window ? int{kWindow} : -1;
  plan.group_keys = plan.has_list ? c.select_size : kTaskKeys;
  plan.parts = ceil_div(plan.group_keys, kTaskKeys);
  if (branch == kCompressed)
    plan.groups = make_tile_map(s.cu_seqlens_k, s.batch,
                                num_compressed(s.seqlen_k, c.block_size, c.block_stride),
                                s.total_k / c.block_stride, c.block_stride, plan.group_keys);
  else
    plan.groups = make_tile_map(s.cu_seqlens_k, s.batch, s.seqlen_k, s.total_k, 1, plan.group_keys);
  const int64_t tiles = s.heads_kv * plan.groups.count * plan.parts;
  const int64_t queries = count_queries(p, plan), group = s.heads_q / s.heads_kv;
  const int64_t splits = std::max(kTargetTasks - tiles, kMinSplits);
  const int64_t piece =
      round_up<int64_t>(std::max(ceil_div(queries, splits), ceil_div(kMinTaskRows, group)), 32);
  plan.piece = static_cast<int>(std::min<int64_t>(piece, INT32_MAX / 64 * 32));
  const int64_t full_pieces = queries / plan.piece;
  plan.max_tasks = static_cast<int>(grid_size(tiles + full_pieces));
  // Only keys with more than `piece` queries are split, into less than twice their full pieces.
  plan.max_slots = static_cast<int>(std::min(tiles + full_pieces, 2 * full_pieces));
  plan.tasks = workspace.take<KeyTask>(plan.max_tasks);
  plan.num_tasks = workspace.take<int>(1);
  plan.tiles = workspace.take<SplitTile>(tiles);
  partial_floats =
      std::max(partial_floats, plan.max_slots * int64_t{kTaskKeys} * (s.dim_qk + s.dim_v));
  return plan;
}

Job make_job(const AttnBwd& p, void* memory) {
  const AttnShape& s = p.shape;
  const int64_t group = s.heads_q / s.heads_kv;
  WorkspaceCursor workspace(memory);
  Job job{};
  job.common = BwdArgs{p, workspace.take<RowStats>(kNumBranches * s.total_q * s.heads_q),
                       static_cast<int>(group)};
  job.selected = p.branch[kSelected].enabled;
  job.shared_window = p.branch[kWindow].enabled && !p.branch[kWindow].dk.ptr;
  job.dq.common = job.common;
  job.dq.tile_tokens = query_tile_tokens(s.dim_qk, job.common.group);
  job.dq.tiles =
      make_tile_map(s.cu_seqlens_q, s.batch, s.seqlen_q, s.total_q, 1, job.dq.tile_tokens);
  if (job.selected) {
    InvertedIndex& index = job.index;
    index.blocks =
        make_tile_map(s.cu_seqlens_k, s.batch, s.seqlen_k, s.total_k, 1, p.config.select_size);
    // Cursors take no more memory than the lists themselves.
    const int64_t chunk = std::max<int64_t>(kMinChunkRows, index.blocks.count / p.index_count + 1);
    index.chunk_rows = static_cast<int>(chunk);
    index.chunks = static_cast<int>(ceil_div(s.total_q, chunk));
    const int64_t lists = s.heads_kv * index.blocks.count;
    const int64_t entries = s.total_q * s.heads_kv * p.index_count;
    if (entries > INT32_MAX) throw std::runtime_error("more than 2^31 - 1 selected blocks");
    index.cursor = workspace.take<int32_t>(lists * index.chunks);
    index.count = workspace.take<int32_t>(lists);
    index.begin = workspace.take<int32_t>(lists);
    index.queries = workspace.take<int32_t>(entries);
    const int64_t tiles = s.heads_kv * job.dq.tiles.count;
    job.union_blocks = workspace.take<UnionBlock>(tiles * job.dq.tile_tokens * p.index_count);
    job.union_counts = workspace.take<int32_t>(tiles);
    job.dq.union_blocks = job.union_blocks;
    job.dq.union_counts = job.union_counts;
  }
  int64_t partial_floats = 0;
  for (int c = 0; c < kNumBranches; ++c)
    if (p.branch[c].enabled && !(c == kWindow && job.shared_window))
      job.plans[job.num_plans++] = make_plan(p, c, job.shared_window, workspace, partial_floats);
  // One after the other, the plans use the same memory.
  float* partial = workspace.take<float>(partial_floats);
  for (KeyPlan& plan : job.plans) plan.partial = partial;
  job.bytes = workspace.bytes();
  return job;
}

struct Kernels {
  void (*dq)(const DqArgs&, cudaStream_t);
  void (*dkv)(const DkvArgs&, cudaStream_t);
};

/// The instance for the call's head dims; a null one where there is none.
template <class T>
Kernels find_kernels(const AttnShape& s) {
#define NSA_BWD_FIND(kType, kDk, kDv)                                \
  if (std::is_same_v<T, kType> && s.dim_qk == kDk && s.dim_v == kDv) \
    return {launch_bwd_dq<T, kDk, kDv>, launch_bwd_dkv<T, kDk, kDv>};
  NSA_ATTN_INSTANCES(NSA_BWD_FIND)
#undef NSA_BWD_FIND
  return {};
}

/// Rows are read and written 16 bytes at a time. The stride of an axis of one element is free.
template <class View>
void check_aligned(const View& view, const char* name, int64_t batch, int64_t heads) {
  const bool aligned = reinterpret_cast<uintptr_t>(view.ptr) % 16 == 0 &&
                       (batch == 1 || view.batch % 8 == 0) && view.seq % 8 == 0 &&
                       (heads == 1 || view.head % 8 == 0);
  if (!aligned)
    throw std::invalid_argument(std::string(name) + ": rows must start at multiples of 16 bytes");
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
  const int64_t batch = s.cu_seqlens_q ? 1 : s.batch;
  check_aligned(p.q, "q", batch, s.heads_q);
  check_aligned(p.dout, "dout", batch, s.heads_q);
  check_aligned(p.dq, "dq", batch, s.heads_q);
  for (const BranchBwd& branch : p.branch) {
    if (!branch.enabled) continue;
    check_aligned(branch.out, "out", batch, s.heads_q);
    check_aligned(branch.k, "k", batch, s.heads_kv);
    check_aligned(branch.v, "v", batch, s.heads_kv);
    check_aligned(branch.dk, "dk", batch, s.heads_kv);
    check_aligned(branch.dv, "dv", batch, s.heads_kv);
  }
}

template <class T>
void run(const AttnBwd& p, void* memory, cudaStream_t stream) {
  const Kernels kernels = find_kernels<T>(p.shape);
  if (!kernels.dq) throw std::invalid_argument("no backward kernel for these head dims");
  const Job job = make_job(p, memory);
  if (p.shape.total_q > 0) launch_bwd_preprocess<T>(job.common, stream);
  if (job.selected) {
    launch_count_selection(p, job.index, stream);
    launch_union_selection(job.dq, job.union_blocks, job.union_counts, stream);
  }
  kernels.dq(job.dq, stream);
  if (p.branch[kCompressed].enabled && p.shape.cu_seqlens_k)
    launch_zero_unused_rows<T>(job.common, stream);
  for (int i = 0; i < job.num_plans; ++i) {
    const DkvArgs args{job.common, job.plans[i], job.index.queries};
    launch_plan_key_tasks(p, args.plan, job.index, stream);
    if (args.plan.has_list) launch_fill_selection(p, job.index, stream);
    kernels.dkv(args, stream);
    launch_bwd_sum<T>(args, stream);
  }
}

}  // namespace
}  // namespace bwd

int64_t attn_bwd_workspace(const AttnBwd& params, Backend) {
  return bwd::make_job(params, nullptr).bytes;
}

void attn_bwd(const AttnBwd& params, void* workspace, Stream stream, Backend backend) {
  if (backend == Backend::kSm90)
    throw std::runtime_error("the attention backward has no Hopper kernels");
  if (params.shape.batch == 0 || params.shape.heads_q == 0) return;
  bwd::check(params);
  dispatch_dtype(params.shape.dtype, [&](auto tag) {
    bwd::run<typename decltype(tag)::type>(params, workspace, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace nsa::cuda
