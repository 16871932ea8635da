// The best selection blocks of a few tokens in the registers of one warp: lane i holds the i-th
// best of each token. Nothing waits for shared memory, and the steps of one token hide the latency
// of the others'.
#pragma once

#include "cuda/fwd/ranking.cuh"

namespace nsa::cuda::sm90 {

template <int kTokens>
class BestBlocks {
 public:
  static constexpr int kMostCapacity = 32;
  static constexpr float kAbsent = -1.0f;  // score of what is no block; real ones are not negative

  __device__ __forceinline__ explicit BestBlocks(int lane) : lane_(lane) {}

  /// An empty list of `capacity` blocks.
  __device__ __forceinline__ void clear(int token, int capacity) {
    score_[token] = kAbsent;
    capacity_[token] = capacity;
  }

  /// One block of each lane, the same for all tokens, with its score for each. Blocks come in
  /// ascending order; of equal ones the first stays ahead.
  __device__ __forceinline__ void offer(const float (&score)[kTokens], int block) {
    float threshold[kTokens];
    uint32_t waiting[kTokens];
    int most = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      threshold[i] = __shfl_sync(kAll, score_[i], (capacity_[i] - 1) & 31);
      if (capacity_[i] == 0) threshold[i] = __int_as_float(0x7f800000);
      waiting[i] = __ballot_sync(kAll, score[i] > threshold[i]);
      most = max(most, __popc(waiting[i]));
    }
    if (most == 0) return;
    if (most > kFew) {
      merge(score, threshold, block);
    } else {
#pragma unroll 1
      for (; most > 0; --most) insert(score, block - lane_, waiting);
    }
  }

  /// The token's row of block_indices: the forced blocks and the list, ascending, padded with -1.
  __device__ __forceinline__ void write(const FwdParams& p, const Forced& forced, int token,
                                        int32_t* row) const {
    const bool chosen = lane_ < capacity_[token] && score_[token] > kAbsent;
    const int index = chosen ? index_[token] : 0x7fffffff;
    int rank = forced.init;
    for (int i = 0; i < capacity_[token]; ++i) rank += __shfl_sync(kAll, index, i) < index;
    if (chosen) row[rank] = index;
    const int local_rank = forced.init + __popc(__ballot_sync(kAll, chosen));
    const int total = local_rank + forced.own + 1 - forced.local;
    if (lane_ >= p.index_count) return;
    if (lane_ < forced.init) {
      row[lane_] = lane_;
    } else if (lane_ >= total) {
      row[lane_] = -1;
    } else if (lane_ >= local_rank) {
      row[lane_] = forced.local + lane_ - local_rank;
    }
  }

 private:
  static constexpr uint32_t kAll = 0xffffffffu;
  static constexpr int kFew = 6;  // so many insertions take as long as a merge

  /// Moves one of the waiting blocks of each token to its place.
  __device__ __forceinline__ void insert(const float (&score)[kTokens], int first_block,
                                         uint32_t (&waiting)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int from = __ffs(waiting[i]) - 1;
      const float shared = __shfl_sync(kAll, score[i], from & 31);
      const float inserted = from < 0 ? kAbsent : shared;  // nothing moves for an absent one
      const int ahead = __popc(__ballot_sync(kAll, score_[i] >= inserted));
      const float score_before = __shfl_up_sync(kAll, score_[i], 1);
      const int index_before = __shfl_up_sync(kAll, index_[i], 1);
      if (lane_ >= ahead) {
        score_[i] = lane_ == ahead ? inserted : score_before;
        index_[i] = lane_ == ahead ? first_block + from : index_before;
      }
      waiting[i] &= waiting[i] - 1;
    }
  }

  /// Takes all blocks that exceed the thresholds: sorts them, keeps the better halves of them and
  /// the lists, and sorts those, all bitonic.
  __device__ __forceinline__ void merge(const float (&offered)[kTokens],
                                        const float (&threshold)[kTokens], int block) {
    float score[kTokens];
    int index[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      score[i] = offered[i] > threshold[i] ? offered[i] : kAbsent;
      index[i] = block;
    }
#pragma unroll 1
    for (int run = 2; run <= 32; run *= 2) {
#pragma unroll 1
      for (int distance = run / 2; distance > 0; distance /= 2)
        exchange(score, index, distance, ((lane_ & distance) == 0) == ((lane_ & run) == 0));
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      keep(score_[i], index_[i], __shfl_xor_sync(kAll, score[i], 31),
           __shfl_xor_sync(kAll, index[i], 31), true);
#pragma unroll 1
    for (int distance = 16; distance > 0; distance /= 2)
      exchange(score_, index_, distance, (lane_ & distance) == 0);
  }
  __device__ __forceinline__ void exchange(float (&score)[kTokens], int (&index)[kTokens],
                                           int distance, bool better) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      keep(score[i], index[i], __shfl_xor_sync(kAll, score[i], distance),
           __shfl_xor_sync(kAll, index[i], distance), better);
  }
  /// Keeps the better or the worse of two.
  static __device__ __forceinline__ void keep(float& score, int& index, float other_score,
                                              int other_index, bool better) {
    const bool ahead = score > other_score || (score == other_score && index < other_index);
    if (ahead == better) return;
    score = other_score;
    index = other_index;
  }

  const int lane_;
  float score_[kTokens];
  int index_[kTokens] = {}, capacity_[kTokens];
};

}  // namespace nsa::cuda::sm90
