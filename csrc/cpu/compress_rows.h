// Rows of the views of a compression. Include a target_*.h first.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/compress_plan.h"
#include "cpu/dtype.h"
#include "cpu/schedule.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// Element offset of row `row` of x, counted from the start of its sequence.
template <class V>
int64_t key_offset(const V& x, const CompressSequence& sequence, int64_t row, int64_t head) {
  return sequence.batch * x.batch + (sequence.start + row) * x.seq + head * x.head;
}

/// Element offset of compressed token c of a sequence.
template <class V>
int64_t token_offset(const V& view, const CompressSequence& sequence, int64_t c, int64_t head) {
  return sequence.batch * view.batch + (sequence.row + c) * view.seq + head * view.head;
}

/// Zeroes the rows of a packed result that hold no token.
inline void zero_unused_rows(const CompressShape& shape, const CompressPlan& plan,
                             const OutView& out, int64_t columns, const Executor& executor) {
  const int64_t size = dtype_size(shape.dtype);
  for_each_item(executor, plan.sequences.size(), 0, [&](int64_t item, char*) {
    const CompressSequence& sequence = plan.sequences[item];
    for (int64_t c = sequence.tokens; sequence.row + c < sequence.row_end; ++c)
      for (int64_t h = 0; h < shape.heads; ++h)
        std::memset(static_cast<char*>(out.ptr) + token_offset(out, sequence, c, h) * size, 0,
                    columns * size);
  });
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
