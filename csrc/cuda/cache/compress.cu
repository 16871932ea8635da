// phi of kinds `mlp` and `linear` in a step of decode. Of B sequences about B/d complete a block in
// a step, and which ones the device alone knows: the products are dot products with the rows of W1
// and W2, and blocks of threads without work leave at once.

#include "cuda/cache/rows.cuh"
#include "cuda/common.h"
#include "cuda/compress/mlp.cuh"
#include "cuda/device/ptx.cuh"
#include "nsa/cache.h"

namespace nsa::cuda {
namespace cache {
namespace {

constexpr int kThreads = 256;
// Rows of W1 that a block of threads owns: it reads an input of l * D elements once for all of
// them. 4 rows of the default sizes (32 KiB) stay in L1 for its inputs.
constexpr int kUnits = 4;
// Blocks of threads that share out the inputs of the same rows. An input takes a block 2 to 3 us,
// most of it latency, and a step has few: B/d sequences of Hkv heads. With 128 hidden units these
// are 512 blocks, which 132 multiprocessors hold at once.
constexpr int kSplits = 8;

template <class T>
__device__ __forceinline__ void unpack8(uint4 packed, float (&values)[8]) {
  compress::unpack8<T>(packed, values);
}

/// A sequence that completes a block.
struct Listed {
  int b, tail_start;
  CacheStep step;
};

/// Lists the sequences of [base, base + kThreads) that complete a block, in order, and returns how
/// many. Called by the whole block, which it synchronises. Every block of threads makes the same
/// list.
__device__ __forceinline__ int list_sequences(const CacheGather& p, int64_t base, bool reports,
                                              Listed* list) {
  __shared__ int counts[kThreads / 32];
  const int64_t b = base + threadIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool completes = false;
  Listed mine{};
  if (b < p.shape.batch) {
    CacheStep step = offered_step(p, b);
    if (has_room(p.shape, b, step.old, int64_t{step.old} + step.wanted)) step.taken = step.wanted;
    if (reports) p.steps[b] = step;
    completes = NewBlocks(step, p.shape.config).count > 0;
    mine = {static_cast<int>(b), p.tail_start[b], step};
  }
  const uint32_t mask = __ballot_sync(0xffffffffu, completes);
  if (lane == 0) counts[warp] = __popc(mask);
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    before += w < warp ? counts[w] : 0;
    all += counts[w];
  }
  if (completes) list[before + __popc(mask & ((1u << lane) - 1))] = mine;
  __syncthreads();
  return all;
}

/// The rows of the block that a sequence completes, of one head of K or V, by pieces of 8.
template <class T>
struct BlockRows {
  const T *fresh, *tail;  // the new token 0 (perhaps before the first), slot 0
  int64_t fresh_seq, tail_seq;
  int start, old, tail_start, slot, slots;

  __device__ __forceinline__ BlockRows(const CacheGather& p, const Listed& at, bool values,
                                       int64_t head)
      : old(at.step.old), tail_start(at.tail_start), slots(static_cast<int>(p.shape.tail)) {
    const InView &from = values ? p.v : p.k, &ring = values ? p.tail_v : p.tail_k;
    fresh_seq = from.seq;
    tail_seq = ring.seq;
    fresh = static_cast<const T*>(from.ptr) + at.b * from.batch + head * from.head +
            (p.shape.tokens - at.step.wanted) * from.seq;
    tail = static_cast<const T*>(ring.ptr) + at.b * ring.batch + head * ring.head;
    const BlockConfig& c = p.shape.config;
    start = static_cast<int>(num_compressed(old, c.block_size, c.block_stride) * c.block_stride);
    slot = start % slots;
  }
  /// Null where the tail lost the row.
  __device__ __forceinline__ const uint4* piece(int row, int at) const {
    const int position = start + row;
    if (position >= old)
      return reinterpret_cast<const uint4*>(fresh + (position - old) * fresh_seq) + at;
    if (position < tail_start) return nullptr;
    const int ring = slot + row < slots ? slot + row : slot + row - slots;
    return reinterpret_cast<const uint4*>(tail + ring * tail_seq) + at;
  }
  __device__ __forceinline__ void load(int row, int at, float (&x)[8]) const {
    const uint4* from = piece(row, at);
    if (from) return unpack8<T>(*from, x);
#pragma unroll
    for (float& element : x) element = nanf("");
  }
};

/// gelu(w1 vec(x + pos) + b1), for `linear` without the gelu, rounded to T: hidden (2, B, Hkv,
/// padded), K before V. Grid: (units / kUnits, 2 * Hw, kSplits).
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    hidden_kernel(CacheCompressMlp p, T* hidden, int64_t padded) {
  __shared__ Listed list[kThreads];
  __shared__ float sums[kThreads / 32][kUnits];
  const CacheGather& tokens = p.tokens;
  const CacheShape& s = tokens.shape;
  const bool values = blockIdx.y >= p.weight_heads;
  const PhiWeights& phi = values ? p.v : p.k;
  const int64_t weight_head = blockIdx.y - (values ? p.weight_heads : 0);
  const int first_unit = blockIdx.x * kUnits;
  const bool reports = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
  const int units = min(kUnits, static_cast<int>(phi.hidden) - first_unit);
  if (units <= 0 && !reports) return;

  const int dim = static_cast<int>(values ? s.dim_v : s.dim_qk), pieces = dim / 8;
  const int rows = s.config.block_size;
  const int64_t elements = int64_t{rows} * dim;
  const T* w1 = static_cast<const T*>(phi.w1) + (weight_head * phi.hidden + first_unit) * elements;
  const T* pos = phi.pos ? static_cast<const T*>(phi.pos) + weight_head * elements : nullptr;
  // One phi for all heads, or for head `weight_head` alone.
  const int heads = p.weight_heads == 1 ? static_cast<int>(s.heads) : 1;
  for (int64_t base = 0; base < s.batch; base += kThreads) {
    const int inputs = list_sequences(tokens, base, reports, list) * heads;
    for (int i = blockIdx.z; i < inputs && units > 0; i += kSplits) {
      const Listed& at = list[i / heads];
      const int64_t head = p.weight_heads == 1 ? i % heads : weight_head;
      const BlockRows<T> block(tokens, at, values, head);
      float acc[kUnits] = {};
#pragma unroll 2
      for (int k = threadIdx.x; k < rows * pieces; k += kThreads) {
        const int row = k / pieces;
        float x[8], w[8];
        block.load(row, k - row * pieces, x);
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
        for (int warp = 0; warp < kThreads / 32; ++warp) pre += sums[warp][u];
        float derivative;
        if (phi.w2) compress::gelu(pre, pre, derivative);
        hidden[(((values ? s.batch : 0) + at.b) * s.heads + head) * padded + first_unit + u] =
            static_cast<T>(pre);
      }
      __syncthreads();
    }
    __syncthreads();  // before the list is made anew
  }
}

/// w2 hidden + b2, or hidden for `linear`. Grid: (B * Hkv, 2). Eight threads form a dot product.
template <class T>
__global__ void __launch_bounds__(kThreads)
    out_kernel(CacheCompressMlp p, const T* hidden, int64_t padded) {
  const CacheShape& s = p.tokens.shape;
  const bool values = blockIdx.y == 1;
  const PhiWeights& phi = values ? p.v : p.k;
  const int64_t b = blockIdx.x / s.heads, head = blockIdx.x % s.heads;
  const OutView& out = values ? p.tokens.out_v : p.tokens.out_k;
  T* to = static_cast<T*>(out.ptr) + b * out.batch + head * out.head;
  const bool completes = NewBlocks(p.tokens.steps[b], s.config).count > 0;
  hidden += (((values ? s.batch : 0) + b) * s.heads + head) * padded;
  if (!completes || !phi.w2) {
    for (int o = threadIdx.x; o < phi.dim_out; o += kThreads)
      to[o] = completes ? hidden[o] : static_cast<T>(0.f);
    return;
  }
  const int64_t weight_head = p.weight_heads == 1 ? 0 : head;
  const T* w2 = static_cast<const T*>(phi.w2) + weight_head * phi.dim_out * phi.hidden;
  const int lane = threadIdx.x % 8, pieces = static_cast<int>(phi.hidden / 8);
  for (int first = 0; first < phi.dim_out; first += kThreads / 8) {
    const int o = first + threadIdx.x / 8;
    float sum = 0.f;
    if (o < phi.dim_out) {
      for (int k = lane; k < pieces; k += 8) {
        float x[8], w[8];
        unpack8<T>(reinterpret_cast<const uint4*>(hidden)[k], x);
        unpack8<T>(__ldg(reinterpret_cast<const uint4*>(w2 + o * phi.hidden) + k), w);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum = fmaf(x[e], w[e], sum);
      }
    }
#pragma unroll
    for (int mask = 4; mask; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane != 0 || o >= phi.dim_out) continue;
    if (phi.b2) sum += to_float(static_cast<const T*>(phi.b2)[weight_head * phi.dim_out + o]);
    to[o] = static_cast<T>(sum);
  }
}

/// sum_r weight[r] (x[r] + pos[r]). Grid: (B * Hkv, 2). The threads hold `groups` partial sums of
/// every piece of 8 elements.
template <class T>
__global__ void __launch_bounds__(kThreads) pool_kernel(CacheCompressPool p) {
  __shared__ float sums[kThreads * 8];
  const CacheGather& tokens = p.tokens;
  const CacheShape& s = tokens.shape;
  const bool values = blockIdx.y == 1;
  const PoolWeights& phi = values ? p.v : p.k;
  const int64_t b = blockIdx.x / s.heads, head = blockIdx.x % s.heads;
  Listed at{static_cast<int>(b), tokens.tail_start[b], offered_step(tokens, b)};
  CacheStep& step = at.step;
  if (has_room(s, b, step.old, int64_t{step.old} + step.wanted)) step.taken = step.wanted;
  if (head == 0 && !values && threadIdx.x == 0) tokens.steps[b] = step;

  const int dim = static_cast<int>(values ? s.dim_v : s.dim_qk), pieces = dim / 8;
  const int rows = s.config.block_size, groups = kThreads / pieces;
  const OutView& out = values ? tokens.out_v : tokens.out_k;
  T* to = static_cast<T*>(out.ptr) + b * out.batch + head * out.head;
  const bool completes = NewBlocks(step, s.config).count > 0;
  const int group = threadIdx.x / pieces, piece = threadIdx.x % pieces;
  if (completes && group < groups) {
    const int64_t weight_head = p.weight_heads == 1 ? 0 : head;
    const T* weight = phi.weight ? static_cast<const T*>(phi.weight) + weight_head * rows : nullptr;
    const T* pos = phi.pos ? static_cast<const T*>(phi.pos) + weight_head * rows * dim : nullptr;
    const BlockRows<T> block(tokens, at, values, head);
    float acc[8] = {};
#pragma unroll 2
    for (int row = group; row < rows; row += groups) {
      float x[8], shift[8];
      block.load(row, piece, x);
      if (pos) {
        unpack8<T>(__ldg(reinterpret_cast<const uint4*>(pos) + row * pieces + piece), shift);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] += shift[e];
      }
      const float factor = weight ? to_float(weight[row]) : 1.f / rows;
#pragma unroll
      for (int e = 0; e < 8; ++e) acc[e] = fmaf(factor, x[e], acc[e]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sums[group * dim + piece * 8 + e] = acc[e];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < dim; e += kThreads) {
    float sum = 0.f;
    for (int g = 0; completes && g < groups; ++g) sum += sums[g * dim + e];
    to[e] = static_cast<T>(sum);
  }
}

int64_t padded_hidden(const CacheCompressMlp& p) {
  return round_up<int64_t>(p.k.hidden > p.v.hidden ? p.k.hidden : p.v.hidden, 8);
}

void check_step(const CacheGather& tokens) {
  check_tokens(tokens);
  if (tokens.shape.tokens > tokens.shape.config.block_stride)
    throw std::invalid_argument("a step of decode has at most block_stride tokens");
}

void check(const CacheCompressMlp& p) {
  check_step(p.tokens);
  for (const PhiWeights* phi : {&p.k, &p.v}) {
    if (phi->hidden % 8)
      throw std::invalid_argument("cache_compress_mlp: hidden must be a multiple of 8");
    for (const void* weight : {phi->pos, phi->w1, phi->w2}) {
      if (!compress::is_aligned16(weight))
        throw std::invalid_argument("cache_compress_mlp: weights must be aligned to 16 bytes");
    }
  }
}

}  // namespace
}  // namespace cache

int64_t cache_compress_mlp_workspace(const CacheCompressMlp& params) {
  const CacheShape& s = params.tokens.shape;
  return 2 * s.batch * s.heads * cache::padded_hidden(params) * 2;
}

void cache_compress_mlp(const CacheCompressMlp& params, void* workspace, Stream cuda_stream) {
  using namespace cache;
  const cudaStream_t stream = static_cast<cudaStream_t>(cuda_stream);
  check(params);
  const CacheShape& s = params.tokens.shape;
  if (s.batch == 0 || s.heads == 0) return;
  const int64_t padded = padded_hidden(params);
  const dim3 grid(grid_size(ceil_div<int64_t>(padded, kUnits)),
                  static_cast<unsigned>(2 * params.weight_heads), kSplits);
  const dim3 out_grid(grid_size(s.batch * s.heads), 2);
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* hidden = static_cast<T*>(workspace);
    hidden_kernel<T><<<grid, kThreads, 0, stream>>>(params, hidden, padded);
    check_launch("cache hidden_kernel");
    out_kernel<T><<<out_grid, kThreads, 0, stream>>>(params, hidden, padded);
    check_launch("cache out_kernel");
  });
}

void cache_compress_pool(const CacheCompressPool& params, Stream stream) {
  using namespace cache;
  check_step(params.tokens);
  const CacheShape& s = params.tokens.shape;
  if (s.dim_qk > kThreads * 8 || s.dim_v > kThreads * 8)
    throw std::invalid_argument("cache_compress_pool: head dims must be at most 2048");
  for (const void* pos : {params.k.pos, params.v.pos}) {
    if (!compress::is_aligned16(pos))
      throw std::invalid_argument("cache_compress_pool: pos must be aligned to 16 bytes");
  }
  if (s.batch == 0 || s.heads == 0) return;
  const dim3 grid(grid_size(s.batch * s.heads), 2);
  dispatch_dtype(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    pool_kernel<T><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  });
  check_launch("cache pool_kernel");
}

}  // namespace nsa::cuda
