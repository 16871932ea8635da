// Top-n selection of blocks by importance (eq. 11). Include a target_*.h first.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "nsa/params.h"

namespace nsa::cpu::NSA_CPU_TARGET {

template <class T>
using Key = typename FloatTraits<T>::Int;

/// The bits of a number: for numbers from 0 up they are ordered as the numbers are.
template <class T>
NSA_CPU_INLINE Key<T> key_of(T x) {
  Key<T> key;
  std::memcpy(&key, &x, sizeof(key));
  return key;
}

/// How many of `count` values, padded to whole vectors with negative ones, have a key from `least`
/// up.
template <class T>
int64_t count_from(const T* values, int64_t count, Key<T> least) {
  Vec<T> total{};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const IntVec<T> keys = (IntVec<T>)load(values + i);
    total += keys >= least ? splat<T>(1) : Vec<T>{};
  }
  return static_cast<int64_t>(hsum<T>(total));
}

/// Writes the row of block_indices of the query at position t: its `count` selected blocks,
/// ascending, -1 padded. `importance[j]`, not negative, is that of block j, for the blocks with
/// j*l' <= t; a vector of room follows. It is overwritten past the competing blocks.
template <class T>
void select_blocks(T* importance, int64_t t, const BlockConfig& config, int32_t count,
                   int32_t* row) {
  const int64_t candidates = t < 0 ? 0 : t / config.select_size + 1;
  if (candidates <= count) {
    for (int64_t j = 0; j < count; ++j) row[j] = static_cast<int32_t>(j < candidates ? j : -1);
    return;
  }
  // More candidates than count >= num_init + num_local: the forced blocks are a head and a tail
  // that do not meet, and the others compete for the places that they leave.
  const int64_t begin = config.num_init, end = candidates - config.num_local;
  const int64_t places = count - config.num_init - config.num_local;
  for (int64_t j = 0; j < begin; ++j) *row++ = static_cast<int32_t>(j);
  if (places > 0) {
    for (int64_t j = end; j < round_up_lanes<T>(end - begin) + begin; ++j) importance[j] = -1;
    const T* values = importance + begin;
    const int64_t n = end - begin;
    // Bisects the keys for the largest one that `places` blocks reach: a few counts over all
    // blocks, which vectorise, where a heap would mispredict.
    T top = 0;
    for (int64_t i = 0; i < n; ++i) top = values[i] > top ? values[i] : top;
    Key<T> least = 0, over = key_of(top) + 1;
    while (over - least > 1) {
      const Key<T> middle = least + (over - least) / 2;
      const int64_t reached = count_from(values, n, middle);
      (reached >= places ? least : over) = middle;
      if (reached == places) break;
    }
    // Of the blocks at the threshold the first ones fill the places that remain.
    int64_t ties = places - count_from(values, n, least + 1);
    for (int64_t j = 0; j < n; ++j) {
      const Key<T> key = key_of(values[j]);
      if (key < least) continue;
      if (key == least && --ties < 0) continue;
      *row++ = static_cast<int32_t>(begin + j);
    }
  }
  for (int64_t j = end; j < candidates; ++j) *row++ = static_cast<int32_t>(j);
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
