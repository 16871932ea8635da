#include "cpu/attn_setup.h"

#include <algorithm>

#include "cpu/isa.h"

namespace nsa::cpu {

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

bool same_view(const InView& a, const InView& b) {
  return a.ptr == b.ptr && a.batch == b.batch && a.seq == b.seq && a.head == b.head;
}

void check_cu_seqlens(const int32_t* cu, int64_t batch, const char* message) {
  require(cu[0] == 0, message);
  for (int64_t b = 0; b < batch; ++b) require(cu[b] <= cu[b + 1], message);
}

}  // namespace

const AttnKernels& attn_kernels(DType dtype) {
  const bool wide = dtype == DType::kFloat64;
#if NSA_CPU_DISPATCH
  if (active_isa() == Isa::kAvx512) return wide ? avx512::kAttnDouble : avx512::kAttnFloat;
  if (active_isa() == Isa::kAvx2) return wide ? avx2::kAttnDouble : avx2::kAttnFloat;
#endif
  return wide ? baseline::kAttnDouble : baseline::kAttnFloat;
}

AttnSetup::AttnSetup(AttnPlan& plan, const Executor& executor, Items kind)
    : kernels(attn_kernels(plan.shape.dtype)) {
  check(plan);
  plan.group = plan.shape.heads_q / plan.shape.heads_kv;
  plan.ld_qk = round_up(plan.shape.dim_qk, kernels.lanes);
  plan.ld_v = round_up(plan.shape.dim_v, kernels.lanes);
  add_sequences(plan);
  plan_tiles(plan);
  kind == Items::kTiles ? add_tiles(plan, executor.num_threads) : add_chunks(plan);
  plan.items = items.data();
  plan.selected_resident = false;
  for (int branch = 0; branch < kNumBranches; ++branch) {
    if (plan.enabled[branch]) add_pack(plan, branch);
  }
}

void AttnSetup::check(const AttnPlan& plan) const {
  const AttnShape& s = plan.shape;
  require(s.dtype >= DType::kFloat64 && s.dtype <= DType::kFloat16, "unknown dtype");
  require(s.batch >= 0 && s.seqlen_q >= 0 && s.seqlen_k >= 0 && s.total_q >= 0 && s.total_k >= 0,
          "batch size and lengths must not be negative");
  require(s.heads_kv >= 1 && s.heads_q >= 1 && s.heads_q % s.heads_kv == 0,
          "heads_q must be a multiple of heads_kv");
  require(s.dim_qk >= 1 && s.dim_v >= 1, "head dims must be at least 1");
  require(!s.cu_seqlens_q == !s.cu_seqlens_k, "cu_seqlens_q and cu_seqlens_k go together");
  require(s.total_q < INT32_MAX / 2 && s.total_k < INT32_MAX / 2, "sequences are too long");

  const BlockConfig& c = plan.config;
  if (plan.enabled[kCompressed]) {
    const char* error = config_error(c);
    require(!error, error);
  }
  if (plan.enabled[kWindow]) require(c.window >= 1, "window must be at least 1");
  if (plan.enabled[kSelected]) {
    require(c.select_size >= 1, "select_size must be at least 1");
    require(plan.index_count >= 1 && (plan.block_indices.ptr || s.total_q == 0),
            "the selected branch needs block_indices");
  }

  if (s.cu_seqlens_q) {
    check_cu_seqlens(s.cu_seqlens_q, s.batch, "cu_seqlens_q must start at 0 and not decrease");
    check_cu_seqlens(s.cu_seqlens_k, s.batch, "cu_seqlens_k must start at 0 and not decrease");
    require(s.cu_seqlens_q[s.batch] == s.total_q, "cu_seqlens_q must end at the rows of q");
    // Of compressed keys only the whole strides of total_k are known.
    const bool raw = plan.enabled[kSelected] || plan.enabled[kWindow];
    const int64_t unit = raw || !plan.enabled[kCompressed] ? 1 : c.block_stride;
    require(s.cu_seqlens_k[s.batch] / unit == s.total_k / unit,
            "cu_seqlens_k must end at the rows of k");
  } else {
    require(s.total_q == s.batch * s.seqlen_q && s.total_k == s.batch * s.seqlen_k,
            "total_q and total_k must be batch times length");
  }
  for (int64_t b = 0; s.seqused_k && b < s.batch; ++b) {
    const int64_t room = s.cu_seqlens_k ? s.cu_seqlens_k[b + 1] - s.cu_seqlens_k[b] : s.seqlen_k;
    require(s.seqused_k[b] >= 0 && s.seqused_k[b] <= room,
            "seqused_k must lie between 0 and the rows of the sequence");
  }
  require(plan.q.ptr || s.total_q == 0, "q is missing");
  for (int branch = 0; branch < kNumBranches; ++branch) {
    if (!plan.enabled[branch] || s.total_q == 0) continue;
    const int64_t rows = branch != kCompressed ? s.total_k
                         : s.cu_seqlens_k
                             ? s.total_k / c.block_stride
                             : num_compressed(s.seqlen_k, c.block_size, c.block_stride) * s.batch;
    require(plan.k[branch].ptr || rows == 0, "the keys of an enabled branch are missing");
  }
}

void AttnSetup::add_sequences(AttnPlan& plan) {
  const AttnShape& s = plan.shape;
  const BlockConfig& c = plan.config;
  const bool packed = s.cu_seqlens_q != nullptr;
  plan.max_compressed = plan.max_select_blocks = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    Sequence sequence{};
    if (packed) {
      sequence.q_row = sequence.lse_row = s.cu_seqlens_q[b];
      sequence.k_row = s.cu_seqlens_k[b];
      sequence.len_q = s.cu_seqlens_q[b + 1] - sequence.q_row;
      sequence.len_k = s.cu_seqlens_k[b + 1] - sequence.k_row;
    } else {
      sequence.batch = b;
      sequence.lse_row = b * s.seqlen_q;
      sequence.len_q = s.seqlen_q;
      sequence.len_k = s.seqlen_k;
    }
    if (s.seqused_k) sequence.len_k = s.seqused_k[b];
    if (plan.block_table) sequence.pages = plan.block_table + b * plan.max_pages;
    if (plan.enabled[kCompressed]) {
      sequence.len_cmp = num_compressed(sequence.len_k, c.block_size, c.block_stride);
      if (packed) sequence.cmp_row = packed_row(sequence.k_row, c.block_stride);
      plan.max_compressed = std::max(plan.max_compressed, sequence.len_cmp);
    }
    if (plan.enabled[kCompressed] || plan.enabled[kSelected]) {
      plan.max_select_blocks =
          std::max(plan.max_select_blocks, num_select_blocks(sequence.len_k, c.select_size));
    }
    sequences.push_back(sequence);
  }
  plan.sequences = sequences.data();
  plan.num_sequences = s.batch;
}

void AttnSetup::plan_tiles(AttnPlan& plan) const {
  // Scores of the compressed branch stay until the selection is made: 2 MiB of float32 a thread,
  // or one token's.
  constexpr int64_t kScores = 1 << 19;
  // Queries, outputs and the gated sum of this many rows of 64 take 1.5 MiB; the more rows, the
  // more of them share a selected block that was read.
  constexpr int64_t kTileRows = 2048;
  const int64_t G = plan.group;
  plan.window_tokens = std::max<int64_t>(1, kRowBatch / G);
  const int64_t fit = kScores / (G * round_up(std::max<int64_t>(plan.max_compressed, 1), 64));
  plan.compressed_tokens = std::clamp<int64_t>(fit, 1, plan.window_tokens);
  // Whole window batches: a row's sums must not depend on how many threads there are.
  plan.tile_tokens = std::max<int64_t>(kTileRows / G / plan.window_tokens, 1) * plan.window_tokens;
}

void AttnSetup::add_tiles(AttnPlan& plan, int num_threads) {
  int64_t tile = plan.tile_tokens;
  const auto count = [&](int64_t tokens) {
    int64_t n = 0;
    for (const Sequence& s : sequences) n += ceil_div(s.len_q, tokens) * plan.shape.heads_kv;
    return n;
  };
  while (tile > plan.window_tokens && count(tile) < 8 * num_threads) {
    tile = std::max<int64_t>(tile / 2 / plan.window_tokens, 1) * plan.window_tokens;
  }
  plan.tile_tokens = tile;
  for (int64_t b = 0; b < plan.num_sequences; ++b) {
    const Sequence& s = sequences[b];
    for (int64_t first = 0; first < s.len_q; first += tile) {
      for (int64_t head = 0; head < plan.shape.heads_kv; ++head) {
        items.push_back({b, head, first, std::min(tile, s.len_q - first)});
      }
    }
  }
  // Late queries see more compressed tokens: the long items first.
  std::stable_sort(items.begin(), items.end(), [&](const QueryItem& a, const QueryItem& b) {
    return sequences[a.sequence].position(a.first + a.count) >
           sequences[b.sequence].position(b.first + b.count);
  });
}

void AttnSetup::add_chunks(AttnPlan& plan) {
  // Every chunk sums dk and dv of its own over all keys that it may see: 8 chunks take 4 times the
  // memory of the gradients. With many heads there is enough parallel work without.
  const int64_t heads = plan.shape.heads_kv;
  const int64_t most =
      std::clamp<int64_t>(32 / std::max<int64_t>(plan.num_sequences * heads, 1), 2, 8);
  for (int64_t b = 0; b < plan.num_sequences; ++b) {
    const int64_t length = sequences[b].len_q;
    const int64_t chunk =
        round_up(std::max<int64_t>(ceil_div(length, most), 128), plan.window_tokens);
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t first = 0; first < length; first += chunk) {
        items.push_back({b, head, first, std::min(chunk, length - first)});
      }
    }
  }
}

void AttnSetup::add_pack(AttnPlan& plan, int branch) {
  const int64_t size = plan.config.select_size, panel = kernels.panel;
  KeyPack& pack = plan.pack[branch];
  if (branch == kWindow && plan.enabled[kSelected] && plan.selected_resident && size % panel == 0 &&
      same_view(plan.k[kWindow], plan.k[kSelected]) &&
      same_view(plan.v[kWindow], plan.v[kSelected])) {
    pack = plan.pack[kSelected];
    return;
  }
  pack.block = branch == kSelected ? size : panel;
  pack.padded = round_up(pack.block, kernels.lanes);
  int64_t slots = 0, visits = 0;
  for (const Sequence& s : sequences) {
    int64_t first = 0, length = branch == kCompressed ? s.len_cmp : s.len_k;
    if (branch == kWindow) {
      first = std::clamp<int64_t>(s.position(0) - plan.config.window + 1, 0, length) / panel;
    }
    const int64_t count = s.len_q == 0 ? 0 : ceil_div(length, pack.block) - first;
    pack_first[branch].push_back(first);
    pack_count[branch].push_back(count);
    pack_base[branch].push_back(slots);
    slots += count * plan.shape.heads_kv;
    visits += s.len_q * plan.shape.heads_kv * plan.index_count;
  }
  pack.first = pack_first[branch].data();
  pack.count = pack_count[branch].data();
  pack.base = pack_base[branch].data();
  if (branch == kSelected) {
    // A few queries over long keys (decode) visit few blocks, and tiny blocks are mostly padding:
    // then a tile packs the blocks that it visits, into memory of its own that stays in L2.
    plan.selected_resident = visits >= 4 * slots && pack.padded <= 4 * pack.block;
    if (!plan.selected_resident) return;
  }
  const int64_t row_size[4] = {plan.shape.dim_qk, plan.ld_v, plan.shape.dim_v, plan.ld_qk};
  for (int i = 0; i < 4; ++i) {
    const bool values = i == 1 || i == 2;
    if (!(plan.parts >> i & 1) || (values && !plan.v[branch].ptr)) continue;
    const int64_t bytes = slots * pack.padded * row_size[i] * compute_size(plan.shape.dtype);
    buffers.emplace_back(std::max<int64_t>(bytes, 64));
    pack.part[i] = buffers.back().data();
  }
  const int64_t step = std::max<int64_t>(1, 1024 / pack.block);
  for (int64_t b = 0; b < plan.num_sequences; ++b) {
    const int64_t begin = pack.first[b], end = begin + pack.count[b];
    for (int64_t head = 0; head < plan.shape.heads_kv; ++head) {
      for (int64_t block = begin; block < end; block += step) {
        pack_items.push_back({branch, b, head, block, std::min(block + step, end)});
      }
    }
  }
}

}  // namespace nsa::cpu
