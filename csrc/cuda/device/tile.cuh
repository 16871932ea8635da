// Tiles of 16-bit rows in shared memory: layout, asynchronous loading, fragment addresses.
//
// A tile of kDim columns (a multiple of 64) is stored row by row; the 16-byte chunk c of row r lies
// at chunk c ^ (r % 8), so that the eight rows of one 8x8 matrix that ldmatrix reads fall into
// different banks.
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"

namespace nsa::cuda {

/// Byte offset of the 16-byte chunk `chunk` of row `row`.
template <int kDim>
__device__ __forceinline__ uint32_t tile_offset(int row, int chunk) {
  static_assert(kDim % 64 == 0);
  return static_cast<uint32_t>(row * (kDim * 2) + ((chunk ^ (row & 7)) << 4));
}

/// Loads kRows rows of kDim elements with all kThreads threads. `source(row)` returns the address
/// of a row of global memory, 16-byte aligned, or null for a row of zeros. The caller commits or
/// arrives on a barrier.
template <int kDim, int kRows, int kThreads, class Source>
__device__ __forceinline__ void load_tile(uint32_t smem, int thread, const Source& source) {
  constexpr int kRowsPerSweep = kThreads / 8;  // eight threads copy 128 bytes of a row at once
  static_assert(kRows % kRowsPerSweep == 0 && kRowsPerSweep % 8 == 0);
  const int chunk = thread & 7;
  const uint32_t dst = smem + tile_offset<kDim>(thread >> 3, chunk);
#pragma unroll
  for (int sweep = 0; sweep < kRows / kRowsPerSweep; ++sweep) {
    const auto* row = source(sweep * kRowsPerSweep + (thread >> 3));
    const char* src = reinterpret_cast<const char*>(row) + chunk * 16;
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel)
      cp_async_16(dst + sweep * kRowsPerSweep * kDim * 2 + panel * 128, src + panel * 128,
                  row != nullptr);
  }
}

/// How the 32 lanes' row addresses of an ldmatrix.x4 cover a 16 x 16 element patch of a tile.
enum class Patch {
  // Registers 0..3: (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
  // Plain: the A fragment of rows x columns = m x k.
  // Transposed: b0, b1 of n columns 0-7, then b0, b1 of 8-15, for rows x columns = k x n.
  kRowsFirst,
  // Registers 0..3: (rows 0-7, columns 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15).
  // Plain: b0, b1 of n rows 0-7, then b0, b1 of 8-15, for rows x columns = n x k.
  // Transposed: the A fragment of the transposed tile, rows x columns = k x m.
  kColumnsFirst,
};

/// Fragment addresses of this lane within tiles of kDim columns.
template <int kDim, Patch kPatch>
class PatchReader {
 public:
  __device__ __forceinline__ explicit PatchReader(int lane) {
    constexpr bool kRows = kPatch == Patch::kRowsFirst;
    const int row = kRows ? lane & 15 : (lane & 7) + ((lane >> 4) << 3);
    const int chunk = kRows ? lane >> 4 : (lane >> 3) & 1;
    row_ = row * (kDim * 2);
    chunk_ = (chunk ^ (row & 7)) << 4;
  }
  /// Address of the patch at row `row` (a multiple of 8) and 16-element column `column16`.
  __device__ __forceinline__ uint32_t at(uint32_t tile, int row, int column16) const {
    return tile + row_ + row * (kDim * 2) + (column16 >> 2) * 128 +
           (chunk_ ^ ((column16 & 3) << 5));
  }

 private:
  uint32_t row_, chunk_;
};

}  // namespace nsa::cuda
