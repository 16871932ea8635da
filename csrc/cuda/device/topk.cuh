// The highest scores of a stream, kept by a warp in shared memory.
#pragma once

#include <cstdint>

namespace nsa::cuda {

/// The `capacity` (0..64) highest scores of a stream of non-negative ones and their indices, sorted
/// by descending score; of equal scores the one that came first stays ahead. Unused entries have
/// score -1 and index -1.
///
/// What exceeds the lowest of the list waits in a buffer until that is full, then all of it is
/// merged at once: an insertion at a time is a chain of dependent steps, 11k cycles a token for a
/// context of 16384 where the merges take a tenth.
class TopList {
 public:
  static constexpr int kPending = 32;  // one for each lane
  /// 4-byte words of shared memory, a multiple of 4.
  __host__ __device__ static constexpr int words(int capacity) {
    return 2 * ((capacity + 3) / 4 * 4) + 2 * kPending + 4;
  }

  /// `memory` is 16-byte aligned and holds words(max_capacity).
  __device__ __forceinline__ TopList(float* memory, int max_capacity, int capacity)
      : pending_score_(memory),
        pending_index_(reinterpret_cast<int*>(memory + kPending)),
        score_(memory + 2 * kPending),
        index_(reinterpret_cast<int*>(score_ + (max_capacity + 3) / 4 * 4)),
        pending_(index_ + (max_capacity + 3) / 4 * 4),
        capacity_(capacity) {}

  __device__ __forceinline__ int capacity() const { return capacity_; }
  __device__ __forceinline__ int index(int i) const { return index_[i]; }

  __device__ __forceinline__ void clear(int lane) const {
    for (int i = lane; i < capacity_; i += 32) {
      score_[i] = -1.0f;
      index_[i] = -1;
    }
    if (lane == 0) *pending_ = 0;
  }

  /// Whether a score may belong into the list.
  __device__ __forceinline__ bool admits(float score) const {
    return capacity_ > 0 && score > score_[capacity_ - 1];
  }
  /// Whether `count` more would overflow the buffer.
  __device__ __forceinline__ bool overflows(int count) const {
    return *pending_ + count > kPending;
  }

  /// Appends the scores of the lanes in `admitted`, all of one list, in the order of the lanes.
  /// Each of these lanes calls it with its own; the caller synchronises the warp afterwards.
  __device__ __forceinline__ void append(float score, int index, uint32_t admitted,
                                         int lane) const {
    const uint32_t before = admitted & ((1u << lane) - 1);
    const int first = *pending_, position = first + __popc(before);
    pending_score_[position] = score;
    pending_index_[position] = index;
    __syncwarp(admitted);
    if (before == 0) *pending_ = first + __popc(admitted);
  }

  /// Empties the buffer into the list; called by the whole warp.
  __device__ __forceinline__ void merge(int lane) const {
    const int count = *pending_;
    const bool has = lane < count, low = lane < capacity_, high = lane + 32 < capacity_;
    const float score = has ? pending_score_[lane] : -2.0f;
    const float score_low = low ? score_[lane] : -1.0f;
    const float score_high = high ? score_[lane + 32] : -1.0f;
    const int index = has ? pending_index_[lane] : -1;
    const int index_low = low ? index_[lane] : -1, index_high = high ? index_[lane + 32] : -1;
    int rank = 0, rank_low = lane, rank_high = lane + 32;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float other = pending_score_[i];
      rank += other > score || (other == score && i < lane);
      rank_low += other > score_low;
      rank_high += other > score_high;
    }
#pragma unroll 4
    for (int i = 0; i < capacity_; ++i) rank += score_[i] >= score;
    __syncwarp();
    place(has, rank, score, index);
    place(low, rank_low, score_low, index_low);
    place(high, rank_high, score_high, index_high);
    if (lane == 0) *pending_ = 0;
    __syncwarp();
  }

 private:
  __device__ __forceinline__ void place(bool valid, int rank, float score, int index) const {
    if (!valid || rank >= capacity_) return;
    score_[rank] = score;
    index_[rank] = index;
  }

  float* pending_score_;
  int* pending_index_;
  float* score_;
  int* index_;
  int* pending_;
  int capacity_;
};

}  // namespace nsa::cuda
