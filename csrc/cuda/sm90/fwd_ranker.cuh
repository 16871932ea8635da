// The warps that choose selection blocks: what the consumers left of a job's block scores, weighed,
// summed over the heads of each token and ranked, while the consumers work on the next job.
#pragma once

#include "cuda/fwd/gates.cuh"
#include "cuda/sm90/fwd_best.cuh"
#include "cuda/sm90/fwd_scores.cuh"

namespace nsa::cuda::sm90 {

template <class Shape>
class Ranker {
  using Block = FwdBlock<Shape>;
  static constexpr int kTokensOfWarp = 2;  // at a time
  using Best = BestBlocks<kTokensOfWarp>;

  /// Up to 16 rows of a token and tile, on their way through shared memory.
  struct Chunk {
    char scores[16 * BlockScores::kRowBytes];
    float references[16];
  };
  static constexpr int kChunks = 2;  // of a token: one is read, one underway

 public:
  struct Smem {
    Chunk chunks[kRankingWarps][kChunks][kTokensOfWarp];
    typename Best::Memory best[kRankingWarps];
    float minus_lse[kScoreBuffers][BlockScores::kRows];  // base two; -inf: a row without weight
    Job jobs[kRankingWarps];                             // there are no registers to keep them in
  };
  static constexpr int64_t kSharedBytes = sizeof(Smem);

  static __device__ __forceinline__ Smem& smem(const Block& block) {
    return *reinterpret_cast<Smem*>(block.extra());
  }

  __device__ __forceinline__ Ranker(const Block& block, int warp)
      : block_(block), p_(block.p), smem_(smem(block)), warp_(warp), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    Job next;
    const Job& job = smem_.jobs[warp_];
    int64_t index = Block::before_first_job();
    while (block_.next_job(index, next)) {
      if (lane_ == 0) smem_.jobs[warp_] = next;
      __syncwarp();
      Block::wait_full(block_.barriers.scores_full, at_);
      for (int token = warp_; token < job.tokens; token += kTokensOfWarp * kRankingWarps)
        rank(job, token);
      Block::arrive(block_.barriers.scores_empty, at_);
      at_.advance(kScoreBuffers);
    }
  }

 private:
  /// Starts the copy of a chunk: this lane's part of the scores, and of the references. A group of
  /// copies of its own.
  template <int kRows>
  __device__ __forceinline__ void copy(const char* scores, const float* references,
                                       Chunk& chunk) const {
    const uint32_t to = smem_addr(chunk.scores + 16 * lane_);
    if (kRows >= 8 || lane_ < 4 * kRows) cp_async_16(to, scores);  // 8 rows of 64 bytes
    if (kRows == 16) cp_async_16(to + 512, scores + 512);
    if (4 * lane_ < kRows) cp_async_16(smem_addr(chunk.references + 4 * lane_), references);
    cp_async_commit();
  }

  /// What the rows of a chunk add to the score of this lane's block. `minus_lse`: of the first of
  /// the rows that this lane weighs.
  template <int kRows>
  __device__ __forceinline__ float weigh(const float* minus_lse, const Chunk& chunk) const {
    cp_async_wait<kChunks * kTokensOfWarp - 1>();
    __syncwarp();
    // Lane c of quad g has the blocks 8 i + 2 c + b of the rows g and g + 8.
    float sums[8] = {};
#pragma unroll
    for (int half = 0; half < (kRows + 7) / 8; ++half) {
      const int r = lane_ / 4 + 8 * half;
      if (kRows < 8 && r >= kRows) break;
      const float weight = exp2_approx(chunk.references[r] + minus_lse[8 * half]);
      add_scaled<__half>(sums, weight,
                         *reinterpret_cast<const uint4*>(chunk.scores + 512 * half + 16 * lane_));
    }
    __syncwarp();  // the chunk's place is free

    // Over the quads. Each step halves what a lane keeps.
#pragma unroll
    for (int kept = 4; kept > 0; kept /= 2) {
      const int bit = 4 * kept;
      const bool upper = lane_ & bit;
#pragma unroll
      for (int i = 0; i < kept; ++i) {
        const float low = sums[i], high = sums[i + kept];
        sums[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, bit);
      }
    }
    return sums[0];
  }
  /// The block of a tile whose score weigh() gives to this lane.
  __device__ __forceinline__ int lane_block() const {
    return (lane_ & 24) + lane_ % 4 * 2 + lane_ / 4 % 2;
  }
  /// Where the summed score of a tile's block is: over the token's first rows.
  __device__ __forceinline__ float& sum(const BlockScores& scores, int tile, int row,
                                        int block) const {
    static_assert(4 * BlockScores::kRowBytes >= 32 * sizeof(float));
    return reinterpret_cast<float*>(scores.row(tile, row))[block];
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
    Best best(smem_.best[warp_], lane_);
    Tokens tokens;
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = first + i * kRankingWarps;
      const Forced forced(p_, job.position(token));
      tokens.open_end[i] = token < job.tokens ? forced.local : 0;
      tokens.row[i] = min(token, job.tokens - 1) << p_.log2_group;
    }
    const Most most = sum_rows(scores, tiles, tokens);
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = first + i * kRankingWarps;
      const Forced forced(p_, job.position(token));
      best.clear(i, token < job.tokens ? forced.capacity(p_.index_count) : 0);
    }
    best.bound(most.score);
    // Blocks may begin past the last tile, where no compressed token reaches.
    const int last_block = job.position(job.tokens - 1) >> p_.select_shift;
    choose(scores, tiles, max(tiles, last_block / BlockScores::kBlocks + 1), tokens, best);
    const View<int32_t>& view = p_.block_indices;
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = first + i * kRankingWarps;
      if (token >= job.tokens) break;
      best.write(p_, Forced(p_, job.position(token)), i,
                 view.ptr + job.batch * view.batch + (job.row_q + token) * view.seq +
                     job.head_kv * view.head);
    }
  }

  /// Whether importance decides about a block of a token.
  __device__ __forceinline__ bool open(const Tokens& tokens, int i, int block) const {
    return block >= p_.config.num_init && block < tokens.open_end[i];
  }

  struct Most {
    int score[kTokensOfWarp];
  };
  /// Sums the rows of each token, into its first. Returns the best that this lane has seen.
  __device__ __forceinline__ Most sum_rows(const BlockScores& scores, int tiles,
                                           const Tokens& tokens) const {
    switch (p_.log2_group) {
      case 2:
        return sum_rows<4, 1>(scores, tiles, tokens, 1);
      case 3:
        return sum_rows<8, 1>(scores, tiles, tokens, 1);
      case 4:
        return sum_rows<16, 1>(scores, tiles, tokens, 1);
      default:
        return sum_rows<16, 0>(scores, tiles, tokens, 1 << p_.log2_group >> 4);
    }
  }
  /// kRows: of a chunk; shares: chunks of a token and tile, kShares where that is not 0.
  template <int kRows, int kShares>
  __device__ __forceinline__ Most sum_rows(const BlockScores& scores, int tiles,
                                           const Tokens& tokens, int shares) const {
    if (kShares > 0) shares = kShares;
    constexpr int kShareBytes = 16 * BlockScores::kRowBytes;
    constexpr int kShareReferences = 16 * sizeof(float);
    Chunk(&chunks)[kChunks][kTokensOfWarp] = smem_.chunks[warp_];
    // Of the first token: what this lane copies next, the lse of what it weighs, where its sums go.
    // Rows from there to the token's first.
    const int first = tokens.row[0];
    const char* from = scores.row(0, first) + 16 * lane_;
    const float* references = scores.references(0) + first + 4 * lane_;
    const float* minus_lse = &smem_.minus_lse[at_.slot][first + lane_ / 4];
    char* to = reinterpret_cast<char*>(&sum(scores, 0, first, lane_block()));
    int rows[kTokensOfWarp];
    Most most;
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      rows[i] = tokens.row[i] - first;
      most.score[i] = kNoScore;
    }
    if (tiles == 0) return most;
    int left = tiles * shares, next_share = 0;
    const auto copy_next = [&](int place, int i) {
      copy<kRows>(from + rows[i] * BlockScores::kRowBytes, references + rows[i], chunks[place][i]);
    };
    const auto move_on = [&] {  // past the end the last chunk again
      if (--left <= 0) return;
      from += kShareBytes;
      references += kShareReferences / sizeof(float);
      if (++next_share < shares) return;
      next_share = 0;
      from += BlockScores::kTileBytes - shares * kShareBytes;
      references += (BlockScores::kTileBytes - shares * kShareReferences) / sizeof(float);
    };
#pragma unroll
    for (int place = 0; place < kChunks; ++place) {
#pragma unroll
      for (int i = 0; i < kTokensOfWarp; ++i) copy_next(place, i);
      move_on();
    }
    int place = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      float score[kTokensOfWarp] = {};
#pragma unroll 1
      for (int share = 0; share < shares; ++share) {
#pragma unroll
        for (int i = 0; i < kTokensOfWarp; ++i) {
          score[i] += weigh<kRows>(minus_lse + rows[i] + 16 * share, chunks[place][i]);
          copy_next(place, i);
        }
        move_on();
        place ^= 1;
      }
#pragma unroll
      for (int i = 0; i < kTokensOfWarp; ++i) {
        if (open(tokens, i, tile * BlockScores::kBlocks + lane_block()))
          most.score[i] = max(most.score[i], score_order(score[i]));
        if (tokens.open_end[i] > 0)
          *reinterpret_cast<float*>(to + rows[i] * BlockScores::kRowBytes) = score[i];
      }
      to += BlockScores::kTileBytes;
    }
    cp_async_wait<0>();  // of a chunk that is not there
    return most;
  }

  /// Chooses among the blocks of `all_tiles` tiles; those past `tiles` have a score of 0.
  __device__ __forceinline__ void choose(const BlockScores& scores, int tiles, int all_tiles,
                                         const Tokens& tokens, Best& best) const {
    constexpr int kBatch = 4;  // tiles at a time: their reads overlap
    __syncwarp();              // the sums, which other lanes wrote
    const auto score_of = [&](int tile, int i) {
      if (!open(tokens, i, tile * BlockScores::kBlocks + lane_)) return kNoScore;
      return tile < tiles ? score_order(sum(scores, tile, tokens.row[i], lane_)) : 0;
    };
#pragma unroll 1
    for (int base = 0; base < all_tiles; base += kBatch) {
      int score[kBatch][kTokensOfWarp];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
#pragma unroll
        for (int i = 0; i < kTokensOfWarp; ++i) score[j][i] = score_of(base + j, i);
      }
      if (best.fits(score)) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
#pragma unroll
          for (int i = 0; i < kTokensOfWarp; ++i)
            best.add(i, score[j][i], (base + j) * BlockScores::kBlocks + lane_);
        }
      } else {
#pragma unroll 1
        for (int tile = base; tile < base + kBatch; ++tile) {
          best.shrink();
#pragma unroll
          for (int i = 0; i < kTokensOfWarp; ++i)
            best.add(i, score_of(tile, i), tile * BlockScores::kBlocks + lane_);
        }
      }
    }
    best.shrink();
  }

  const Block& block_;
  const FwdParams& p_;
  Smem& smem_;
  const int warp_, lane_;
  Cursor at_;
};

}  // namespace nsa::cuda::sm90
