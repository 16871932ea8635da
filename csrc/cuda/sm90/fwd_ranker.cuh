// Column sums on their way from the consumers to the ranking warps, and what these make of them:
// the best selection blocks of each token.
//
// The consumers sum the softmax of a tile over the heads of each token in registers and leave 128
// column sums a slot in a small ring. Warps of the producer warpgroup score the blocks and keep the
// lists, so that a list that needs more work delays no matrix product.
#pragma once

#include "cuda/fwd/ranking.cuh"
#include "cuda/sm90/fwd_best.cuh"
#include "cuda/sm90/fwd_block.cuh"

namespace nsa::cuda::sm90 {

/// The ring: for each of column_slots tiles and each slot of sum_heads the halo and the tile's
/// columns; then the lists of the tokens.
template <class Shape>
class Columns {
 public:
  static constexpr int kPitch = kHalo + Shape::kTileKeys;
  /// Slots of sum_heads in a token: one, or one for each 16 rows.
  __host__ __device__ static constexpr int shares(const FwdParams& p) {
    return p.log2_group < 4 ? 1 : 1 << (p.log2_group - 4);
  }
  __host__ __device__ static constexpr int slots(const FwdParams& p) {
    return p.tile_tokens * shares(p);
  }
  static int64_t tile_bytes(const FwdParams& p) {
    return int64_t{slots(p)} * kPitch * sizeof(float);
  }
  static int64_t list_bytes(const FwdParams& p) {
    return int64_t{p.tile_tokens} * TopList::words(p.index_count) * sizeof(float);
  }

  __device__ __forceinline__ explicit Columns(const FwdBlock<Shape>& block)
      : block_(block), memory_(reinterpret_cast<float*>(block.extra())) {}

  /// Column 0 of a slot. The kHalo before that of a token's first share are the token's own, from
  /// the tile before.
  __device__ __forceinline__ float* at(int ring_slot, int slot) const {
    return memory_ + (ring_slot * slots(block_.p) + slot) * kPitch + kHalo;
  }
  __device__ __forceinline__ TopList list(int token, const Forced& forced) const {
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
    Job job;
    int64_t index = Block::before_first_job();
    while (block_.next_job(index, job)) {
      const int tiles = Range(p_, job).tiles(Shape::kTileKeys);
      if constexpr (Shape::kLargeGroups) {
        if (short_blocks() && p_.index_count <= Lists::kMostCapacity) {
          rank_in_registers(job, tiles);
          continue;
        }
      }
      for (int token = warp_; token < job.tokens; token += kRankingWarps) {
        list(job, token).clear(lane_);
        if (lane_ < kHalo) halo(at_.slot, token)[lane_] = 0.0f;
      }
      __syncwarp();
      // Blocks may begin past the last compressed token: all but the halo is zero there.
      const int last_block = job.position(job.tokens - 1) >> p_.select_shift;
      for (int tile = 0; tile < tiles || tile << blocks_shift() <= last_block; ++tile) {
        if (tile < tiles) Block::wait_full(block_.barriers.columns_full, at_);
        if (tile < tiles && short_blocks()) {
          rank_short(job, tile);
        } else {
          rank_any(job, tile, tiles);
        }
        if (tile >= tiles) continue;
        Block::arrive(block_.barriers.columns_empty, at_);
        at_.advance(block_.args.column_slots);
      }
      for (int token = warp_; token < job.tokens; token += kRankingWarps) {
        const TopList best = list(job, token);
        best.merge(lane_);
        write_indices(p_, job, token, Forced(p_, job.position(token)), best, lane_);
      }
      __syncwarp();
    }
  }

 private:
  static constexpr int kTokensOfWarp = 3;
  using Lists = BestBlocks<kTokensOfWarp>;
  static_assert(!Shape::kLargeGroups || Shape::kRows / 16 <= kTokensOfWarp * kRankingWarps);

  __device__ __forceinline__ int shares() const { return Columns<Shape>::shares(p_); }
  __device__ __forceinline__ int strides_shift() const { return p_.select_shift - p_.stride_shift; }
  /// log2 of the blocks that begin in a tile.
  __device__ __forceinline__ int blocks_shift() const {
    static_assert(Shape::kTileKeys == 128);
    return 7 - strides_shift();
  }
  /// The column sums of a token before the tile, over all of its shares.
  __device__ __forceinline__ float* halo(int ring_slot, int token) const {
    return columns_.at(ring_slot, token * shares()) - kHalo;
  }
  __device__ __forceinline__ int next_slot() const {
    return at_.slot + 1 == block_.args.column_slots ? 0 : at_.slot + 1;
  }
  __device__ __forceinline__ TopList list(const Job& job, int token) const {
    return columns_.list(token, Forced(p_, job.position(token)));
  }

  /// Blocks of four strides that at most one column reaches into from before, as with the default
  /// lengths: each lane scores one, from one read of 16 bytes.
  __device__ __forceinline__ bool short_blocks() const {
    return strides_shift() == 2 && p_.config.block_size <= 2 * p_.config.block_stride;
  }
  /// All of a job whose blocks are short, its lists in registers.
  __device__ __forceinline__ void rank_in_registers(const Job& job, int tiles) {
    const float reach = p_.config.block_size > p_.config.block_stride ? 2.0f : 1.0f;
    Lists lists(lane_);
    float last[kTokensOfWarp];    // lane 0: the last column of the tile before
    int open_end[kTokensOfWarp];  // blocks from num_init up to here are not forced
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = warp_ + i * kRankingWarps;
      const Forced forced(p_, job.position(token));
      lists.clear(i, token < job.tokens ? forced.capacity(p_.index_count) : 0);
      last[i] = 0.0f;
      open_end[i] = forced.local;
    }
    // Blocks may begin past the last compressed token: all but what reaches into them is zero.
    const int last_block = job.position(job.tokens - 1) >> p_.select_shift;
#pragma unroll 1
    for (int tile = 0; tile < tiles || tile * 32 <= last_block; ++tile) {
      const int block = tile * 32 + lane_;
      float score[kTokensOfWarp];
      if (tile < tiles) Block::wait_full(block_.barriers.columns_full, at_);
#pragma unroll
      for (int i = 0; i < kTokensOfWarp; ++i) {
        const int token = min(warp_ + i * kRankingWarps, p_.tile_tokens - 1);
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (tile < tiles) v = sum_of_shares(token);
        const float rotated = __shfl_sync(0xffffffffu, v.w, (lane_ + 31) % 32);
        const float before = lane_ == 0 ? last[i] : rotated;
        last[i] = rotated;
        const float value = (reach - 1.0f) * before + reach * (v.x + v.y + v.z) + v.w;
        score[i] = block >= p_.config.num_init && block < open_end[i] ? value : Lists::kAbsent;
      }
      if (tile < tiles) {
        Block::arrive(block_.barriers.columns_empty, at_);
        at_.advance(block_.args.column_slots);
      }
      lists.offer(score, block);
    }
    const View<int32_t>& view = p_.block_indices;
#pragma unroll
    for (int i = 0; i < kTokensOfWarp; ++i) {
      const int token = warp_ + i * kRankingWarps;
      if (token >= job.tokens) break;
      lists.write(p_, Forced(p_, job.position(token)), i,
                  view.ptr + job.batch * view.batch + (job.row_q + token) * view.seq +
                      job.head_kv * view.head);
    }
  }
  /// Columns 4 * lane ... 4 * lane + 3 of a token.
  __device__ __forceinline__ float4 sum_of_shares(int token) const {
    const float* column = columns_.at(at_.slot, token * shares()) + 4 * lane_;
    float4 v = *reinterpret_cast<const float4*>(column);
    for (int share = 1; share < shares(); ++share) {
      const float4 more = *reinterpret_cast<const float4*>(column + share * Columns<Shape>::kPitch);
      v = make_float4(v.x + more.x, v.y + more.y, v.z + more.z, v.w + more.w);
    }
    return v;
  }
  __device__ __forceinline__ void rank_short(const Job& job, int tile) const {
    constexpr int kBatch = 3;  // tokens at a time: their reads overlap
    const float reach = p_.config.block_size > p_.config.block_stride ? 2.0f : 1.0f;
    for (int first = warp_; first < job.tokens; first += kBatch * kRankingWarps) {
      float score[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int token = first + i * kRankingWarps;
        if (token >= job.tokens) continue;
        const float* column = columns_.at(at_.slot, token * shares());
        const float4 v = sum_of_shares(token);
        float before = __shfl_up_sync(0xffffffffu, v.w, 1);
        if (lane_ == 0) before = column[-1];
        __syncwarp();  // the next slot may be this one
        if (lane_ == 31) columns_.at(next_slot(), token * shares())[-1] = v.w;
        score[i] = (reach - 1.0f) * before + reach * (v.x + v.y + v.z) + v.w;
      }
#pragma unroll 1  // one copy of the merge: with more the block's code exceeds the cache
      for (int token = first; token < min(job.tokens, first + kBatch * kRankingWarps);
           token += kRankingWarps) {
        const Forced forced(p_, job.position(token));
        const int block = tile * 32 + lane_;
        offer(columns_.list(token, forced), score[0], block, forced.leaves_open(block));
#pragma unroll
        for (int i = 0; i + 1 < kBatch; ++i) score[i] = score[i + 1];
      }
    }
  }

  /// Any lengths; also tiles past the `tiles` that have columns.
  __device__ __forceinline__ void rank_any(const Job& job, int tile, int tiles) const {
    for (int token = warp_; token < job.tokens; token += kRankingWarps) {
      const float* columns = columns_.at(at_.slot, token * shares());
      const auto sum = [&](int column) {
        if (tile > tiles || (tile == tiles && column >= 0)) return 0.0f;
        float value = columns[column];
        for (int share = 1; column >= 0 && share < shares(); ++share)
          value += columns[share * Columns<Shape>::kPitch + column];
        return value;
      };
      offer_tile(job, token, tile, sum);
      if (tile < tiles && lane_ < kHalo)
        halo(next_slot(), token)[lane_] = sum(Shape::kTileKeys - kHalo + lane_);
    }
  }

  /// Offers the blocks of a tile to a token's list; sum(i) is that of column i of the tile.
  template <class Sum>
  __device__ __forceinline__ void offer_tile(const Job& job, int token, int tile,
                                             const Sum& sum) const {
    const Forced forced(p_, job.position(token));
    const TopList best = columns_.list(token, forced);
    for (int base = 0; base < 1 << blocks_shift(); base += 32) {
      const int local_block = base + lane_, block = (tile << blocks_shift()) + local_block;
      const bool candidate = local_block < 1 << blocks_shift() && forced.leaves_open(block);
      float score = 0.0f;
      if (candidate)
        score = block_score(p_, [&](int k) { return sum((local_block << strides_shift()) + k); });
      offer(best, score, block, candidate);
    }
  }

  /// One block of each lane, all of one token.
  __device__ __forceinline__ void offer(const TopList& best, float score, int block,
                                        bool candidate) const {
    for (;;) {
      const bool admitted = candidate && best.admits(score);
      const uint32_t mask = __ballot_sync(0xffffffffu, admitted);
      if (mask == 0) return;
      const bool full = best.overflows(__popc(mask));
      __syncwarp();  // all lanes look before the first appends
      if (!full) {
        if (admitted) best.append(score, block, mask, lane_);
        __syncwarp();
        return;
      }
      best.merge(lane_);
    }
  }

  const Block& block_;
  const FwdParams& p_;
  const Columns<Shape> columns_;
  const int warp_, lane_;
  Cursor at_;
};

}  // namespace nsa::cuda::sm90
