// The best selection blocks of a few tokens, by one warp. Blocks come in ascending order; up to 64
// of a token wait in shared memory, and a block is among the best where few of them are ahead of
// it: each lane counts those ahead of its own, which takes a third of the instructions of a sort
// and no chain of shuffles.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/fwd/forced.cuh"

namespace nsa::cuda::sm90 {

/// A score, to be compared as an integer: scores are not negative.
__device__ __forceinline__ int score_order(float score) { return __float_as_int(score); }
inline constexpr int kNoScore = -1;  // of what is no block

template <int kTokens>
class BestBlocks {
 public:
  static constexpr int kPlaces = 64;
  /// By token; the score's order above the complement of the block, so that of equal scores the
  /// lower block is ahead. 0: none.
  using Memory = uint64_t[kTokens][kPlaces];

  __device__ __forceinline__ BestBlocks(Memory& memory, int lane) : memory_(memory), lane_(lane) {}

  /// Nothing of a token, of which at most `capacity` <= 32 blocks are wanted. bound() comes next.
  __device__ __forceinline__ void clear(int token, int capacity) {
    count_[token] = 0;
    capacity_[token] = capacity;
  }

  /// From the best score that each lane has seen of each token, what its best blocks exceed. The
  /// capacity-th best lane's is a bound: so many blocks are as good, and few are better. Before the
  /// first add().
  __device__ __forceinline__ void bound(const int (&most)[kTokens]) {
    int (&seen)[kTokens][32] = reinterpret_cast<int (&)[kTokens][32]>(memory_);
    int ahead[kTokens] = {};
    __syncwarp();  // the memory is free
#pragma unroll
    for (int i = 0; i < kTokens; ++i) seen[i][lane_] = most[i];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 32; j += 4) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        const int4 x = *reinterpret_cast<const int4*>(&seen[i][j]);
        ahead[i] += (x.x > most[i]) + (x.y > most[i]) + (x.z > most[i]) + (x.w > most[i]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int least = __reduce_min_sync(kAll, ahead[i] < capacity_[i] ? most[i] : 0x7fffffff);
      // All blocks where there are too few. Without capacity nothing is least.
      exceed_[i] = max(least, 0) - (least != 0x7fffffff);
    }
  }

  /// Whether there is room for all of these scores of each token that exceed the bounds; there is
  /// for one of each lane after shrink().
  template <int kCount>
  __device__ __forceinline__ bool fits(const int (&score)[kCount][kTokens]) const {
    bool fits = true;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      int count = count_[i];
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        count += __popc(__ballot_sync(kAll, score[j][i] > exceed_[i]));
      fits = fits && count <= kPlaces;
    }
    return fits;
  }
  /// Takes a block of each lane, further on than those before, if its score exceeds the bound.
  __device__ __forceinline__ void add(int token, int score, int block) {
    const bool better = score > exceed_[token];
    const uint32_t all = __ballot_sync(kAll, better);
    if (better)
      memory_[token][count_[token] + __popc(all & below())] =
          static_cast<uint64_t>(score) << 32 | ~static_cast<uint32_t>(block);
    count_[token] += __popc(all);
  }

  /// Keeps the best. To be called after the last add().
  __device__ __forceinline__ void shrink() {
    int most = 0;
    uint64_t own[kTokens][2];
    int ahead[kTokens][2] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      most = max(most, count_[i]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane_ + 32 * half >= count_[i]) memory_[i][lane_ + 32 * half] = 0;
    }
    __syncwarp();
    const auto count = [&](int half) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) own[i][half] = memory_[i][lane_ + 32 * half];
#pragma unroll 1
      for (int j = 0; j < most; j += 4) {
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(&memory_[i][j + k]);
            ahead[i][half] += (two.x > own[i][half]) + (two.y > own[i][half]);
          }
        }
      }
    };
    count(0);
    const int halves = most > 32 ? 2 : 1;
    if (halves == 2) count(1);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      count_[i] = 0;
      int least = 0x7fffffff;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half >= halves) break;
        const bool stays = own[i][half] != 0 && ahead[i][half] < capacity_[i];
        const uint32_t stay = __ballot_sync(kAll, stays);
        if (stays) {
          memory_[i][count_[i] + __popc(stay & below())] = own[i][half];
          least = min(least, static_cast<int>(own[i][half] >> 32));
        }
        count_[i] += __popc(stay);
      }
      // Later blocks are behind those of the same score.
      least = __reduce_min_sync(kAll, least);
      if (count_[i] == capacity_[i]) exceed_[i] = max(exceed_[i], least);
    }
    __syncwarp();
  }

  /// The token's row of block_indices: the forced blocks and the best, ascending, padded with -1.
  /// After shrink().
  __device__ __forceinline__ void write(const FwdParams& p, const Forced& forced, int token,
                                        int32_t* row) const {
    if (lane_ < count_[token])
      row[forced.init + lane_] =
          static_cast<int32_t>(~static_cast<uint32_t>(memory_[token][lane_]));
    forced.write(row, count_[token], p.index_count, lane_);
  }

 private:
  static constexpr uint32_t kAll = 0xffffffffu;

  /// The lanes before this one.
  __device__ __forceinline__ uint32_t below() const { return (1u << lane_) - 1; }

  Memory& memory_;
  const int lane_;
  int count_[kTokens], capacity_[kTokens];  // of those that wait; of those that are wanted
  int exceed_[kTokens];                     // scores up to this one are not among the best
};

}  // namespace nsa::cuda::sm90
