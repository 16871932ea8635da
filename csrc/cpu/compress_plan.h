// What the compression kernels iterate over: the sequences of a (packed) batch and their tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "nsa/geometry.h"
#include "nsa/params.h"

namespace nsa::cpu {

/// One sequence of a batch, where it lies in the views of x and of the compressed tokens.
struct CompressSequence {
  int64_t batch;    // index along the views' batch axis
  int64_t start;    // first row of x
  int64_t rows;     // rows of x whose gradient this sequence owns
  int64_t row;      // first row of the compressed tokens
  int64_t tokens;   // Tc
  int64_t row_end;  // rows up to here are this sequence's, those behind its tokens hold none
  int64_t slot;     // compressed tokens of the sequences before it: an index without gaps
};

/// Up to kRows consecutive compressed tokens, or stride-long segments of x, of one sequence.
struct CompressTile {
  static constexpr int64_t kRows = 64;
  int32_t sequence;
  int64_t begin;
  int32_t count;
};

struct CompressPlan {
  std::vector<CompressSequence> sequences;
  std::vector<CompressTile> token_tiles;
  std::vector<CompressTile> segment_tiles;  // they cover every row of x
  int64_t tokens = 0;                       // of all sequences
  int64_t overlap;                          // l / d: the blocks that a key belongs to

  explicit CompressPlan(const CompressShape& shape)
      : overlap(shape.block_size / shape.block_stride), stride_(shape.block_stride) {
    const int32_t l = shape.block_size, d = shape.block_stride;
    for (int64_t b = 0; b < shape.batch; ++b) {
      if (shape.cu_seqlens) {
        const int64_t start = shape.cu_seqlens[b], seqlen = shape.cu_seqlens[b + 1] - start;
        const int64_t row_end = packed_row(shape.cu_seqlens[b + 1], d);
        add({0, start, seqlen, packed_row(start, d), num_compressed(seqlen, l, d), row_end,
             tokens});
      } else {
        const int64_t count = num_compressed(shape.seqlen, l, d);
        add({b, 0, shape.seqlen, 0, count, count, tokens});
      }
    }
    if (shape.cu_seqlens) {
      // Rows behind the last sequence: no tokens, but their zeros are written like all others.
      const int64_t end = shape.cu_seqlens[shape.batch];
      add({0, end, shape.total - end, packed_row(end, d), 0, packed_row(shape.total, d), tokens});
    }
  }

 private:
  void add(const CompressSequence& sequence) {
    const int32_t index = static_cast<int32_t>(sequences.size());
    sequences.push_back(sequence);
    tokens += sequence.tokens;
    cut(index, sequence.tokens, token_tiles);
    cut(index, (sequence.rows + stride_ - 1) / stride_, segment_tiles);
  }

  static void cut(int32_t sequence, int64_t count, std::vector<CompressTile>& tiles) {
    for (int64_t begin = 0; begin < count; begin += CompressTile::kRows) {
      const int64_t rows = std::min(CompressTile::kRows, count - begin);
      tiles.push_back({sequence, begin, static_cast<int32_t>(rows)});
    }
  }

  int32_t stride_;
};

}  // namespace nsa::cpu
