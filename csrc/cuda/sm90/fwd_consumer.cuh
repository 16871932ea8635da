// A consumer warpgroup: 64 query rows, from the scores to the output, with wgmma.
#pragma once

#include "cuda/device/pdl.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/sm90/fwd_block.cuh"
#include "cuda/sm90/fwd_epilogue.cuh"
#include "cuda/sm90/fwd_list.cuh"
#include "cuda/sm90/fwd_ranker.cuh"
#include "cuda/sm90/fwd_softmax.cuh"

namespace nsa::cuda::sm90 {

template <class Shape>
class Consumer {
  using T = typename Shape::T;
  using Block = FwdBlock<Shape>;
  static constexpr int kTileKeys = Shape::kTileKeys, kScores = kTileKeys / 2;
  static constexpr int kOutputs = Shape::kDimV / 2;
  static constexpr Walk kWalk = Shape::kWalk;
  // Where Q lies is in a uniform register throughout. In the loop of a range the compiler then adds
  // to the halves of its matrix descriptor one by one, three instructions instead of one.
  static constexpr bool kUniformQ = kWalk == Walk::kList;
  static constexpr int kBarrier = sizeof(uint64_t);
  // From a tile's barrier to the next is as far as from its matrix descriptor to the next, times
  // this.
  static constexpr int kWordsPerBarrier = Shape::kTileBytes / 16 / kBarrier;

 public:
  __device__ __forceinline__ Consumer(const Block& block, int consumer)
      : block_(block),
        p(block.p),
        consumer_(consumer),
        warp_(consumer * 4 + threadIdx.x % 128 / 32),
        lane_(threadIdx.x % 32),
        q_(kUniformQ ? uniform(descriptor_word(block.q_tile(consumer)))
                     : descriptor_word(block.q_tile(consumer))),
        first_(smem_addr(block.barriers.full)),
        words_(descriptor_word(block.tile(Cursor())) - first_ * kWordsPerBarrier),
        at_{first_, 0} {}

  __device__ void run() {
    int64_t index = Block::before_first_job();
    Job job;
    request_q(index);
    uint32_t parity = 0;
    while (block_.next_job(index, job)) {
      Rows rows;
      const int row = warp_ * 16 + lane_ / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = (row + 8 * half) >> p.log2_group;
        const int t = job.position(min(token, job.tokens - 1));
        Range::visible(p, t, rows.lo[half], rows.hi[half]);
      }
      if constexpr (kWalk == Walk::kRange) prefetch_rows<T, Shape::kDimV>(p, job, row);
      float o[kOutputs];
      OnlineRows stats;
      mbarrier_wait(smem_addr(&block_.barriers.q_full[consumer_]), parity);
      parity ^= 1;
      // The loops over tiles have no registers to keep the job in.
      Job& kept = block_.barriers.jobs[warp_];
      if (lane_ == 0) kept = job;
      if constexpr (kWalk == Walk::kList) {
        walk_list(rows, o, stats);
      } else if constexpr (kWalk == Walk::kRange) {
        walk_range(Range(p, job), rows, o, stats);
      } else {
        walk_ranking(Range(p, job), rows, o, stats);
      }
      __syncwarp();
      job = kept;
      // The warpgroup's last scores are done: its next Q loads while it stores this job's rows.
      named_barrier_sync(1 + consumer_, 128);
      request_q(index);
      // The window, last of a full call, reads what the others wrote.
      if (kWalk == Walk::kRange) wait_for_previous();
      constexpr int kBatch = kWalk == Walk::kRange ? Shape::kDimV / 32 : 1;
      write_rows<T, Shape::kDimV, kBatch>(p, job, row, o, stats);
    }
    wait_for_previous();  // without a job, too: the end of a kernel is that of all before it
  }

 private:
  /// The keys [lo, hi) that a thread's two rows see, g and g + 8 of its warp.
  struct Rows {
    int lo[2], hi[2];
  };

  /// Loads Q of the job after `index`.
  __device__ __forceinline__ void request_q(int64_t index) const {
    if (threadIdx.x % 128 != 0) return;
    Job next;
    if (block_.next_job(index, next)) block_.load_q(next, consumer_);
  }

  /// A tile of the ring: the address of its `full` barrier, and the parity of its phase.
  struct Tile {
    uint32_t full, parity;
  };
  __device__ __forceinline__ void wait_full(const Tile& tile) const {
    mbarrier_wait(tile.full, tile.parity);
  }
  /// The calling warp is done with a tile; its products with it are waited for.
  __device__ __forceinline__ void release(const Tile& tile) const {
    if (kWarpArrivals == 32 || lane_ == 0) mbarrier_arrive(tile.full + kMaxStages * kBarrier);
  }
  /// The next `count` tiles of the ring, which lie one after the other: the first of them.
  __device__ __forceinline__ Tile take(int count = 1) {
    const Tile tile = at_;
    at_.full += count * kBarrier;
    if (at_.full == first_ + block_.args.stages * kBarrier) at_ = {first_, at_.parity ^ 1};
    return tile;
  }
  /// The V of a list's K is in the slot after it, and there when the K's barrier says so.
  static __device__ __forceinline__ Tile value_of(const Tile& k) {
    return {k.full + kBarrier, k.parity};
  }
  /// Releases `pairs` tiles of K and V that none of the warpgroup's tokens wants. A release belongs
  /// to the phase of its fill: before that it would count for the fill before.
  __device__ __forceinline__ void skip(int pairs) {
#pragma unroll 1
    for (int i = 0; i < pairs; ++i) {
      const Tile k = take(2), v = value_of(k);
      wait_full(k);
      release(k);
      release(v);
    }
  }

  /// The descriptor word of a tile of the ring, in a uniform register.
  __device__ __forceinline__ uint32_t word(const Tile& tile) const {
    return uniform(words_ + tile.full * kWordsPerBarrier);
  }

  __device__ __forceinline__ void issue_scores(float (&s)[kScores], uint32_t keys_word) const {
    const uint64_t q = descriptor(kUniformQ ? q_ : uniform(q_));
    const uint64_t keys = descriptor(keys_word);
#pragma unroll
    for (int k = 0; k < Shape::kDimQk / 16; ++k)
      wgmma_ss<T, kTileKeys>(s, q + (k / 4 * 8192 + k % 4 * 32) / 16,
                             keys + (k / 4 * Shape::kPanelBytes + k % 4 * 32) / 16, k > 0);
    wgmma_commit();
  }
  /// The scores of a tile, which is released, with nothing else underway.
  __device__ __forceinline__ void compute_scores(float (&s)[kScores], const Tile& k) const {
    wait_full(k);
    wgmma_fence();
    issue_scores(s, word(k));
    wgmma_wait<0>();
    pin(s);
    release(k);
  }
  __device__ __forceinline__ void issue_output(float (&o)[kOutputs],
                                               const uint32_t (&pack)[kScores / 2],
                                               uint32_t word) const {
    const uint64_t values = mn_major_descriptor(word, Shape::kPanelBytes);
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k)
      wgmma_rs<T, Shape::kDimV>(o, pack + 4 * k, values + k * 2048 / 16);
    wgmma_commit();
  }

  /// Scores of keys from hi on become -inf; `key` is the tile's first.
  __device__ __forceinline__ void mask(float (&s)[kScores], const int (&row_hi)[2], int key) const {
    const bool inside = key + kTileKeys <= min(row_hi[0], row_hi[1]);
    if (__builtin_expect(__all_sync(0xffffffffu, inside), true)) return;
    // Bounds relative to this lane's first key: what is compared with them is constant.
    const int first = key + lane_ % 4 * Shape::kLaneKeys;
    const int hi[2] = {row_hi[0] - first, row_hi[1] - first};
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      if (Shape::key_of(i) >= hi[i / 2 % 2]) s[i] = negative_infinity();
  }

  /// As mask, of ranges, which have a lo: all rows of the warp see keys [lo, hi) of the tile. Of a
  /// window's first and last tile that is all but a few keys.
  __device__ __forceinline__ void mask_range(float (&s)[kScores], const Rows& rows, int key, int lo,
                                             int hi) const {
    constexpr int kPart = 16;
    if (__builtin_expect(lo <= 0 && hi >= kTileKeys, true)) return;
    const int first = key + lane_ % 4 * Shape::kLaneKeys;
    const int row_lo[2] = {rows.lo[0] - first, rows.lo[1] - first};
    const int row_hi[2] = {rows.hi[0] - first, rows.hi[1] - first};
#pragma unroll
    for (int part = 0; part < kTileKeys / kPart; ++part) {
      if (lo <= part * kPart && hi >= (part + 1) * kPart) continue;
#pragma unroll
      for (int i = 0; i < kPart / 2; ++i) {
        const int offset = part * kPart + Shape::key_of(i), half = i / 2 % 2;
        if (offset < row_lo[half] || offset >= row_hi[half])
          s[part * (kPart / 2) + i] = negative_infinity();
      }
    }
  }

  /// s becomes exponentials, of which the sums are kept.
  __device__ __forceinline__ void exponentials(float (&s)[kScores], OnlineRows& stats) const {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      s[i] = exp2_approx(s[i]);
      if (kWalk != Walk::kRank) stats.sum[i / 2 % 2] += s[i];  // else leave_scores does
    }
  }
  /// Online softmax of tile j of a range. Where that raises the reference of some row of the warp,
  /// returns true and gives the factors for what came before.
  __device__ __forceinline__ bool softmax(float (&s)[kScores], int j, OnlineRows& stats,
                                          float (&factor)[2]) const {
    bool raised = false, unseen = false;  // rows see something in the first tile, or nothing at all
    if (j == 0) {
      stats.first_exponents(s, p.scale_log2);
    } else {
      raised = stats.exponents(s, p.scale_log2, factor, unseen);
    }
    exponentials(s, stats);
    return raised;
  }
  static __device__ __forceinline__ void clear(float (&o)[kOutputs]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0.0f;
  }
  static __device__ __forceinline__ void rescale(float (&o)[kOutputs], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] *= factor[i / 2 % 2];
  }
  static __device__ __forceinline__ void pack(const float (&s)[kScores],
                                              uint32_t (&packed)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) packed[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  /// Walks `tiles` tiles of K and V. `weigh(s, j, factor)` turns the scores of tile j into
  /// weights, and returns whether what came before is to be multiplied by the factors. The scores
  /// of a tile are computed while the weights of the one before meet their V.
  template <class Weigh>
  __device__ __forceinline__ void walk_pairs(int tiles, float (&o)[kOutputs], const Weigh& weigh) {
    float s[kScores], factor[2];
    uint32_t packed[kScores / 2];
    compute_scores(s, take());
    weigh(s, 0, factor);  // nothing came before
    pack(s, packed);
    for (int j = 1; j < tiles; ++j) {
      const Tile k = take(), v = take();
      wait_full(k);
      wait_full(v);
      wgmma_fence();
      issue_scores(s, word(k));
      issue_output(o, packed, word(v));
      wgmma_wait<1>();
      pin(s);
      release(k);
      const bool raised = weigh(s, j, factor);
      wgmma_wait<0>();
      pin(o);
      release(v);
      if (raised) rescale(o, factor);
      pack(s, packed);
    }
    const Tile last = take();
    wait_full(last);
    wgmma_fence();
    issue_output(o, packed, word(last));
    wgmma_wait<0>();
    pin(o);
    release(last);
  }

  __device__ __forceinline__ void walk_range(const Range& range, const Rows& rows,
                                             float (&o)[kOutputs], OnlineRows& stats) {
    const int tiles = range.template tiles<Shape>();
    clear(o);
    if (tiles == 0) return;
    // What every row of the warp sees: the last one's first key, the first one's last key.
    const int lo = uniform(__shfl_sync(0xffffffffu, rows.lo[1], 31)), hi = uniform(rows.hi[0]);
    walk_pairs(tiles, o, [&](float (&s)[kScores], int j, float (&factor)[2]) {
      const int key = range.begin + j * kTileKeys;
      mask_range(s, rows, key, lo - key, hi - key);
      return softmax(s, j, stats, factor);
    });
  }

  /// A tile of a list that some of the warpgroup's tokens chose.
  struct ListTile {
    int tile, key;
    uint32_t tokens;
  };
  static __device__ __forceinline__ ListTile next_tile(const BlockList& blocks,
                                                       WantedTiles& wanted) {
    ListTile next;
    next.tile = wanted.next();
    next.key = blocks.tile(next.tile, next.tokens);
    return next;
  }

  __device__ __forceinline__ void walk_list(const Rows& rows, float (&o)[kOutputs],
                                            OnlineRows& stats) {
    clear(o);
    Block::wait_full(block_.barriers.list_full, list_);
    const BlockList blocks(p, block_.extra(), list_.slot);
    const int tiles = blocks.tiles();
    WantedTiles wanted(blocks, BlockList::row_tokens(p, consumer_ * 64, 64));
    const uint32_t warp_tokens = keep(BlockList::row_tokens(p, warp_ * 16, 16));
    bool unseen = true;
    int walked = 0;  // tiles up to here have been taken from the ring, or skipped
    ListTile at = next_tile(blocks, wanted);
    while (at.tile < tiles) {
      skip(at.tile - walked);
      walked = at.tile + 1;
      const Tile k = take(2), v = value_of(k);
      const uint32_t keys = word(k);
      float s[kScores];
      uint32_t packed[kScores / 2];
      wait_full(k);
      wgmma_fence();
      issue_scores(s, keys);
      wgmma_wait<0>();
      pin(s);
      release(k);
      if (__any_sync(0xffffffffu, at.tokens & warp_tokens)) {
        float factor[2];
        int hi[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_ * 16 + lane_ / 4 + 8 * half;
          const bool chose = at.tokens & BlockList::row_tokens(p, row, 1);
          hi[half] = chose ? min(at.key + min(kTileKeys, p.config.select_size), rows.hi[half]) : 0;
        }
        mask(s, hi, at.key);
        if (stats.exponents(s, p.scale_log2, factor, unseen)) rescale(o, factor);
        exponentials(s, stats);
        pack(s, packed);
      } else {  // another warp's token chose the block
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i) packed[i] = keep(0);
      }
      wgmma_fence();
      issue_output(o, packed, keys + Shape::kTileBytes / 16);
      at = next_tile(blocks, wanted);  // beside the product
      wgmma_wait<0>();
      pin(o);
      release(v);
    }
    skip(tiles - walked);
    Block::arrive(block_.barriers.list_empty, list_);
    list_.advance(kListBuffers);
  }

  /// As walk_range; leaves block scores beside the outputs.
  __device__ __forceinline__ void walk_ranking(const Range& range, const Rows& rows,
                                               float (&o)[kOutputs], OnlineRows& stats) {
    const int tiles = range.template tiles<Shape>();
    clear(o);
    Block::wait_empty(block_.barriers.scores_empty, scores_at_);
    ScoreRows to(BlockScores(block_.args, scores_at_.slot), warp_ * 16 + lane_ / 4, lane_ % 4);
    float carried[2] = {};
    const auto weigh = [&](float (&s)[kScores], int j, float (&factor)[2]) {
      mask(s, rows.hi, j * kTileKeys);
      const bool raised = softmax(s, j, stats, factor);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (raised) carried[half] *= factor[half];
      leave_scores(s, to, stats, carried);
      to.advance();
      return raised;
    };
    if (p.has_output) {
      if (tiles > 0) walk_pairs(tiles, o, weigh);
    } else {
      float s[kScores], unused[2];
      for (int j = 0; j < tiles; ++j) {
        compute_scores(s, take());
        weigh(s, j, unused);
      }
    }
    // Each compressed token counts `reach` times in the scores of its blocks, all of which are in
    // the tiles that were walked.
#pragma unroll
    for (int half = 0; half < 2; ++half) stats.sum[half] *= block_.args.reach > 1.0f ? 0.5f : 1.0f;
    leave_lse(stats);
    Block::arrive(block_.barriers.scores_full, scores_at_);
    scores_at_.advance(kScoreBuffers);
  }

  /// What each row's head adds to the importance of a tile's blocks. Lane c of a quad has the four
  /// compressed tokens that begin in each of the blocks 8 i + 2 c and 8 i + 2 c + 1; the one that
  /// reaches into a block from before may be another lane's. Lane 3 carries the tile's last one
  /// over to the next tile. Adds the block scores up on the way.
  __device__ __forceinline__ void leave_scores(const float (&s)[kScores], const ScoreRows& to,
                                               OnlineRows& stats, float (&carried)[2]) const {
    const int quad_lane = lane_ % 4;
    const float reach = block_.args.reach;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float score[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto token = [&](int k, int b) { return s[4 * (i + 4 * k) + 2 * half + b]; };
        const auto inside = [&](int b) {
          return fmaf(reach, token(0, b) + token(1, b) + token(2, b), token(3, b));
        };
        const float sent = quad_lane == 3 ? carried[half] : token(3, 1);
        const float before = __shfl_sync(0xffffffffu, sent, (lane_ & ~3) | ((lane_ + 3) & 3));
        carried[half] = token(3, 1);
        score[2 * i] = fmaf(reach - 1.0f, before, inside(0));
        score[2 * i + 1] = fmaf(reach - 1.0f, token(3, 0), inside(1));
      }
      int greatest = 0;  // they are not negative: compared as integers, three at once
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        stats.sum[half] += score[i];
        greatest = max(greatest, __float_as_int(score[i]));
      }
      const float scale = BlockScores::scale(quad_max(greatest));
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed[i] = pack2<__half>(scale * score[2 * i], scale * score[2 * i + 1]);
      to.store(half, make_uint4(packed[0], packed[1], packed[2], packed[3]));
      if (quad_lane == 0) to.store_reference(half, stats.reference[half] - log2_approx(scale));
    }
  }
  /// What turns the references into weights once the job is done.
  __device__ __forceinline__ void leave_lse(const OnlineRows& stats) const {
    float* to = Ranker<Shape>::smem(block_).minus_lse[scores_at_.slot];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float lse = stats.lse2(half, quad_sum(stats.sum[half]));
      const int row = warp_ * 16 + lane_ / 4 + 8 * half, head = row & ((1 << p.log2_group) - 1);
      // Rows that only pad the group, and those that see nothing, weigh nothing.
      if (lane_ % 4 == 0)
        to[row] = head < p.group && lse != negative_infinity() ? -lse : negative_infinity();
    }
  }

  const Block& block_;
  const FwdParams& p;
  const int consumer_, warp_, lane_;
  const uint32_t q_, first_, words_;
  Tile at_;
  Cursor list_, scores_at_;
};

}  // namespace nsa::cuda::sm90
