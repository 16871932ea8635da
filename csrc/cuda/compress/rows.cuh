// Where the compressed tokens and the keys of a batch lie, padded or packed.
//
// A "row" counts the compressed tokens of a head: b * Tc + c in a padded batch, the row of k_cmp in
// a packed one (`packed_row`), where rows that hold no token occur.
#pragma once

#include <cstdint>

#include "cuda/common.h"
#include "cuda/device/ptx.cuh"
#include "nsa/geometry.h"
#include "nsa/params.h"

namespace nsa::cuda::compress {

/// What the kernels need of CompressShape.
struct Sequences {
  const int32_t* cu_seqlens;  // (B + 1), or null
  int64_t batch;              // B
  int64_t seqlen;             // Sk of a padded batch
  int64_t tokens;             // Tc of a padded batch
  int64_t keys;               // B * Sk, packed: rows of x
  int64_t rows;               // B * Tc, packed: rows of k_cmp
  int32_t block_size, block_stride;
};

inline Sequences make_sequences(const CompressShape& shape) {
  Sequences s;
  s.cu_seqlens = shape.cu_seqlens;
  s.batch = shape.batch;
  s.seqlen = shape.seqlen;
  s.tokens = num_compressed(shape.seqlen, shape.block_size, shape.block_stride);
  s.keys = shape.cu_seqlens ? shape.total : shape.batch * shape.seqlen;
  s.rows = shape.cu_seqlens ? packed_row(shape.total, shape.block_stride) : shape.batch * s.tokens;
  s.block_size = shape.block_size;
  s.block_stride = shape.block_stride;
  return s;
}

/// A compressed token: `batch` and `token` index k_cmp, `batch` and `key` the first key in x.
struct TokenPosition {
  int64_t batch, token, key;
  int64_t left;  // tokens of its sequence from this one on; none: the row holds no token
  __device__ __forceinline__ bool used() const { return left > 0; }
};

// For a gradient with respect to x, the keys of a sequence are cut into segments of d: key j*d + r
// of segment j is covered by the tokens j, j-1, .., j - l/d + 1, at their offsets r, d + r, ... The
// segments of a packed batch are counted so that those of sequence b start at cu_seqlens[b] / d +
// b, which leaves room for an incomplete last one; rows of x behind the last sequence count as one
// more sequence, without tokens.

__host__ __device__ __forceinline__ int64_t num_segments(const Sequences& seqs) {
  if (seqs.cu_seqlens) return seqs.keys / seqs.block_stride + seqs.batch + 1;
  return seqs.batch * ceil_div<int64_t>(seqs.seqlen, seqs.block_stride);
}

/// A segment: `batch` and `key` index its first key in x, `batch` and `token` the token j in k_cmp
/// (where there is one).
struct SegmentPosition {
  int64_t batch, key, token;
  int64_t row;        // the row of token j, which in a padded batch counts over the sequences
  int64_t keys;       // how many keys it has, at most d, maybe none
  int64_t j, tokens;  // its index, and the tokens of its sequence
};

/// The last sequence whose compressed tokens start at or before packed row `row`, or -1. If the row
/// holds a token, it is one of this sequence, because later sequences start behind it
/// (`packed_row`).
__device__ __forceinline__ int64_t last_sequence(const Sequences& seqs, int64_t row) {
  int64_t lo = 0, hi = seqs.batch;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (packed_row(__ldg(seqs.cu_seqlens + mid), seqs.block_stride) <= row)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo - 1;
}

__device__ __forceinline__ TokenPosition token_position(const Sequences& seqs, int64_t row) {
  if (!seqs.cu_seqlens) {
    const int64_t b = row / seqs.tokens, c = row - b * seqs.tokens;
    return {b, c, c * seqs.block_stride, seqs.tokens - c};
  }
  const int64_t b = last_sequence(seqs, row);
  if (b < 0) return {0, row, 0, 0};
  const int64_t start = __ldg(seqs.cu_seqlens + b), end = __ldg(seqs.cu_seqlens + b + 1);
  const int64_t c = row - packed_row(start, seqs.block_stride);
  return {0, row, start + c * seqs.block_stride,
          num_compressed(end - start, seqs.block_size, seqs.block_stride) - c};
}

__device__ __forceinline__ SegmentPosition segment_position(const Sequences& seqs,
                                                            int64_t segment) {
  const int64_t d = seqs.block_stride;
  if (!seqs.cu_seqlens) {
    const int64_t per_sequence = ceil_div<int64_t>(seqs.seqlen, d);
    const int64_t b = segment / per_sequence, j = segment - b * per_sequence;
    const int64_t rest = seqs.seqlen - j * d;
    return {b, j * d, j, b * seqs.tokens + j, rest < d ? rest : d, j, seqs.tokens};
  }
  int64_t lo = 0, hi = seqs.batch + 1;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (__ldg(seqs.cu_seqlens + mid) / d + mid <= segment)
      lo = mid + 1;
    else
      hi = mid;
  }
  const int64_t b = lo - 1, start = __ldg(seqs.cu_seqlens + b);
  const bool behind = b == seqs.batch;
  const int64_t length = (behind ? seqs.keys : __ldg(seqs.cu_seqlens + b + 1)) - start;
  const int64_t j = segment - (start / d + b), rest = length - j * d;
  const int64_t row = packed_row(start, seqs.block_stride) + j;
  return {0,
          start + j * d,
          row,
          row,
          rest < d ? rest : d,
          j,
          behind ? 0 : num_compressed(length, seqs.block_size, seqs.block_stride)};
}

inline bool is_aligned16(const void* ptr) { return reinterpret_cast<uintptr_t>(ptr) % 16 == 0; }

/// Whether every row of a view can be read and written in pieces of 8 elements (16 bytes).
template <class T>
bool rows_aligned16(const View<T>& view) {
  return is_aligned16(view.ptr) && view.batch % 8 == 0 && view.seq % 8 == 0 && view.head % 8 == 0;
}

/// Eight elements in one register quad. Rows that are not 16-byte aligned are read one by one.
template <class T, bool kAligned>
__device__ __forceinline__ uint4 load8(const T* src) {
  if constexpr (kAligned) {
    return __ldg(reinterpret_cast<const uint4*>(src));
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(src);
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = __ldg(bits + 2 * i) | static_cast<uint32_t>(__ldg(bits + 2 * i + 1)) << 16;
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void store8(T* dst, const float (&values)[8]) {
  uint4 packed;
  packed.x = pack2<T>(values[0], values[1]);
  packed.y = pack2<T>(values[2], values[3]);
  packed.z = pack2<T>(values[4], values[5]);
  packed.w = pack2<T>(values[6], values[7]);
  if constexpr (kAligned) {
    *reinterpret_cast<uint4*>(dst) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) dst[i] = static_cast<T>(values[i]);
  }
}

template <class T>
__device__ __forceinline__ void unpack8(uint4 packed, float (&values)[8]) {
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

}  // namespace nsa::cuda::compress
