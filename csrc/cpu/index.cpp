#include "cpu/index.h"

#include <algorithm>

namespace nsa::cpu {

namespace {

/// Calls entry(row, block) for every distinct visible block of every row, in order of the rows.
template <class Entry>
void for_each_entry(const SelectedRows& selected, int32_t select_size, int64_t num_blocks,
                    int32_t* seen, Entry entry) {
  std::fill_n(seen, num_blocks, -1);
  for (int64_t row = 0; row < selected.rows; ++row) {
    const int64_t t = selected.position + row;
    const int64_t blocks = t < 0 ? 0 : std::min<int64_t>(t / select_size + 1, num_blocks);
    const int32_t* indices = selected.ptr + row * selected.stride;
    for (int32_t i = 0; i < selected.count; ++i) {
      const int32_t block = indices[i];
      if (block < 0 || block >= blocks || seen[block] == row) continue;
      seen[block] = static_cast<int32_t>(row);
      entry(static_cast<int32_t>(row), block);
    }
  }
}

}  // namespace

void invert(const SelectedRows& selected, int32_t select_size, int64_t num_blocks, int64_t* begin,
            int32_t* seen, int32_t* tokens) {
  std::fill_n(begin, num_blocks + 1, 0);
  for_each_entry(selected, select_size, num_blocks, seen,
                 [&](int32_t, int32_t block) { ++begin[block + 1]; });
  for (int64_t j = 0; j < num_blocks; ++j) begin[j + 1] += begin[j];
  for_each_entry(selected, select_size, num_blocks, seen,
                 [&](int32_t row, int32_t block) { tokens[begin[block]++] = row; });
  // Every begin[j] has moved to begin[j + 1].
  for (int64_t j = num_blocks; j > 0; --j) begin[j] = begin[j - 1];
  begin[0] = 0;
}

}  // namespace nsa::cpu
