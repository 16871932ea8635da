// The inverse of block_indices: which queries selected a block.
#pragma once

#include <cstdint>

namespace nsa::cpu {

/// Rows of block_indices of one (sequence, kv head), for queries at positions `position`,
/// `position + 1`, ...
struct SelectedRows {
  const int32_t* ptr;
  int64_t stride;
  int64_t rows;
  int64_t position;
  int32_t count;  // entries of a row
};

/// The rows by selected block, ascending, as a counting sort gives them: those of block j are
/// tokens[begin[j] .. begin[j + 1]). An entry outside [0, num_blocks), a repeated one, and a block
/// that lies past the query's position are left out. `begin` has num_blocks + 1 entries, `seen`
/// num_blocks, `tokens` rows * count.
void invert(const SelectedRows& selected, int32_t select_size, int64_t num_blocks, int64_t* begin,
            int32_t* seen, int32_t* tokens);

}  // namespace nsa::cpu
