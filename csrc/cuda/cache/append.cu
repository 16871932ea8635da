// Storing new tokens in a KV cache: copies by 16 bytes, laid out by lengths that only the device
// knows. One launch before phi and one after it.

#include "cuda/cache/rows.cuh"
#include "cuda/common.h"
#include "cuda/device/ptx.cuh"
#include "nsa/cache.h"

namespace nsa::cuda {
namespace cache {
namespace {

constexpr int kThreads = 256;
constexpr int kPiecesPerThread = 4;

template <class T>
__device__ __forceinline__ uint4 nan_piece() {
  const uint32_t pair = pack2<T>(nanf(""), nanf(""));
  return make_uint4(pair, pair, pair, pair);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(CacheGather p, int chunks) {
  const CacheShape& s = p.shape;
  const BlockConfig& c = s.config;
  const int64_t b = blockIdx.x / chunks;
  const int chunk = blockIdx.x % chunks;
  CacheStep step = offered_step(p, b);
  const bool room =
      has_room(s, b, step.old, int64_t{step.old} + step.wanted, threadIdx.x, kThreads);
  if (__syncthreads_and(room)) step.taken = step.wanted;
  if (chunk == 0 && threadIdx.x == 0) p.steps[b] = step;
  const NewBlocks blocks(step, c);
  const int64_t needed = blocks.count > 0 ? (blocks.count - 1) * c.block_stride + c.block_size : 0;
  const int64_t start = blocks.first * c.block_stride;
  const int pieces_k = static_cast<int>(s.dim_qk / 8), pieces_v = static_cast<int>(s.dim_v / 8);
  const int per_row = static_cast<int>(s.heads) * (pieces_k + pieces_v);
  const int64_t end = gathered_rows(s.tokens, c) * per_row;
  for (int64_t i = int64_t{chunk} * kThreads + threadIdx.x; i < end;
       i += int64_t{chunks} * kThreads) {
    const int64_t row = i / per_row;
    int piece = static_cast<int>(i - row * per_row);
    const bool values = piece >= static_cast<int>(s.heads) * pieces_k;
    if (values) piece -= static_cast<int>(s.heads) * pieces_k;
    const int pieces = values ? pieces_v : pieces_k;
    const int head = piece / pieces, at = piece - head * pieces;
    uint4 value = {};
    if (row < needed) {
      const uint4* from = token_piece<T>(p, step, b, start + row, values, head, at);
      value = from ? *from : nan_piece<T>();
    }
    *piece_of<T>(values ? p.out_v : p.out_k, b, row, head, at) = value;
  }
}

/// Piece `at` of a key rotated at `position`, in pairs (i, i + D/2).
template <class T>
__device__ __forceinline__ uint4 rotated(const uint4* key, int at, int pieces, float position,
                                         const float* inv_freq) {
  const int half = pieces * 4;  // elements; a piece of 8 may lie in both halves
  const T* elements = reinterpret_cast<const T*>(key);
  float values[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int i = at * 8 + e, pair = i < half ? i : i - half;
    float sin, cos;
    sincosf(position * inv_freq[pair], &sin, &cos);
    const float a = to_float(elements[pair]), b = to_float(elements[pair + half]);
    values[e] = i < half ? a * cos - b * sin : b * cos + a * sin;
  }
  return make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                    pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7]));
}

/// Grid: (B * chunks, 2 * 4): K and V of the raw tokens of the selected and the window branch, of
/// the tail, of the compressed tokens.
enum Target : int { kToSelected, kToWindow, kToTail, kToCompressed, kNumTargets };

template <class T>
__global__ void __launch_bounds__(kThreads) append_kernel(CacheAppend p, int chunks) {
  const CacheShape& s = p.shape;
  const BlockConfig& c = s.config;
  const int64_t b = blockIdx.x / chunks;
  const int chunk = blockIdx.x % chunks;
  const int target = blockIdx.y % kNumTargets;
  const bool values = blockIdx.y >= kNumTargets;
  const CacheStep step = p.steps[b];
  if (blockIdx.y == 0 && chunk == 0 && threadIdx.x == 0) {
    const int length = static_cast<int>(step.length());
    p.seqlens[b] = length;
    p.tail_start[b] = max(p.tail_start[b], length - static_cast<int>(s.tail));
    p.dropped[b] += step.wanted - step.taken;
  }
  const NewBlocks blocks(step, c);
  const int branch = target == kToSelected ? kSelected
                     : target == kToWindow ? kWindow
                                           : kCompressed;
  const InView& from =
      target == kToCompressed ? (values ? p.v_cmp : p.k_cmp) : (values ? p.v : p.k)[branch];
  const PagedOut& pages = (values ? p.v_pages : p.k_pages)[branch];
  if (from.ptr == nullptr) return;
  // First row, among the new tokens or the new blocks, and how many.
  int64_t first = 0, rows = target == kToCompressed ? blocks.count : step.taken;
  if (target == kToTail && rows > s.tail) {
    first = rows - s.tail;
    rows = s.tail;
  }
  const int pieces = static_cast<int>((values ? s.dim_v : s.dim_qk) / 8);
  const int per_row = static_cast<int>(s.heads) * pieces;
  const int page_rows = target == kToCompressed ? c.select_size / c.block_stride : c.select_size;
  const bool rotates = target == kToCompressed && !values && p.rope_inv_freq;
  for (int64_t i = int64_t{chunk} * kThreads + threadIdx.x; i < rows * per_row;
       i += int64_t{chunks} * kThreads) {
    const int64_t row = first + i / per_row;
    const int piece = static_cast<int>(i % per_row), head = piece / pieces;
    const int at = piece - head * pieces;
    const int64_t index = (target == kToCompressed ? blocks.first : step.old) + row;
    uint4* to;
    if (target == kToTail) {
      to = piece_of<T>(values ? p.tail_v : p.tail_k, b, index % s.tail, head, at);
    } else {
      const int64_t page = page_of(s, b, index / page_rows);
      if (page < 0 || page >= s.num_pages) continue;
      to = reinterpret_cast<uint4*>(static_cast<T*>(pages.ptr) + page * pages.page +
                                    index % page_rows * pages.seq + head * pages.head) +
           at;
    }
    const int64_t from_row = target == kToCompressed ? row : step.row(index, s.tokens);
    if (rotates) {
      *to = rotated<T>(piece_of<T>(from, b, from_row, head, 0), at, pieces,
                       static_cast<float>(index * c.block_stride),
                       static_cast<const float*>(p.rope_inv_freq));
    } else {
      *to = *piece_of<T>(from, b, from_row, head, at);
    }
  }
}

/// Blocks of threads for `rows` rows of a sequence; rows are long chunks' many, so at most 64.
int chunks_of(int64_t rows, int64_t pieces_per_row) {
  const int64_t chunks = ceil_div<int64_t>(rows * pieces_per_row, kThreads * kPiecesPerThread);
  return static_cast<int>(chunks < 1 ? 1 : chunks > 64 ? 64 : chunks);
}

}  // namespace
}  // namespace cache

void cache_gather(const CacheGather& params, Stream stream) {
  using namespace cache;
  const CacheShape& s = params.shape;
  check_tokens(params);
  if (s.batch == 0) return;
  const int chunks =
      chunks_of(gathered_rows(s.tokens, s.config), s.heads * (s.dim_qk + s.dim_v) / 8);
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    gather_kernel<T>
        <<<grid_size(s.batch * chunks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params,
                                                                                          chunks);
  });
  check_launch("cache_gather");
}

void cache_append(const CacheAppend& params, Stream stream) {
  using namespace cache;
  const CacheShape& s = params.shape;
  if (s.dim_qk % 8 || s.dim_v % 8)
    throw std::invalid_argument("head dims must be multiples of 8 on CUDA");
  for (int branch = 0; branch < kNumBranches; ++branch) {
    check_aligned(params.k[branch], "k", params.k[branch].batch);
    check_aligned(params.v[branch], "v", params.v[branch].batch);
    check_aligned(params.k_pages[branch], "k_pages", params.k_pages[branch].page);
    check_aligned(params.v_pages[branch], "v_pages", params.v_pages[branch].page);
  }
  check_aligned(params.k_cmp, "k_cmp", params.k_cmp.batch);
  check_aligned(params.v_cmp, "v_cmp", params.v_cmp.batch);
  check_aligned(params.tail_k, "tail_k", params.tail_k.batch);
  check_aligned(params.tail_v, "tail_v", params.tail_v.batch);
  if (s.batch == 0) return;
  const int chunks = chunks_of(s.tokens, s.heads * (s.dim_qk > s.dim_v ? s.dim_qk : s.dim_v) / 8);
  const dim3 grid(grid_size(s.batch * chunks), 2 * kNumTargets);
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    append_kernel<T><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params, chunks);
  });
  check_launch("cache_append");
}

}  // namespace nsa::cuda
