// Decode over a KV cache: what the GPU takes, how the work is laid out, the launch.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cuda/common.h"
#include "cuda/decode/launch.h"
#include "cuda/decode/select.h"
#include "cuda/instances/attn_instances.h"
#include "nsa/decode.h"

namespace nsa::cuda {

namespace {

using decode::DecodeParams;

int32_t log2_of(int64_t power) {
  int32_t log2 = 0;
  while ((int64_t{1} << log2) < power) ++log2;
  return log2;
}

/// Rows of a block of threads that has `rows` of them to do: 16, 32 or 64.
int32_t tile_rows(int64_t rows) { return rows <= 16 ? 16 : rows <= 32 ? 32 : 64; }

decode::Shape shape_of(const AttnShape& shape) {
#define NSA_MATCH(T, kDk, kDv)                                                                \
  if (shape.dim_qk == kDk && shape.dim_v == kDv && dispatch_dtype(shape.dtype, [](auto tag) { \
        return std::is_same_v<typename decltype(tag)::type, T>;                               \
      }))                                                                                     \
    return decode::shape_of<T, kDk, kDv>();
  NSA_ATTN_INSTANCES(NSA_MATCH)
#undef NSA_MATCH
  throw std::invalid_argument("decode has no kernel for these head dims");
}

/// The layout of a call; with a null workspace only its size counts.
DecodeParams plan(const DecodeFwd& call, void* workspace, int64_t* bytes) {
  const AttnShape& shape = call.shape;
  const BlockConfig& config = call.config;
  DecodeParams p{};
  p.q = call.q;
  for (int c = 0; c < kNumBranches; ++c) {
    p.k[c] = call.k[c];
    p.v[c] = call.v[c];
  }
  p.gates = call.gates;
  p.out = call.out;
  p.block_indices = call.block_indices;
  p.seqlens_k = call.seqlens_k;
  p.block_table = call.block_table;
  p.config = config;
  p.max_pages = static_cast<int32_t>(call.max_pages);
  p.batch = static_cast<int32_t>(shape.batch);
  p.tokens = static_cast<int32_t>(shape.seqlen_q);
  p.heads_q = static_cast<int32_t>(shape.heads_q);
  p.heads_kv = static_cast<int32_t>(shape.heads_kv);
  p.group = p.heads_q / p.heads_kv;
  p.select_shift = log2_of(config.select_size);
  p.stride_shift = log2_of(config.block_stride);
  p.scale_log2 = static_cast<float>(shape.softmax_scale * 1.4426950408889634);
  p.chunks = static_cast<int32_t>(decode::padded_chunks(config, call.max_pages));
  p.candidates = decode::select_candidates(config, call.max_pages);

  const int64_t rows = shape.seqlen_q * p.group;
  p.rows[kCompressed] = tile_rows(rows);
  p.rows[kSelected] = p.rows[kWindow] = tile_rows(p.group);
  p.row_tiles = static_cast<int32_t>(ceil_div<int64_t>(rows, p.rows[kCompressed]));
  const decode::Shape device = shape_of(shape);
  p.stages = device.stages;
  p.workers[kCompressed] = std::max(1, device.resident / (p.heads_kv * p.row_tiles));
  p.workers[kSelected] = p.workers[kWindow] = std::max(1, device.resident / p.heads_kv);

  WorkspaceCursor cursor(workspace);
  for (int c = 0; c < kNumBranches; ++c) {
    const int64_t units = c == kCompressed ? shape.batch : shape.batch * shape.seqlen_q;
    const int64_t partial_rows =
        (p.workers[c] + units) * p.heads_kv * (c == kCompressed ? p.row_tiles : 1) * p.rows[c];
    p.partials[c].out = cursor.take<float>(partial_rows * shape.dim_v);
    p.partials[c].sums = cursor.take<float2>(partial_rows);
  }
  const int64_t weight_rows = shape.batch * shape.heads_kv * rows;
  p.weights = cursor.take<float>(weight_rows * p.chunks * decode::chunk_blocks(config));
  p.carries = cursor.take<float2>(weight_rows * p.chunks);
  p.lists = cursor.take<int2>(shape.batch * shape.seqlen_q * shape.heads_kv * config.num_selected);
  *bytes = cursor.bytes();
  return p;
}

void check_aligned(const void* ptr, std::initializer_list<int64_t> strides, const char* name) {
  bool aligned = reinterpret_cast<uintptr_t>(ptr) % 16 == 0;
  for (const int64_t stride : strides) aligned = aligned && stride % 8 == 0;
  if (!aligned)
    throw std::invalid_argument(std::string(name) +
                                " must be 16-byte aligned on CUDA: its address a multiple of 16 "
                                "bytes, its strides of 8 elements");
}

void check_call(const DecodeFwd& call) {
  const ComputeCapability device;
  std::string message;
  for (const std::string& reason :
       decode_supports(call.shape, call.config, device.major, device.minor))
    message += (message.empty() ? "" : "; ") + reason;
  if (!message.empty()) throw std::invalid_argument(message);

  const double scale = call.shape.softmax_scale;
  if (!(scale > 0) || !std::isfinite(scale))
    throw std::invalid_argument("softmax_scale must be positive and finite on CUDA");
  if (call.max_pages < 1 || call.max_pages > INT32_MAX / call.config.select_size ||
      (call.block_table == nullptr && call.shape.batch * call.max_pages > INT32_MAX))
    throw std::invalid_argument("a cache on CUDA holds fewer than 2^31 keys and pages");
  check_aligned(call.q.ptr, {call.q.batch, call.q.seq, call.q.head}, "q");
  check_aligned(call.out.ptr, {call.out.batch, call.out.seq, call.out.head}, "out");
  static constexpr const char* kNames[kNumBranches][2] = {
      {"k_cmp", "v_cmp"}, {"k_slc", "v_slc"}, {"k_win", "v_win"}};
  for (int c = 0; c < kNumBranches; ++c) {
    const PagedView &k = call.k[c], &v = call.v[c];
    check_aligned(k.ptr, {k.page, k.seq, k.head}, kNames[c][0]);
    check_aligned(v.ptr, {v.page, v.seq, v.head}, kNames[c][1]);
  }
}

}  // namespace

std::vector<std::string> decode_supports(const AttnShape& shape, const BlockConfig& config,
                                         int major, int minor) {
  std::vector<std::string> reasons = supports(shape, config, major, minor);
  if (!reasons.empty()) return reasons;
  // The scores of all blocks of a sequence are kept in shared memory while the best are chosen.
  const int64_t room = major == 8 ? (minor == 0 || minor == 7 ? 163 : 99) : major < 12 ? 227 : 99;
  const auto fits = [&](int64_t pages) {
    return decode::select_shared_bytes(config, pages) <= room * 1024;
  };
  const int64_t pages = ceil_div<int64_t>(shape.seqlen_k, config.select_size);
  if (!fits(pages)) {
    int64_t most = 0;
    for (int64_t step = int64_t{1} << 20; step >= 1; step /= 2) most += fits(most + step) * step;
    reasons.push_back("the capacity of a sequence must be at most " +
                      std::to_string(most * config.select_size) + " keys on this GPU, got " +
                      std::to_string(shape.seqlen_k));
  }
  return reasons;
}

int64_t decode_fwd_workspace(const DecodeFwd& call) {
  int64_t bytes;
  plan(call, nullptr, &bytes);
  return bytes;
}

void decode_fwd(const DecodeFwd& call, void* workspace, Stream stream) {
  check_call(call);
  if (call.shape.batch == 0 || call.shape.seqlen_q == 0) return;
  int64_t bytes;
  const DecodeParams p = plan(call, workspace, &bytes);
#define NSA_LAUNCH(T, kDk, kDv)                                                                 \
  if (call.shape.dim_qk == kDk && call.shape.dim_v == kDv &&                                    \
      dispatch_dtype(call.shape.dtype,                                                          \
                     [](auto tag) { return std::is_same_v<typename decltype(tag)::type, T>; })) \
    return decode::launch_decode<T, kDk, kDv>(p, static_cast<cudaStream_t>(stream));
  NSA_ATTN_INSTANCES(NSA_LAUNCH)
#undef NSA_LAUNCH
}

}  // namespace nsa::cuda
