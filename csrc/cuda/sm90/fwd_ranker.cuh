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

  /// Up to 16 rows of a token and tile, copied to shared memory.
  struct Chunk {
    float scores[16 * BlockScores::kBlocks];
    float weights[16];  // first the references
  };
  static constexpr int kChunks = 5;  // of a warp: one is read, the others are underway

 public:
  struct Smem {
    Chunk ring[kRankingWarps][kChunks];
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
  /// Rows of a chunk, and chunks of a token and tile.
  __device__ __forceinline__ int chunk_rows() const { return min(1 << p_.log2_group, 16); }
  __device__ __forceinline__ int shares() const { return max(1 << p_.log2_group >> 4, 1); }
  /// The first row of a chunk. Tokens past the job's are those before, again.
  __device__ __forceinline__ int first_row(const Job& job, int token, int share) const {
    return (min(token, job.tokens - 1) << p_.log2_group) + 16 * share;
  }

  /// Position in the order in which chunks are copied: tiles, tokens, shares.
  struct Position {
    int tile = 0, token = 0, share = 0;
  };
  /// Starts the copy of a chunk, and moves on to the next. One group of copies, empty at the end.
  __device__ __forceinline__ void copy(const Job& job, int tiles, int first, Position& at,
                                       int slot) const {
    if (at.tile < tiles) {
      const BlockScores scores(block_.args, at_.slot);
      const int row = first_row(job, first + at.token * kRankingWarps, at.share);
      Chunk& chunk = smem_.ring[warp_][slot];
      const float* from = scores.row(at.tile, row);
      const int pieces = chunk_rows() * (BlockScores::kBlocks / 4);
      for (int i = lane_; i < pieces; i += 32)
        cp_async_16(smem_addr(chunk.scores + 4 * i), from + 4 * i);
      // Four at a time: those of the row's neighbours, too, where a token has fewer rows.
      if (4 * lane_ < chunk_rows())
        cp_async_16(smem_addr(chunk.weights + 4 * lane_),
                    scores.references(at.tile) + (row & ~3) + 4 * lane_);
      if (++at.share == shares()) {
        at.share = 0;
        if (++at.token == kTokensOfWarp) {
          at.token = 0;
          ++at.tile;
        }
      }
    }
    cp_async_commit();
  }

  /// What the rows of a chunk add to the score of this lane's block.
  __device__ __forceinline__ float weigh(int row, int slot) const {
    Chunk& chunk = smem_.ring[warp_][slot];
    const int rows = chunk_rows(), first = row % 4;
    cp_async_wait<kChunks - 1>();
    __syncwarp();
    if (lane_ < rows) {
      float& weight = chunk.weights[first + lane_];
      weight = exp2_approx(weight + smem_.minus_lse[at_.slot][row + lane_]);
    }
    __syncwarp();
    const float* scores = chunk.scores + BlockScores::word(lane_);
    float sum = 0.0f;
#pragma unroll 4
    for (int r = 0; r < rows; ++r)
      sum = fmaf(chunk.weights[first + r], scores[r * BlockScores::kBlocks], sum);
    __syncwarp();  // the chunk's place is free
    return sum;
  }

  /// Ranks the blocks of the tokens `first` and kRankingWarps, 2 kRankingWarps after it.
  __device__ __forceinline__ void rank(const Job& job, int first) const {
    const int tiles = Range(p_, job).template tiles<Shape>();
    Lists lists(lane_);
    int open_end[kTokensOfWarp];  // blocks from num_init up to here are not forced
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = first + i * kRankingWarps;
      const Forced forced(p_, job.position(token));
      lists.clear(i, token < job.tokens ? forced.capacity(p_.index_count) : 0);
      open_end[i] = forced.local;
    }
    Position next;
    for (int slot = 0; slot < kChunks; ++slot) copy(job, tiles, first, next, slot);
    // Blocks may begin past the last tile, where no compressed token reaches.
    const int last_block = job.position(job.tokens - 1) >> p_.select_shift;
    int slot = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles || tile * BlockScores::kBlocks <= last_block; ++tile) {
      const int block = tile * BlockScores::kBlocks + lane_;
      float score[kTokensOfWarp];
#pragma unroll
      for (int i = 0; i < kTokensOfWarp; ++i) {
        float sum = 0.0f;
        for (int share = 0; tile < tiles && share < shares(); ++share) {
          sum += weigh(first_row(job, first + i * kRankingWarps, share), slot);
          copy(job, tiles, first, next, slot);
          if (++slot == kChunks) slot = 0;
        }
        score[i] = block >= p_.config.num_init && block < open_end[i] ? sum : Lists::kAbsent;
      }
      lists.offer(score, block);
    }
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
