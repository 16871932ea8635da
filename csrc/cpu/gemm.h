// The register-blocked matrix product under every attention and compression kernel. Include a
// target_*.h first.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace nsa::cpu::NSA_CPU_TARGET {

// A micro-tile is kTileRows x kTileVecs vectors of accumulators; with the loaded B vectors and one
// broadcast of A it must fit the registers: 6*4 + 4 + 1 of 32, or 6*2 + 2 + 1 of 16. FMA has a
// latency of 4 and a throughput of 1 or 2 a cycle, so 8 independent accumulators are the least.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVecs = NSA_CPU_VECTOR_REGISTERS >= 32 ? 4 : 2;

/// Columns of a micro-tile: the panel width of packed operands.
template <class T>
inline constexpr int64_t kPanel = kTileVecs * kLanes<T>;

/// How the product meets what C held before.
enum class Store { kOverwrite, kAdd, kScaleAdd };

/// Operands of C[m][:] (+)= sum_k A[m][k] * B[k][:]. Rows of A and C lie wherever their pointers
/// say; element k of a row of A is a[m][k * a_step], row k of B starts at b + k * b_step. C and B
/// are whole vectors wide.
template <class T>
struct Product {
  int64_t depth;
  const T* const* a;
  int64_t a_step;
  const T* b;
  int64_t b_step;
  T* const* c;
  int64_t c_column;  // added to every row of C
  const T* scale;    // kScaleAdd: C[m][:] = scale[m] * C[m][:] + product
};

template <class T, int kRows, int kVecs>
__attribute__((noinline)) void micro_tile(const Product<T>& p, int64_t row, Store mode) {
  Vec<T> acc[kRows][kVecs];
  const T* a[kRows];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) a[m] = p.a[row + m];
  if (mode == Store::kOverwrite) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) acc[m][n] = Vec<T>{};
    }
  } else {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const T* c = p.c[row + m] + p.c_column;
      const T scale = mode == Store::kAdd ? T(1) : p.scale[row + m];
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) acc[m][n] = load(c + n * kLanes<T>) * scale;
    }
  }
  const T* b = p.b;
  const int64_t a_step = p.a_step, b_step = p.b_step;
  int64_t at = 0;
  for (int64_t k = p.depth; k > 0; --k) {
    Vec<T> bv[kVecs];
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) bv[n] = load(b + n * kLanes<T>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const T x = a[m][at];
#pragma GCC unroll 8
      for (int n = 0; n < kVecs; ++n) acc[m][n] += x * bv[n];
    }
    b += b_step;
    at += a_step;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
    T* c = p.c[row + m] + p.c_column;
#pragma GCC unroll 8
    for (int n = 0; n < kVecs; ++n) store(c + n * kLanes<T>, acc[m][n]);
  }
}

template <class T, int kVecs>
void row_panel(const Product<T>& p, int64_t rows, Store mode) {
  static_assert(kTileRows == 6);
  for (int64_t row = 0; row < rows;) {
    // Even parts: 8 rows are 4 + 4, not 6 + 2.
    const int64_t left = rows - row, parts = (left + kTileRows - 1) / kTileRows;
    const int64_t count = (left + parts - 1) / parts;
    switch (count) {
      case 1:
        micro_tile<T, 1, kVecs>(p, row, mode);
        break;
      case 2:
        micro_tile<T, 2, kVecs>(p, row, mode);
        break;
      case 3:
        micro_tile<T, 3, kVecs>(p, row, mode);
        break;
      case 4:
        micro_tile<T, 4, kVecs>(p, row, mode);
        break;
      case 5:
        micro_tile<T, 5, kVecs>(p, row, mode);
        break;
      default:
        micro_tile<T, 6, kVecs>(p, row, mode);
    }
    row += count;
  }
}

/// The product over `vecs` vectors of columns, at most kTileVecs of them.
template <class T>
void gemm_panel(const Product<T>& p, int64_t rows, int64_t vecs, Store mode) {
  if constexpr (kTileVecs == 4) {
    if (vecs == 4) return row_panel<T, 4>(p, rows, mode);
    if (vecs == 3) return row_panel<T, 3>(p, rows, mode);
  }
  if (vecs == 2) return row_panel<T, 2>(p, rows, mode);
  row_panel<T, 1>(p, rows, mode);
}

/// The product over any number of vectors of columns. The order of a sum over k does not depend on
/// how many rows or columns there are.
template <class T>
void gemm(Product<T> p, int64_t rows, int64_t vecs, Store mode) {
  for (int64_t n = 0; n < vecs; n += kTileVecs) {
    gemm_panel(p, rows, vecs - n < kTileVecs ? vecs - n : kTileVecs, mode);
    p.b += kPanel<T>;
    p.c_column += kPanel<T>;
  }
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
