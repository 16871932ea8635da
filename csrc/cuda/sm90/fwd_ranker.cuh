// The warps that choose selection blocks: what the consumers left of a job's block scores, weighed,
// summed over the heads of each token and ranked, while the consumers work on the next job.
#pragma once

#include "cuda/fwd/ranking.cuh"
#include "cuda/sm90/fwd_best.cuh"
#include "cuda/sm90/fwd_scores.cuh"

namespace nsa::cuda::sm90 {

template <class Shape>
class Ranker {
  using Block = FwdBlock<Shape>;
  static constexpr int kTokensOfWarp = 3;  // at a time: the steps of one hide the latency of others
  using Lists = BestBlocks<kTokensOfWarp>;

  /// Up to 16 rows of a token and tile, in shared memory while they are weighed.
  struct Chunk {
    float scores[16 * BlockScores::kBlocks];
    float weights[16];  // first the references
  };

 public:
  struct Smem {
    Chunk chunks[kRankingWarps][kTokensOfWarp];
    float minus_lse[kScoreBuffers][BlockScores::kRows];  // base two; -inf: a row without weight
  };
  static constexpr int64_t kSharedBytes = sizeof(Smem);

  static __device__ __forceinline__ Smem& smem(const Block& block) {
    return *reinterpret_cast<Smem*>(block.extra());
  }

  __device__ __forceinline__ Ranker(const Block& block, int warp)
      : block_(block), p_(block.p), smem_(smem(block)), warp_(warp), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    Job job;
    int64_t index = Block::before_first_job();
    while (block_.next_job(index, job)) {
      Block::wait_full(block_.barriers.scores_full, at_);
      for (int token = warp_; token < job.tokens; token += kTokensOfWarp * kRankingWarps)
        rank(job, token);
      Block::arrive(block_.barriers.scores_empty, at_);
      at_.advance(kScoreBuffers);
    }
  }

 private:
  /// Chunks of a token and tile. Rows are copied four at a time; of a token with fewer some are
  /// others', and weigh nothing.
  __device__ __forceinline__ int shares() const { return max(1 << p_.log2_group >> 4, 1); }
  __device__ __forceinline__ int chunk_rows() const { return min(max(1 << p_.log2_group, 4), 16); }

  /// Starts the copy of rows from `row` on of a tile; a group of copies of its own.
  __device__ __forceinline__ void copy(const BlockScores& scores, int tile, int row,
                                       Chunk& chunk) const {
    const float* from = scores.row(tile, row & ~3) + 4 * lane_;
    const uint32_t to = smem_addr(chunk.scores + 4 * lane_);
#pragma unroll
    for (int i = 0; i < 4; ++i)  // of 128 floats, 4 rows
      if (4 * i < chunk_rows()) cp_async_16(to + i * 512, from + i * 128);
    if (4 * lane_ < chunk_rows())
      cp_async_16(smem_addr(chunk.weights + 4 * lane_),
                  scores.references(tile) + (row & ~3) + 4 * lane_);
    cp_async_commit();
  }

  /// What the rows of a chunk, a token's from `row` on, add to the score of this lane's block.
  __device__ __forceinline__ float weigh(int row, Chunk& chunk) const {
    cp_async_wait<kTokensOfWarp - 1>();
    __syncwarp();
    if (lane_ < chunk_rows()) {
      const int first = row & 3;
      const bool own = lane_ >= first && lane_ < first + (1 << p_.log2_group);
      const float minus_lse = smem_.minus_lse[at_.slot][(row & ~3) + lane_];
      float& weight = chunk.weights[lane_];
      weight = own ? exp2_approx(weight + minus_lse) : 0.0f;
    }
    __syncwarp();
    const float* scores = chunk.scores + BlockScores::word(lane_);
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < 16; r += 4) {
      if (r >= chunk_rows()) break;
      const float4 weights = *reinterpret_cast<const float4*>(chunk.weights + r);
      sum = fmaf(weights.x, scores[r * BlockScores::kBlocks], sum);
      sum = fmaf(weights.y, scores[(r + 1) * BlockScores::kBlocks], sum);
      sum = fmaf(weights.z, scores[(r + 2) * BlockScores::kBlocks], sum);
      sum = fmaf(weights.w, scores[(r + 3) * BlockScores::kBlocks], sum);
    }
    __syncwarp();  // the chunk's place is free
    return sum;
  }

  /// Ranks the blocks of the tokens `first` and kRankingWarps, 2 kRankingWarps after it.
  __device__ __forceinline__ void rank(const Job& job, int first) const {
    const int tiles = Range(p_, job).template tiles<Shape>();
    const BlockScores scores(block_.args, at_.slot);
    Chunk(&chunks)[kTokensOfWarp] = smem_.chunks[warp_];
    Lists lists(lane_);
    int open_end[kTokensOfWarp];  // blocks from num_init up to here are not forced
    int row[kTokensOfWarp];
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = first + i * kRankingWarps;
      const Forced forced(p_, job.position(token));
      lists.clear(i, token < job.tokens ? forced.capacity(p_.index_count) : 0);
      open_end[i] = forced.local;
      row[i] = min(token, job.tokens - 1) << p_.log2_group;
      if (tiles > 0) copy(scores, 0, row[i], chunks[i]);
    }
    // Blocks may begin past the last tile, where no compressed token reaches.
    const int last_block = job.position(job.tokens - 1) >> p_.select_shift;
#pragma unroll 1
    for (int tile = 0; tile < tiles || tile * BlockScores::kBlocks <= last_block; ++tile) {
      const int block = tile * BlockScores::kBlocks + lane_;
      float score[kTokensOfWarp] = {};
#pragma unroll 1
      for (int share = 0; tile < tiles && share < shares(); ++share) {
        // Next in the same place: the token's next share, or the first of the next tile.
        const bool last = share + 1 == shares();
        const int next_tile = min(tile + last, tiles - 1), next_row = last ? 0 : 16 * (share + 1);
#pragma unroll
        for (int i = 0; i < kTokensOfWarp; ++i) {
          score[i] += weigh(row[i] + 16 * share, chunks[i]);
          copy(scores, next_tile, row[i] + next_row, chunks[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTokensOfWarp; ++i)
        if (block < p_.config.num_init || block >= open_end[i]) score[i] = Lists::kAbsent;
      lists.offer(score, block);
    }
    cp_async_wait<0>();  // of a tile that is not there
    const View<int32_t>& view = p_.block_indices;
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = first + i * kRankingWarps;
      if (token >= job.tokens) break;
      lists.write(p_, Forced(p_, job.position(token)), i,
                  view.ptr + job.batch * view.batch + (job.row_q + token) * view.seq +
                      job.head_kv * view.head);
    }
  }

  const Block& block_;
  const FwdParams& p_;
  Smem& smem_;
  const int warp_, lane_;
  Cursor at_;
};

}  // namespace nsa::cuda::sm90
