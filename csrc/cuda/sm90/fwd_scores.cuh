// Scores of selection blocks on their way from the consumers to the ranking warps.
//
// A consumer walks the compressed tokens once, so a row's lse is known only at its end. What the
// row's head adds to the importance of a block (eq. 8-10) is therefore left relative to a reference
// of its row and tile, and weighed by 2^(reference - lse) when the job is ranked, while the
// consumers work on the next.
//
// In float32 they cost 3 ms of 65536 tokens, because they do not stay in L2; so they are float16,
// multiplied by a power of two that brings the row's own greatest score in the tile near the end of
// the range: what lies up to 2^-28 below it is off by at most 2^-11 of itself, and the sum over
// heads is float32.
#pragma once

#include "cuda/sm90/fwd_block.cuh"

namespace nsa::cuda::sm90 {

/// Whether these kernels rank the blocks of a call: four compressed tokens begin in a selection
/// block, at most one reaches into it from before, a token has four rows, a warp's lanes hold a
/// list.
inline bool ranks(const FwdParams& p) {
  return p.select_shift - p.stride_shift == 2 && p.config.block_size <= 2 * p.config.block_stride &&
         p.log2_group >= 2 && p.index_count <= 32;
}

/// The scores of one job, in global memory that a block of threads writes and reads again soon
/// after: for each tile of 128 compressed tokens and each query row 32 block scores, then the rows'
/// references.
class BlockScores {
 public:
  static constexpr int kRows = 128, kBlocks = 32;
  static constexpr int kRowBytes = kBlocks * sizeof(__half);
  static constexpr int kTileBytes = kRows * (kRowBytes + sizeof(float));
  /// What the scores of a row and tile are multiplied by, a power of two: the greatest of them,
  /// given as an integer of the same bits, comes to lie in [2^14, 2^15).
  static __device__ __forceinline__ float scale(int greatest) {
    constexpr uint32_t kExponent = 0x7f800000, kLeast = (127 - 100) << 23;
    // Zero, or that little below the reference of the exponentials: as 2^-100.
    const auto bits = static_cast<uint32_t>(max(greatest, static_cast<int>(kLeast)));
    return __uint_as_float(((127u + 127 + 14) << 23) - (bits & kExponent));
  }

  /// Tiles of the longest sequence of a call.
  static int tiles(const FwdParams& p) {
    return static_cast<int>(
        num_compressed(p.seqlen_k, p.config.block_size, p.config.block_stride) / 128 + 1);
  }
  /// Of one block of threads.
  static int64_t bytes(int tiles) { return int64_t{kScoreBuffers} * tiles * kTileBytes; }

  /// Buffer `slot` of the calling block of threads.
  __device__ __forceinline__ BlockScores(const FwdArgs& args, int slot)
      : base_(args.scores +
              (int64_t{blockIdx.x} * kScoreBuffers + slot) * args.score_tiles * kTileBytes) {}

  /// The scores of a row. Lane c of a quad has the 16 bytes from 16 c on, which are the blocks
  /// 8 i + 2 c and 8 i + 2 c + 1 of i = 0 to 3.
  __device__ __forceinline__ char* row(int tile, int row) const {
    return base_ + static_cast<int64_t>(tile) * kTileBytes + row * kRowBytes;
  }
  __device__ __forceinline__ float* references(int tile) const {
    return reinterpret_cast<float*>(row(tile, kRows));
  }

 private:
  char* base_;
};

/// Where a lane of a quad stores what it has of the scores of the rows `row` and `row + 8`, tile
/// after tile.
class ScoreRows {
 public:
  __device__ __forceinline__ ScoreRows(const BlockScores& scores, int row, int quad_lane)
      : scores_(scores.row(0, row) + 16 * quad_lane),
        references_(reinterpret_cast<char*>(scores.references(0) + row)) {}

  __device__ __forceinline__ void store(int half, const uint4& x) const {
    *reinterpret_cast<uint4*>(scores_ + half * 8 * BlockScores::kRowBytes) = x;
  }
  /// log2 of what the stored scores are to be multiplied by, but for the row's lse.
  __device__ __forceinline__ void store_reference(int half, float x) const {
    reinterpret_cast<float*>(references_)[8 * half] = x;
  }
  __device__ __forceinline__ void advance() {
    scores_ += BlockScores::kTileBytes;
    references_ += BlockScores::kTileBytes;
  }

 private:
  char *scores_, *references_;
};

}  // namespace nsa::cuda::sm90
