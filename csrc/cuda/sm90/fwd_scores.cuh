// Scores of selection blocks on their way from the consumers to the ranking warps.
//
// A consumer walks the compressed tokens once, so a row's lse is known only at its end. What the
// row's head adds to the importance of a block (eq. 8-10) is therefore left relative to the
// reference that the row has at that tile, and weighed by 2^(reference - lse) when the job is
// ranked, while the consumers work on the next. Global memory that a block of threads writes and
// reads again soon after: most of it stays in L2.
#pragma once

#include "cuda/sm90/fwd_block.cuh"

namespace nsa::cuda::sm90 {

/// Whether these kernels rank the blocks of a call: four compressed tokens begin in a selection
/// block, at most one reaches into it from before, and a warp's lanes hold a list.
inline bool ranks(const FwdParams& p) {
  return p.select_shift - p.stride_shift == 2 &&
         p.config.block_size <= 2 * p.config.block_stride && p.index_count <= 32;
}

/// The scores of one job: for each tile of 128 compressed tokens and each query row 32 block
/// scores, then the rows' references. Float32.
class BlockScores {
 public:
  static constexpr int kRows = 128, kBlocks = 32;
  static constexpr int kTileFloats = kRows * (kBlocks + 1);

  /// Tiles of the longest sequence of a call.
  static int tiles(const FwdParams& p) {
    return static_cast<int>(
        num_compressed(p.seqlen_k, p.config.block_size, p.config.block_stride) / 128 + 1);
  }
  /// Of one block of threads.
  static int64_t bytes(int tiles) {
    return int64_t{kScoreBuffers} * tiles * kTileFloats * sizeof(float);
  }

  /// Buffer `slot` of the calling block of threads.
  __device__ __forceinline__ BlockScores(const FwdArgs& args, int slot)
      : base_(args.scores +
              (int64_t{blockIdx.x} * kScoreBuffers + slot) * args.score_tiles * kTileFloats) {}

  /// The 32 scores of a row, in the order of word().
  __device__ __forceinline__ float* row(int tile, int row) const {
    return base_ + static_cast<int64_t>(tile) * kTileFloats + row * kBlocks;
  }
  __device__ __forceinline__ float* references(int tile) const { return row(tile, kRows); }

  /// Where a row keeps block 8 i + 2 c + b, 0 <= i, c < 4, which lane c of a quad makes: such that
  /// the lane writes 16 bytes at once.
  static __device__ __forceinline__ int word(int block) {
    const int i = block / 8, c = block / 2 % 4;
    return i / 2 * 16 + c * 4 + i % 2 * 2 + block % 2;
  }

 private:
  float* base_;
};

}  // namespace nsa::cuda::sm90
