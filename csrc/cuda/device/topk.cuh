// The highest scores of a stream, kept by a warp in shared memory.
#pragma once

#include <cstdint>

namespace nsa::cuda {

/// The `capacity` (0..64) highest scores of a stream of non-negative ones and their indices, sorted
/// by descending score; of equal scores the one that came first stays ahead. Unused entries have
/// score -1 and index -1.
///
/// What exceeds the lowest of the list waits in a buffer until that is full, then all of it is
/// merged at once: inserting one at a time is a long chain of dependent steps.
class TopList {
 public:
  static constexpr int kPending = 32;  // one for each lane
  /// 4-byte words of shared memory, a multiple of 4.
  __host__ __device__ static constexpr int words(int capacity) {
    return 2 * padded(capacity) + 2 * kPending + 4;
  }

  /// `memory` is 16-byte aligned and holds words(max_capacity).
  __device__ __forceinline__ TopList(float* memory, int max_capacity, int capacity)
      : pending_score_(memory),
        pending_index_(reinterpret_cast<int*>(memory + kPending)),
        score_(memory + 2 * kPending),
        index_(reinterpret_cast<int*>(score_ + padded(max_capacity))),
        pending_(index_ + padded(max_capacity)),
        capacity_(capacity) {}

  __device__ __forceinline__ int capacity() const { return capacity_; }
  __device__ __forceinline__ int index(int i) const { return index_[i]; }

  __device__ __forceinline__ void clear(int lane) const {
    for (int i = lane; i < padded(capacity_); i += 32) {
      score_[i] = -1.0f;
      index_[i] = -1;
    }
    pending_score_[lane] = kAbsent;
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

  /// Empties the buffer into the list; called by the whole warp. The place of an entry is the
  /// number of those before it: every lane counts them for one of the buffer and one or two of the
  /// list.
  __device__ __forceinline__ void merge(int lane) const {
    const bool low = lane < capacity_, high = lane + 32 < capacity_;
    const float score = pending_score_[lane];
    const float score_low = low ? score_[lane] : -1.0f;
    const float score_high = high ? score_[lane + 32] : -1.0f;
    const int index = pending_index_[lane];
    const int index_low = low ? index_[lane] : -1, index_high = high ? index_[lane + 32] : -1;
    int rank = 0, rank_low = lane, rank_high = lane + 32;
#pragma unroll 4
    for (int i = 0; i < kPending; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(pending_score_ + i);
      const float others[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        rank += i + j < lane ? others[j] >= score : others[j] > score;
        rank_low += others[j] > score_low;
        rank_high += others[j] > score_high;
      }
    }
    for (int i = 0; i < capacity_; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(score_ + i);
      rank += (four.x >= score) + (four.y >= score) + (four.z >= score) + (four.w >= score);
    }
    __syncwarp();
    place(score != kAbsent, rank, score, index);
    place(low, rank_low, score_low, index_low);
    place(high, rank_high, score_high, index_high);
    pending_score_[lane] = kAbsent;
    if (lane == 0) *pending_ = 0;
    __syncwarp();
  }

 private:
  static constexpr float kAbsent = -2.0f;  // score of the buffer's free entries
  /// Entries are read four at a time; those past the capacity keep the score -1.
  __host__ __device__ static constexpr int padded(int capacity) { return (capacity + 3) / 4 * 4; }

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
