// What a launch of the Hopper forward kernel gets, and its shape.
#pragma once

#include <cuda.h>

#include "cuda/fwd/params.h"

namespace nsa::cuda::sm90 {

/// How a kernel walks the keys. kRange: one range of keys, online softmax (window; compressed
/// without a selection). kList: the blocks that the tile's tokens chose. kRank: the compressed
/// tokens twice, first for the lse, then for output and importance.
enum class Walk { kRange, kList, kRank };

struct FwdArgs {
  FwdParams p;
  int64_t jobs;          // tiles * batch * kv heads
  int32_t stages;        // K or V tiles in shared memory
  int32_t column_slots;  // kRank: tiles whose column sums wait for the ranking warps
  CUtensorMap q;         // (Dk, G, Hkv, Sq, B), box (64, padded G, 1, tokens of 64 rows, 1)
  CUtensorMap k, v;      // (D, Hkv, Sk, B), box (64, 1, kTileKeys, 1)
};

/// kLargeGroups: the padded group is at least 16, a warp's rows are of one token (kRank only: it
/// shortens the sums over heads).
template <class T_, int kDimQk_, int kDimV_, Walk kWalk_, bool kLargeGroups_ = true>
struct FwdShape {
  using T = T_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr Walk kWalk = kWalk_;
  static constexpr bool kLargeGroups = kLargeGroups_;
  // Gathered blocks are loaded for 192 rows at once: the more tokens share a load, the less traffic
  // (measured, random selections at 65536 tokens: 15.4 ms with two warpgroups, 14.5 with three).
  // 64 keys a tile then leave room for their accumulators. Ranges want wide tiles: fewer waits.
  static constexpr int kConsumers = kWalk == Walk::kList && kDimQk <= 128 ? 3 : 2;
  static constexpr int kTileKeys = kWalk == Walk::kList ? 64 : 128;
  static constexpr int kRows = kConsumers * 64;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  // What setmaxnreg hands out is what the launch took: 168 x 384 and 128 x 512 registers. The
  // producer warpgroup of a list or a ranking does more than issue copies.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 56 : 56;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 152 : (504 - kProducerRegisters) / 2;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (kConsumers + 1) * (kConsumers == 3 ? 128 : 168));

  static constexpr int kPanelBytes = kTileKeys * 128;  // 64 columns of a K or V tile
  static constexpr int kQueryBytes = 64 * kDimQk * 2;  // of one warpgroup
  static constexpr int kTileBytes = (kDimQk > kDimV ? kDimQk : kDimV) / 64 * kPanelBytes;
};

}  // namespace nsa::cuda::sm90
