// Storing a step of decode in a KV cache, at most d new tokens of every sequence: rows to the pages
// and the tail, phi of the blocks that complete, lengths. One block of threads does all that
// belongs to a sequence, so that no block reads a length that another one changes; but for the
// first product of `mlp` and `linear`, which takes the whole GPU to read W1.
//
// Of B sequences about B/d complete a block in a step, and which ones the device alone knows.

#include "cuda/cache/rows.cuh"
#include "cuda/common.h"
#include "cuda/compress/mlp.cuh"
#include "cuda/device/pdl.cuh"
#include "nsa/cache.h"

namespace nsa::cuda {
namespace cache {
namespace {

using compress::unpack8;

/// A sequence and what is done to it.
struct Listed {
  int b, tail_start;
  CacheStep step;
};

/// The rows of the block that a sequence completes, of one head of K or V, by pieces of 8.
template <class T>
struct BlockRows {
  const T *fresh, *tail;  // the new token 0 (perhaps before the first), slot 0
  int64_t fresh_seq, tail_seq;
  int start, old, tail_start, slot, slots;

  __device__ __forceinline__ BlockRows(const CacheStore& p, const Listed& at, bool values,
                                       int64_t head)
      : old(at.step.old), tail_start(at.tail_start), slots(static_cast<int>(p.shape.tail)) {
    const InView& from = (values ? p.v : p.k)[kCompressed];
    const OutView& ring = values ? p.tail_v : p.tail_k;
    fresh_seq = from.seq;
    tail_seq = ring.seq;
    fresh = static_cast<const T*>(from.ptr) + at.b * from.batch + head * from.head +
            (p.shape.tokens - at.step.wanted) * from.seq;
    tail = static_cast<const T*>(ring.ptr) + at.b * ring.batch + head * ring.head;
    start = first_incomplete(at.step, p.shape.config) * p.shape.config.block_stride;
    slot = start % slots;
  }
  /// NaN where the tail lost the row.
  __device__ __forceinline__ uint4 piece(int row, int at) const {
    const int position = start + row;
    const int ring = slot + row < slots ? slot + row : slot + row - slots;
    const T* from = position >= old ? fresh + (position - old) * fresh_seq : tail + ring * tail_seq;
    return position >= old || position >= tail_start ? reinterpret_cast<const uint4*>(from)[at]
                                                     : nan_piece<T>();
  }
};

// The first product of `mlp` and `linear`: dot products with the rows of W1. Blocks of threads
// without work leave at once.

constexpr int kHiddenThreads = 256;
// Rows of W1 that a block of threads owns: it reads an input of l * D elements once for all of
// them. 4 rows of the default sizes (32 KiB) stay in L1 for its inputs.
constexpr int kUnits = 4;
// Blocks of threads that share out the inputs of the same rows. An input takes a block 2 to 3 us,
// most of it latency, and a step has few: B/d sequences of Hkv heads. With 128 hidden units these
// are 512 blocks, which 132 multiprocessors hold at once.
constexpr int kSplits = 8;

struct MlpStep : CacheStoreMlp {
  void* hidden;  // (2, B, Hkv, padded): K, then V
  int64_t padded;
};

template <class T>
__device__ __forceinline__ T* hidden_row(const MlpStep& p, bool values, int64_t b, int64_t head) {
  return static_cast<T*>(p.hidden) +
         (((values ? p.shape.batch : 0) + b) * p.shape.heads + head) * p.padded;
}

/// Lists the sequences of [base, base + kHiddenThreads) that complete a block, in order, and
/// returns how many. Called by the whole block, which it synchronises. Every block of threads makes
/// the same list.
__device__ __forceinline__ int list_sequences(const CacheStore& p, int64_t base, Listed* list) {
  __shared__ int counts[kHiddenThreads / 32];
  const int64_t b = base + threadIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool completes = false;
  Listed mine{};
  if (b < p.shape.batch) {
    mine = {static_cast<int>(b), p.tail_start[b], offered_step(p, b)};
    if (has_room(p.shape, b, mine.step)) mine.step.taken = mine.step.wanted;
    completes = NewBlocks(mine.step, p.shape.config).count > 0;
  }
  const uint32_t mask = __ballot_sync(0xffffffffu, completes);
  if (lane == 0) counts[warp] = __popc(mask);
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kHiddenThreads / 32; ++w) {
    before += w < warp ? counts[w] : 0;
    all += counts[w];
  }
  if (completes) list[before + __popc(mask & ((1u << lane) - 1))] = mine;
  __syncthreads();
  return all;
}

/// gelu(w1 vec(x + pos) + b1), for `linear` without the gelu, rounded to T: hidden (2, B, Hkv,
/// padded), K before V. Grid: (units / kUnits, 2 * Hw, kSplits).
template <class T>
__global__ void __launch_bounds__(kHiddenThreads, 4)
    hidden_kernel(const __grid_constant__ MlpStep p) {
  __shared__ Listed list[kHiddenThreads];
  __shared__ float sums[kHiddenThreads / 32][kUnits];
  launch_dependents();
  wait_for_previous();
  const CacheShape& s = p.shape;
  const bool values = blockIdx.y >= p.weight_heads;
  const PhiWeights& phi = values ? p.phi_v : p.phi_k;
  const int64_t weight_head = blockIdx.y - (values ? p.weight_heads : 0);
  const int first_unit = blockIdx.x * kUnits;
  const int units = min(kUnits, static_cast<int>(phi.hidden) - first_unit);
  if (units <= 0) return;

  const int dim = static_cast<int>(values ? s.dim_v : s.dim_qk), pieces = dim / 8;
  const int rows = s.config.block_size;
  const int64_t elements = int64_t{rows} * dim;
  const T* w1 = static_cast<const T*>(phi.w1) + (weight_head * phi.hidden + first_unit) * elements;
  const T* pos = phi.pos ? static_cast<const T*>(phi.pos) + weight_head * elements : nullptr;
  // One phi for all heads, or for head `weight_head` alone.
  const int heads = p.weight_heads == 1 ? static_cast<int>(s.heads) : 1;
  for (int64_t base = 0; base < s.batch; base += kHiddenThreads) {
    const int inputs = list_sequences(p, base, list) * heads;
    for (int i = blockIdx.z; i < inputs; i += kSplits) {
      const Listed& at = list[i / heads];
      const int64_t head = p.weight_heads == 1 ? i % heads : weight_head;
      const BlockRows<T> block(p, at, values, head);
      float acc[kUnits] = {};
#pragma unroll 2
      for (int k = threadIdx.x; k < rows * pieces; k += kHiddenThreads) {
        const int row = k / pieces;
        float x[8], w[8];
        unpack8<T>(block.piece(row, k - row * pieces), x);
        if (pos) {
          unpack8<T>(__ldg(reinterpret_cast<const uint4*>(pos) + k), w);
#pragma unroll
          for (int e = 0; e < 8; ++e) x[e] += w[e];
        }
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          if (u >= units) break;
          unpack8<T>(__ldg(reinterpret_cast<const uint4*>(w1 + u * elements) + k), w);
#pragma unroll
          for (int e = 0; e < 8; ++e) acc[u] = fmaf(x[e], w[e], acc[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int mask = 16; mask; mask /= 2) acc[u] += __shfl_xor_sync(0xffffffffu, acc[u], mask);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][u] = acc[u];
      }
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < units) {
        const int u = threadIdx.x;
        const int64_t unit = weight_head * phi.hidden + first_unit + u;
        float pre = phi.b1 ? to_float(static_cast<const T*>(phi.b1)[unit]) : 0.f;
#pragma unroll
        for (int warp = 0; warp < kHiddenThreads / 32; ++warp) pre += sums[warp][u];
        float derivative;
        if (phi.w2) compress::gelu(pre, pre, derivative);
        hidden_row<T>(p, values, at.b, head)[first_unit + u] = static_cast<T>(pre);
      }
      __syncthreads();
    }
    __syncthreads();  // before the list is made anew
  }
}

// The rest, a block of threads for each sequence.

constexpr int kThreads = 512;

/// Room for as many whole heads, of K and V, as kThreads pieces hold.
template <class T>
struct Scratch {
  float sums[kThreads * 8];
  uint4 tokens[kThreads];  // compressed tokens by pieces: of the heads of K, then of those of V
};

/// Heads [first, first + count).
struct Heads {
  int first, count;
};

/// sum_r weight[r] (x[r] + pos[r]), to scratch.tokens. The threads hold `groups` partial sums of
/// every piece.
template <class T>
__device__ __forceinline__ void compress_block(const CacheStorePool& p, const Listed& at,
                                               const Heads& heads, Scratch<T>& scratch) {
  constexpr int kRows = 4;  // that a thread has on their way
  const CacheShape& s = p.shape;
  const int pieces_k = static_cast<int>(s.dim_qk / 8), pieces_v = static_cast<int>(s.dim_v / 8);
  const int columns = heads.count * (pieces_k + pieces_v), rows = s.config.block_size;
  const int groups = kThreads / columns, group = threadIdx.x / columns;
  const int index = threadIdx.x - group * columns;
  if (group < groups) {
    const Column column(index, heads.count, pieces_k, pieces_v);
    const int head = heads.first + column.head, pieces = column.values ? pieces_v : pieces_k;
    const int64_t weight_head = p.weight_heads == 1 ? 0 : head;
    const PoolWeights& phi = column.values ? p.phi_v : p.phi_k;
    const T* weight = phi.weight ? static_cast<const T*>(phi.weight) + weight_head * rows : nullptr;
    const uint4* pos =
        phi.pos ? static_cast<const uint4*>(phi.pos) + weight_head * rows * pieces + column.at
                : nullptr;
    const BlockRows<T> block(p, at, column.values, head);
    float acc[8] = {};
#pragma unroll 1
    for (int base = group; base < rows; base += kRows * groups) {
      uint4 packed[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = base + i * groups;
        packed[i] = row < rows ? block.piece(row, column.at) : uint4{};
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int row = base + i * groups;
        if (row >= rows) break;
        float x[8], shift[8];
        unpack8<T>(packed[i], x);
        if (pos) {
          unpack8<T>(__ldg(pos + row * pieces), shift);
#pragma unroll
          for (int e = 0; e < 8; ++e) x[e] += shift[e];
        }
        const float factor = weight ? to_float(weight[row]) : 1.f / rows;
#pragma unroll
        for (int e = 0; e < 8; ++e) acc[e] = fmaf(factor, x[e], acc[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) scratch.sums[(group * columns + index) * 8 + e] = acc[e];
  }
  __syncthreads();
  T* tokens = reinterpret_cast<T*>(scratch.tokens);
  for (int e = threadIdx.x; e < columns * 8; e += kThreads) {
    float sum = 0.f;
    for (int g = 0; g < groups; ++g) sum += scratch.sums[g * columns * 8 + e];
    tokens[e] = static_cast<T>(sum);
  }
}

/// w2 hidden + b2, or hidden for `linear`, to scratch.tokens. Eight threads form dot products of a
/// row of W2, of up to kDots of the heads that share it at a time.
template <class T>
__device__ __forceinline__ void compress_block(const MlpStep& p, const Listed& at,
                                               const Heads& heads, Scratch<T>& scratch) {
  constexpr int kDots = 4;
  const CacheShape& s = p.shape;
  const int dim_k = static_cast<int>(s.dim_qk), dim_v = static_cast<int>(s.dim_v);
  T* tokens = reinterpret_cast<T*>(scratch.tokens);
  const int sharing = p.weight_heads == 1 ? heads.count : 1;  // heads that share a row of W2
  const int outputs = heads.count / sharing * (dim_k + dim_v);
  const int lane = threadIdx.x % 8;
  for (int base = 0; base < outputs; base += kThreads / 8) {
    const int index = base + threadIdx.x / 8;
    const bool exists = index < outputs;
    const int set = exists ? index / (dim_k + dim_v) : 0;
    int o = exists ? index - set * (dim_k + dim_v) : 0;
    const bool values = o >= dim_k;
    if (values) o -= dim_k;
    const PhiWeights& phi = values ? p.phi_v : p.phi_k;
    const int dim = values ? dim_v : dim_k, pieces = static_cast<int>(phi.hidden / 8);
    const int64_t weight_row = (p.weight_heads == 1 ? 0 : heads.first + set) * dim + o;
    const uint4* w2 = static_cast<const uint4*>(phi.w2) + weight_row * pieces;
    T* to = tokens + (values ? heads.count * dim_k : 0) + set * dim + o;
    for (int first = 0; first < sharing; first += kDots) {
      float sums[kDots] = {};
      const T* hidden[kDots];
#pragma unroll
      for (int i = 0; i < kDots; ++i)
        hidden[i] = hidden_row<T>(p, values, at.b, heads.first + set + min(first + i, sharing - 1));
      if (phi.w2 == nullptr) {
#pragma unroll
        for (int i = 0; i < kDots; ++i) sums[i] = lane == 0 ? to_float(hidden[i][o]) : 0.f;
      } else {
#pragma unroll 2
        for (int k = lane; k < pieces; k += 8) {
          float w[8];
          unpack8<T>(__ldg(w2 + k), w);
#pragma unroll
          for (int i = 0; i < kDots; ++i) {
            float x[8];
            unpack8<T>(reinterpret_cast<const uint4*>(hidden[i])[k], x);
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[i] = fmaf(x[e], w[e], sums[i]);
          }
        }
      }
      const float bias = phi.b2 ? to_float(static_cast<const T*>(phi.b2)[weight_row]) : 0.f;
#pragma unroll
      for (int i = 0; i < kDots; ++i) {
#pragma unroll
        for (int mask = 4; mask; mask /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], mask);
        if (lane == i && exists && first + i < sharing)
          to[(first + i) * dim] = static_cast<T>(sums[i] + bias);
      }
    }
  }
}

/// Compressed tokens to their page, keys rotated.
template <class T>
__device__ __forceinline__ void write_block(const CacheStore& p, const Listed& at,
                                            const Heads& heads, const Scratch<T>& scratch) {
  const CacheShape& s = p.shape;
  const int pieces_k = static_cast<int>(s.dim_qk / 8), pieces_v = static_cast<int>(s.dim_v / 8);
  const int index = threadIdx.x;
  if (index >= heads.count * (pieces_k + pieces_v)) return;
  const Column column(index, heads.count, pieces_k, pieces_v);
  const int token = first_incomplete(at.step, s.config);
  const int page_rows = s.config.select_size / s.config.block_stride, page = token / page_rows;
  uint4* to =
      piece_of<T>((column.values ? p.v_pages : p.k_pages)[kCompressed], page_of(s, at.b, page),
                  token - page * page_rows, heads.first + column.head, column.at);
  if (column.values || p.rope_inv_freq == nullptr) {
    *to = scratch.tokens[index];
  } else {
    *to = rotated<T>(scratch.tokens + column.head * pieces_k, column.at, pieces_k,
                     static_cast<float>(token * s.config.block_stride),
                     static_cast<const float*>(p.rope_inv_freq));
  }
}

/// The pieces of the new rows: those to the pages of the selected branch, to the tail, and to the
/// pages of the window where it has its own.
template <class T>
class NewRows {
 public:
  __device__ __forceinline__ NewRows(const CacheStore& p, int b)
      : p_(p),
        b_(b),
        tokens_(static_cast<int>(p.shape.tokens)),
        heads_(static_cast<int>(p.shape.heads)),
        pieces_k_(static_cast<int>(p.shape.dim_qk / 8)),
        pieces_v_(static_cast<int>(p.shape.dim_v / 8)) {}

  __device__ __forceinline__ int count() const {
    return (p_.k[kWindow].ptr ? 3 : 2) * tokens_ * columns();
  }
  __device__ __forceinline__ uint4 load(int index) const {
    const Place place(*this, index);
    const Column& column = place.column;
    return *piece_of<T>((column.values ? p_.v : p_.k)[place.branch], b_, place.row, column.head,
                        column.at);
  }
  /// Nothing for a row that is no new token.
  __device__ __forceinline__ void store(int index, uint4 value, const CacheStep& step) const {
    const Place place(*this, index);
    const Column& column = place.column;
    const int position = step.old + place.row - (tokens_ - step.taken);
    if (position < step.old) return;
    if (place.branch == kCompressed) {
      *piece_of<T>(column.values ? p_.tail_v : p_.tail_k, b_,
                   position % static_cast<int>(p_.shape.tail), column.head, column.at) = value;
      return;
    }
    const int page_rows = p_.shape.config.select_size, page = position / page_rows;
    *piece_of<T>((column.values ? p_.v_pages : p_.k_pages)[place.branch],
                 page_of(p_.shape, b_, page), position - page * page_rows, column.head, column.at) =
        value;
  }

 private:
  __device__ __forceinline__ int columns() const { return heads_ * (pieces_k_ + pieces_v_); }

  struct Place {
    int branch, row;
    Column column;
    __device__ __forceinline__ Place(const NewRows& rows, int index)
        : row(index / rows.columns()),
          column(index - row * rows.columns(), rows.heads_, rows.pieces_k_, rows.pieces_v_) {
      const int target = row / rows.tokens_;
      branch = target == 0 ? kSelected : target == 1 ? kCompressed : kWindow;
      row -= target * rows.tokens_;
    }
  };

  const CacheStore& p_;
  int b_, tokens_, heads_, pieces_k_, pieces_v_;
};

/// Grid: B. Params: CacheStorePool or MlpStep.
template <class T, class Params>
__global__ void __launch_bounds__(kThreads) store_kernel(const __grid_constant__ Params p) {
  __shared__ Scratch<T> scratch;
  launch_dependents();
  wait_for_previous();
  const CacheShape& s = p.shape;
  const int b = blockIdx.x, thread = threadIdx.x;
  const NewRows<T> rows(p, b);
  // On its way before the length is known.
  uint4 value{};
  if (thread < rows.count()) value = rows.load(thread);
  Listed at{b, p.tail_start[b], offered_step(p, b)};
  CacheStep& step = at.step;
  if (__syncthreads_and(has_room(s, b, step, thread, kThreads))) step.taken = step.wanted;
  if (NewBlocks(step, s.config).count > 0) {
    const int most = kThreads / static_cast<int>((s.dim_qk + s.dim_v) / 8);
    for (int first = 0; first < s.heads; first += most) {
      const Heads heads{first, min(most, static_cast<int>(s.heads) - first)};
      compress_block<T>(p, at, heads, scratch);
      __syncthreads();
      write_block<T>(p, at, heads, scratch);
      __syncthreads();
    }
  }
  // The tail has been read.
  for (int i = thread; i < rows.count(); i += kThreads) {
    if (i >= kThreads) value = rows.load(i);
    rows.store(i, value, step);
  }
  if (thread != 0) return;
  const int length = step.old + step.taken;
  p.seqlens[b] = length;
  p.tail_start[b] = max(at.tail_start, length - static_cast<int>(s.tail));
  if (step.taken < step.wanted) p.dropped[b] += step.wanted;
}

template <class Params>
void launch_store(const Params& params, cudaStream_t stream) {
  const CacheShape& s = params.shape;
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch_overlapping(store_kernel<T, Params>, "cache store_kernel", grid_size(s.batch), kThreads,
                       0, stream, params);
  });
}

int64_t padded_hidden(const CacheStoreMlp& p) {
  return round_up<int64_t>(p.phi_k.hidden > p.phi_v.hidden ? p.phi_k.hidden : p.phi_v.hidden, 8);
}

void check_weights(std::initializer_list<const void*> weights) {
  for (const void* weight : weights) {
    if (!compress::is_aligned16(weight))
      throw std::invalid_argument("cache_store: weights must be aligned to 16 bytes");
  }
}

void check(const CacheStore& p) {
  check_tokens(p);
  const CacheShape& s = p.shape;
  if (s.tokens > s.config.block_stride)
    throw std::invalid_argument("a step of decode has at most block_stride tokens");
  if (s.dim_qk + s.dim_v > kThreads * 8)
    throw std::invalid_argument("cache_store: head dims must be at most 4096 together");
}

}  // namespace
}  // namespace cache

int64_t cache_store_mlp_workspace(const CacheStoreMlp& params) {
  const CacheShape& s = params.shape;
  return 2 * s.batch * s.heads * cache::padded_hidden(params) * 2;
}

void cache_store_mlp(const CacheStoreMlp& params, void* workspace, Stream cuda_stream) {
  using namespace cache;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  check(params);
  for (const PhiWeights* phi : {&params.phi_k, &params.phi_v}) {
    check_weights({phi->pos, phi->w1, phi->w2});
    if (phi->hidden % 8)
      throw std::invalid_argument("cache_store_mlp: hidden must be a multiple of 8");
  }
  const CacheShape& s = params.shape;
  if (s.batch == 0 || s.heads == 0) return;
  const MlpStep step{params, workspace, padded_hidden(params)};
  const dim3 grid(grid_size(ceil_div<int64_t>(step.padded, kUnits)),
                  static_cast<unsigned>(2 * params.weight_heads), kSplits);
  dispatch_dtype(s.dtype, [&](auto tag) {
    launch_overlapping(hidden_kernel<typename decltype(tag)::type>, "cache hidden_kernel", grid,
                       kHiddenThreads, 0, stream, step);
  });
  launch_store(step, stream);
}

void cache_store_pool(const CacheStorePool& params, Stream stream) {
  using namespace cache;
  check(params);
  check_weights({params.phi_k.pos, params.phi_v.pos});
  if (params.shape.batch == 0 || params.shape.heads == 0) return;
  launch_store(params, static_cast<cudaStream_t>(stream));
}

}  // namespace nsa::cuda
