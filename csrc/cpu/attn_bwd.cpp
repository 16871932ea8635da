#include <algorithm>
#include <cstring>

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
                                                           params.config.block_stride)
                                          : shape.total_k;
    require(!branch.dk.ptr == !branch.dv.ptr || keys == 0, "dk and dv go together");
    const bool shared = i == kWindow && params.branch[kSelected].enabled;
    require(branch.dk.ptr || keys == 0 || shared, "dk and dv of an enabled branch are missing");
    if (shape.total_q == 0) continue;
    require(branch.v.ptr || keys == 0, "the values of an enabled branch are missing");
    require(branch.out.ptr && branch.lse.ptr, "the saved output or lse of a branch is missing");
  }
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

/// The inverse of block_indices for every (sequence, kv head).
struct InvertedIndex {
  std::vector<int64_t> begin;        // blocks + 1 of every (sequence, head), into tokens
  std::vector<int64_t> first_begin;  // by sequence: where its first head's lie
  Buffer tokens;

  InvertedIndex(const AttnPlan& plan, const std::vector<Sequence>& sequences,
                const Executor& executor) {
    const int64_t heads = plan.shape.heads_kv;
    std::vector<int64_t> first_token;
    int64_t begins = 0, total = 0;
    for (const Sequence& s : sequences) {
      first_begin.push_back(begins);
      first_token.push_back(total);
      begins += heads * (num_select_blocks(s.len_k, plan.config.select_size) + 1);
      total += heads * s.len_q * plan.index_count;
    }
    begin.resize(begins);
    tokens = Buffer(std::max<int64_t>(total * sizeof(int32_t), 64));
    for_each_item(executor, static_cast<int64_t>(sequences.size()) * heads,
                  std::max<int64_t>(plan.max_select_blocks * sizeof(int32_t), 64),
                  [&](int64_t item, char* seen) {
                    const int64_t b = item / heads, head = item % heads;
                    const Sequence& s = sequences[b];
                    const int64_t blocks = num_select_blocks(s.len_k, plan.config.select_size);
                    const int64_t at = first_token[b] + head * s.len_q * plan.index_count;
                    int64_t* from = begin.data() + first_begin[b] + head * (blocks + 1);
                    invert(plan.selected_rows(s, head, 0, s.len_q), plan.config.select_size, blocks,
                           from, reinterpret_cast<int32_t*>(seen), tokens.as<int32_t>() + at);
                    for (int64_t j = 0; j <= blocks; ++j) from[j] += at;
                  });
  }
};

/// Work items of the key-stationary pass: sums over parts of long lists, then all tiles of keys.
struct KeyItems {
  std::vector<KeyItem> partials, tiles;

  KeyItems(const BwdPlan& plan, const std::vector<Sequence>& sequences,
           const InvertedIndex* index) {
    for (int64_t b = 0; b < static_cast<int64_t>(sequences.size()); ++b) {
      for (int64_t head = 0; head < plan.shape.heads_kv; ++head) {
        if (plan.enabled[kCompressed]) add_dense(kCompressed, b, head, sequences[b].len_cmp);
        if (plan.enabled[kWindow] && !plan.window_shares_grads) {
          add_dense(kWindow, b, head, sequences[b].len_k);
        }
        if (plan.enabled[kSelected]) add_selected(plan, sequences[b], b, head, *index);
      }
    }
    const auto cost = [&](const KeyItem& item) {
      const Sequence& s = sequences[item.sequence];
      if (item.branch == kSelected) return item.list_end - item.list_begin;
      if (item.branch == kWindow) return std::min<int64_t>(plan.config.window + kKeyTile, s.len_q);
      return std::min(s.len_k - item.begin * plan.config.block_stride, s.len_q);
    };
    std::stable_sort(tiles.begin(), tiles.end(),
                     [&](const KeyItem& x, const KeyItem& y) { return cost(x) > cost(y); });
  }

 private:
  void add_dense(int32_t branch, int64_t sequence, int64_t head, int64_t length) {
    for (int64_t begin = 0; begin < length; begin += kKeyTile) {
      tiles.push_back(
          {branch, sequence, head, begin, std::min(kKeyTile, length - begin), 0, 0, 0, 0});
    }
  }

  void add_selected(const BwdPlan& plan, const Sequence& s, int64_t sequence, int64_t head,
                    const InvertedIndex& index) {
    const int64_t size = plan.config.select_size;
    const int64_t blocks = num_select_blocks(s.len_k, plan.config.select_size);
    const int64_t* begin = index.begin.data() + index.first_begin[sequence] + head * (blocks + 1);
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t end_key = std::min((j + 1) * size, s.len_k);
      for (int64_t key = j * size; key < end_key; key += kKeyTile) {
        KeyItem item{kSelected, sequence, head, key, std::min(kKeyTile, end_key - key), 0, 0, 0, 0};
        const int64_t list_end = std::min(begin[j] + kListSegment, begin[j + 1]);
        KeyItem part = item;
        item.list_begin = begin[j];
        item.list_end = list_end;
        item.partial = static_cast<int64_t>(partials.size());
        for (int64_t from = list_end; from < begin[j + 1]; from += kListSegment) {
          part.list_begin = from;
          part.list_end = std::min(from + kListSegment, begin[j + 1]);
          part.partial = static_cast<int64_t>(partials.size());
          part.num_partials = -1;
          partials.push_back(part);
        }
        item.num_partials = static_cast<int64_t>(partials.size()) - item.partial;
        tiles.push_back(item);
      }
    }
  }
};

}  // namespace

void attn_bwd(const AttnBwd& params, const Executor& executor) {
  BwdPlan plan{};
  plan.shape = params.shape;
  plan.config = params.config;
  plan.q = params.q;
  plan.gates = params.gates;
  for (int branch = 0; branch < kNumBranches; ++branch) {
    plan.enabled[branch] = params.branch[branch].enabled;
    plan.k[branch] = params.branch[branch].k;
    plan.v[branch] = params.branch[branch].v;
  }
  plan.parts = kKeysT | kValuesT | kKeys;
  plan.block_indices = params.block_indices;
  plan.index_count = params.index_count;
  plan.params = &params;
  plan.rows = params.shape.total_q;
  plan.window_shares_grads = shares_grads(params);
  AttnSetup setup(plan, executor);
  check(params);
  clear_unused_rows(params, setup.sequences);

  const AttnKernels& kernels = setup.kernels;
  const int64_t element = compute_size(params.shape.dtype);
  const int64_t num_items = static_cast<int64_t>(setup.items.size());
  Buffer dots(std::max<int64_t>(kNumBranches * plan.rows * params.shape.heads_q * element, 64));
  plan.dots = dots.data();
  for_each_item(executor, num_items, kernels.dots_scratch(plan), [&](int64_t item, char* scratch) {
    kernels.dots(plan, setup.items[item], scratch);
  });
  for_each_item(executor, static_cast<int64_t>(setup.pack_items.size()),
                std::max(plan.ld_qk, plan.ld_v) * element, [&](int64_t item, char* scratch) {
                  kernels.pack(plan, setup.pack_items[item], scratch);
                });
  for_each_item(executor, num_items, kernels.dq_scratch(plan),
                [&](int64_t item, char* scratch) { kernels.dq(plan, setup.items[item], scratch); });
  setup.buffers.clear();  // the key-stationary pass packs its own tile of keys

  std::unique_ptr<InvertedIndex> index;
  if (plan.enabled[kSelected]) {
    index = std::make_unique<InvertedIndex>(plan, setup.sequences, executor);
    plan.tokens = index->tokens.as<int32_t>();
  }
  const KeyItems key_items(plan, setup.sequences, index.get());
  const int64_t partial_size = kKeyTile * (plan.ld_qk + plan.ld_v) * element;
  Buffer partials(std::max<int64_t>(key_items.partials.size() * partial_size, 64));
  plan.partials = partials.data();
  const int64_t scratch_bytes = kernels.keys_scratch(plan);
  for (const std::vector<KeyItem>* items : {&key_items.partials, &key_items.tiles}) {
    for_each_item(
        executor, static_cast<int64_t>(items->size()), scratch_bytes,
        [&](int64_t item, char* scratch) { kernels.keys(plan, (*items)[item], scratch); });
  }
}

}  // namespace nsa::cpu
