// The two matrix products of a warp's rows with one tile of keys: S = Q K^T and O += P V. A warp
// owns kGroups groups of 16 rows; `groups` says which of them take part.
#pragma once

#include "cuda/device/tile.cuh"
#include "cuda/sm80/fwd_source.cuh"

namespace nsa::cuda::sm80 {

/// Loads a tile of keys or values: its two segments of consecutive rows of global memory.
template <int kDim, int kThreads, class T, class Source>
__device__ __forceinline__ void load_segments(uint32_t tile, int thread, const T* base,
                                              int64_t stride, const Source& source, int index) {
  constexpr int kRowsAtOnce = kThreads / 8;  // eight threads copy 128 bytes of a row at once
  static_assert(kSegmentKeys % kRowsAtOnce == 0);
  const int row = thread >> 3, chunk = thread & 7;
#pragma unroll
  for (int segment = 0; segment < 2; ++segment) {
    const SegmentRows rows = source.rows(index, segment);
    const T* src = base + (rows.first + row) * stride + chunk * 8;
    const int64_t step = kRowsAtOnce * stride;
#pragma unroll
    for (int i = 0; i < kSegmentKeys; i += kRowsAtOnce) {
      const uint32_t dst =
          tile + segment * kSegmentKeys * kDim * 2 + tile_offset<kDim>(row + i, chunk);
      const bool valid = row + i < rows.count;
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel)
        cp_async_16(dst + panel * 128, src + panel * 64, valid);
      src += step;
    }
  }
}

/// A warp's rows of Q as A fragments: read again from shared memory for every tile, or kept in
/// registers.
template <class T, int kDim, int kGroups, bool kInRegisters>
class QueryRows {
 public:
  __device__ __forceinline__ QueryRows(uint32_t rows, int lane) : rows_(rows), reader_(lane) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) read(step, fragments_[step]);
    }
  }
  __device__ __forceinline__ void get(int step, uint32_t (&a)[kGroups][4]) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kGroups * 4; ++i) a[i / 4][i % 4] = fragments_[step][i / 4][i % 4];
    } else {
      read(step, a);
    }
  }

 private:
  __device__ __forceinline__ void read(int step, uint32_t (&a)[kGroups][4]) const {
#pragma unroll
    for (int m = 0; m < kGroups; ++m) ldmatrix_x4(a[m], reader_.at(rows_, m * 16, step));
  }
  uint32_t rows_;
  PatchReader<kDim, Patch::kRowsFirst> reader_;
  uint32_t fragments_[kInRegisters ? kDim / 16 : 1][kGroups][4];
};

template <class T, int kDim, int kGroups, class Query>
__device__ __forceinline__ void scores(float (&s)[kGroups][8][4], const Query& query, uint32_t keys,
                                       const PatchReader<kDim, Patch::kColumnsFirst>& reader,
                                       uint32_t groups) {
#pragma unroll
  for (int m = 0; m < kGroups; ++m) {
#pragma unroll
    for (int i = 0; i < 32; ++i) s[m][i / 4][i % 4] = 0.0f;
  }
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[kGroups][4];
    query.get(step, a);
#pragma unroll
    for (int n = 0; n < kTileKeys / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, reader.at(keys, n * 16, step));
#pragma unroll
      for (int m = 0; m < kGroups; ++m) {
        if (kGroups > 1 && !(groups >> m & 1)) continue;
        mma_16816<T>(s[m][2 * n], a[m], b[0], b[1]);
        mma_16816<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <class T, int kDim, int kGroups>
__device__ __forceinline__ void accumulate(float (&o)[kGroups][kDim / 8][4],
                                           const uint32_t (&p)[kGroups][kTileKeys / 16][4],
                                           uint32_t values,
                                           const PatchReader<kDim, Patch::kRowsFirst>& reader,
                                           uint32_t groups) {
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, reader.at(values, step * 16, n));
#pragma unroll
      for (int m = 0; m < kGroups; ++m) {
        if (kGroups > 1 && !(groups >> m & 1)) continue;
        mma_16816<T>(o[m][2 * n], p[m][step], b[0], b[1]);
        mma_16816<T>(o[m][2 * n + 1], p[m][step], b[2], b[3]);
      }
    }
  }
}

/// Packs one group's probabilities as the A fragments of P V.
template <class T>
__device__ __forceinline__ void pack_probabilities(uint32_t (&packed)[kTileKeys / 16][4],
                                                   const float (&p)[8][4]) {
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &p[2 * step + i / 2][2 * (i % 2)];
      packed[step][i] = pack2<T>(pair[0], pair[1]);
    }
  }
}

}  // namespace nsa::cuda::sm80
