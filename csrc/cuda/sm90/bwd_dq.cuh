// Query-stationary dQ on Hopper: a block of threads owns 128 query rows (whole tokens) and walks
// the keys that they see in all branches, so that their sum stays in registers and is rounded once.
//
//   S = Q K^T     P = gate * exp2(scale S - lse)     dP = dO V^T     dS = P * (dP - delta)
//   dQ += scale dS K
//
// Two consumer warpgroups of 64 rows each; of the producer warpgroup one warp loads tiles of 64
// keys and another Q and dO. A warpgroup passes over selected blocks that none of its tokens chose:
// its warps read the list themselves, so that they know before a tile is there. Blocks of threads
// are persistent: the keys of a block's next query tile are loaded while it works on this one.
//
// Barriers: `full` of a slot takes the bytes of K and V; `empty` the eight warps that read it;
// `rows_full`, `rows_empty` the same for Q and dO.
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

template <class T_, int kDimQk_, int kDimV_>
struct DqShape : Registers<(kDimQk_ > 64 ? 232 : 208)> {
  using T = T_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kConsumers = kQueryTileRows / kRows;
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
    uint64_t full[kStages], empty[kStages], rows_full, rows_empty;
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

  /// A tile of keys [key, min(key + 64, end)), and the tokens of the query tile that look at it.
  struct KeyTile {
    int key, end;
    uint32_t tokens[2];
  };

  /// A thread's two rows, 8 apart: what the current branch says about them.
  struct RowPair {
    int token[2];  // within the query tile; -1 for padding, which sees nothing
    float lse_log2[2], gate[2], gated_delta[2];
    KeyRange keys[2];
  };

  /// Rows of Q as the A operand: in registers where there is room beside the accumulators, which
  /// takes a fifth of the load off shared memory.
  struct Operands {
    static constexpr bool kQInRegisters = kDimQk <= 128;
    uint32_t q[kQInRegisters ? kDimQk / 4 : 1];
    uint32_t q_tile, dout_tile;  // of the warpgroup
  };

  /// What is left to do of a tile: dq += dS K. It waits for the next tile's products, so that the
  /// tensor cores have work before that tile's exponentials; until then the tile keeps its slot.
  struct Pending {
    int slot = -1;
    uint32_t ds[kScores / 2];
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
      mbarrier_init(smem_addr(&smem_.rows_full), 1);
      mbarrier_init(smem_addr(&smem_.rows_empty), 4 * Shape::kConsumers * kWarpArrivals);
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      lower_registers<Shape::kProducerRegisters>();
      if (threadIdx.x < 32)
        load_keys();
      else if (threadIdx.x == 32)
        load_rows();
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

  /// Calls body(job) for the query tiles of this block of threads.
  template <class Body>
  __device__ __forceinline__ void for_each_job(const Body& body) const {
    for (int i = blockIdx.x; i < launch_.jobs; i += gridDim.x) {
      const Job job = job_at(i);
      if (job.count > 0) body(job);
    }
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

  // ---- Producers --------------------------------------------------------------------------------

  /// One lane: a tile of keys into the ring.
  __device__ __forceinline__ void load_tile(const Job& job, int branch, int key, Position& at) {
    mbarrier_wait(smem_addr(&smem_.empty[at.slot]), at.parity ^ 1);
    const uint32_t full = smem_addr(&smem_.full[at.slot]), dst = smem_addr(smem_.ring[at.slot]);
    const int row = first_key_row(job.sequence, branch, p_.config) + key;
    const int batch = static_cast<int>(job.sequence.batch);
    mbarrier_arrive_expect(full, Shape::kStageBytes);
#pragma unroll
    for (int panel = 0; panel < kDimQk / 64; ++panel)
      tma_load(dst + panel * kPanelBytes, &launch_.k[branch], full, panel * 64, job.head, row,
               batch);
#pragma unroll
    for (int panel = 0; panel < kDimV / 64; ++panel)
      tma_load(dst + Shape::kKBytes + panel * kPanelBytes, &launch_.v[branch], full, panel * 64,
               job.head, row, batch);
    at.advance();
  }

  /// One warp. Its lanes read the lists of blocks, the first one does the rest.
  __device__ void load_keys() {
    const int lane = threadIdx.x;
    Position at;
    for_each_job([&](const Job& job) {
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!p_.branch[branch].enabled) continue;
        if (branch == kSelected) {
          const UnionBlock* blocks = blocks_of(job);
          const int count = launch_.args.union_counts[list_of(job)], size = p_.config.select_size;
          for (int base = 0; base < count; base += 32) {
            int own = 0;
            if (base + lane < count) own = blocks[base + lane].block;
            for (int i = 0; i < min(32, count - base); ++i) {
              const int key = __shfl_sync(kFullWarp, own, i) * size;
              if (lane == 0)
                for (int part = 0; part < size; part += kRows)
                  load_tile(job, branch, key + part, at);
              __syncwarp();
            }
          }
        } else if (lane == 0) {
          const KeyRange keys = dense_keys(job, branch);
          for (int i = 0; i < tiles_of(keys); ++i)
            load_tile(job, branch, keys.begin + i * kRows, at);
        }
        __syncwarp();
      }
    });
  }

  /// One thread.
  __device__ void load_rows() {
    uint32_t parity = 0;
    for_each_job([&](const Job& job) {
      mbarrier_wait(smem_addr(&smem_.rows_empty), parity ^ 1);
      parity ^= 1;
      const uint32_t full = smem_addr(&smem_.rows_full);
      mbarrier_arrive_expect(full, Shape::kConsumers * Shape::kStageBytes);
      const int batch = static_cast<int>(job.sequence.batch);
      for (int c = 0; c < Shape::kConsumers; ++c) {
        const int row =
            static_cast<int>(job.sequence.q_first) + job.first + c * (kRows >> launch_.log2_group);
        for (int panel = 0; panel < kDimQk / 64; ++panel)
          tma_load(smem_addr(smem_.q[c]) + panel * kPanelBytes, &launch_.q, full, panel * 64, 0,
                   job.head, row, batch);
        for (int panel = 0; panel < kDimV / 64; ++panel)
          tma_load(smem_addr(smem_.dout[c]) + panel * kPanelBytes, &launch_.dout, full, panel * 64,
                   0, job.head, row, batch);
      }
    });
  }

  // ---- Consumers --------------------------------------------------------------------------------

  __device__ __forceinline__ void wait_full(const Position& at) {
    mbarrier_wait(smem_addr(&smem_.full[at.slot]), at.parity);
  }

  __device__ void consume(int consumer) {
    const int tokens = kRows >> launch_.log2_group;
    Position at;
    uint32_t parity = 0;
    for (int number = blockIdx.x; number < launch_.jobs; number += gridDim.x) {
      const int job_tokens = job_again(number).count;
      if (job_tokens <= 0) continue;
      const int first_token = consumer * tokens;
      RowPair rows;
      const int first_row = warp_row() + threadIdx.x % 32 / 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i, token = first_token + (row >> launch_.log2_group);
        const bool valid = token < job_tokens && head_of(row) < launch_.args.common.group;
        rows.token[i] = valid ? token : -1;
      }
      float dq[kDimQk / 2];
#pragma unroll
      for (int i = 0; i < kDimQk / 2; ++i) dq[i] = 0.0f;
      pin(dq);
      Pending pending;
      mbarrier_wait(smem_addr(&smem_.rows_full), parity);
      parity ^= 1;
      const Operands operands = load_operands(consumer);
#pragma unroll 1
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!p_.branch[branch].enabled) continue;
        load_branch(job_again(number), branch, first_row, rows);
        walk_tiles(number, branch, consumer, rows, operands, pending, at, dq);
      }
      settle(pending, dq);
      arrive_warp(smem_.rows_empty);
      store(job_again(number), first_row, rows, dq);
    }
  }

  /// The tiles of a branch, those passed over included.
  __device__ __forceinline__ void walk_tiles(int number, int branch, int consumer,
                                             const RowPair& rows, const Operands& operands,
                                             Pending& pending, Position& at,
                                             float (&dq)[kDimQk / 2]) {
    const int lane = threadIdx.x % 32;
    const bool listed = branch == kSelected;
    KeyTile tile{0, 0, {~0u, ~0u}};
    UnionBlock own{};     // of a lane, among 32 of the list,
    uint32_t wanted = 0;  // and which of them some token of the warpgroup chose
    int count, parts = 1;
    bool idle;
    {
      const Job job = job_again(number);
      idle = consumer * (kRows >> launch_.log2_group) >= job.count;
      if (listed) {
        count = launch_.args.union_counts[list_of(job)];
        parts = tiles_of_block();
      } else {
        const KeyRange keys = dense_keys(job, branch);
        tile.key = keys.begin - kRows;
        tile.end = keys.end;
        count = tiles_of(keys);
      }
    }
    for (int i = 0; i < count; ++i) {
      bool taken = !idle;
      if (listed) {
        if (i % 32 == 0) {
          own = UnionBlock{};
          if (i + lane < count) own = blocks_of(job_again(number))[i + lane];
          wanted = __ballot_sync(kFullWarp, wants(consumer, own));
        }
        taken = wanted >> i % 32 & 1;
        if (taken) {
          tile.key = __shfl_sync(kFullWarp, own.block, i % 32) * p_.config.select_size - kRows;
          tile.end = tile.key + kRows + p_.config.select_size;
          tile.tokens[0] = __shfl_sync(kFullWarp, own.tokens[0], i % 32);
          tile.tokens[1] = __shfl_sync(kFullWarp, own.tokens[1], i % 32);
        }
      }
      // A slot that is held while others are waited for may be the one they need.
      if (!taken) settle(pending, dq);
      for (int part = 0; part < parts; ++part) {
        wait_full(at);
        if (!taken) {
          arrive_warp(smem_.empty[at.slot]);
        } else {
          tile.key += kRows;
          if (pending.slot >= 0)
            add_tile<true>(at.slot, tile, rows, operands, pending, dq);
          else
            add_tile<false>(at.slot, tile, rows, operands, pending, dq);
        }
        at.advance();
      }
    }
  }

  /// Whether some token of a warpgroup chose a block.
  __device__ __forceinline__ bool wants(int consumer, const UnionBlock& block) const {
    const int tokens = kRows >> launch_.log2_group, first = consumer * tokens;
    if (tokens == kMaxTileTokens)  // G = 1: the second warpgroup has none
      return consumer == 0 && (block.tokens[0] | block.tokens[1]) != 0;
    return ((first < 32 ? block.tokens[0] : block.tokens[1]) >> first % 32 &
            (~0u >> (32 - tokens))) != 0;
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

  __device__ __forceinline__ Operands load_operands(int consumer) const {
    Operands operands;
    operands.q_tile = smem_addr(smem_.q[consumer]);
    operands.dout_tile = smem_addr(smem_.dout[consumer]);
    if constexpr (Operands::kQInRegisters) {
#pragma unroll
      for (int k = 0; k < kDimQk / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, rows_patch(operands.q_tile, warp_row(), k));
#pragma unroll
        for (int i = 0; i < 4; ++i) operands.q[4 * k + i] = a[i];
      }
    }
    return operands;
  }
  static __device__ __forceinline__ int warp_row() { return threadIdx.x % 128 / 32 * 16; }

  // This lane's row address for an ldmatrix.x4 of the 16 x 16 patch at row `row` and 16-column
  // `column` of a tile: 8 x 8 matrices in the order down, then right.
  static __device__ __forceinline__ uint32_t rows_patch(uint32_t tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    row += lane % 16;
    return tile + column / 4 * kPanelBytes + row * 128 +
           (((column % 4 * 2 + lane / 16) ^ (row % 8)) << 4);
  }

  __device__ __forceinline__ void issue_pending(const Pending& pending,
                                                float (&dq)[kDimQk / 2]) const {
    issue_update<T, kDimQk, kRows / 16>(dq, pending.ds, smem_addr(smem_.ring[pending.slot]));
  }
  __device__ __forceinline__ void settle(Pending& pending, float (&dq)[kDimQk / 2]) {
    if (pending.slot < 0) return;
    wgmma_fence();
    issue_pending(pending, dq);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dq);
    arrive_warp(smem_.empty[pending.slot]);
    pending.slot = -1;
  }

  template <bool kPending>
  __device__ __forceinline__ void add_tile(int slot, const KeyTile& tile, const RowPair& rows,
                                           const Operands& operands, Pending& pending,
                                           float (&dq)[kDimQk / 2]) {
    const uint32_t k_tile = smem_addr(smem_.ring[slot]);
    float s[kScores], dp[kScores];
    wgmma_fence();
    if constexpr (kPending) issue_pending(pending, dq);
    if constexpr (Operands::kQInRegisters)
      issue_scores<T, kRows, kDimQk>(s, operands.q, k_tile);
    else
      issue_scores<T, kRows, kDimQk>(s, operands.q_tile, k_tile);
    wgmma_commit();
    issue_scores<T, kRows, kDimV>(dp, operands.dout_tile, k_tile + Shape::kKBytes);
    wgmma_commit();
    // Meanwhile: the keys of the tile that the thread's rows see.
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
    wgmma_wait<1>();
    pin(s);
    if constexpr (kPending) {
      pin(dq);
      arrive_warp(smem_.empty[pending.slot]);
    }
    // In a block of code of their own: the compiler would take the exponentials after the wait.
    if (launch_.jobs > 0) {
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
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      const float gate = rows.gate[i % 2], delta = rows.gated_delta[i % 2];
      pending.ds[i] = pack2<T>(s[2 * i] * fmaf(gate, dp[2 * i], -delta),
                               s[2 * i + 1] * fmaf(gate, dp[2 * i + 1], -delta));
    }
    pending.slot = slot;
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
__global__ void __launch_bounds__(kThreads, 1)
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
                std::min(jobs, static_cast<unsigned>(multiprocessor_count())), kThreads,
                sizeof(typename Shape::Smem), stream, launch);
}

}  // namespace nsa::cuda::bwd::sm90
