// Packed operands for gemm.h, as the compression's products use them. Include a target_*.h first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/gemm.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// Elements rounded up so that what follows them in a scratch buffer starts on a cache line.
constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// A packed operand B of `depth` x `columns`: panels of kPanel columns, each holding its rows one
// after the other. A panel of kDepthBlock rows of floats takes 16 of the 32 KiB of a first-level
// cache and stays there while the rows of A pass.
inline constexpr int64_t kDepthBlock = 64;
inline constexpr int64_t kRowBlock = 64;

template <class T>
constexpr int64_t num_panels(int64_t columns) {
  return (columns + kPanel<T> - 1) / kPanel<T>;
}

template <class T>
constexpr int64_t packed_size(int64_t depth, int64_t columns) {
  return num_panels<T>(columns) * depth * kPanel<T>;
}

/// Row k of B: `columns` elements of src from `offset` on. The padding is zeroed: nothing reads its
/// products, but what memory happens to hold could be denormal numbers, on which arithmetic is
/// slow.
template <class T>
void pack_row(DType dtype, const void* src, int64_t offset, int64_t depth, int64_t columns,
              int64_t k, T* packed) {
  for (int64_t n = 0; n < columns; n += kPanel<T>) {
    T* row = packed + n * depth + k * kPanel<T>;
    const int64_t count = std::min(kPanel<T>, columns - n);
    load_row(dtype, src, offset + n, count, T(1), row);
    std::fill(row + count, row + kPanel<T>, T(0));
  }
}

/// Rows [begin, begin + count) of panel `panel` of B, where B[k][n] = src[offset + n * pitch + k].
/// `scratch` holds count elements.
template <class T>
void pack_panel_transposed(DType dtype, const void* src, int64_t offset, int64_t pitch,
                           int64_t depth, int64_t columns, int64_t panel, int64_t begin,
                           int64_t count, T* scratch, T* packed) {
  T* rows = packed + (panel * depth + begin) * kPanel<T>;
  for (int64_t n = 0; n < kPanel<T>; ++n) {
    const int64_t column = panel * kPanel<T> + n;
    if (column < columns)
      load_row(dtype, src, offset + column * pitch + begin, count, T(1), scratch);
    else
      std::fill(scratch, scratch + count, T(0));
    for (int64_t k = 0; k < count; ++k) rows[k * kPanel<T> + n] = scratch[k];
  }
}

/// C[m][:] += sum_k A[m][k] * B[k][:] with A[m][k] = a[m * a_row + k * a_step]; `b` points at the
/// first of the `depth` rows to use of a packed operand whose panels lie `b_panel` elements apart.
/// Rows of C are whole vectors wide.
template <class T>
void multiply_add(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_step,
                  const T* b, int64_t b_panel, int64_t columns, T* c, int64_t c_row) {
  const T* a_rows[kRowBlock];
  T* c_rows[kRowBlock];
  for (int64_t m0 = 0; m0 < rows; m0 += kRowBlock) {
    const int64_t count = std::min(kRowBlock, rows - m0);
    for (int64_t m = 0; m < count; ++m) c_rows[m] = c + (m0 + m) * c_row;
    for (int64_t k0 = 0; k0 < depth; k0 += kDepthBlock) {
      for (int64_t m = 0; m < count; ++m) a_rows[m] = a + (m0 + m) * a_row + k0 * a_step;
      for (int64_t panel = 0; panel < num_panels<T>(columns); ++panel) {
        const int64_t n0 = panel * kPanel<T>;
        const Product<T> product{std::min(kDepthBlock, depth - k0),
                                 a_rows,
                                 a_step,
                                 b + panel * b_panel + k0 * kPanel<T>,
                                 kPanel<T>,
                                 c_rows,
                                 n0,
                                 nullptr};
        const int64_t width = round_up_lanes<T>(std::min(kPanel<T>, columns - n0));
        gemm_panel(product, count, width / kLanes<T>, Store::kAdd);
      }
    }
  }
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
