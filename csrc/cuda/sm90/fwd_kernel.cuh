// The forward main loop on Hopper: persistent blocks of a producer warpgroup, which loads tiles of
// K and V with TMA and prepares the lists of selected blocks, and consumer warpgroups of 64 query
// rows each, which multiply with wgmma.
#pragma once

#include "cuda/device/softmax.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/sm80/fwd_job.cuh"
#include "cuda/sm80/fwd_selection.cuh"
#include "cuda/sm90/fwd_args.h"
#include "cuda/sm90/fwd_epilogue.cuh"
#include "cuda/sm90/fwd_list.cuh"

namespace nsa::cuda::sm90 {

using sm80::Job;
using sm80::make_job;

/// A ring position: which slot, and the parity of its phase.
template <int kStages>
struct Cursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

/// Keys [begin, end) that a tile of queries walks (kRange, kRank).
struct Range {
  int begin, end;
  __device__ __forceinline__ Range(const sm80::FwdParams& p, const Job& job) {
    int unused;
    visible(p, job.position(0), begin, unused);
    visible(p, job.position(job.tokens - 1), unused, end);
  }
  /// The query at position t sees keys lo <= s < hi.
  static __device__ __forceinline__ void visible(const sm80::FwdParams& p, int t, int& lo,
                                                 int& hi) {
    if (p.branch == kCompressed) {
      lo = 0;
      hi = static_cast<int>(visible_compressed(t, p.config.block_size, p.config.block_stride));
    } else {
      lo = max(0, t - p.config.window + 1);
      hi = max(0, t + 1);
    }
  }
  __device__ __forceinline__ int tiles(int tile_keys) const {
    return end <= begin ? 0 : (end - begin + tile_keys - 1) / tile_keys;
  }
};

template <class Shape>
struct FwdKernel {
  using T = typename Shape::T;
  static constexpr int kStages = Shape::kStages, kConsumers = Shape::kConsumers;
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kTileKeys = Shape::kTileKeys, kScores = kTileKeys / 2;
  static constexpr int kOutputs = Shape::kDimV / 2;
  static constexpr Walk kWalk = Shape::kWalk;
  using Selection = sm80::Selection<1, 4 * kConsumers>;
  using Position = Cursor<kStages>;

  struct Smem {
    alignas(1024) char q[kConsumers][Shape::kQueryBytes];
    alignas(1024) char tiles[kStages][Shape::kTileBytes];
    uint64_t full[kStages], empty[kStages];
    uint64_t q_full, q_empty;
    uint64_t list_full[2], list_empty[2];
    alignas(16) char extra[1];  // lists (kList) or the selection's state (kRank)
  };
  /// Shared memory of the lists or of the selection's state.
  static int64_t extra_bytes(const sm80::FwdParams& p) {
    if (kWalk == Walk::kList) return BlockList::kBuffers * BlockList::buffer_bytes(p.sort_size);
    return kWalk == Walk::kRank ? Selection::smem_bytes(p) : 0;
  }
  static int64_t smem_bytes(const sm80::FwdParams& p) {
    return 1024 + static_cast<int64_t>(sizeof(Smem)) + extra_bytes(p);
  }

  const FwdArgs& args;
  const sm80::FwdParams& p;
  Smem& smem;

  __device__ __forceinline__ FwdKernel(const FwdArgs& args, char* raw)
      : args(args),
        p(args.p),
        smem(*reinterpret_cast<Smem*>((reinterpret_cast<uintptr_t>(raw) + 1023) &
                                      ~uintptr_t{1023})) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(smem_addr(&smem.full[i]), 1);
        mbarrier_init(smem_addr(&smem.empty[i]), kConsumerWarps);
      }
      mbarrier_init(smem_addr(&smem.q_full), 1);
      mbarrier_init(smem_addr(&smem.q_empty), kConsumerWarps);
      for (int i = 0; i < 2; ++i) {
        mbarrier_init(smem_addr(&smem.list_full[i]), 1);
        mbarrier_init(smem_addr(&smem.list_empty[i]), kConsumerWarps + 1);
      }
      fence_barrier_init();
    }
    __syncthreads();
    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == 0) {
      lower_registers<Shape::kProducerRegisters>();
      const int warp = threadIdx.x / 32;
      if (warp == 0) {
        produce();
      } else if (kWalk == Walk::kList) {
        build_lists();
      }
    } else {
      raise_registers<Shape::kConsumerRegisters>();
      consume(warpgroup - 1);
    }
  }

  __device__ __forceinline__ BlockList list(int buffer) const {
    return BlockList(smem.extra, p.sort_size, buffer);
  }

  // ---- Producer ---------------------------------------------------------------------------------

  template <int kDim>
  __device__ __forceinline__ void load_tile(const CUtensorMap& map, const Job& job, int key,
                                            Position& at) {
    mbarrier_wait(smem_addr(&smem.empty[at.slot]), at.parity ^ 1);
    const uint32_t bar = smem_addr(&smem.full[at.slot]), dst = smem_addr(smem.tiles[at.slot]);
    mbarrier_arrive_expect(bar, kDim / 64 * Shape::kPanelBytes);
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel)
      tma_load(dst + panel * Shape::kPanelBytes, &map, bar, panel * 64, job.head_kv,
               static_cast<int>(job.row_k) + key, job.batch);
    at.advance();
  }
  __device__ __forceinline__ void load_k(const Job& job, int key, Position& at) {
    load_tile<Shape::kDimQk>(args.k, job, key, at);
  }
  __device__ __forceinline__ void load_v(const Job& job, int key, Position& at) {
    load_tile<Shape::kDimV>(args.v, job, key, at);
  }

  __device__ __forceinline__ void load_q(const Job& job, uint32_t parity) {
    mbarrier_wait(smem_addr(&smem.q_empty), parity ^ 1);
    const uint32_t bar = smem_addr(&smem.q_full);
    const int tokens = 64 >> p.log2_group;
    mbarrier_arrive_expect(bar, kConsumers * Shape::kQueryBytes);
    for (int c = 0; c < kConsumers; ++c) {
#pragma unroll
      for (int panel = 0; panel < Shape::kDimQk / 64; ++panel)
        tma_load(smem_addr(smem.q[c]) + panel * 8192, &args.q, bar, panel * 64, 0, job.head_kv,
                 static_cast<int>(job.row_q) + c * tokens, job.batch);
    }
  }

  /// One thread. Tiles go out in the order in which the consumers take them: K(j + 1) before V(j),
  /// because the scores of a tile are issued ahead of the product with the V before.
  __device__ void produce() {
    if (threadIdx.x != 0) return;
    Position at;
    uint32_t parity = 0;
    for (int64_t index = blockIdx.x; index < args.jobs; index += gridDim.x) {
      Job job;
      if (!make_job(p, index, job)) continue;
      load_q(job, parity);
      if constexpr (kWalk == Walk::kList) {
        const int buffer = list_.buffer;
        mbarrier_wait(smem_addr(&smem.list_full[buffer]), list_.parity);
        const BlockList blocks = list(buffer);
        for (int j = 0; j < blocks.count(); ++j) {
          const int key = blocks.block(j) * kTileKeys;
          load_k(job, key, at);
          load_v(job, key, at);
        }
        mbarrier_arrive(smem_addr(&smem.list_empty[buffer]));
        list_.advance();
      } else {
        const Range range(p, job);
        const int tiles = range.tiles(kTileKeys);
        if constexpr (kWalk == Walk::kRank) {
          for (int j = 0; j < tiles; ++j) load_k(job, range.begin + j * kTileKeys, at);
        }
        const bool values = kWalk == Walk::kRange || p.has_output;
        if (tiles > 0) load_k(job, range.begin, at);
        for (int j = 0; j < tiles; ++j) {
          if (j + 1 < tiles) load_k(job, range.begin + (j + 1) * kTileKeys, at);
          if (values) load_v(job, range.begin + j * kTileKeys, at);
        }
      }
      parity ^= 1;
    }
  }

  /// Warps 1-3 of the producer warpgroup: the block lists, one job ahead.
  __device__ void build_lists() {
    constexpr int kThreads = 96;
    for (int64_t index = blockIdx.x; index < args.jobs; index += gridDim.x) {
      Job job;
      if (!make_job(p, index, job)) continue;
      mbarrier_wait(smem_addr(&smem.list_empty[list_.buffer]), list_.parity ^ 1);
      list(list_.buffer).template build<kThreads>(p, job, threadIdx.x - 32);
      if (threadIdx.x == 32) mbarrier_arrive(smem_addr(&smem.list_full[list_.buffer]));
      list_.advance();
    }
  }

  // ---- Consumers --------------------------------------------------------------------------------

  /// What a thread of a consumer warpgroup knows of its two rows, g and g + 8 of its warp.
  struct Rows {
    int token[2], lo[2], hi[2];
  };

  /// The calling warp is done with what the barrier guards; its products with it are waited for.
  __device__ __forceinline__ void arrive(uint64_t& barrier) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(smem_addr(&barrier));
  }
  __device__ __forceinline__ void release(const Position& at) { arrive(smem.empty[at.slot]); }

  __device__ __forceinline__ void issue_scores(float (&s)[kScores], uint32_t tile) {
    const uint32_t q = smem_addr(smem.q[consumer_]);
#pragma unroll
    for (int k = 0; k < Shape::kDimQk / 16; ++k)
      wgmma_ss<T, kTileKeys>(s, desc_k_major(q + k / 4 * 8192 + k % 4 * 32),
                             desc_k_major(tile + k / 4 * Shape::kPanelBytes + k % 4 * 32), k > 0);
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_output(float (&o)[kOutputs],
                                               const uint32_t (&pack)[kScores / 2], uint32_t tile) {
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k)
      wgmma_rs<T, Shape::kDimV>(o, pack + 4 * k,
                                desc_mn_major(tile + k * 2048, Shape::kPanelBytes));
    wgmma_commit();
  }

  /// Scores of keys outside [lo, hi) become -inf; `key` is the tile's first.
  __device__ __forceinline__ void mask(float (&s)[kScores], const Rows& rows, int key) {
    const bool inside =
        key >= max(rows.lo[0], rows.lo[1]) && key + kTileKeys <= min(rows.hi[0], rows.hi[1]);
    if (__all_sync(0xffffffffu, inside)) return;
    const int column = key + (threadIdx.x % 4) * 2;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int s_key = column + i / 4 * 8 + (i & 1), half = i / 2 % 2;
      if (s_key < rows.lo[half] || s_key >= rows.hi[half]) s[i] = negative_infinity();
    }
  }

  /// Online softmax of one tile: s becomes exponentials; returns the factors for what came before.
  __device__ __forceinline__ void exponentials(float (&s)[kScores], OnlineRow (&stats)[2],
                                               float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = s[2 * half];
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i)
        most = fmaxf(most, fmaxf(s[4 * i + 2 * half], s[4 * i + 2 * half + 1]));
      float reference, sum = 0.0f;
      factor[half] = stats[half].raise(quad_max(most), p.scale_log2, reference);
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = s[4 * i + 2 * half + c];
          x = exp2_approx(fmaf(x, p.scale_log2, -reference));
          sum += x;
        }
      }
      stats[half].sum += sum;
    }
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

  __device__ __forceinline__ void wait_full(const Position& at) {
    mbarrier_wait(smem_addr(&smem.full[at.slot]), at.parity);
  }
  __device__ __forceinline__ uint32_t tile(const Position& at) {
    return smem_addr(smem.tiles[at.slot]);
  }

  __device__ __forceinline__ void consume(int consumer) {
    consumer_ = consumer;
    Position at;
    uint32_t parity = 0;
    for (int64_t index = blockIdx.x; index < args.jobs; index += gridDim.x) {
      Job job;
      if (!make_job(p, index, job)) continue;
      Rows rows;
      const int row = consumer * 64 + (threadIdx.x % 128) / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows.token[half] = (row + 8 * half) >> p.log2_group;
        const int t = job.position(min(rows.token[half], job.tokens - 1));
        Range::visible(p, t, rows.lo[half], rows.hi[half]);
      }
      float o[kOutputs];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] = 0.0f;
      OnlineRow stats[2];
      mbarrier_wait(smem_addr(&smem.q_full), parity);
      parity ^= 1;
      if constexpr (kWalk == Walk::kList) {
        walk_list(job, rows, o, stats, at);
      } else if constexpr (kWalk == Walk::kRange) {
        walk_range(Range(p, job), rows, o, stats, at);
      } else {
        walk_ranking(job, rows, o, stats, at);
      }
      arrive(smem.q_empty);
      write_rows<T, Shape::kDimV, kWalk != Walk::kRank>(p, job, row, o, stats);
    }
  }

  /// Walks `tiles` tiles of K and V. `softmax(s, j, factor)` turns the scores of tile j into
  /// weights and gives the factors of what came before. The scores of a tile are computed while the
  /// weights of the one before meet their V.
  template <bool kRescale, class Softmax>
  __device__ __forceinline__ void walk_pairs(int tiles, float (&o)[kOutputs], Position& at,
                                             const Softmax& softmax) {
    float s[kScores], factor[2];
    uint32_t packed[kScores / 2];
    wait_full(at);
    wgmma_fence();
    issue_scores(s, tile(at));
    wgmma_wait<0>();
    pin(s);
    release(at);
    at.advance();
    softmax(s, 0, factor);
    pack(s, packed);
    for (int j = 1; j < tiles; ++j) {
      const Position k = at;
      at.advance();
      const Position v = at;
      at.advance();
      wait_full(k);
      wait_full(v);
      wgmma_fence();
      issue_scores(s, tile(k));
      issue_output(o, packed, tile(v));
      wgmma_wait<1>();
      pin(s);
      release(k);
      softmax(s, j, factor);
      wgmma_wait<0>();
      pin(o);
      release(v);
      if constexpr (kRescale) rescale(o, factor);
      pack(s, packed);
    }
    wait_full(at);
    wgmma_fence();
    issue_output(o, packed, tile(at));
    wgmma_wait<0>();
    pin(o);
    release(at);
    at.advance();
  }

  __device__ __forceinline__ void walk_range(const Range& range, const Rows& rows,
                                             float (&o)[kOutputs], OnlineRow (&stats)[2],
                                             Position& at) {
    const int tiles = range.tiles(kTileKeys);
    if (tiles == 0) return;
    walk_pairs<true>(tiles, o, at, [&](float (&s)[kScores], int j, float (&factor)[2]) {
      mask(s, rows, range.begin + j * kTileKeys);
      exponentials(s, stats, factor);
    });
  }

  __device__ __forceinline__ void walk_list(const Job& job, const Rows& rows, float (&o)[kOutputs],
                                            OnlineRow (&stats)[2], Position& at) {
    mbarrier_wait(smem_addr(&smem.list_full[list_.buffer]), list_.parity);
    const BlockList blocks = list(list_.buffer);
    const int count = blocks.count();
    const int tokens = 64 >> p.log2_group, first = consumer_ * tokens;
    const uint32_t mine = first < 32 ? (tokens < 32 ? (1u << tokens) - 1 : ~0u) << first : 0;
    for (int j = 0; j < count; ++j) {
      const Position k = at;
      at.advance();
      const Position v = at;
      at.advance();
      const uint32_t mask_bits = blocks.tokens(j);
      if (mask_bits & mine) {
        const int key = blocks.block(j) * kTileKeys;
        float s[kScores], factor[2];
        uint32_t packed[kScores / 2];
        wait_full(k);
        wgmma_fence();
        issue_scores(s, tile(k));
        wgmma_wait<0>();
        pin(s);
        Rows seen = rows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool chosen = rows.token[half] < 32 && (mask_bits >> rows.token[half] & 1);
          seen.lo[half] = 0;
          seen.hi[half] = chosen ? job.position(rows.token[half]) + 1 : 0;
        }
        mask(s, seen, key);
        exponentials(s, stats, factor);
        rescale(o, factor);
        pack(s, packed);
        wait_full(v);
        wgmma_fence();
        issue_output(o, packed, tile(v));
        wgmma_wait<0>();
        pin(o);
      } else {
        // A release belongs to the phase of its fill: before that it would count for the fill before.
        wait_full(k);
        wait_full(v);
      }
      release(k);
      release(v);
    }
    __syncwarp();
    arrive(smem.list_empty[list_.buffer]);
    list_.advance();
  }

  __device__ __forceinline__ void walk_ranking(const Job& job, const Rows& rows,
                                               float (&o)[kOutputs], OnlineRow (&stats)[2],
                                               Position& at) {
    const Range range(p, job);
    const int tiles = range.tiles(kTileKeys);
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    Selection selection(p, job, warp, smem.extra);
    selection.begin(lane);
    if (tiles > 0) {
      sum_exponentials(range, tiles, rows, stats, at);
      float minus_lse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        stats[half].merge_quad(p.scale_log2);
        const float lse = stats[half].lse2(p.scale_log2);
        minus_lse[half] = lse == negative_infinity() ? 0.0f : -lse;
      }
      weigh_values(range, tiles, rows, minus_lse, selection, o, at);
    }
    selection.finish(tiles * (kTileKeys / sm80::kTileKeys), lane);
  }

  /// First pass over the compressed tokens: maximum and sum of each row. The scores of the next
  /// tile are computed while those of this one are exponentiated.
  __device__ __forceinline__ void sum_exponentials(const Range& range, int tiles, const Rows& rows,
                                                   OnlineRow (&stats)[2], Position& at) {
    float even[kScores], odd[kScores];
    Position issued = at;  // the tile whose scores are underway
    auto issue = [&](float (&s)[kScores]) {
      wait_full(at);
      wgmma_fence();
      issue_scores(s, tile(at));
      issued = at;
      at.advance();
    };
    auto finish = [&](float (&s)[kScores], int j) {
      float factor[2];
      mask(s, rows, range.begin + j * kTileKeys);
      exponentials(s, stats, factor);
    };
    auto step = [&](float (&now)[kScores], float (&next)[kScores], int j) {
      const Position done = issued;
      issue(next);
      wgmma_wait<1>();
      pin(now);
      release(done);
      finish(now, j);
    };
    auto last = [&](float (&s)[kScores], int j) {
      wgmma_wait<0>();
      pin(s);
      release(issued);
      finish(s, j);
    };
    issue(even);
    int j = 0;
    for (; j + 2 < tiles; j += 2) {
      step(even, odd, j);
      step(odd, even, j + 1);
    }
    if (j + 1 < tiles) {
      step(even, odd, j);
      last(odd, j + 1);
    } else {
      last(even, j);
    }
  }

  /// Second pass: p = exp(s - lse), its product with V and its share of the importance.
  __device__ __forceinline__ void weigh_values(const Range& range, int tiles, const Rows& rows,
                                               const float (&minus_lse)[2], Selection& selection,
                                               float (&o)[kOutputs], Position& at) {
    auto softmax = [&](float (&s)[kScores], int j, float (&)[2]) {
      mask(s, rows, range.begin + j * kTileKeys);
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        s[i] = exp2_approx(fmaf(s[i], p.scale_log2, minus_lse[i / 2 % 2]));
      constexpr int kParts = kTileKeys / sm80::kTileKeys;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float weights[1][8][4];
#pragma unroll
        for (int i = 0; i < 32; ++i) weights[0][i / 4][i % 4] = s[part * 32 + i];
        selection.observe(j * kParts + part, weights, threadIdx.x % 32);
      }
    };
    if (p.has_output) return walk_pairs<false>(tiles, o, at, softmax);
    float s[kScores], unused[2];
    for (int j = 0; j < tiles; ++j) {
      wait_full(at);
      wgmma_fence();
      issue_scores(s, tile(at));
      wgmma_wait<0>();
      pin(s);
      release(at);
      at.advance();
      softmax(s, j, unused);
    }
  }

  int consumer_ = 0;
  ListCursor list_;
};

}  // namespace nsa::cuda::sm90
