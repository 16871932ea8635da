#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/attn_setup.h"

namespace nsa::cpu {

namespace {

int64_t stored_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

bool shares_grads(const AttnBwd& params) {
  return params.branch[kWindow].enabled && !params.branch[kWindow].dk.ptr;
}

void check(const AttnBwd& params) {
  const AttnShape& shape = params.shape;
  int enabled = 0;
  for (const BranchBwd& branch : params.branch) enabled += branch.enabled;
  require(params.gates.ptr || shape.total_q == 0 || enabled <= 1,
          "without gates only one branch may be enabled");
  require(params.gates.ptr || !params.dgates.ptr, "dgates need gates");
  for (int i = 0; i < kNumBranches; ++i) {
    const BranchBwd& branch = params.branch[i];
    if (!branch.enabled) continue;
    const int64_t keys = i == kCompressed ? num_compressed(shape.seqlen_k, params.config.block_size,
                                                           params.config.block_stride) *
                                                shape.batch
                                          : shape.total_k;
    require(!branch.dk.ptr == !branch.dv.ptr || keys == 0, "dk and dv go together");
    const bool shared = i == kWindow && params.branch[kSelected].enabled;
    require(branch.dk.ptr || keys == 0 || shared, "dk and dv of an enabled branch are missing");
    if (shape.total_q == 0) continue;
    require(branch.v.ptr || keys == 0, "the values of an enabled branch are missing");
    require(branch.out.ptr && branch.lse.ptr, "the saved output or lse of a branch is missing");
  }
  require(!shape.seqused_k, "the backward takes no seqused_k");
  require(shape.total_q == 0 || (params.dout.ptr && params.dq.ptr), "dout or dq is missing");
}

/// Zeros the compressed rows of a packed batch that hold no token.
void clear_unused_rows(const AttnBwd& params, const std::vector<Sequence>& sequences) {
  const BranchBwd& branch = params.branch[kCompressed];
  const AttnShape& shape = params.shape;
  if (!branch.enabled || !shape.cu_seqlens_k) return;
  const auto clear = [&](int64_t begin, int64_t end) {
    const int64_t size = stored_size(shape.dtype);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t head = 0; head < shape.heads_kv; ++head) {
        std::memset(static_cast<char*>(branch.dk.ptr) + offset_of(branch.dk, 0, row, head) * size,
                    0, shape.dim_qk * size);
        std::memset(static_cast<char*>(branch.dv.ptr) + offset_of(branch.dv, 0, row, head) * size,
                    0, shape.dim_v * size);
      }
    }
  };
  int64_t used = 0;
  for (const Sequence& s : sequences) {
    if (s.len_cmp == 0) continue;
    clear(used, s.cmp_row);
    used = s.cmp_row + s.len_cmp;
  }
  clear(used, shape.total_k / params.config.block_stride);
}

/// The partial sums of every chunk of queries, and what adds them up.
struct Partials {
  std::vector<ChunkGrads> grads;  // by item
  std::vector<int64_t> first_item;
  std::vector<ReduceItem> reductions;
  Buffer memory;

  Partials(const BwdPlan& plan, const AttnSetup& setup) {
    const int64_t heads = plan.shape.heads_kv;
    first_item.assign(setup.sequences.size() * heads + 1, 0);
    int64_t elements = 0;
    for (const QueryItem& item : setup.items) {
      ++first_item[item.sequence * heads + item.head + 1];
      grads.emplace_back();
      for (int branch = 0; branch < kNumBranches; ++branch) {
        const Sequence& s = setup.sequences[item.sequence];
        grads.back().branch[branch] = seen_keys(plan, s, item, branch, setup.kernels.panel);
        elements += grads.back().branch[branch].count * (plan.ld_qk + plan.ld_v);
      }
    }
    for (std::size_t i = 1; i < first_item.size(); ++i) first_item[i] += first_item[i - 1];

    const int64_t size = compute_size(plan.shape.dtype);
    memory = Buffer(std::max<int64_t>(elements * size, 64));
    char* at = memory.data();
    for (ChunkGrads& chunk : grads) {
      for (PartialGrads& partial : chunk.branch) {
        partial.dk = at;
        partial.dv = at += partial.count * plan.ld_qk * size;
        at += partial.count * plan.ld_v * size;
      }
    }

    constexpr int64_t kStep = 256;
    for (int64_t b = 0; b < plan.num_sequences; ++b) {
      const Sequence& s = setup.sequences[b];
      for (int32_t branch = 0; branch < kNumBranches; ++branch) {
        if (!has_grads(plan, branch)) continue;
        const int64_t length = branch == kCompressed ? s.len_cmp : s.len_k;
        for (int64_t head = 0; head < heads; ++head) {
          for (int64_t begin = 0; begin < length; begin += kStep) {
            reductions.push_back({branch, b, head, begin, std::min(begin + kStep, length)});
          }
        }
      }
    }
  }

 private:
  static bool has_grads(const BwdPlan& plan, int branch) {
    return plan.enabled[branch] && !(branch == kWindow && plan.window_shares_grads);
  }

  /// The keys of a branch that the visits of a chunk touch, a few masked ones among them.
  static PartialGrads seen_keys(const BwdPlan& plan, const Sequence& s, const QueryItem& item,
                                int branch, int64_t panel) {
    const BlockConfig& c = plan.config;
    const int64_t first = s.position(item.first), end = first + item.count;
    if (!has_grads(plan, branch) || end <= 0) return {};
    if (branch == kCompressed) {
      return {0, visible_compressed(end - 1, c.block_size, c.block_stride), nullptr, nullptr};
    }
    if (branch == kSelected) {  // whole blocks
      const int64_t blocks = num_select_blocks(end, c.select_size);
      return {0, std::min(blocks * c.select_size, s.len_k), nullptr, nullptr};
    }
    const int64_t begin = std::max<int64_t>(first - c.window + 1, 0) / panel * panel;
    return {begin, end - begin, nullptr, nullptr};
  }
};

}  // namespace

void attn_bwd(const AttnBwd& params, const Executor& executor) {
  BwdPlan plan{};
  take_call(plan, params);
  plan.parts = kKeysT | kValuesT | kKeys;
  plan.rows = params.shape.total_q;
  plan.window_shares_grads = shares_grads(params);
  AttnSetup setup(plan, executor, AttnSetup::Items::kChunks);
  check(params);
  clear_unused_rows(params, setup.sequences);

  const AttnKernels& kernels = setup.kernels;
  const int64_t element = compute_size(params.shape.dtype);
  const int64_t num_items = static_cast<int64_t>(setup.items.size());
  Buffer dots(std::max<int64_t>(kNumBranches * plan.rows * params.shape.heads_q * element, 64));
  plan.dots = dots.data();
  for_each_item(executor, num_items, kernels.rows_scratch(plan), [&](int64_t item, char* scratch) {
    kernels.dots(plan, setup.items[item], scratch);
  });
  for_each_item(executor, static_cast<int64_t>(setup.pack_items.size()),
                std::max(plan.ld_qk, plan.ld_v) * element, [&](int64_t item, char* scratch) {
                  kernels.pack(plan, setup.pack_items[item], scratch);
                });

  const Partials partials(plan, setup);
  plan.partials = partials.grads.data();
  plan.first_item = partials.first_item.data();
  // Late queries see more compressed tokens: the long items first.
  std::vector<int64_t> order(num_items);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const QueryItem &x = setup.items[a], &y = setup.items[b];
    return setup.sequences[x.sequence].position(x.first + x.count) >
           setup.sequences[y.sequence].position(y.first + y.count);
  });
  for_each_item(executor, num_items, kernels.bwd_scratch(plan),
                [&](int64_t item, char* scratch) { kernels.bwd(plan, order[item], scratch); });
  for_each_item(executor, static_cast<int64_t>(partials.reductions.size()),
                kernels.rows_scratch(plan), [&](int64_t item, char* scratch) {
                  kernels.reduce(plan, partials.reductions[item], scratch);
                });
}

}  // namespace nsa::cpu
