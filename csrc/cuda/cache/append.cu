// Storing chunks of new tokens in a KV cache: copies by 16 bytes, laid out by lengths that only the
// device knows. One launch before phi and one after it. A step of decode has store.cu.

#include "cuda/cache/rows.cuh"
#include "cuda/common.h"
#include "nsa/cache.h"

namespace nsa::cuda {
namespace cache {
namespace {

constexpr int kThreads = 256;
constexpr int kPiecesPerThread = 4;

/// Where the token at `position` lies, piece `at` of its row: among the new ones or in the tail.
/// Null where the tail lost it.
template <class T>
__device__ __forceinline__ const uint4* token_piece(const CacheGather& p, const CacheStep& step,
                                                    int64_t b, int64_t position,
                                                    const Column& column) {
  const bool values = column.values;
  if (position >= step.old)
    return piece_of<T>(values ? p.v : p.k, b, step.row(position, p.shape.tokens), column.head,
                       column.at);
  if (position < p.tail_start[b]) return nullptr;
  return piece_of<T>(values ? p.tail_v : p.tail_k, b, position % p.shape.tail, column.head,
                     column.at);
}

template <class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(CacheGather p, int chunks) {
  const CacheShape& s = p.shape;
  const BlockConfig& c = s.config;
  const int64_t b = blockIdx.x / chunks;
  const int chunk = blockIdx.x % chunks;
  CacheStep step = offered_step(p, b);
  if (__syncthreads_and(has_room(s, b, step, threadIdx.x, kThreads))) step.taken = step.wanted;
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
    const Column column(static_cast<int>(i - row * per_row), static_cast<int>(s.heads), pieces_k,
                        pieces_v);
    uint4 value = {};
    if (row < needed) {
      const uint4* from = token_piece<T>(p, step, b, start + row, column);
      value = from ? *from : nan_piece<T>();
    }
    *piece_of<T>(column.values ? p.out_v : p.out_k, b, row, column.head, column.at) = value;
  }
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
      to = piece_of<T>(pages, page, static_cast<int>(index % page_rows), head, at);
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
  check_dims(s);
  check_aligned(params.k, "k", params.k.batch);
  check_aligned(params.v, "v", params.v.batch);
  check_aligned(params.tail_k, "tail_k", params.tail_k.batch);
  check_aligned(params.tail_v, "tail_v", params.tail_v.batch);
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
  check_tokens(params);
  check_aligned(params.k_cmp, "k_cmp", params.k_cmp.batch);
  check_aligned(params.v_cmp, "v_cmp", params.v_cmp.batch);
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
