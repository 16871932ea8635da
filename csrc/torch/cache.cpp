// cache_gather, cache_append, cache_store_* and decode_fwd: the KV cache and attention over it.
#include "nsa/cache.h"

#include "nsa/decode.h"
#include "torch/config.h"
#include "torch/ops.h"
#include "torch/runtime.h"

namespace nsa::binding {

namespace {

constexpr const char* kPoolNames[kNumBranches][2] = {
    {"k_cmp_pages", "v_cmp_pages"}, {"k_pages", "v_pages"}, {"k_win_pages", "v_win_pages"}};

BlockConfig cache_config(const std::vector<int64_t>& list) {
  const BlockConfig config = to_config(list);
  const char* error = config_error(config);
  STD_TORCH_CHECK(error == nullptr, error);
  return config;
}

/// Pages (num_pages, l' or l'/d, Hkv, D) of one branch.
template <class View>
View pages_view(const Tensor& pages, const char* name, int64_t num_pages, int64_t rows,
                int64_t heads, int64_t dim, const Tensor& like) {
  check(pages, name, {num_pages, rows, heads, dim}, like.scalar_type(), like);
  return {const_cast<void*>(pages.const_data_ptr()), pages.stride(0), pages.stride(1),
          pages.stride(2)};
}

int64_t page_rows(const BlockConfig& config, int branch) {
  return branch == kCompressed ? config.select_size / config.block_stride : config.select_size;
}

/// Pages of a sequence: the columns of the block table, or an equal share of the pool.
int64_t pages_of_sequence(const OptTensor& block_table, int64_t num_pages, int64_t batch,
                          const Tensor& like) {
  if (block_table) {
    check(*block_table, "block_table", {batch, -1}, ScalarType::Int, like);
    check_contiguous(*block_table, "block_table");
    STD_TORCH_CHECK(block_table->size(1) >= 1, "block_table must have at least one column");
    return block_table->size(1);
  }
  STD_TORCH_CHECK(batch >= 1 && num_pages >= batch && num_pages % batch == 0, "the ", num_pages,
                  " pages must be a multiple of the ", batch, " sequences");
  return num_pages / batch;
}

const int32_t* int32_ptr(const OptTensor& tensor, const char* name,
                         const std::vector<int64_t>& sizes, const Tensor& like) {
  if (!tensor) return nullptr;
  check(*tensor, name, sizes, ScalarType::Int, like);
  check_contiguous(*tensor, name);
  return tensor->const_data_ptr<int32_t>();
}

/// A row of state (3, B): seqlens, tail_start, dropped.
int32_t* state_row(const Tensor& state, int row, const CacheShape& shape, const Tensor& like) {
  check(state, "state", {3, shape.batch}, ScalarType::Int, like);
  return static_cast<int32_t*>(const_cast<void*>(state.const_data_ptr())) + row * state.stride(0);
}

/// Sizes of the new raw tokens k (B, T, Hkv, Dk) and v (B, T, Hkv, Dv) of the compressed branch.
CacheShape cache_shape(const Tensor& k, const Tensor& v, const Tensor& tail_k, const Tensor& tail_v,
                       const OptTensor& block_table, int64_t num_pages, const BlockConfig& config) {
  STD_TORCH_CHECK(k.dim() == 4, "k must have 4 dims, got ", shape_string(k));
  CacheShape shape{};
  shape.dtype = to_dtype(k, "k");
  shape.batch = k.size(0);
  shape.tokens = k.size(1);
  shape.heads = k.size(2);
  shape.dim_qk = k.size(3);
  shape.dim_v = last_size(v);
  shape.config = config;
  check(k, "k", {-1, -1, -1, -1}, k.scalar_type(), k);
  check(v, "v", {shape.batch, shape.tokens, shape.heads, -1}, k.scalar_type(), k);
  check(tail_k, "tail_k", {shape.batch, -1, shape.heads, shape.dim_qk}, k.scalar_type(), k);
  shape.tail = tail_k.size(1);
  check(tail_v, "tail_v", {shape.batch, shape.tail, shape.heads, shape.dim_v}, k.scalar_type(), k);
  STD_TORCH_CHECK(shape.tail >= config.block_size, "the tail must hold ", config.block_size,
                  " tokens, got ", shape.tail);
  shape.num_pages = num_pages;
  shape.max_pages = pages_of_sequence(block_table, num_pages, shape.batch, k);
  shape.block_table = block_table ? block_table->const_data_ptr<int32_t>() : nullptr;
  STD_TORCH_CHECK(
      shape.tokens <= INT32_MAX / 2 && shape.max_pages <= INT32_MAX / 2 / config.select_size,
      "sequences must be shorter than 2^30");
  return shape;
}

/// Rows of the block table that are read on the CPU point into the pool.
void check_table(const DecodeFwd& params, int64_t num_pages) {
  if (!params.block_table) return;
  const int64_t size = params.config.select_size;
  for (int64_t b = 0; b < params.shape.batch; ++b) {
    STD_TORCH_CHECK(params.seqlens_k[b] <= params.max_pages * size, "seqlens: sequence ", b,
                    " exceeds the capacity");
    for (int64_t j = 0; j * size < params.seqlens_k[b]; ++j) {
      const int32_t page = params.block_table[b * params.max_pages + j];
      STD_TORCH_CHECK(page >= 0 && page < num_pages, "block_table: sequence ", b, " has page ",
                      page, " of ", num_pages);
    }
  }
}

InView dense(const PagedView& pages, int64_t max_pages) {
  return {pages.ptr, max_pages * pages.page, pages.seq, pages.head};
}

/// A chunk too long for the decode kernels, over a cache without a block table: an ordinary forward
/// over the rows of each sequence that are used.
AttnFwd chunk_fwd(const DecodeFwd& decode) {
  AttnFwd call{};
  call.shape = decode.shape;
  call.shape.total_q = call.shape.batch * call.shape.seqlen_q;
  call.shape.total_k = call.shape.batch * call.shape.seqlen_k;
  call.shape.seqused_k = decode.seqlens_k;
  call.config = decode.config;
  call.q = decode.q;
  call.gates = decode.gates;
  call.out = decode.out;
  call.block_indices = decode.block_indices;
  call.index_count = decode.config.num_selected;
  for (int branch = 0; branch < kNumBranches; ++branch) {
    const int64_t rows = page_rows(decode.config, branch);
    STD_TORCH_CHECK(decode.k[branch].page == rows * decode.k[branch].seq &&
                        decode.v[branch].page == rows * decode.v[branch].seq,
                    kPoolNames[branch][0], " and ", kPoolNames[branch][1],
                    ": the pages must follow each other without a gap");
    call.branch[branch].enabled = true;
    call.branch[branch].k = dense(decode.k[branch], decode.max_pages);
    call.branch[branch].v = dense(decode.v[branch], decode.max_pages);
  }
  return call;
}

/// New tokens of all branches, and the cache.
void set_tokens(CacheTokens& params, const Tensor& state, const Tensor& k_pages,
                const Tensor& v_pages, const OptTensor& k_win_pages, const OptTensor& v_win_pages,
                const Tensor& k_cmp_pages, const Tensor& v_cmp_pages, const Tensor& tail_k,
                const Tensor& tail_v, const Tensor& k, const Tensor& v, const OptTensor& k_win,
                const OptTensor& v_win, const Tensor& k_raw, const Tensor& v_raw,
                const OptTensor& block_table, const OptTensor& rope_inv_freq,
                const BlockConfig& config) {
  const bool own_window = k_win_pages.has_value();
  STD_TORCH_CHECK(v_win_pages.has_value() == own_window && k_win.has_value() == own_window &&
                      v_win.has_value() == own_window,
                  "k_win, v_win and their pages go together");
  STD_TORCH_CHECK(k_pages.dim() == 4, "k_pages must have 4 dims, got ", shape_string(k_pages));
  params.shape = cache_shape(k_raw, v_raw, tail_k, tail_v, block_table, k_pages.size(0), config);
  const CacheShape& s = params.shape;
  const Tensor* const fresh[kNumBranches][2] = {
      {&k_raw, &v_raw}, {&k, &v}, {k_win ? &*k_win : nullptr, v_win ? &*v_win : nullptr}};
  const Tensor* const pools[kNumBranches][2] = {
      {&k_cmp_pages, &v_cmp_pages},
      {&k_pages, &v_pages},
      {k_win_pages ? &*k_win_pages : nullptr, v_win_pages ? &*v_win_pages : nullptr}};
  static constexpr const char* kNames[kNumBranches][2] = {
      {"k_raw", "v_raw"}, {"k", "v"}, {"k_win", "v_win"}};
  for (int c = 0; c < kNumBranches; ++c) {
    if (!fresh[c][0]) continue;
    for (int i = 0; i < 2; ++i) {
      const int64_t dim = i ? s.dim_v : s.dim_qk;
      check(*fresh[c][i], kNames[c][i], {s.batch, s.tokens, s.heads, dim}, k_raw.scalar_type(),
            k_raw);
      (i ? params.v : params.k)[c] = view(*fresh[c][i], false);
      (i ? params.v_pages : params.k_pages)[c] = pages_view<PagedOut>(
          *pools[c][i], kPoolNames[c][i], s.num_pages, page_rows(s.config, c), s.heads, dim, k_raw);
    }
  }
  if (rope_inv_freq) {
    const bool wide = s.dtype == DType::kFloat64;
    STD_TORCH_CHECK(s.dim_qk % 2 == 0, "rope_inv_freq needs an even Dk, got ", s.dim_qk);
    check(*rope_inv_freq, "rope_inv_freq", {s.dim_qk / 2},
          wide ? ScalarType::Double : ScalarType::Float, k_raw);
    params.rope_inv_freq = rope_inv_freq->const_data_ptr();
  }
  params.tail_k = view<void>(tail_k, false);
  params.tail_v = view<void>(tail_v, false);
  params.seqlens = state_row(state, 0, s, k_raw);
  params.tail_start = state_row(state, 1, s, k_raw);
  params.dropped = state_row(state, 2, s, k_raw);
}

#ifdef NSA_EXT_WITH_CUDA

/// A weight of phi, or null where it is absent.
const void* weight_ptr(const OptTensor& weight, const char* name, const std::vector<int64_t>& sizes,
                       const Tensor& like) {
  if (!weight) return nullptr;
  check(*weight, name, sizes, like.scalar_type(), like);
  check_contiguous(*weight, name);
  return weight->const_data_ptr();
}

void check_step(const CacheStore& params) {
  const CacheShape& s = params.shape;
  STD_TORCH_CHECK(s.tokens >= 1 && s.tokens <= s.config.block_stride,
                  "k must have 1 to block_stride tokens, got ", s.tokens);
  STD_TORCH_CHECK(params.weight_heads == 1 || params.weight_heads == s.heads,
                  "phi's weights must have 1 or ", s.heads, " heads, got ", params.weight_heads);
}

PhiWeights phi_weights(const CacheStore& params, int64_t dim, const char* pos_name,
                       const OptTensor& pos, const char* w1_name, const Tensor& w1,
                       const char* b1_name, const OptTensor& b1, const char* w2_name,
                       const OptTensor& w2, const char* b2_name, const OptTensor& b2,
                       const Tensor& like) {
  const int64_t heads = params.weight_heads, l = params.shape.config.block_size;
  STD_TORCH_CHECK(w1.dim() == 3, w1_name, " must have 3 dims, got ", shape_string(w1));
  STD_TORCH_CHECK(w2 || !b2, b2_name, " needs ", w2_name);
  PhiWeights phi{};
  phi.hidden = w2 ? w1.size(1) : dim;
  phi.pos = weight_ptr(pos, pos_name, {heads, l, dim}, like);
  phi.w1 = weight_ptr(w1, w1_name, {heads, phi.hidden, l * dim}, like);
  phi.b1 = weight_ptr(b1, b1_name, {heads, phi.hidden}, like);
  phi.w2 = weight_ptr(w2, w2_name, {heads, dim, phi.hidden}, like);
  phi.b2 = weight_ptr(b2, b2_name, {heads, dim}, like);
  return phi;
}

#endif

}  // namespace

int64_t max_decode_rows() { return kMaxDecodeRows; }

Tensor3 cache_gather(Tensor k, Tensor v, Tensor tail_k, Tensor tail_v, Tensor state,
                     OptTensor counts, OptTensor block_table, int64_t num_pages,
                     std::vector<int64_t> config) {
  CacheGather params{};
  params.shape = cache_shape(k, v, tail_k, tail_v, block_table, num_pages, cache_config(config));
  const CacheShape& s = params.shape;
  params.seqlens = state_row(state, 0, s, k);
  params.tail_start = state_row(state, 1, s, k);
  params.counts = int32_ptr(counts, "counts", {s.batch}, k);
  params.k = view(k, false);
  params.v = view(v, false);
  params.tail_k = view(tail_k, false);
  params.tail_v = view(tail_v, false);
  const int64_t rows = gathered_rows(s.tokens, s.config);
  const Tensor out_k = empty(k, {s.batch, rows, s.heads, s.dim_qk}, k.scalar_type()),
               out_v = empty(k, {s.batch, rows, s.heads, s.dim_v}, k.scalar_type()),
               steps = empty(k, {s.batch, 3}, ScalarType::Int);
  params.out_k = view<void>(out_k, false);
  params.out_v = view<void>(out_v, false);
  params.steps = static_cast<CacheStep*>(steps.mutable_data_ptr());
  run(
      k, [&] { cpu::cache_gather(params, torch_executor()); }, [] { return int64_t{0}; },
      [&](void*, cuda::Stream stream) { cuda::cache_gather(params, stream); });
  return {out_k, out_v, steps};
}

void cache_append(Tensor state, Tensor k_pages, Tensor v_pages, OptTensor k_win_pages,
                  OptTensor v_win_pages, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor tail_k,
                  Tensor tail_v, Tensor steps, Tensor k, Tensor v, OptTensor k_win, OptTensor v_win,
                  Tensor k_raw, Tensor v_raw, Tensor k_cmp, Tensor v_cmp, OptTensor block_table,
                  OptTensor rope_inv_freq, std::vector<int64_t> config) {
  CacheAppend params{};
  set_tokens(params, state, k_pages, v_pages, k_win_pages, v_win_pages, k_cmp_pages, v_cmp_pages,
             tail_k, tail_v, k, v, k_win, v_win, k_raw, v_raw, block_table, rope_inv_freq,
             cache_config(config));
  const CacheShape& s = params.shape;
  const int64_t blocks = max_new_blocks(s.tokens, s.config);
  check(k_cmp, "k_cmp", {s.batch, blocks, s.heads, s.dim_qk}, k_raw.scalar_type(), k_raw);
  check(v_cmp, "v_cmp", {s.batch, blocks, s.heads, s.dim_v}, k_raw.scalar_type(), k_raw);
  params.k_cmp = view(k_cmp, false);
  params.v_cmp = view(v_cmp, false);
  params.steps = reinterpret_cast<const CacheStep*>(int32_ptr(steps, "steps", {s.batch, 3}, k_raw));
  run(
      k_raw, [&] { cpu::cache_append(params, torch_executor()); }, [] { return int64_t{0}; },
      [&](void*, cuda::Stream stream) { cuda::cache_append(params, stream); });
}

#ifdef NSA_EXT_WITH_CUDA

void cache_store_mlp(Tensor state, Tensor k_pages, Tensor v_pages, OptTensor k_win_pages,
                     OptTensor v_win_pages, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor tail_k,
                     Tensor tail_v, Tensor k, Tensor v, OptTensor k_win, OptTensor v_win,
                     Tensor k_raw, Tensor v_raw, OptTensor counts, OptTensor block_table,
                     OptTensor rope_inv_freq, std::vector<int64_t> config, OptTensor k_pos,
                     Tensor k_w1, OptTensor k_b1, OptTensor k_w2, OptTensor k_b2, OptTensor v_pos,
                     Tensor v_w1, OptTensor v_b1, OptTensor v_w2, OptTensor v_b2) {
  CacheStoreMlp params{};
  set_tokens(params, state, k_pages, v_pages, k_win_pages, v_win_pages, k_cmp_pages, v_cmp_pages,
             tail_k, tail_v, k, v, k_win, v_win, k_raw, v_raw, block_table, rope_inv_freq,
             cache_config(config));
  const CacheShape& s = params.shape;
  params.counts = int32_ptr(counts, "counts", {s.batch}, k_raw);
  params.weight_heads = k_w1.dim() ? k_w1.size(0) : 0;
  check_step(params);
  params.phi_k = phi_weights(params, s.dim_qk, "k_pos", k_pos, "k_w1", k_w1, "k_b1", k_b1, "k_w2",
                             k_w2, "k_b2", k_b2, k_raw);
  params.phi_v = phi_weights(params, s.dim_v, "v_pos", v_pos, "v_w1", v_w1, "v_b1", v_b1, "v_w2",
                             v_w2, "v_b2", v_b2, k_raw);
  run(
      k_raw, [] {}, [&] { return cuda::cache_store_mlp_workspace(params); },
      [&](void* workspace, cuda::Stream stream) {
        cuda::cache_store_mlp(params, workspace, stream);
      });
}

void cache_store_pool(Tensor state, Tensor k_pages, Tensor v_pages, OptTensor k_win_pages,
                      OptTensor v_win_pages, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor tail_k,
                      Tensor tail_v, Tensor k, Tensor v, OptTensor k_win, OptTensor v_win,
                      Tensor k_raw, Tensor v_raw, OptTensor counts, OptTensor block_table,
                      OptTensor rope_inv_freq, std::vector<int64_t> config, OptTensor k_weight,
                      OptTensor k_pos, OptTensor v_weight, OptTensor v_pos) {
  CacheStorePool params{};
  set_tokens(params, state, k_pages, v_pages, k_win_pages, v_win_pages, k_cmp_pages, v_cmp_pages,
             tail_k, tail_v, k, v, k_win, v_win, k_raw, v_raw, block_table, rope_inv_freq,
             cache_config(config));
  const CacheShape& s = params.shape;
  params.counts = int32_ptr(counts, "counts", {s.batch}, k_raw);
  params.weight_heads = 1;
  for (const OptTensor& weight : {k_weight, k_pos, v_weight, v_pos}) {
    if (weight && weight->dim() && weight->size(0) != 1) params.weight_heads = weight->size(0);
  }
  check_step(params);
  const int64_t heads = params.weight_heads, l = s.config.block_size;
  params.phi_k = {weight_ptr(k_weight, "k_weight", {heads, l}, k_raw),
                  weight_ptr(k_pos, "k_pos", {heads, l, s.dim_qk}, k_raw)};
  params.phi_v = {weight_ptr(v_weight, "v_weight", {heads, l}, k_raw),
                  weight_ptr(v_pos, "v_pos", {heads, l, s.dim_v}, k_raw)};
  run(
      k_raw, [] {}, [] { return int64_t{0}; },
      [&](void*, cuda::Stream stream) { cuda::cache_store_pool(params, stream); });
}

#endif

Tensor2 decode_fwd(Tensor q, Tensor k_cmp_pages, Tensor v_cmp_pages, Tensor k_pages, Tensor v_pages,
                   OptTensor k_win_pages, OptTensor v_win_pages, Tensor gates, Tensor seqlens,
                   OptTensor block_table, std::vector<int64_t> config, double softmax_scale) {
  STD_TORCH_CHECK(k_win_pages.has_value() == v_win_pages.has_value(),
                  "k_win_pages and v_win_pages go together");
  STD_TORCH_CHECK(q.dim() == 4, "q must have 4 dims, got ", shape_string(q));
  STD_TORCH_CHECK(k_pages.dim() == 4, "k_pages must have 4 dims, got ", shape_string(k_pages));
  check(q, "q", {-1, -1, -1, -1}, q.scalar_type(), q);
  DecodeFwd params{};
  params.config = cache_config(config);
  AttnShape& shape = params.shape;
  shape.dtype = to_dtype(q, "q");
  shape.batch = q.size(0);
  shape.seqlen_q = q.size(1);
  shape.heads_q = q.size(2);
  shape.dim_qk = q.size(3);
  shape.heads_kv = k_pages.size(2);
  shape.dim_v = last_size(v_pages);
  shape.softmax_scale = softmax_scale;
  STD_TORCH_CHECK(shape.heads_kv >= 1 && shape.heads_q % shape.heads_kv == 0, "the ", shape.heads_q,
                  " query heads must be a multiple of the ", shape.heads_kv, " key-value heads");
  const int64_t num_pages = k_pages.size(0);
  params.max_pages = pages_of_sequence(block_table, num_pages, shape.batch, q);
  STD_TORCH_CHECK(params.max_pages <= INT32_MAX / 2 / params.config.select_size,
                  "sequences must be shorter than 2^30");
  shape.seqlen_k = params.max_pages * params.config.select_size;
  shape.total_q = shape.batch * shape.seqlen_q;
  shape.total_k = shape.batch * shape.seqlen_k;
  params.block_table = block_table ? block_table->const_data_ptr<int32_t>() : nullptr;
  params.seqlens_k = int32_ptr(seqlens, "seqlens", {shape.batch}, q);
  const Tensor* const pools[kNumBranches][2] = {
      {&k_cmp_pages, &v_cmp_pages},
      {&k_pages, &v_pages},
      {k_win_pages ? &*k_win_pages : &k_pages, v_win_pages ? &*v_win_pages : &v_pages}};
  for (int c = 0; c < kNumBranches; ++c) {
    const int64_t rows = page_rows(params.config, c);
    params.k[c] = pages_view<PagedView>(*pools[c][0], kPoolNames[c][0], num_pages, rows,
                                        shape.heads_kv, shape.dim_qk, q);
    params.v[c] = pages_view<PagedView>(*pools[c][1], kPoolNames[c][1], num_pages, rows,
                                        shape.heads_kv, shape.dim_v, q);
  }
  check(gates, "gates", {shape.batch, shape.seqlen_q, shape.heads_q, kNumBranches}, q.scalar_type(),
        q);
  params.q = view(q, false);
  params.gates = view(gates, false);
  const Tensor out = empty(q, {shape.batch, shape.seqlen_q, shape.heads_q, shape.dim_v},
                           q.scalar_type()),
               block_indices = empty(
                   q, {shape.batch, shape.seqlen_q, shape.heads_kv, params.config.num_selected},
                   ScalarType::Int);
  params.out = view<void>(out, false);
  params.block_indices = view<int32_t>(block_indices, false);
  if (shape.total_q == 0) return {out, block_indices};
  const bool chunk = shape.seqlen_q * (shape.heads_q / shape.heads_kv) > kMaxDecodeRows;
  if (!q.is_cpu() && chunk) {
    STD_TORCH_CHECK(!block_table, "a chunk of more than ", kMaxDecodeRows,
                    " rows T * Hq / Hkv needs a cache without a block table on CUDA");
    const AttnFwd call = chunk_fwd(params);
    run(
        q, [] {}, [&] { return cuda::attn_fwd_workspace(call, cuda_backend()); },
        [&](void* workspace, cuda::Stream stream) {
          cuda::attn_fwd(call, workspace, stream, cuda_backend());
        });
    return {out, block_indices};
  }
  run(
      q,
      [&] {
        check_table(params, num_pages);
        cpu::decode_fwd(params, torch_executor());
      },
      [&] { return cuda::decode_fwd_workspace(params); },
      [&](void* workspace, cuda::Stream stream) { cuda::decode_fwd(params, workspace, stream); });
  return {out, block_indices};
}

}  // namespace nsa::binding
