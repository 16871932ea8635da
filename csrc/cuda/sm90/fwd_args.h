// What a launch of the Hopper forward kernel gets, and its shape.
#pragma once

#include <cuda.h>

#include "cuda/fwd/params.h"

namespace nsa::cuda::sm90 {

/// How a kernel walks the keys, all with online softmax. kRange: one range of keys (window;
/// compressed without a selection). kList: the blocks that the tile's tokens chose. kRank: the
/// compressed tokens, leaving scores of selection blocks for the ranking warps.
enum class Walk { kRange, kList, kRank };

struct FwdArgs {
  FwdParams p;
  int64_t jobs;         // tiles * batch * kv heads
  int32_t stages;       // K or V tiles in shared memory
  int32_t score_tiles;  // kRank: tiles of the longest sequence
  // kRank: strides of a selection block that a compressed token covers, 1 or 2; the one that begins
  // in the block's last stride covers 1.
  float reach;
  char* scores;      // kRank: BlockScores of each block of threads
  CUtensorMap q;     // (Dk, G, Hkv, Sq, B), box (64, padded G, 1, tokens of 64 rows, 1)
  CUtensorMap k, v;  // (D, Hkv, Sk, B), box (64, 1, kTileKeys, 1)
};

template <class T_, int kDimQk_, int kDimV_, Walk kWalk_>
struct FwdShape {
  using T = T_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr Walk kWalk = kWalk_;
  // Gathered blocks are loaded for 192 rows at once: the more tokens share a load, the less traffic
  // (measured, random selections at 65536 tokens: 15.4 ms with two warpgroups, 14.5 with three).
  // 64 keys a tile then leave room for their accumulators.
  static constexpr int kConsumers = kWalk == Walk::kList && kDimQk <= 128 ? 3 : 2;
  // Ranges want wide tiles: fewer waits. 8 tokens with a window of 512 span 519 keys, three tiles
  // of 176 (88 + 64 accumulators and 44 weights of 232 registers), or four of 144 for Dk = 192,
  // where no three stages of 176 fit. The scores of selection blocks are laid out by tiles of 128.
  static constexpr int kRangeKeys = kDimQk <= 128 ? 176 : 144;
  static constexpr int kTileKeys = kWalk == Walk::kList   ? 64
                                   : kWalk == Walk::kRank ? 128
                                                          : kRangeKeys;
  static constexpr int kRows = kConsumers * 64;
  static constexpr int kRankers = kWalk == Walk::kRank ? 1 : 0;  // warpgroups
  static constexpr int kThreads = (1 + kConsumers + kRankers) * 128;
  // What setmaxnreg hands out is what the launch took: 168 x 384 and 128 x 512 registers. The
  // producer warpgroup of a list does more than issue copies; that of a range spills with 24.
  static constexpr int kProducerRegisters = kWalk == Walk::kList    ? 56
                                            : kWalk == Walk::kRange ? 40
                                                                    : 24;
  static constexpr int kRankerRegisters = 72;
  static constexpr int kConsumerRegisters = kConsumers == 3         ? 152
                                            : kRankers == 1         ? 208
                                            : kWalk == Walk::kRange ? 232
                                                                    : 224;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters +
                    kRankers * kRankerRegisters <=
                kThreads / 128 * (kThreads == 512 ? 128 : 168));

  // kRank: a tile's keys lie in quarters, column 32 k + b is key 4 b + k. The four compressed
  // tokens that begin in a selection block are then in the accumulators of one thread.
  static constexpr int kQuarters = kWalk == Walk::kRank ? 4 : 1;
  /// The key of accumulator i of a lane, relative to its first.
  static __device__ constexpr int key_of(int i) {
    return kQuarters == 1 ? i / 4 * 8 + i % 2 : i / 4 % 4 * 32 + i % 2 * 4 + i / 16;
  }
  /// Keys between the first ones of neighbouring lanes of a quad.
  static constexpr int kLaneKeys = 2 * kQuarters;

  static constexpr int kPanelBytes = kTileKeys * 128;  // 64 columns of a K or V tile
  static constexpr int kQueryBytes = 64 * kDimQk * 2;  // of one warpgroup
  static constexpr int kTileBytes = (kDimQk > kDimV ? kDimQk : kDimV) / 64 * kPanelBytes;
};

}  // namespace nsa::cuda::sm90
