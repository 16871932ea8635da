// Importance (eq. 8-10) and the choice of the best blocks (eq. 11): one block of threads for each
// new token and kv head.
#include <algorithm>
#include <type_traits>

#include "cuda/decode/segments.cuh"
#include "cuda/decode/select.h"
#include "cuda/device/pdl.cuh"

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
  int2 winners[64];  // block, page
  int count;
  // then candidates (uint64_t), scores of the blocks, carries into a chunk's first block
};

/// Importance of the blocks, from the weights of all heads.
template <int kBlocks>
class BlockScores {
  static constexpr int kVector = kBlocks < 4 ? 2 : 4;
  static constexpr int kHeads = kBlocks <= 4 ? 4 : 1;  // of a thread at a time
  using Vector = std::conditional_t<kVector == 4, float4, float2>;

 public:
  /// Of the new token whose rows start at `first_row`. The weights of the first step are on their
  /// way when this returns: they are needed together with the lse.
  __device__ __forceinline__ BlockScores(const DecodeParams& p, int64_t first_row, int chunks)
      : p_(p), first_row_(first_row), chunks_(chunks) {
    load(0, 0);
  }

  /// scores[j], j < chunks * kBlocks: what a block gets from its own chunk; carries[c]: what chunk
  /// c - 1 adds to the first block of chunk c.
  __device__ __forceinline__ void compute(const float* lse2, float* scores, float* carries) {
#pragma unroll 1
    for (int base = 0; base < chunks_; base += kThreads / kParts) {
      float sums[kBlocks] = {}, carry = 0.0f;
#pragma unroll 1
      for (int g = 0; g < p_.group; g += kHeads * kParts) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const int head = g + h * kParts + part();
          const float factor = head < p_.group ? exp2_approx(carries_[h].y - lse2[head]) : 0.0f;
          carry = fmaf(carries_[h].x, factor, carry);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) sums[i] = fmaf(weights_[h][i], factor, sums[i]);
        }
        const bool last = g + kHeads * kParts >= p_.group;
        load(last ? base + kThreads / kParts : base, last ? 0 : g + kHeads * kParts);
      }
#pragma unroll
      for (int distance = 1; distance < kParts; distance *= 2) {
        carry += __shfl_xor_sync(0xffffffffu, carry, distance);
#pragma unroll
        for (int i = 0; i < kBlocks; ++i)
          sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], distance);
      }
      const int chunk = base + threadIdx.x / kParts;
      if (part() == 0 && chunk < chunks_) {
        carries[chunk + 1] = carry;
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) scores[chunk * kBlocks + i] = sums[i];
      }
    }
  }

 private:
  __device__ __forceinline__ static int part() { return threadIdx.x % kParts; }
  __device__ __forceinline__ void load(int base, int g) {
    const int chunk = base + threadIdx.x / kParts;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int head = g + h * kParts + part();
      const bool valid = chunk < chunks_ && head < p_.group;
      const int64_t at = (first_row_ + head) * p_.chunks + chunk;
      carries_[h] = valid ? p_.carries[at] : float2{};
#pragma unroll
      for (int i = 0; i < kBlocks; i += kVector)
        *reinterpret_cast<Vector*>(&weights_[h][i]) =
            valid ? *reinterpret_cast<const Vector*>(p_.weights + at * kBlocks + i) : Vector{};
    }
  }

  const DecodeParams& p_;
  int64_t first_row_;
  int chunks_;
  float2 carries_[kHeads];
  alignas(16) float weights_[kHeads][kBlocks];
};

/// The `wanted` best of the blocks [begin, end) and their pages, in no order, to winners; 0 <
/// wanted < end - begin.
///
/// The wanted-th best of the buckets' bests is no better than the wanted-th best block, and what
/// reaches it lies in `wanted` buckets: few candidates are left to be ranked against each other.
__device__ void choose_best(const DecodeParams& p, int b, const float* scores, int begin, int end,
                            int wanted, SelectSmem& smem, uint64_t* candidates) {
  constexpr int kSharers = kThreads / kBuckets;  // threads of a bucket
  const int bucket = threadIdx.x / kSharers, sharer = threadIdx.x % kSharers;
  const int first = begin + bucket + sharer * kBuckets;
  uint64_t best = 0;  // below every key
#pragma unroll 1
  for (int j = first; j < end; j += kThreads) best = max(best, make_key(scores[j], j));
#pragma unroll
  for (int distance = 1; distance < kSharers; distance *= 2)
    best = max(best, __shfl_xor_sync(0xffffffffu, best, distance));
  if (sharer == 0) smem.bucket_best[bucket] = best;
  if (threadIdx.x == 0) smem.count = 0;
  __syncthreads();

  int rank = 0;
#pragma unroll 8
  for (int i = sharer; i < kBuckets; i += kSharers) rank += smem.bucket_best[i] > best;
#pragma unroll
  for (int distance = 1; distance < kSharers; distance *= 2)
    rank += __shfl_xor_sync(0xffffffffu, rank, distance);
  if (rank == wanted - 1 && sharer == 0) smem.threshold = best;
  __syncthreads();

  const uint64_t threshold = smem.threshold;
#pragma unroll 1
  for (int j = first; j < end; j += kThreads) {
    const uint64_t key = make_key(scores[j], j);
    if (key >= threshold) candidates[atomicAdd(&smem.count, 1)] = key;
  }
  __syncthreads();

  const int count = smem.count;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint64_t mine = candidates[i];
    const int block = block_of(mine), page = sequence_pages(p, b).at(block);
    int better = 0;
#pragma unroll 8
    for (int other = 0; other < count; ++other) better += candidates[other] > mine;
    if (better < wanted) smem.winners[better] = make_int2(block, page);
  }
  __syncthreads();
}

template <int kBlocks>
__global__ void __launch_bounds__(kThreads, 2)
    select_kernel(const __grid_constant__ DecodeParams p) {
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
  const int warp = threadIdx.x / 32;
  Segments segments{};
  if (choice) segments = row_segments(p, kCompressed, b, token, head, min(warp, p.group - 1));
  // Entry `index` of the list, unless it is to be chosen.
  const int index = threadIdx.x;
  int place = index;
  int2 block = make_int2(-1, -1);
  if (index < init + (choice ? 0 : wanted)) {
    block.x = index;
  } else if (index >= init + wanted && index < init + wanted + own + 1 - local) {
    block.x = local + index - init - wanted;
  }
  if (block.x >= 0) block.y = sequence_pages(p, b).at(block.x);
  wait_for_previous();

  if (choice) {
    const int chunks = ceil_div(visible_tokens(p, t), kChunk);
    const int64_t first_row =
        ((static_cast<int64_t>(b) * p.heads_kv + head) * p.tokens + token) * p.group;
    RowSum row_sum(p.partials[kCompressed].sums, segments);
    BlockScores<kBlocks> block_scores(p, first_row, chunks);
#pragma unroll 1
    for (int g = warp; g < p.group; g += kWarps) {
      if (g >= kWarps)
        row_sum =
            RowSum(p.partials[kCompressed].sums, row_segments(p, kCompressed, b, token, head, g));
      const float lse2 = row_sum.lse2();
      if (threadIdx.x % 32 == 0) smem.lse2[g] = lse2;
    }
#pragma unroll 1
    for (int j = chunks * kBlocks + threadIdx.x; j < local; j += kThreads) scores[j] = 0.0f;
    __syncthreads();
    block_scores.compute(smem.lse2, scores, carries);
    __syncthreads();
#pragma unroll 1
    for (int chunk = 1 + threadIdx.x; chunk <= chunks; chunk += kThreads)
      scores[chunk * kBlocks] += carries[chunk];
    __syncthreads();
    choose_best(p, b, scores, init, local, wanted, smem, candidates);
  }

  if (index >= n) return;
  if (choice && index >= init && index < init + wanted) {
    block = smem.winners[index - init];
    place = init;
#pragma unroll 4
    for (int i = 0; i < wanted; ++i) place += smem.winners[i].x < block.x;
  }
  p.lists[static_cast<int64_t>(blockIdx.x) * n + place] = block;
  if (p.block_indices.ptr)
    p.block_indices.ptr[b * p.block_indices.batch + token * p.block_indices.seq +
                        head * p.block_indices.head + place] = block.x;
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
    launch_overlapping(kernel, "decode select_kernel",
                       grid_size(int64_t{p.batch} * p.tokens * p.heads_kv), kThreads,
                       select_shared_bytes(p.config, p.max_pages), stream, p);
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
