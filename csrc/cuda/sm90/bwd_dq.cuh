// Query-stationary dQ on Hopper: a block of threads owns 192 query rows (whole tokens; 128 with
// Dk = 192) and walks the keys that they see in all branches, so that their sum stays in registers
// and is rounded once.
//
//   S = Q K^T     P = gate * exp2(scale S - lse)     dP = dO V^T     dS = P * (dP - delta)
//   dQ += scale dS K
//
// Consumer warpgroups of 64 rows each: what one of them waits for is filled by the others. A warp
// of the producer warpgroup loads tiles of 64 keys and writes beside each who looks at it: a
// warpgroup passes over selected blocks that none of its tokens chose. Blocks of threads are
// persistent: the keys of a block's next query tile are loaded while it works on this one. A
// warpgroup loads its rows of Q and dO itself, as soon as it is through with those before.
//
// Barriers: `full` of a slot takes the bytes of K and V, and the note; `empty` the warps that read
// it; `rows_full` of a warpgroup its rows of Q and dO.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/sm90/bwd_tiles.cuh"
#include "cuda/sm90/fwd_epilogue.cuh"

namespace nsa::cuda::bwd::sm90 {

struct DqLaunch {
  DqArgs args;
  int log2_group;  // of the padded group
  int jobs;        // query tiles of all heads, gaps in their numbering included
  float scale, scale_log2;
  CUtensorMap q, dout;
  CUtensorMap k[kNumBranches], v[kNumBranches];
};

/// A tile of keys from `key` on, and the tokens of the query tile that look at it.
struct alignas(16) KeyTile {
  int key;
  uint32_t tokens[2];
};

template <class T_, int kDimQk_, int kDimV_>
struct DqShape : Registers<dq_consumers(kDimQk_), (kDimQk_ > 128  ? 232
                                                   : kDimQk_ > 64 ? 160
                                                                  : 144)> {
  using T = T_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kConsumers = dq_consumers(kDimQk);
  static constexpr int kKBytes = kTileBytes<kDimQk>, kVBytes = kTileBytes<kDimV>;
  static constexpr int kStageBytes = kKBytes + kVBytes;
  // What 227 KB hold beside Q and dO.
  static constexpr int kFitting = (227 * 1024 - 1024 - kConsumers * kStageBytes) / kStageBytes;
  static constexpr int kStages = kFitting < 8 ? kFitting : 8;
  static_assert(kStages >= 2);

  struct Smem {
    alignas(1024) char rows[kConsumers][kStageBytes];  // Q, then dO
    alignas(1024) char ring[kStages][kStageBytes];     // K, then V
    KeyTile tiles[kStages];
    uint64_t full[kStages], empty[kStages], rows_full[kConsumers];
  };
};

template <class Shape>
class DqKernel {
  using T = typename Shape::T;
  using Smem = typename Shape::Smem;
  using Position = RingPosition<Shape::kStages>;
  static constexpr int kDimQk = Shape::kDimQk, kDimV = Shape::kDimV;
  static constexpr int kScores = kRows / 2;

  /// A query tile of one head: `count` tokens of a sequence from `first` on.
  struct Job {
    Sequence sequence;
    int number, head;
    int first, count;
  };

  /// A thread's two rows, 8 apart: what the current branch says about them.
  struct RowPair {
    int token[2];  // within the query tile; -1 for padding, which sees nothing
    float lse_log2[2], gate[2], minus_gated_delta[2];
    KeyRange keys[2];
  };

  /// Tokens of the query tile, a bit each. The same in all lanes.
  struct Tokens {
    uint32_t bits[2];
    /// `count` of them from `first` on, those from `end` on left out.
    __device__ __forceinline__ Tokens(int first, int count, int end) {
      count = min(count, end - first);
      const uint64_t all = count > 0 ? ~uint64_t{0} >> (64 - count) << first : 0;
      bits[0] = static_cast<uint32_t>(all);
      bits[1] = static_cast<uint32_t>(all >> 32);
    }
    __device__ __forceinline__ bool any_of(const uint4& tile) const {
      return __any_sync(kFullWarp, (tile.y & bits[0]) | (tile.z & bits[1]));
    }
    __device__ __forceinline__ bool all_in(const uint4& tile) const {
      return ((~tile.y & bits[0]) | (~tile.z & bits[1])) == 0;
    }
  };

  /// Keys that all rows of a warp see, as far as they are there. The same in all lanes.
  struct WholeTiles {
    int first, last;  // tiles that begin there or between
  };

 public:
  __device__ __forceinline__ DqKernel(const DqLaunch& launch, char* smem)
      : launch_(launch), p_(launch.args.common.p), smem_(keep(smem_addr(smem))) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      Position at = first_position();
      for (int i = 0; i < Shape::kStages; ++i) {
        mbarrier_init(at.full, 1);
        mbarrier_init(at.empty(), 4 * Shape::kConsumers * kWarpArrivals);
        at.advance();
      }
      for (int i = 0; i < Shape::kConsumers; ++i) mbarrier_init(rows_full(i), 1);
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      lower_registers<Shape::kProducerRegisters>();
      if (threadIdx.x < 32) load_keys();
    } else {
      raise_registers<Shape::kConsumerRegisters>();
      consume(uniform(static_cast<int>(threadIdx.x / 128) - 1));
    }
  }

 private:
  // Where things are in shared memory.
  __device__ __forceinline__ uint32_t rows_tile(int consumer) const {
    return smem_ + offsetof(Smem, rows) + consumer * Shape::kStageBytes;
  }
  __device__ __forceinline__ Position first_position() const {
    return Position(smem_ + offsetof(Smem, full));
  }
  __device__ __forceinline__ uint32_t ring(const Position& at) const {
    return smem_ + offsetof(Smem, ring) +
           (at.full - smem_ - offsetof(Smem, full)) * (Shape::kStageBytes / kBarrierBytes);
  }
  __device__ __forceinline__ uint32_t note(const Position& at) const {
    return smem_ + offsetof(Smem, tiles) +
           (at.full - smem_ - offsetof(Smem, full)) * (sizeof(KeyTile) / kBarrierBytes);
  }
  __device__ __forceinline__ uint32_t rows_full(int consumer) const {
    return smem_ + offsetof(Smem, rows_full) + consumer * 8;
  }

  /// Query tile i. One kv head at a time across the grid, so that its K and V stay in L2; long rows
  /// first. Without tokens in a gap of the numbering.
  __device__ __forceinline__ Job job_at(int i) const {
    const TileMap& tiles = launch_.args.tiles;
    Job job;
    job.head = i / tiles.count;
    job.number = tiles.count - 1 - i % tiles.count;
    const TileMap::Place place = tiles.place(job.number);
    job.sequence = load_sequence(p_.shape, place.batch);
    job.first = place.index * launch_.args.tile_tokens;
    job.count = min(launch_.args.tile_tokens, job.sequence.q_len - job.first);
    return job;
  }
  /// The same by a whole warp, worked out anew wherever it stands: there are no registers to keep
  /// it in.
  __device__ __forceinline__ Job job_again(int i) const { return job_at(uniform(i)); }

  /// Keys between the first that the first token sees and the last that the last one does.
  __device__ __forceinline__ KeyRange dense_keys(const Job& job, int branch) const {
    return {visible_keys(branch, job.sequence.position(job.first), p_.config).begin,
            visible_keys(branch, job.sequence.position(job.first + job.count - 1), p_.config).end};
  }
  static __device__ __forceinline__ int tiles_of(const KeyRange& keys) {
    return max(0, keys.end - keys.begin + kRows - 1) / kRows;
  }
  __device__ __forceinline__ int tiles_of_block() const {
    return (p_.config.select_size + kRows - 1) / kRows;
  }
  __device__ __forceinline__ int64_t list_of(const Job& job) const {
    return static_cast<int64_t>(job.head) * launch_.args.tiles.count + job.number;
  }

  __device__ __forceinline__ const UnionBlock* blocks_of(const Job& job) const {
    return launch_.args.union_blocks + list_of(job) * launch_.args.tile_tokens * p_.index_count;
  }

  /// Key tiles of a branch.
  __device__ __forceinline__ int count_tiles(const Job& job, int branch) const {
    return branch == kSelected ? launch_.args.union_counts[list_of(job)] * tiles_of_block()
                               : tiles_of(dense_keys(job, branch));
  }
  __device__ __forceinline__ int consumer_tokens() const { return kRows >> launch_.log2_group; }

  // ---- Producers --------------------------------------------------------------------------------

  /// What the copy engine is told of a branch: in uniform registers, where it wants them.
  struct KeySource {
    const CUtensorMap *k, *v;
    int batch, head, first;  // row of the first key
  };
  __device__ __forceinline__ KeySource key_source(const Job& job, int branch) const {
    return {uniform(&launch_.k[branch]), uniform(&launch_.v[branch]),
            uniform(static_cast<int>(job.sequence.batch)), uniform(job.head),
            uniform(first_key_row(job.sequence, branch, p_.config))};
  }

  /// A warp, by one lane: a tile of keys into the ring.
  __device__ __forceinline__ void load_tile(const KeySource& source, const KeyTile& tile,
                                            Position& at) {
    const int row = uniform(source.first + tile.key);
    const uint32_t bar = uniform(at.full), dst = uniform(ring(at));
    mbarrier_wait(at.empty(), at.parity ^ 1);
    if (elect_lane()) {
      store_shared_16(
          note(at), make_uint4(static_cast<uint32_t>(tile.key), tile.tokens[0], tile.tokens[1], 0));
      mbarrier_arrive_expect(bar, Shape::kStageBytes);
#pragma unroll
      for (int panel = 0; panel < kDimQk / 64; ++panel)
        tma_load(dst + panel * kPanelBytes, source.k, bar, panel * 64, source.head, row,
                 source.batch);
#pragma unroll
      for (int panel = 0; panel < kDimV / 64; ++panel)
        tma_load(dst + Shape::kKBytes + panel * kPanelBytes, source.v, bar, panel * 64, source.head,
                 row, source.batch);
    }
    __syncwarp();
    at.advance();
  }

  /// One warp. Its lanes read the lists of blocks, an elected one issues the copies.
  __device__ void load_keys() {
    const int lane = threadIdx.x;
    Position at = first_position();
    for (int number = blockIdx.x; number < launch_.jobs; number += gridDim.x) {
      if (job_again(number).count <= 0) continue;
#pragma unroll 1
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!p_.branch[branch].enabled) continue;
        const Job job = job_again(number);
        const KeySource source = key_source(job, branch);
        if (branch == kSelected) {
          const UnionBlock* blocks = blocks_of(job);
          const int count = uniform(launch_.args.union_counts[list_of(job)]);
          const int size = p_.config.select_size;
          for (int base = 0; base < count; base += 32) {
            UnionBlock own{};
            if (base + lane < count) own = blocks[base + lane];
#pragma unroll 1
            for (int i = 0; i < min(32, count - base); ++i) {
              KeyTile tile{__shfl_sync(kFullWarp, own.block, i) * size,
                           {__shfl_sync(kFullWarp, own.tokens[0], i),
                            __shfl_sync(kFullWarp, own.tokens[1], i)}};
#pragma unroll 1
              for (int part = 0; part < size; part += kRows) {
                load_tile(source, tile, at);
                tile.key += kRows;
              }
            }
          }
        } else {
          const KeyRange keys = dense_keys(job, branch);
          const int end = uniform(keys.end);
#pragma unroll 1
          for (int key = uniform(keys.begin); key < end; key += kRows)
            load_tile(source, {key, {~0u, ~0u}}, at);
        }
      }
    }
  }

  // ---- Consumers --------------------------------------------------------------------------------

  /// The first query tile from `number` on, in this block's steps, that has tokens.
  __device__ __forceinline__ int next_job(int number) const {
    while (number < launch_.jobs && job_again(number).count <= 0) number += gridDim.x;
    return number;
  }

  /// A warpgroup: its first thread loads a query tile's rows of Q and dO, if there is one.
  __device__ __forceinline__ void load_rows(int consumer, int number) const {
    if (number >= launch_.jobs) return;
    const Job job = job_again(number);
    const uint32_t bar = rows_full(consumer), dst = rows_tile(consumer);
    const int batch = static_cast<int>(job.sequence.batch);
    const int row =
        static_cast<int>(job.sequence.q_first) + job.first + consumer * consumer_tokens();
    if (threadIdx.x % 128 != 0) return;
    mbarrier_arrive_expect(bar, Shape::kStageBytes);
#pragma unroll
    for (int panel = 0; panel < kDimQk / 64; ++panel)
      tma_load(dst + panel * kPanelBytes, &launch_.q, bar, panel * 64, 0, job.head, row, batch);
#pragma unroll
    for (int panel = 0; panel < kDimV / 64; ++panel)
      tma_load(dst + Shape::kKBytes + panel * kPanelBytes, &launch_.dout, bar, panel * 64, 0,
               job.head, row, batch);
  }

  __device__ void consume(int consumer) {
    Position at = first_position();
    const RingAddress<Shape::kStageBytes / 16> words(descriptor_word(smem_ + offsetof(Smem, ring)),
                                                     first_position().full);
    const RingAddress<sizeof(KeyTile)> notes(smem_ + offsetof(Smem, tiles), first_position().full);
    uint32_t parity = 0;
    int number = next_job(blockIdx.x);
    load_rows(consumer, number);
    while (number < launch_.jobs) {
      RowPair rows;
      const int first_row = warp_row() + threadIdx.x % 32 / 4;
      const int first_token = consumer * consumer_tokens();
      const int job_tokens = job_again(number).count;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i;
        const int token = first_token + (row >> launch_.log2_group);
        const bool valid = token < job_tokens && head_of(row) < launch_.args.common.group;
        rows.token[i] = valid ? token : -1;
      }
      const Tokens group_tokens(first_token, consumer_tokens(), job_tokens);
      const Tokens warp_tokens(first_warp_token(consumer), warp_token_count(), job_tokens);
      float dq[kDimQk / 2];
#pragma unroll
      for (int i = 0; i < kDimQk / 2; ++i) dq[i] = 0.0f;
      pin(dq);
      mbarrier_wait(rows_full(consumer), parity);
      parity ^= 1;
#pragma unroll 1
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!p_.branch[branch].enabled) continue;
        int left;
        WholeTiles whole;
        {
          const Job job = job_again(number);
          left = uniform(count_tiles(job, branch));
          load_branch(job, branch, first_row, rows);
          whole = whole_tiles(job, branch, consumer);
        }
        for (; left > 0; --left) {
          mbarrier_wait(at.full, at.parity);
          const uint4 tile = load_shared_16(notes.at(at.full));
          if (group_tokens.any_of(tile))
            add_tile(consumer, branch, uniform(words.at(at.full)), tile, warp_tokens, whole, rows,
                     dq);
          mbarrier_arrive_warp(at.empty());
          at.advance();
        }
      }
      named_barrier_sync(1 + consumer, 128);  // all four warps are through with the rows
      const int next = next_job(number + gridDim.x);
      load_rows(consumer, next);
      store(job_again(number), first_row, rows, dq);
      number = next;
    }
  }

  // The tokens that the calling warp has rows of.
  __device__ __forceinline__ int first_warp_token(int consumer) const {
    return consumer * consumer_tokens() + (warp_row() >> launch_.log2_group);
  }
  __device__ __forceinline__ int warp_token_count() const {
    return max(16 >> launch_.log2_group, 1);
  }

  /// Later tokens see later keys: no keys before the last one's first, none after the first one's
  /// last. Where blocks are shorter than tiles, none is whole.
  __device__ __forceinline__ WholeTiles whole_tiles(const Job& job, int branch,
                                                    int consumer) const {
    const int first = first_warp_token(consumer);
    const int last = min(first + warp_token_count(), job.count) - 1;
    const auto keys_of = [&](int token) {
      return visible_keys(branch, job.sequence.position(job.first + token), p_.config);
    };
    if (branch == kSelected && p_.config.select_size < kRows) return {0, -1};
    return {keys_of(last).begin, keys_of(first).end - kRows};
  }

  /// Query head of a row, within the group.
  __device__ __forceinline__ int head_of(int row) const {
    return row & ((1 << launch_.log2_group) - 1);
  }

  __device__ __forceinline__ void load_branch(const Job& job, int branch, int first_row,
                                              RowPair& rows) const {
    const int group = launch_.args.common.group;
    // Both rows' at once; those that are not there read others'.
    float4 stats[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool valid = rows.token[i] >= 0;
      const int64_t token = job.sequence.q_row + job.first + (valid ? rows.token[i] : 0);
      stats[i] = __ldg(reinterpret_cast<const float4*>(
          launch_.args.common.stats +
          ((branch * p_.shape.heads_kv + job.head) * p_.shape.total_q + token) * group +
          (valid ? head_of(first_row + 8 * i) : 0)));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // A row that is not there has gate 0 and exponentials 0.
      const bool valid = rows.token[i] >= 0;
      rows.keys[i] = {0, 0};
      if (valid)
        rows.keys[i] =
            visible_keys(branch, job.sequence.position(job.first + rows.token[i]), p_.config);
      rows.lse_log2[i] = valid ? stats[i].x : INFINITY;
      rows.gate[i] = valid ? stats[i].z : 0.0f;
      rows.minus_gated_delta[i] = valid ? stats[i].z * stats[i].y : 0.0f;
    }
  }

  static __device__ __forceinline__ int warp_row() { return threadIdx.x % 128 / 32 * 16; }

  __device__ __forceinline__ void add_tile(int consumer, int branch, uint32_t k, const uint4& tile,
                                           const Tokens& warp_tokens, const WholeTiles& whole,
                                           const RowPair& rows, float (&dq)[kDimQk / 2]) {
    const uint32_t q = uniform(descriptor_word(rows_tile(consumer)));
    float s[kScores], dp[kScores];
    wgmma_fence();
    issue_scores<T, kRows, kDimQk>(s, q, k);
    wgmma_commit();
    issue_scores<T, kRows, kDimV>(dp, q + Shape::kKBytes / 16, k + Shape::kKBytes / 16);
    wgmma_commit();
    const int key = static_cast<int>(tile.x);
    const bool seen = warp_tokens.any_of(tile);
    const bool masked =
        __any_sync(kFullWarp, !warp_tokens.all_in(tile) || key < whole.first || key > whole.last);
    wgmma_wait<1>();
    pin(s);
    if (seen) {
      if (masked) mask(s, rows, tile, branch);
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        s[i] = exp2_approx(fmaf(s[i], launch_.scale_log2, -rows.lse_log2[i / 2 % 2]));
    }
    wgmma_wait<0>();
    pin(dp);
    uint32_t ds[kScores / 2];
    if (seen) {
      // The gate on the side of dP: one operation less than on P's.
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i) {
        const float gate = rows.gate[i % 2], minus_delta = rows.minus_gated_delta[i % 2];
        ds[i] = pack2<T>(s[2 * i] * fmaf(gate, dp[2 * i], minus_delta),
                         s[2 * i + 1] * fmaf(gate, dp[2 * i + 1], minus_delta));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kScores / 2; ++i) ds[i] = keep(0);
    }
    wgmma_fence();
    issue_update<T, kDimQk, kRows / 16>(dq, ds, k);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dq);
  }

  /// Scores of keys that a row does not see, or whose block it did not choose, become -inf.
  __device__ __forceinline__ void mask(float (&s)[kScores], const RowPair& rows, const uint4& tile,
                                       int branch) const {
    const int key = static_cast<int>(tile.x);
    const int count = branch == kSelected ? min(p_.config.select_size, kRows) : kRows;
    const int lane_column = threadIdx.x % 4 * 2;
    int first[2], end[2];  // from the lane's first column on
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = rows.token[half];
      const uint32_t bits = token < 32 ? tile.y : tile.z;
      const bool looks = token >= 0 && (bits >> token % 32 & 1);
      first[half] = rows.keys[half].begin - key - lane_column;
      end[half] = (looks ? min(rows.keys[half].end - key, count) : 0) - lane_column;
    }
    // Few tiles have keys past the end of what rows see and keys before it.
    constexpr int kLast = kRows - 8 + 1;
    if (__any_sync(kFullWarp, min(end[0], end[1]) <= kLast)) {
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if (i / 4 * 8 + i % 2 >= end[i / 2 % 2]) s[i] = -INFINITY;
    }
    if (__any_sync(kFullWarp, max(first[0], first[1]) > 0)) {
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        if (i / 4 * 8 + i % 2 < first[i / 2 % 2]) s[i] = -INFINITY;
    }
  }

  /// Rows of 16 bytes a lane: the four lanes of a quad exchange their columns first.
  __device__ __forceinline__ void store(const Job& job, int first_row, const RowPair& rows,
                                        const float (&dq)[kDimQk / 2]) const {
    const float scale = launch_.scale;
    const View<T> view = typed<T>(p_.dq);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = rows.token[half];
      const int64_t head = static_cast<int64_t>(job.head) * launch_.args.common.group +
                           head_of(first_row + 8 * half);
      T* dst = job.sequence.queries(view) + (job.first + token) * view.seq + head * view.head +
               threadIdx.x % 4 * 8;
#pragma unroll
      for (int chunk = 0; chunk < kDimQk / 32; ++chunk) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = dq + (chunk * 4 + i) * 4 + 2 * half;
          w[i] = pack2<T>(pair[0] * scale, pair[1] * scale);
        }
        cuda::sm90::quad_transpose(w);
        if (token >= 0)
          *reinterpret_cast<uint4*>(dst + chunk * 32) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }

  const DqLaunch& launch_;
  const AttnBwd& p_;
  uint32_t smem_;
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    bwd_dq_kernel(const __grid_constant__ DqLaunch launch) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // other targets get an empty body that is never launched
  char* const smem = aligned_shared_memory();
  DqKernel<Shape>(launch, smem).run();
#endif
}

template <class T, int kDimQk, int kDimV>
void launch_bwd_dq(const DqArgs& args, cudaStream_t stream) {
  using Shape = DqShape<T, kDimQk, kDimV>;
  const AttnBwd& p = args.common.p;
  const unsigned jobs = grid_size(p.shape.heads_kv * args.tiles.count);
  if (jobs == 0 || p.shape.total_q == 0) return;
  DqLaunch launch{args};
  launch.log2_group = log2_padded_group(args.common.group);
  launch.jobs = static_cast<int>(jobs);
  launch.scale = static_cast<float>(p.shape.softmax_scale);
  launch.scale_log2 = static_cast<float>(p.shape.softmax_scale * 1.4426950408889634);
  const int padded = 1 << launch.log2_group;
  launch.q = query_map(p.shape, p.q, kDimQk, padded, kRows / padded);
  launch.dout = query_map(p.shape, p.dout, kDimV, padded, kRows / padded);
  for (int c = 0; c < kNumBranches; ++c) {
    if (!p.branch[c].enabled) continue;
    launch.k[c] = key_map(p, c, p.branch[c].k, kDimQk);
    launch.v[c] = key_map(p, c, p.branch[c].v, kDimV);
  }
  launch_kernel(bwd_dq_kernel<Shape>, "sm90::bwd_dq_kernel",
                std::min(jobs, static_cast<unsigned>(multiprocessor_count())), Shape::kThreads,
                sizeof(typename Shape::Smem), stream, launch);
}

}  // namespace nsa::cuda::bwd::sm90
