// Top-n selection of blocks by importance (eq. 11).
#pragma once

#include <cstdint>

#include "nsa/params.h"

namespace nsa::cpu {

/// Scratch of one selected block.
template <class T>
struct Ranked {
  T importance;
  int32_t block;
};

/// Writes the row of block_indices of the query at position t: its `count` selected blocks,
/// ascending, -1 padded. `importance[j]` is that of block j, for the blocks with j*l' <= t;
/// `heap` has room for `count` entries.
template <class T>
void select_blocks(const T* importance, int64_t t, const BlockConfig& config, int32_t count,
                   Ranked<T>* heap, int32_t* row);

}  // namespace nsa::cpu
