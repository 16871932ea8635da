// Column sums on their way from the consumers to the ranking warps, and what these make of them:
// the best selection blocks of each token.
//
// The consumers sum the softmax of a tile over the heads of each token in registers and leave 128
// column sums a slot in a small ring. Warps of the producer warpgroup score the blocks and keep the
// lists, so that a list that needs more work delays no matrix product.
#pragma once

#include "cuda/sm80/fwd_ranking.cuh"
#include "cuda/sm90/fwd_block.cuh"

namespace nsa::cuda::sm90 {

/// The ring: for each of column_slots tiles and each slot of sum_heads the halo and the tile's
/// columns; then the lists of the tokens.
template <class Shape>
class Columns {
 public:
  static constexpr int kPitch = sm80::kHalo + Shape::kTileKeys;
  /// Slots of sum_heads in a token: one, or one for each 16 rows.
  __host__ __device__ static constexpr int shares(const sm80::FwdParams& p) {
    return p.log2_group < 4 ? 1 : 1 << (p.log2_group - 4);
  }
  __host__ __device__ static constexpr int slots(const sm80::FwdParams& p) {
    return p.tile_tokens * shares(p);
  }
  static int64_t tile_bytes(const sm80::FwdParams& p) {
    return int64_t{slots(p)} * kPitch * sizeof(float);
  }
  static int64_t list_bytes(const sm80::FwdParams& p) {
    return int64_t{p.tile_tokens} * TopList::words(p.index_count) * sizeof(float);
  }

  __device__ __forceinline__ explicit Columns(const FwdBlock<Shape>& block)
      : block_(block), memory_(reinterpret_cast<float*>(block.extra())) {}

  /// Column 0 of a slot; the kHalo before it are those of the tile before.
  __device__ __forceinline__ float* at(int ring_slot, int slot) const {
    return memory_ + (ring_slot * slots(block_.p) + slot) * kPitch + sm80::kHalo;
  }
  __device__ __forceinline__ TopList list(int token, const sm80::Forced& forced) const {
    const int n = block_.p.index_count;
    return TopList(
        memory_ + block_.args.column_slots * slots(block_.p) * kPitch + token * TopList::words(n),
        n, forced.capacity(n));
  }

 private:
  const FwdBlock<Shape>& block_;
  float* memory_;
};

template <class Shape>
class Ranker {
  using Block = FwdBlock<Shape>;

 public:
  __device__ __forceinline__ Ranker(const Block& block, int warp)
      : block_(block), p_(block.p), columns_(block), warp_(warp), lane_(threadIdx.x % 32) {}

  __device__ void run() {
    sm80::Job job;
    int64_t index = Block::before_first_job();
    while (block_.next_job(index, job)) {
      const int tiles = Range(p_, job).tiles(Shape::kTileKeys);
      for (int token = warp_; token < job.tokens; token += kRankingWarps) {
        list(job, token).clear(lane_);
        for (int i = 0; i < shares(); ++i)
          if (lane_ < sm80::kHalo) halo(at_.slot, token, i)[lane_] = 0.0f;
      }
      __syncwarp();
      for (int tile = 0; tile < tiles; ++tile) {
        Block::wait_full(block_.barriers.columns_full, at_);
        const int next = at_.slot + 1 == block_.args.column_slots ? 0 : at_.slot + 1;
        for (int token = warp_; token < job.tokens; token += kRankingWarps) {
          score<true>(job, token, tile);
          float last[kMaxShares];
          for (int i = 0; i < shares(); ++i)
            last[i] =
                lane_ < sm80::kHalo ? halo(at_.slot, token, i)[Shape::kTileKeys + lane_] : 0.0f;
          __syncwarp();
          for (int i = 0; i < shares(); ++i)
            if (lane_ < sm80::kHalo) halo(next, token, i)[lane_] = last[i];
        }
        Block::arrive(block_.barriers.columns_empty, at_);
        at_.advance(block_.args.column_slots);
      }
      const int last_block = job.position(job.tokens - 1) >> p_.select_shift;
      for (int token = warp_; token < job.tokens; token += kRankingWarps) {
        // Blocks that begin past the last compressed token: all but the halo is zero there.
        score<false>(job, token, tiles);
        for (int tile = tiles + 1; tile << blocks_shift() <= last_block; ++tile)
          score_nothing(job, token, tile);
        const TopList best = list(job, token);
        best.merge(lane_);
        write_indices(p_, job, token, sm80::Forced(p_, job.position(token)), best, lane_);
      }
      __syncwarp();
    }
  }

 private:
  static constexpr int kMaxShares = 4;  // 16-row shares of a token with G = 64

  __device__ __forceinline__ int shares() const { return Columns<Shape>::shares(p_); }
  __device__ __forceinline__ int blocks_shift() const {
    static_assert(Shape::kTileKeys == 128);
    return 7 - (p_.select_shift - p_.stride_shift);
  }
  __device__ __forceinline__ float* halo(int ring_slot, int token, int share) const {
    return columns_.at(ring_slot, token * shares() + share) - sm80::kHalo;
  }
  __device__ __forceinline__ TopList list(const sm80::Job& job, int token) const {
    return columns_.list(token, sm80::Forced(p_, job.position(token)));
  }

  /// Offers the blocks of a tile to the token's list. Without kColumns only the halo counts.
  template <bool kColumns>
  __device__ __forceinline__ void score(const sm80::Job& job, int token, int tile) const {
    const sm80::Forced forced(p_, job.position(token));
    const TopList best = columns_.list(token, forced);
    const int strides_shift = p_.select_shift - p_.stride_shift, shares = this->shares();
    const float* column = columns_.at(at_.slot, token * shares);
    for (int base = 0; base < 1 << blocks_shift(); base += 32) {
      const int local_block = base + lane_, block = (tile << blocks_shift()) + local_block;
      const bool candidate = local_block < 1 << blocks_shift() && forced.leaves_open(block);
      float value = 0.0f;
      if (candidate && (kColumns || base == 0)) {
        const float* first = column + (local_block << strides_shift);
        value = sm80::block_score(p_, [&](int k) {
          if (!kColumns && (local_block << strides_shift) + k >= 0) return 0.0f;
          float sum = first[k];
          for (int i = 1; i < shares; ++i) sum += first[i * Columns<Shape>::kPitch + k];
          return sum;
        });
      }
      offer(best, value, block, candidate);
    }
  }
  __device__ __forceinline__ void score_nothing(const sm80::Job& job, int token, int tile) const {
    const sm80::Forced forced(p_, job.position(token));
    const TopList best = columns_.list(token, forced);
    for (int base = 0; base < 1 << blocks_shift(); base += 32) {
      const int block = (tile << blocks_shift()) + base + lane_;
      offer(best, 0.0f, block, base + lane_ < 1 << blocks_shift() && forced.leaves_open(block));
    }
  }

  /// One block of each lane, all of one token.
  __device__ __forceinline__ void offer(const TopList& best, float value, int block,
                                        bool candidate) const {
    for (;;) {
      const bool admitted = candidate && best.admits(value);
      const uint32_t mask = __ballot_sync(0xffffffffu, admitted);
      if (mask == 0) return;
      if (!best.overflows(__popc(mask))) {
        if (admitted) best.append(value, block, mask, lane_);
        __syncwarp();
        return;
      }
      best.merge(lane_);
    }
  }

  const Block& block_;
  const sm80::FwdParams& p_;
  const Columns<Shape> columns_;
  const int warp_, lane_;
  Cursor at_;
};

}  // namespace nsa::cuda::sm90
