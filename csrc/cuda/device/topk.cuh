// The highest scores of a stream, kept by a warp in shared memory.
#pragma once

#include <cstdint>

namespace nsa::cuda {

/// The `capacity` (0..64) highest scores of a stream of non-negative ones and their indices, sorted
/// by descending score; of equal scores the one that came first stays ahead. Unused entries have
/// score -1 and index -1.
struct TopList {
  float* score;
  int* index;
  int capacity;

  __device__ __forceinline__ void clear(int lane) const {
    for (int i = lane; i < capacity; i += 32) {
      score[i] = -1.0f;
      index[i] = -1;
    }
  }

  /// Whether insert() would change the list.
  __device__ __forceinline__ bool admits(float value) const {
    return capacity > 0 && value > score[capacity - 1];
  }

  /// Called by the whole warp with the same arguments.
  __device__ __forceinline__ void insert(float value, int value_index, int lane) const {
    const bool low = lane < capacity, high = lane + 32 < capacity;
    const float score_low = low ? score[lane] : -1.0f;
    const float score_high = high ? score[lane + 32] : -1.0f;
    const int index_low = low ? index[lane] : -1, index_high = high ? index[lane + 32] : -1;
    const int position = __popc(__ballot_sync(0xffffffffu, score_low >= value)) +
                         __popc(__ballot_sync(0xffffffffu, score_high >= value));
    if (position >= capacity) return;
    __syncwarp();
    if (lane >= position && lane + 1 < capacity) {
      score[lane + 1] = score_low;
      index[lane + 1] = index_low;
    }
    if (lane + 32 >= position && lane + 33 < capacity) {
      score[lane + 33] = score_high;
      index[lane + 33] = index_high;
    }
    if (lane == 0) {
      score[position] = value;
      index[position] = value_index;
    }
    __syncwarp();
  }
};

}  // namespace nsa::cuda
