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
  static constexpr int kTokensOfWarp = 2;  // at a time
  using Lists = BestBlocks<kTokensOfWarp>;

  /// Up to 16 rows of a token and tile, in shared memory while they are weighed.
  struct Chunk {
    float scores[16 * BlockScores::kBlocks];
    float weights[16];  // first the references
  };

  /// A block that may belong to a list.
  struct Candidate {
    float score;
    int block;
  };

 public:
  struct Smem {
    Chunk chunks[kRankingWarps][kTokensOfWarp];
    Candidate candidates[kRankingWarps][kTokensOfWarp][32];
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

  /// The tokens that a warp ranks together.
  struct Tokens {
    int row[kTokensOfWarp];       // the first row of each; past the job's last token that one's
    int open_end[kTokensOfWarp];  // blocks from num_init up to here are not forced; 0: no token
  };

  /// Ranks the blocks of the tokens `first` and kRankingWarps after it. First the scores of all
  /// blocks, from which a bound follows; then a list of the few that exceed it.
  __device__ __forceinline__ void rank(const Job& job, int first) const {
    const int tiles = Range(p_, job).template tiles<Shape>();
    const BlockScores scores(block_.args, at_.slot);
    Lists lists(lane_);
    Tokens tokens;
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = first + i * kRankingWarps;
      const Forced forced(p_, job.position(token));
      lists.clear(i, token < job.tokens ? forced.capacity(p_.index_count) : 0);
      tokens.open_end[i] = token < job.tokens ? forced.local : 0;
      tokens.row[i] = min(token, job.tokens - 1) << p_.log2_group;
    }
    float exceed[kTokensOfWarp];
    lists.bound(sum_rows(scores, tiles, tokens).score, exceed);
    // Blocks may begin past the last tile, where no compressed token reaches.
    const int last_block = job.position(job.tokens - 1) >> p_.select_shift;
    list(scores, tiles, max(tiles, last_block / BlockScores::kBlocks + 1), tokens, exceed, lists);
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

  /// Whether importance decides about a block of a token.
  __device__ __forceinline__ bool open(const Tokens& tokens, int i, int block) const {
    return block >= p_.config.num_init && block < tokens.open_end[i];
  }

  struct Most {
    float score[kTokensOfWarp];
  };
  /// Sums the rows of each token, into its first. Returns the best that this lane has seen.
  __device__ __forceinline__ Most sum_rows(const BlockScores& scores, int tiles,
                                           const Tokens& tokens) const {
    Chunk(&chunks)[kTokensOfWarp] = smem_.chunks[warp_];
    Most most;
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      most.score[i] = Lists::kAbsent;
      if (tiles > 0) copy(scores, 0, tokens.row[i], chunks[i]);
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      float score[kTokensOfWarp] = {};
#pragma unroll 1
      for (int share = 0; share < shares(); ++share) {
        // Next in the same place: the token's next share, or the first of the next tile.
        const bool last = share + 1 == shares();
        const int next_tile = min(tile + last, tiles - 1), next_row = last ? 0 : 16 * (share + 1);
#pragma unroll
        for (int i = 0; i < kTokensOfWarp; ++i) {
          score[i] += weigh(tokens.row[i] + 16 * share, chunks[i]);
          copy(scores, next_tile, tokens.row[i] + next_row, chunks[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTokensOfWarp; ++i) {
        if (open(tokens, i, tile * BlockScores::kBlocks + lane_))
          most.score[i] = fmaxf(most.score[i], score[i]);
        if (tokens.open_end[i] > 0) scores.row(tile, tokens.row[i])[lane_] = score[i];
      }
    }
    cp_async_wait<0>();  // of a tile that is not there
    return most;
  }

  /// Lists the blocks of `all_tiles` tiles whose scores exceed the bounds; those past `tiles` have
  /// no score.
  __device__ __forceinline__ void list(const BlockScores& scores, int tiles, int all_tiles,
                                       const Tokens& tokens, float (&exceed)[kTokensOfWarp],
                                       Lists& lists) const {
    constexpr int kBatch = 4;  // tiles at a time: their reads overlap
    int waiting[kTokensOfWarp] = {};
#pragma unroll 1
    for (int base = 0; base < all_tiles; base += kBatch) {
      float score[kBatch][kTokensOfWarp];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int i = 0; i < kTokensOfWarp; ++i) {
          const int tile = base + j;
          score[j][i] = tile < tiles ? scores.row(tile, tokens.row[i])[lane_] : 0.0f;
          if (!open(tokens, i, tile * BlockScores::kBlocks + lane_)) score[j][i] = Lists::kAbsent;
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int i = 0; i < kTokensOfWarp; ++i) {
          uint32_t better = __ballot_sync(0xffffffffu, score[j][i] > exceed[i]);
          if (better == 0) continue;
          if (waiting[i] + __popc(better) > 32) {
            flush(waiting, lists);
            lists.raise(exceed);
            better = __ballot_sync(0xffffffffu, score[j][i] > exceed[i]);
          }
          const int place = waiting[i] + __popc(better & ((1u << lane_) - 1));
          if (better >> lane_ & 1)
            smem_.candidates[warp_][i][place] = {score[j][i],
                                                 (base + j) * BlockScores::kBlocks + lane_};
          waiting[i] += __popc(better);
        }
      }
    }
    flush(waiting, lists);
  }
  /// Merges the candidates that wait into the lists.
  __device__ __forceinline__ void flush(int (&waiting)[kTokensOfWarp], Lists& lists) const {
    float score[kTokensOfWarp];
    int block[kTokensOfWarp];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const Candidate candidate = smem_.candidates[warp_][i][lane_];
      score[i] = lane_ < waiting[i] ? candidate.score : Lists::kAbsent;
      block[i] = candidate.block;
      waiting[i] = 0;
    }
    __syncwarp();  // their places are free
    lists.merge(score, block);
  }

  const Block& block_;
  const FwdParams& p_;
  Smem& smem_;
  const int warp_, lane_;
  Cursor at_;
};

}  // namespace nsa::cuda::sm90
