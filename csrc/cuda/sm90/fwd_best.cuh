// The best selection blocks of a few tokens in the registers of one warp: lane i holds the i-th
// best of each token. The steps of one token hide the latency of the others'.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/fwd/forced.cuh"

namespace nsa::cuda::sm90 {

template <int kTokens>
class BestBlocks {
 public:
  static constexpr float kAbsent = -1.0f;  // score of what is no block; real ones are not negative

  __device__ __forceinline__ explicit BestBlocks(int lane) : lane_(lane) {}

  /// An empty list of `capacity` <= 32 blocks.
  __device__ __forceinline__ void clear(int token, int capacity) {
    score_[token] = kAbsent;
    index_[token] = 0;
    capacity_[token] = capacity;
  }

  /// From the best score that each lane has seen of each token: what the scores of its list must
  /// exceed. The capacity-th best lane's is a bound: so many blocks are as good, and few are
  /// better.
  __device__ __forceinline__ void bound(const float (&most)[kTokens],
                                        float (&exceed)[kTokens]) const {
    float score[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) score[i] = most[i];
    sort([&](int distance, bool better) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const float other = __shfl_xor_sync(kAll, score[i], distance);
        score[i] = better ? fmaxf(score[i], other) : fminf(score[i], other);
      }
    });
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float least = __shfl_sync(kAll, score[i], (capacity_[i] - 1) & 31);
      // The next number below it; all blocks where there are too few.
      exceed[i] = least > 0.0f ? __int_as_float(__float_as_int(least) - 1) : 0.5f * kAbsent;
      if (capacity_[i] == 0) exceed[i] = __int_as_float(0x7f800000);
    }
  }
  /// The same from the lists, where they are full.
  __device__ __forceinline__ void raise(float (&exceed)[kTokens]) const {
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      exceed[i] = fmaxf(exceed[i], __shfl_sync(kAll, score_[i], (capacity_[i] - 1) & 31));
  }

  /// Takes a block of each lane for each token: sorts them, keeps the better halves of them and the
  /// lists, and sorts those, all bitonic. Of equal scores the lower block is ahead.
  __device__ __forceinline__ void merge(float (&score)[kTokens], int (&block)[kTokens]) {
    sort([&](int distance, bool better) { exchange(score, block, distance, better); });
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      keep(score_[i], index_[i], __shfl_xor_sync(kAll, score[i], 31),
           __shfl_xor_sync(kAll, block[i], 31), true);
#pragma unroll 1
    for (int distance = 16; distance > 0; distance /= 2)
      exchange(score_, index_, distance, (lane_ & distance) == 0);
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

  /// exchange(distance, better) of a bitonic network, best first.
  template <class Exchange>
  __device__ __forceinline__ void sort(const Exchange& exchange) const {
#pragma unroll 1
    for (int run = 2; run <= 32; run *= 2) {
#pragma unroll 1
      for (int distance = run / 2; distance > 0; distance /= 2)
        exchange(distance, ((lane_ & distance) == 0) == ((lane_ & run) == 0));
    }
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
  int index_[kTokens], capacity_[kTokens];
};

}  // namespace nsa::cuda::sm90
