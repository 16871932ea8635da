// Importance (eq. 8-10) and the choice of the best blocks (eq. 11): one block of threads for each
// new token and kv head.
#include <algorithm>

#include "cuda/decode/pdl.cuh"
#include "cuda/decode/schedule.cuh"
#include "cuda/decode/select.h"
#include "cuda/device/softmax.cuh"

namespace nsa::cuda::decode {

namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kParts = 4;      // threads that share the heads of a chunk
constexpr int kBuckets = 128;  // of blocks j = bucket mod kBuckets; at least n <= 64

/// Higher is better, equal scores by the lower index. Scores are not negative.
__device__ __forceinline__ uint64_t make_key(float score, int block) {
  return static_cast<uint64_t>(__float_as_uint(score)) << 32 | ~static_cast<uint32_t>(block);
}
__device__ __forceinline__ int block_of(uint64_t key) {
  return static_cast<int>(~static_cast<uint32_t>(key));
}

struct SelectSmem {
  uint64_t bucket_best[kBuckets];
  uint64_t threshold;
  float lse2[64];
  int winners[64];
  int count;
  // then candidates (uint64_t), scores of the blocks, carries into a chunk's first block
};

/// log2 of the sum of 2^score over the compressed tokens that each head sees: merges the segments.
__device__ void merge_lse(const DecodeParams& p, const Span& span, int b, int token, int head,
                          float* lse2) {
  const int lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < p.group; g += kWarps) {
    const int row = token * p.group + g, rows = p.rows[kCompressed];
    float max = negative_infinity(), sum = 0.0f;
    for (int i = lane; i < span.count; i += 32) {
      const int64_t at = slot<kCompressed>(p, span.first + i, b, head, row / rows);
      const float2 part = p.partials[kCompressed].sums[at * rows + row % rows];
      if (part.y == 0.0f) continue;
      const float new_max = fmaxf(max, part.x);
      sum = fmaf(sum, exp2f(max - new_max), part.y * exp2f(part.x - new_max));
      max = new_max;
    }
    float all_max = max;
    for (int distance = 16; distance > 0; distance /= 2)
      all_max = fmaxf(all_max, __shfl_xor_sync(0xffffffffu, all_max, distance));
    sum = sum > 0.0f ? sum * exp2f(max - all_max) : 0.0f;
    for (int distance = 16; distance > 0; distance /= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane == 0) lse2[g] = all_max + log2f(sum);
  }
}

/// scores[j], j < chunks * kBlocks: importance from a block's own chunk; carries[c]: what chunk
/// c - 1 adds to the first block of chunk c.
template <int kBlocks>
__device__ void score_blocks(const DecodeParams& p, int64_t first_row, int chunks,
                             const float* lse2, float* scores, float* carries) {
  constexpr int kVector = kBlocks < 4 ? 2 : 4;
  const int part = threadIdx.x % kParts;
  for (int base = 0; base < chunks; base += kThreads / kParts) {
    const int chunk = base + threadIdx.x / kParts;
    float sums[kBlocks] = {}, carry = 0.0f;
    if (chunk < chunks) {
#pragma unroll 4
      for (int g = part; g < p.group; g += kParts) {
        const int64_t at = (first_row + g) * p.chunks + chunk;
        float weights[kBlocks];
#pragma unroll
        for (int i = 0; i < kBlocks; i += kVector) {
          if constexpr (kVector == 4) {
            *reinterpret_cast<float4*>(weights + i) =
                *reinterpret_cast<const float4*>(p.weights + at * kBlocks + i);
          } else {
            *reinterpret_cast<float2*>(weights + i) =
                *reinterpret_cast<const float2*>(p.weights + at * kBlocks + i);
          }
        }
        const float2 next = p.carries[at];
        const float factor = exp2f(next.y - lse2[g]);
        carry = fmaf(next.x, factor, carry);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) sums[i] = fmaf(weights[i], factor, sums[i]);
      }
    }
#pragma unroll
    for (int distance = 1; distance < kParts; distance *= 2) {
      carry += __shfl_xor_sync(0xffffffffu, carry, distance);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
    }
    if (part == 0 && chunk < chunks) {
      carries[chunk + 1] = carry;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) scores[chunk * kBlocks + i] = sums[i];
    }
  }
}

/// The `wanted` best of the blocks [begin, end), ascending, to winners; 0 < wanted < end - begin.
///
/// The wanted-th best of the buckets' bests is no better than the wanted-th best block, and what
/// reaches it lies in `wanted` buckets: few candidates are left to be ranked against each other.
__device__ void choose_best(const float* scores, int begin, int end, int wanted, SelectSmem& smem,
                            uint64_t* candidates) {
  constexpr int kSharers = kThreads / kBuckets;
  const int bucket = threadIdx.x / kSharers;
  const int first = begin + bucket + threadIdx.x % kSharers * kBuckets;
  uint64_t best = 0;  // below every key
  for (int j = first; j < end; j += kThreads) best = max(best, make_key(scores[j], j));
#pragma unroll
  for (int distance = 1; distance < kSharers; distance *= 2)
    best = max(best, __shfl_xor_sync(0xffffffffu, best, distance));
  if (threadIdx.x % kSharers == 0) smem.bucket_best[bucket] = best;
  if (threadIdx.x == 0) smem.count = 0;
  __syncthreads();

  if (threadIdx.x < kBuckets) {
    const uint64_t mine = smem.bucket_best[threadIdx.x];
    int rank = 0;
#pragma unroll 8
    for (int i = 0; i < kBuckets; ++i) rank += smem.bucket_best[i] > mine;
    if (rank == wanted - 1) smem.threshold = mine;
  }
  __syncthreads();

  const uint64_t threshold = smem.threshold;
  for (int j = first; j < end; j += kThreads) {
    const uint64_t key = make_key(scores[j], j);
    if (key >= threshold) candidates[atomicAdd(&smem.count, 1)] = key;
  }
  __syncthreads();

  const int count = smem.count;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t mine = candidates[i];
    int rank = 0;
#pragma unroll 4
    for (int other = 0; other < count; ++other) rank += candidates[other] > mine;
    if (rank < wanted) smem.winners[rank] = block_of(mine);
  }
  __syncthreads();
}

template <int kBlocks>
__global__ void __launch_bounds__(kThreads) select_kernel(const DecodeParams p) {
  extern __shared__ __align__(16) char memory[];
  SelectSmem& smem = *reinterpret_cast<SelectSmem*>(memory);
  uint64_t* const candidates = reinterpret_cast<uint64_t*>(memory + sizeof(SelectSmem));
  float* const scores = reinterpret_cast<float*>(candidates + p.candidates);
  float* const carries = scores + p.chunks * kBlocks + kBlocks;

  launch_dependents();
  const int head = blockIdx.x % p.heads_kv, row = blockIdx.x / p.heads_kv;
  const int token = row % p.tokens, b = row / p.tokens;
  const int t = sequence_length(p, b) - p.tokens + token, n = p.config.num_selected;
  // Forced are the blocks [0, init) and [local, own].
  const int own = t < 0 ? -1 : t >> p.select_shift;
  const int init = min(p.config.num_init, own + 1);
  const int local = max(init, own + 1 - p.config.num_local);
  const int wanted = min(n - init - (own + 1 - local), local - init);
  const bool choice = wanted > 0 && wanted < local - init;
  Span span{};
  if (choice) span = Schedule<kCompressed>(p, threadIdx.x % 32).span(b, 0);
  wait_for_previous();

  if (choice) {
    merge_lse(p, span, b, token, head, smem.lse2);
    const int visible =
        static_cast<int>(visible_compressed(t, p.config.block_size, p.config.block_stride));
    const int chunks = ceil_div(visible, kChunk);
    for (int j = chunks * kBlocks + threadIdx.x; j < local; j += kThreads) scores[j] = 0.0f;
    __syncthreads();
    const int64_t first_row =
        ((static_cast<int64_t>(b) * p.heads_kv + head) * p.tokens + token) * p.group;
    score_blocks<kBlocks>(p, first_row, chunks, smem.lse2, scores, carries);
    __syncthreads();
    for (int chunk = 1 + threadIdx.x; chunk <= chunks; chunk += kThreads)
      scores[chunk * kBlocks] += carries[chunk];
    __syncthreads();
    choose_best(scores, init, local, wanted, smem, candidates);
  }

  const int index = threadIdx.x;
  if (index >= n) return;
  int block = -1, place = index;
  if (index < init) {
    block = index;
  } else if (index < init + wanted) {
    block = index;  // all candidates
    if (choice) {
      block = smem.winners[index - init];
      place = init;
      for (int i = 0; i < wanted; ++i) place += smem.winners[i] < block;
    }
  } else if (index < init + wanted + own + 1 - local) {
    block = local + index - init - wanted;
  }
  p.lists[static_cast<int64_t>(blockIdx.x) * n + place] = block;
  if (p.block_indices.ptr)
    p.block_indices.ptr[b * p.block_indices.batch + token * p.block_indices.seq +
                        head * p.block_indices.head + place] = block;
}

}  // namespace

int32_t select_candidates(const BlockConfig& config, int64_t max_pages) {
  const int64_t bucket = ceil_div<int64_t>(max_pages, kBuckets);
  return static_cast<int32_t>(std::min<int64_t>(config.num_selected * bucket, max_pages));
}

int64_t select_shared_bytes(const BlockConfig& config, int64_t max_pages) {
  const int64_t chunks = padded_chunks(config, max_pages), blocks = chunk_blocks(config);
  return sizeof(SelectSmem) + select_candidates(config, max_pages) * int64_t{8} +
         (chunks * blocks + blocks + chunks + 1) * int64_t{4};
}

void launch_select(const DecodeParams& p, cudaStream_t stream) {
  const auto run = [&](auto* kernel) {
    launch(kernel, p, int64_t{p.batch} * p.tokens * p.heads_kv, kThreads,
           select_shared_bytes(p.config, p.max_pages), true, stream, "decode select_kernel");
  };
  switch (chunk_blocks(p.config)) {
    case 2:
      return run(select_kernel<2>);
    case 4:
      return run(select_kernel<4>);
    case 8:
      return run(select_kernel<8>);
    default:
      return run(select_kernel<16>);
  }
}

}  // namespace nsa::cuda::decode
