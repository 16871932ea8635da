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
// Blocks of threads that share out the inputs of the same rows: with 128 hidden units 256 blocks.
constexpr int kSplits = 4;

template <class T>
__device__ __forceinline__ void unpack8(uint4 packed, float (&values)[8]) {
  compress::unpack8<T>(packed, values);
}

/// gelu(w1 vec(x + pos) + b1), for `linear` without the gelu, rounded to T: hidden (2, B, Hkv,
/// padded), K before V. Grid: (units / kUnits, 2 * Hw, kSplits).
template <class T>
__global__ void __launch_bounds__(kThreads)
    hidden_kernel(CacheCompressMlp p, T* hidden, int64_t padded) {
  __shared__ int list[kThreads];
  __shared__ int listed;
  __shared__ float sums[kThreads / 32][kUnits];
  const CacheGather& tokens = p.tokens;
  const CacheShape& s = tokens.shape;
  const BlockConfig& c = s.config;
  const bool values = blockIdx.y >= p.weight_heads;
  const PhiWeights& phi = values ? p.v : p.k;
  const int64_t weight_head = blockIdx.y - (values ? p.weight_heads : 0);
  const int first_unit = blockIdx.x * kUnits;
  const bool reports = blockIdx.x == 0 && blockIdx.y == 0;
  const int units = min(kUnits, static_cast<int>(phi.hidden) - first_unit);
  if (units <= 0 && !reports) return;

  const int dim = static_cast<int>(values ? s.dim_v : s.dim_qk), pieces = dim / 8;
  const int64_t elements = int64_t{c.block_size} * dim;
  const T* w1 = static_cast<const T*>(phi.w1) + (weight_head * phi.hidden + first_unit) * elements;
  const T* pos = phi.pos ? static_cast<const T*>(phi.pos) + weight_head * elements : nullptr;
  // One phi for all heads, or for head `weight_head` alone.
  const int heads = p.weight_heads == 1 ? static_cast<int>(s.heads) : 1;
  for (int64_t base = 0; base < s.batch; base += int64_t{kThreads} * kSplits) {
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    const int64_t mine = base + int64_t{threadIdx.x} * kSplits + blockIdx.z;
    if (mine < s.batch) {
      CacheStep step = offered_step(tokens, mine);
      if (has_room(s, mine, step.old, int64_t{step.old} + step.wanted)) step.taken = step.wanted;
      if (reports) tokens.steps[mine] = step;
      if (NewBlocks(step, c).count > 0) list[atomicAdd(&listed, 1)] = static_cast<int>(mine);
    }
    __syncthreads();
    for (int i = 0; i < listed * heads && units > 0; ++i) {
      const int64_t b = list[i / heads], head = p.weight_heads == 1 ? i % heads : weight_head;
      CacheStep step = offered_step(tokens, b);
      const int64_t start = num_compressed(step.old, c.block_size, c.block_stride) * c.block_stride;
      float acc[kUnits] = {};
      for (int k = threadIdx.x; k < c.block_size * pieces; k += kThreads) {
        const int row = k / pieces;
        const uint4* from =
            token_piece<T>(tokens, step, b, start + row, values, head, k - row * pieces);
        float x[8], w[8];
        if (from) {
          unpack8<T>(*from, x);
        } else {
#pragma unroll
          for (float& element : x) element = nanf("");
        }
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
        float pre =
            phi.b1
                ? to_float(static_cast<const T*>(phi.b1)[weight_head * phi.hidden + first_unit + u])
                : 0.f;
#pragma unroll
        for (int warp = 0; warp < kThreads / 32; ++warp) pre += sums[warp][u];
        float derivative;
        if (phi.w2) compress::gelu(pre, pre, derivative);
        hidden[(((values ? s.batch : 0) + b) * s.heads + head) * padded + first_unit + u] =
            static_cast<T>(pre);
      }
      __syncthreads();
    }
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

int64_t padded_hidden(const CacheCompressMlp& p) {
  return round_up<int64_t>(p.k.hidden > p.v.hidden ? p.k.hidden : p.v.hidden, 8);
}

void check(const CacheCompressMlp& p) {
  check_tokens(p.tokens);
  if (p.tokens.shape.tokens > p.tokens.shape.config.block_stride)
    throw std::invalid_argument("cache_compress_mlp takes at most block_stride tokens");
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

}  // namespace nsa::cuda
