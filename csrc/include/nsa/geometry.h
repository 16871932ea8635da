// The integer geometry of NSA, shared by every backend (docs/semantics.md). Each formula is written
// here once.
#pragma once

#include <cstdint>

#include "nsa/params.h"

#ifdef __CUDACC__
#define NSA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NSA_HOST_DEVICE inline
#endif

namespace nsa {

/// Tc: complete compression blocks of a sequence of `seqlen` keys.
NSA_HOST_DEVICE int64_t num_compressed(int64_t seqlen, int32_t block_size, int32_t block_stride) {
  return seqlen < block_size ? 0 : (seqlen - block_size) / block_stride + 1;
}

/// Compressed tokens visible to position t: the first ones, those with c*d + l - 1 <= t. 0 for t <
/// 0.
NSA_HOST_DEVICE int64_t visible_compressed(int64_t t, int32_t block_size, int32_t block_stride) {
  return num_compressed(t + 1, block_size, block_stride);
}

/// Row where the compressed tokens of a sequence start, for a sequence that starts at row `start`
/// of packed keys. The rows never overlap: floor(a/d) + floor(b/d) <= floor((a+b)/d) and Tc <=
/// floor(Sk/d) because d <= l.
NSA_HOST_DEVICE int64_t packed_row(int64_t start, int32_t block_stride) {
  return start / block_stride;
}

/// Selection blocks of a sequence, the last one possibly incomplete.
NSA_HOST_DEVICE int64_t num_select_blocks(int64_t seqlen, int32_t select_size) {
  return (seqlen + select_size - 1) / select_size;
}

/// Weight of compressed token c in the importance of selection block j (eq. 9):
/// |[c*d, c*d+l) intersect [j*l', (j+1)*l')| / d, a whole number because d divides l and l'.
NSA_HOST_DEVICE int64_t overlap_weight(int64_t c, int64_t j, const BlockConfig& config) {
  const int64_t begin = c * config.block_stride, end = begin + config.block_size;
  const int64_t block_begin = j * config.select_size, block_end = block_begin + config.select_size;
  const int64_t lo = begin > block_begin ? begin : block_begin;
  const int64_t hi = end < block_end ? end : block_end;
  return hi > lo ? (hi - lo) / config.block_stride : 0;
}

/// Whether block j, a candidate of position t (j*l' <= t), is selected whatever its importance.
NSA_HOST_DEVICE bool is_forced(int64_t j, int64_t t, const BlockConfig& config) {
  const int64_t own = t / config.select_size;
  return j < config.num_init || j > own - config.num_local;
}

/// The first unmet requirement of a configuration, or null.
inline const char* config_error(const BlockConfig& c) {
  if (c.block_size < 1 || c.block_stride < 1 || c.select_size < 1)
    return "block lengths must be at least 1";
  if (c.num_selected < 1 || c.window < 1) return "num_selected and window must be at least 1";
  if (c.num_init < 0 || c.num_local < 0) return "num_init and num_local must not be negative";
  if (c.block_size % c.block_stride) return "block_stride must divide block_size";
  if (c.select_size % c.block_stride) return "block_stride must divide select_size";
  if (c.block_size > c.select_size) return "block_size must be at most select_size";
  if (c.num_selected < c.num_init + c.num_local)
    return "num_selected must be at least num_init + num_local";
  return nullptr;
}

}  // namespace nsa
