// Query-stationary dQ on Hopper: a block of threads owns 192 query rows (whole tokens; 128 with
// Dk = 192) and walks the keys that they see in all branches, so that their sum stays in registers
// and is rounded once.
//
//   S = Q K^T     P = gate * exp2(scale S - lse)     dP = dO V^T     dS = P * (dP - delta)
//   dQ += scale dS K
//
// Consumer warpgroups of 64 rows each: what one of them waits for is filled by the others. Of the
// producer warpgroup one warp loads tiles of 64 keys and writes a note beside each, others load Q
// and dO, one a consumer. A warpgroup passes over selected blocks that none of its tokens chose.
// Blocks of threads are persistent: the keys of a block's next query tile are loaded while it works
// on this one.
//
// Barriers: `full` of a slot takes the bytes of K and V, and the note; `empty` the warps that read
// it; `rows_full`, `rows_empty` the same for a warpgroup's rows of Q and dO.
#pragma once

#include <algorithm>

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

/// A tile of keys [key, min(key + 64, end)), and the tokens of the query tile that look at it.
struct alignas(16) KeyTile {
  int key, end;
  uint32_t tokens[2];
};

template <class T_, int kDimQk_, int kDimV_>
struct DqShape : Registers<dq_consumers(kDimQk_), (kDimQk_ > 128 ? 232 : 160)> {
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
    alignas(1024) char q[kConsumers][kKBytes];
    alignas(1024) char dout[kConsumers][kVBytes];
    alignas(1024) char ring[kStages][kStageBytes];  // K, then V
    KeyTile tiles[kStages];
    uint32_t wanted[kStages];  // by which consumers
    uint64_t full[kStages], empty[kStages], rows_full[kConsumers], rows_empty[kConsumers];
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
    float lse_log2[2], gate[2], gated_delta[2];
    KeyRange keys[2];
  };

 public:
  __device__ __forceinline__ DqKernel(const DqLaunch& launch, char* smem)
      : launch_(launch), p_(launch.args.common.p), smem_(*reinterpret_cast<Smem*>(smem)) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        mbarrier_init(smem_addr(&smem_.full[i]), 1);
        mbarrier_init(smem_addr(&smem_.empty[i]), 4 * Shape::kConsumers * kWarpArrivals);
      }
      for (int i = 0; i < Shape::kConsumers; ++i) {
        mbarrier_init(smem_addr(&smem_.rows_full[i]), 1);
        mbarrier_init(smem_addr(&smem_.rows_empty[i]), 4 * kWarpArrivals);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      lower_registers<Shape::kProducerRegisters>();
      const int warp = threadIdx.x / 32;
      if (warp == 0)
        load_keys();
      else if (warp <= Shape::kConsumers && threadIdx.x % 32 == 0)
        load_rows(warp - 1);
    } else {
      raise_registers<Shape::kConsumerRegisters>();
      consume(threadIdx.x / 128 - 1);
    }
  }

 private:
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
  /// The same, worked out anew: consumers have no registers to keep it in.
  __device__ __forceinline__ Job job_again(int i) const {
    asm volatile("" : "+r"(i));
    return job_at(i);
  }

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

  /// One lane: a tile of keys into the ring. `first` is the branch's first row of keys.
  __device__ __forceinline__ void load_tile(int branch, int batch, int head, int first,
                                            const KeyTile& tile, uint32_t wanted,
                                            const Position& at) {
    mbarrier_wait(smem_addr(&smem_.empty[at.slot]), at.parity ^ 1);
    const uint32_t full = smem_addr(&smem_.full[at.slot]), dst = smem_addr(smem_.ring[at.slot]);
    smem_.tiles[at.slot] = tile;
    smem_.wanted[at.slot] = wanted;
    mbarrier_arrive_expect(full, Shape::kStageBytes);
#pragma unroll
    for (int panel = 0; panel < kDimQk / 64; ++panel)
      tma_load(dst + panel * kPanelBytes, &launch_.k[branch], full, panel * 64, head,
               first + tile.key, batch);
#pragma unroll
    for (int panel = 0; panel < kDimV / 64; ++panel)
      tma_load(dst + Shape::kKBytes + panel * kPanelBytes, &launch_.v[branch], full, panel * 64,
               head, first + tile.key, batch);
  }

  /// The consumers that have one of these tokens of the query tile.
  __device__ __forceinline__ uint32_t consumers_of(const uint32_t (&tokens)[2]) const {
    const int count = consumer_tokens();
    uint32_t wanted = 0;
#pragma unroll
    for (int c = 0; c < Shape::kConsumers; ++c) {
      const int first = c * count;
      bool wants;
      if (count == kMaxTileTokens)  // G = 1: the first warpgroup has them all
        wants = c == 0 && (tokens[0] | tokens[1]) != 0;
      else
        wants = first < kMaxTileTokens && ((first < 32 ? tokens[0] : tokens[1]) >> first % 32 &
                                           (~0u >> (32 - count))) != 0;
      wanted |= static_cast<uint32_t>(wants) << c;
    }
    return wanted;
  }

  /// One warp. Its lanes read the lists of blocks, and each loads its own.
  __device__ void load_keys() {
    const int lane = threadIdx.x;
    Position at;
    for (int number = blockIdx.x; number < launch_.jobs; number += gridDim.x) {
      if (job_again(number).count <= 0) continue;
#pragma unroll 1
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!p_.branch[branch].enabled) continue;
        const Job job = job_again(number);
        const int batch = static_cast<int>(job.sequence.batch);
        const int first = first_key_row(job.sequence, branch, p_.config);
        if (branch == kSelected) {
          const UnionBlock* blocks = blocks_of(job);
          const int count = launch_.args.union_counts[list_of(job)], size = p_.config.select_size;
          for (int base = 0; base < count; base += 32) {
            UnionBlock own{};
            if (base + lane < count) own = blocks[base + lane];
            KeyTile tile{own.block * size, own.block * size + size, {own.tokens[0], own.tokens[1]}};
            const uint32_t wanted = consumers_of(tile.tokens);
            for (int i = 0; i < min(32, count - base); ++i) {
              for (int part = 0; part < size; part += kRows) {
                if (lane == i) {
                  load_tile(branch, batch, job.head, first, tile, wanted, at);
                  tile.key += kRows;
                }
                at.advance();
              }
              __syncwarp();
            }
          }
        } else {
          const KeyRange keys = dense_keys(job, branch);
          uint32_t wanted = 0;
          for (int c = 0; c < Shape::kConsumers; ++c)
            wanted |= static_cast<uint32_t>(c * consumer_tokens() < job.count) << c;
          for (int key = keys.begin; key < keys.end; key += kRows) {
            if (lane == 0)
              load_tile(branch, batch, job.head, first, {key, keys.end, {~0u, ~0u}}, wanted, at);
            at.advance();
          }
        }
        __syncwarp();
      }
    }
  }

  /// One thread: rows of Q and dO of a consumer.
  __device__ void load_rows(int consumer) {
    const uint32_t full = smem_addr(&smem_.rows_full[consumer]);
    uint32_t parity = 0;
    for (int number = blockIdx.x; number < launch_.jobs; number += gridDim.x) {
      const Job job = job_at(number);
      if (job.count <= 0) continue;
      mbarrier_wait(smem_addr(&smem_.rows_empty[consumer]), parity ^ 1);
      parity ^= 1;
      mbarrier_arrive_expect(full, Shape::kStageBytes);
      const int batch = static_cast<int>(job.sequence.batch);
      const int row =
          static_cast<int>(job.sequence.q_first) + job.first + consumer * consumer_tokens();
      for (int panel = 0; panel < kDimQk / 64; ++panel)
        tma_load(smem_addr(smem_.q[consumer]) + panel * kPanelBytes, &launch_.q, full, panel * 64,
                 0, job.head, row, batch);
      for (int panel = 0; panel < kDimV / 64; ++panel)
        tma_load(smem_addr(smem_.dout[consumer]) + panel * kPanelBytes, &launch_.dout, full,
                 panel * 64, 0, job.head, row, batch);
    }
  }

  // ---- Consumers --------------------------------------------------------------------------------

  __device__ void consume(int consumer) {
    Position at;
    uint32_t parity = 0;
    for (int number = blockIdx.x; number < launch_.jobs; number += gridDim.x) {
      const int job_tokens = job_again(number).count;
      if (job_tokens <= 0) continue;
      RowPair rows;
      const int first_row = warp_row() + threadIdx.x % 32 / 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i;
        const int token = consumer * consumer_tokens() + (row >> launch_.log2_group);
        const bool valid = token < job_tokens && head_of(row) < launch_.args.common.group;
        rows.token[i] = valid ? token : -1;
      }
      float dq[kDimQk / 2];
#pragma unroll
      for (int i = 0; i < kDimQk / 2; ++i) dq[i] = 0.0f;
      pin(dq);
      mbarrier_wait(smem_addr(&smem_.rows_full[consumer]), parity);
      parity ^= 1;
#pragma unroll 1
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!p_.branch[branch].enabled) continue;
        int left;
        {
          const Job job = job_again(number);
          load_branch(job, branch, first_row, rows);
          left = count_tiles(job, branch);
        }
        for (; left > 0; --left) {
          mbarrier_wait(smem_addr(&smem_.full[at.slot]), at.parity);
          if (uniform(smem_.wanted[at.slot]) >> consumer & 1)
            add_tile(consumer, at.slot, rows, dq);
          arrive_warp(smem_.empty[at.slot]);
          at.advance();
        }
      }
      arrive_warp(smem_.rows_empty[consumer]);
      store(job_again(number), first_row, rows, dq);
    }
  }

  /// Query head of a row, within the group.
  __device__ __forceinline__ int head_of(int row) const {
    return row & ((1 << launch_.log2_group) - 1);
  }

  __device__ __forceinline__ void load_branch(const Job& job, int branch, int first_row,
                                              RowPair& rows) const {
    const int group = launch_.args.common.group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // A row that is not there has gate 0 and exponentials 0.
      rows.lse_log2[i] = INFINITY;
      rows.gate[i] = rows.gated_delta[i] = 0.0f;
      rows.keys[i] = {0, 0};
      if (rows.token[i] < 0) continue;
      const int64_t token = job.sequence.q_row + job.first + rows.token[i];
      const float4 x = __ldg(reinterpret_cast<const float4*>(
          launch_.args.common.stats +
          ((branch * p_.shape.heads_kv + job.head) * p_.shape.total_q + token) * group +
          head_of(first_row + 8 * i)));
      rows.lse_log2[i] = x.x;
      rows.gate[i] = x.z;
      rows.gated_delta[i] = x.z * x.y;
      rows.keys[i] =
          visible_keys(branch, job.sequence.position(job.first + rows.token[i]), p_.config);
    }
  }

  static __device__ __forceinline__ int warp_row() { return threadIdx.x % 128 / 32 * 16; }

  __device__ __forceinline__ void add_tile(int consumer, int slot, const RowPair& rows,
                                           float (&dq)[kDimQk / 2]) {
    const uint32_t k_tile = smem_addr(smem_.ring[slot]);
    float s[kScores], dp[kScores];
    wgmma_fence();
    issue_scores<T, kRows, kDimQk>(s, smem_addr(smem_.q[consumer]), k_tile);
    wgmma_commit();
    issue_scores<T, kRows, kDimV>(dp, smem_addr(smem_.dout[consumer]), k_tile + Shape::kKBytes);
    wgmma_commit();
    // Meanwhile: the keys of the tile that the thread's rows see.
    const KeyTile tile = smem_.tiles[slot];
    KeyRange seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = rows.token[half];
      const uint32_t bits = token < 32 ? tile.tokens[0] : tile.tokens[1];
      const bool looks = token >= 0 && (bits >> token % 32 & 1);
      seen[half] = {rows.keys[half].begin - tile.key,
                    looks ? min(rows.keys[half].end, tile.end) - tile.key : 0};
    }
    const bool whole = __all_sync(kFullWarp, seen[0].begin <= 0 && seen[0].end >= kRows &&
                                                 seen[1].begin <= 0 && seen[1].end >= kRows);
    const bool none = __all_sync(kFullWarp, seen[0].end <= 0 && seen[1].end <= 0);
    wgmma_wait<1>();
    pin(s);
    if (!none) {
      if (!whole) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          const int key = threadIdx.x % 4 * 2 + i / 4 * 8 + i % 2;
          const KeyRange& range = seen[i / 2 % 2];
          if (key < range.begin || key >= range.end) s[i] = -INFINITY;
        }
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        s[i] = exp2_approx(fmaf(s[i], launch_.scale_log2, -rows.lse_log2[i / 2 % 2]));
    }
    wgmma_wait<0>();
    pin(dp);
    // The gate on the side of dP: one operation less than on P's.
    const uint32_t keep = none ? 0 : ~0u;
    uint32_t ds[kScores / 2];
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      const float gate = rows.gate[i % 2], delta = rows.gated_delta[i % 2];
      ds[i] = pack2<T>(s[2 * i] * fmaf(gate, dp[2 * i], -delta),
                       s[2 * i + 1] * fmaf(gate, dp[2 * i + 1], -delta)) &
              keep;
    }
    wgmma_fence();
    issue_update<T, kDimQk, kRows / 16>(dq, ds, k_tile);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dq);
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
  Smem& smem_;
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
