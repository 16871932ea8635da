// Importance (eq. 8-10) and the choice of the best blocks (eq. 11): one block of threads for each
// new token and kv head.
#include <algorithm>
#include <type_traits>

#include "cuda/decode/pdl.cuh"
#include "cuda/decode/segments.cuh"
#include "cuda/decode/select.h"

namespace nsa::cuda::decode {

namespace {

// More threads wait longer: each of few chunks and blocks, all of the same arithmetic around them.
constexpr int kThreads = 256, kWarps = kThreads / 32;
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

/// Scores of the blocks in shared memory, in two parts that add up.
template <int kBlocks>
struct Scores {
  float* blocks;   // from the block's own chunk
  float* carries;  // (chunks + 1): of each chunk's first block, from the chunk before it

  __device__ __forceinline__ float at(int j) const {
    return blocks[j] + (j % kBlocks == 0 ? carries[j / kBlocks] : 0.0f);
  }
};

/// Importance of the blocks, from the weights of all heads; a thread takes a chunk.
template <int kBlocks>
class Importance {
  static constexpr int kRecord = record_floats(kBlocks);
  static constexpr int kHeads = kBlocks <= 4 ? 8 : 32 / kBlocks;  // at a time
  using Vector = std::conditional_t<kBlocks == 2, float2, float4>;
  static constexpr int kVector = sizeof(Vector) / sizeof(float);

 public:
  /// Of the new token whose rows start at `first_row`, over at least one chunk. The first weights
  /// are on their way when this returns: they are needed together with the lse.
  __device__ __forceinline__ Importance(const DecodeParams& p, int64_t first_row, int chunks)
      : weights_(p.weights + first_row * p.chunks * kRecord),
        row_stride_(p.chunks * kRecord),
        group_(p.group),
        chunks_(chunks) {
    load(threadIdx.x, 0);
  }

  __device__ __forceinline__ void compute(const float* lse2, const Scores<kBlocks>& scores) {
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < chunks_; chunk += kThreads) {
      float sums[kBlocks] = {}, carry = 0.0f;
#pragma unroll 1
      for (int g = 0; g < group_; g += kHeads) {
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float factor = g + h < group_ ? exp2_approx(tails_[h].y - lse2[g + h]) : 0.0f;
          carry = fmaf(tails_[h].x, factor, carry);
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) sums[i] = fmaf(records_[h][i], factor, sums[i]);
        }
        const bool last = g + kHeads >= group_;
        load(last ? chunk + kThreads : chunk, last ? 0 : g + kHeads);
      }
      scores.carries[chunk + 1] = carry;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) scores.blocks[chunk * kBlocks + i] = sums[i];
    }
  }

 private:
  /// Past the last chunk or head it loads those, in vain.
  __device__ __forceinline__ void load(int chunk, int g) {
    const float* chunk_weights = weights_ + min(chunk, chunks_ - 1) * kRecord;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float* record = chunk_weights + int64_t{min(g + h, group_ - 1)} * row_stride_;
#pragma unroll
      for (int i = 0; i < kBlocks; i += kVector)
        *reinterpret_cast<Vector*>(&records_[h][i]) = *reinterpret_cast<const Vector*>(record + i);
      tails_[h] = *reinterpret_cast<const float2*>(record + kBlocks);
    }
  }

  const float* weights_;
  int row_stride_, group_, chunks_;
  alignas(16) float records_[kHeads][kBlocks];
  float2 tails_[kHeads];  // carry, reference
};

/// The `wanted` best of the blocks [begin, end) and their pages, in no order, to winners; 0 <
/// wanted < end - begin.
///
/// The wanted-th best of the buckets' bests is no better than the wanted-th best block, and what
/// reaches it lies in `wanted` buckets: few candidates are left to be ranked against each other.
template <int kBlocks>
__device__ __forceinline__ void choose_best(const DecodeParams& p, int b,
                                            const Scores<kBlocks>& scores, int begin, int end,
                                            int wanted, SelectSmem& smem, uint64_t* candidates) {
  constexpr int kSharers = kThreads / kBuckets;  // threads of a bucket
  const int bucket = threadIdx.x / kSharers, sharer = threadIdx.x % kSharers;
  const int first = begin + bucket + sharer * kBuckets;
  uint64_t best = 0;  // below every key
#pragma unroll 1
  for (int j = first; j < end; j += kThreads) best = max(best, make_key(scores.at(j), j));
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
    const uint64_t key = make_key(scores.at(j), j);
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

// 80 registers, so that two blocks of the kernels that read the cache fit beside one of this.
template <int kBlocks>
__global__ void __launch_bounds__(kThreads, 3)
    select_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(16) char memory[];
  SelectSmem& smem = *reinterpret_cast<SelectSmem*>(memory);
  uint64_t* const candidates = reinterpret_cast<uint64_t*>(memory + sizeof(SelectSmem));
  Scores<kBlocks> scores;
  scores.blocks = reinterpret_cast<float*>(candidates + p.candidates);
  scores.carries = scores.blocks + p.chunks * kBlocks;

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
  Span span{};
  if (choice) span = Schedule(p, kCompressed, threadIdx.x % 32).span(b, 0);
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
    // Two heads of a warp at a time, those that do not exist in vain.
    const auto row_sum = [&](int g) {
      return RowSum(p.partials[kCompressed].sums,
                    row_segments(p, kCompressed, span, b, token, head, min(g, p.group - 1)));
    };
    RowSum low = row_sum(warp), high = row_sum(warp + kWarps);
    Importance<kBlocks> importance(p, first_row, chunks);
#pragma unroll 1
    for (int j = chunks * kBlocks + threadIdx.x; j < local; j += kThreads) scores.blocks[j] = 0.0f;
#pragma unroll 1
    for (int c = chunks + 1 + threadIdx.x; c * kBlocks < local; c += kThreads)
      scores.carries[c] = 0.0f;
    if (threadIdx.x == 0) scores.carries[0] = 0.0f;
#pragma unroll 1
    for (int g = warp;;) {
      const float lse2[2] = {low.lse2(), high.lse2()};
      if (threadIdx.x % 32 == 0) {
        smem.lse2[g] = lse2[0];
        smem.lse2[g + kWarps] = lse2[1];
      }
      g += 2 * kWarps;
      if (g >= p.group) break;
      low = row_sum(g);
      high = row_sum(g + kWarps);
    }
    __syncthreads();
    importance.compute(smem.lse2, scores);
    __syncthreads();
    choose_best<kBlocks>(p, b, scores, init, local, wanted, smem, candidates);
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
         (chunks * blocks + chunks + 1) * int64_t{4};
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
