// Query-stationary dQ on Hopper: a block of threads owns 128 query rows (whole tokens) and walks
// the keys that they see in all branches, so that their sum stays in registers and is rounded once.
//
//   S = Q K^T     P = gate * exp2(scale S - lse)     dP = dO V^T     dS = P * (dP - delta)
//   dQ += scale dS K
//
// Two consumer warpgroups of 64 rows each; of the producer warpgroup one warp loads tiles of 64
// keys and another Q and dO. A warpgroup passes over selected blocks that none of its tokens chose.
// Blocks of threads are persistent: the keys of a block's next query tile are loaded while it works
// on this one.
//
// Barriers: `full` of a slot takes its info and the bytes of K and V; `empty` the eight warps that
// read it; `rows_full`, `rows_empty` the same for Q and dO.
#pragma once

#include <algorithm>

#include "cuda/sm90/bwd_tiles.cuh"
#include "cuda/sm90/fwd_epilogue.cuh"

namespace nsa::cuda::bwd::sm90 {

struct DqLaunch {
  DqArgs args;
  int log2_group;  // of the padded group
  int jobs;        // query tiles of all heads, gaps in their numbering included
  CUtensorMap q, dout;
  CUtensorMap k[kNumBranches], v[kNumBranches];
};

/// What the warpgroups must know of a selected block's tile of keys.
struct alignas(16) KeyTileInfo {
  int key, end;        // keys [key, min(key + 64, end))
  uint32_t tokens[2];  // of the query tile, that chose them

  __device__ __forceinline__ uint32_t bits_from(int token) const {
    return (token < 32 ? tokens[0] : tokens[1]) >> token % 32;
  }
};

template <class T_, int kDimQk_, int kDimV_>
struct DqShape : Registers<224> {
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
    KeyTileInfo info[kStages];
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

  /// A thread's two rows, 8 apart: what the current branch says about them.
  struct RowPair {
    int token[2];  // within the query tile; -1 for padding, which sees nothing
    float lse_log2[2], delta[2], gate[2];
    KeyRange keys[2];
  };

 public:
  __device__ __forceinline__ DqKernel(const DqLaunch& launch, char* smem)
      : launch_(launch), p_(launch.args.common.p), smem_(*reinterpret_cast<Smem*>(smem)) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        mbarrier_init(smem_addr(&smem_.full[i]), 1);
        mbarrier_init(smem_addr(&smem_.empty[i]), 4 * Shape::kConsumers);
      }
      mbarrier_init(smem_addr(&smem_.rows_full), 1);
      mbarrier_init(smem_addr(&smem_.rows_empty), 4 * Shape::kConsumers);
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
  /// Calls body(job) for the query tiles of this block of threads. One kv head at a time across the
  /// grid, so that its K and V stay in L2; long rows first.
  template <class Body>
  __device__ __forceinline__ void for_each_job(const Body& body) const {
    const TileMap& tiles = launch_.args.tiles;
    for (int i = blockIdx.x; i < launch_.jobs; i += gridDim.x) {
      Job job;
      job.head = i / tiles.count;
      job.number = tiles.count - 1 - i % tiles.count;
      const TileMap::Place place = tiles.place(job.number);
      job.sequence = load_sequence(p_.shape, place.batch);
      job.first = place.index * launch_.args.tile_tokens;
      job.count = min(launch_.args.tile_tokens, job.sequence.q_len - job.first);
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

  // ---- Producers --------------------------------------------------------------------------------

  /// One lane: a tile of keys into the ring.
  __device__ __forceinline__ void load_tile(const Job& job, int branch, const KeyTileInfo& info,
                                            Position& at) {
    mbarrier_wait(smem_addr(&smem_.empty[at.slot]), at.parity ^ 1);
    const uint32_t full = smem_addr(&smem_.full[at.slot]), dst = smem_addr(smem_.ring[at.slot]);
    const int row = first_key_row(job.sequence, branch, p_.config) + info.key;
    const int batch = static_cast<int>(job.sequence.batch);
    smem_.info[at.slot] = info;
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
          const int64_t list = list_of(job);
          const UnionBlock* blocks =
              launch_.args.union_blocks + list * launch_.args.tile_tokens * p_.index_count;
          const int count = launch_.args.union_counts[list], size = p_.config.select_size;
          for (int base = 0; base < count; base += 32) {
            UnionBlock own{};
            if (base + lane < count) own = blocks[base + lane];
            for (int i = 0; i < min(32, count - base); ++i) {
              const int key = __shfl_sync(kFullWarp, own.block, i) * size;
              const uint32_t low = __shfl_sync(kFullWarp, own.tokens[0], i);
              const uint32_t high = __shfl_sync(kFullWarp, own.tokens[1], i);
              if (lane == 0)
                for (int part = 0; part < size; part += kRows)
                  load_tile(job, branch, {key + part, key + size, {low, high}}, at);
              __syncwarp();
            }
          }
        } else if (lane == 0) {
          const KeyRange keys = dense_keys(job, branch);
          for (int i = 0; i < tiles_of(keys); ++i)
            load_tile(job, branch, {keys.begin + i * kRows, keys.end, {~0u, ~0u}}, at);
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
  __device__ __forceinline__ void release(Position& at) {
    arrive_warp(smem_.empty[at.slot]);
    at.advance();
  }

  __device__ void consume(int consumer) {
    const int tokens = kRows >> launch_.log2_group;
    Position at;
    uint32_t parity = 0;
    for_each_job([&](const Job& job) {
      const int first_token = consumer * tokens;
      const bool idle = first_token >= job.count;
      RowPair rows;
      const int first_row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i, token = first_token + (row >> launch_.log2_group);
        const bool valid = token < job.count && head_of(row) < launch_.args.common.group;
        rows.token[i] = valid ? token : -1;
      }
      float dq[kDimQk / 2];
#pragma unroll
      for (int i = 0; i < kDimQk / 2; ++i) dq[i] = 0.0f;
      pin(dq);
      mbarrier_wait(smem_addr(&smem_.rows_full), parity);
      parity ^= 1;
      const Operands operands = load_operands(consumer);
#pragma unroll 1
      for (int branch = 0; branch < kNumBranches; ++branch) {
        if (!p_.branch[branch].enabled) continue;
        load_branch(job, branch, first_row, rows);
        const bool listed = branch == kSelected;
        const KeyRange keys = dense_keys(job, branch);
        const int tiles =
            listed ? launch_.args.union_counts[list_of(job)] * tiles_of_block() : tiles_of(keys);
        for (int i = 0; i < tiles; ++i) {
          wait_full(at);
          const KeyTileInfo info = smem_.info[at.slot];
          const Takers takers = listed ? takers_of(info, consumer)
                                : idle ? Takers::kNone
                                       : Takers::kAll;
          if (takers != Takers::kNone) {
            KeyRange seen[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int token = rows.token[half];
              const bool looks = token >= 0 && (info.bits_from(token) & 1);
              seen[half] = {rows.keys[half].begin - info.key,
                            looks ? min(rows.keys[half].end, info.end) - info.key : 0};
            }
            const uint32_t k_tile = smem_addr(smem_.ring[at.slot]);
            if (takers == Takers::kAll)
              add_tile(k_tile, rows, seen, operands, dq);
            else if (takers == Takers::kThisWarp)
              add_tile_alone(k_tile, rows, seen, operands, dq);
          }
          release(at);
        }
      }
      arrive_warp(smem_.rows_empty);
      store(job, first_row, rows, dq);
    });
  }

  /// Query head of a row, within the group.
  __device__ __forceinline__ int head_of(int row) const {
    return row & ((1 << launch_.log2_group) - 1);
  }

  /// Who of a warpgroup works on a selected block. A block that matters to one warp's rows alone is
  /// left to that warp: wgmma would take all 64 rows through it, and on random selections with
  /// G = 16 that is how most blocks are.
  enum class Takers { kNone, kThisWarp, kOtherWarp, kAll };
  __device__ __forceinline__ Takers takers_of(const KeyTileInfo& info, int consumer) const {
    const int tokens = kRows >> launch_.log2_group, first = consumer * tokens;
    if (tokens > 32)  // G = 1
      return first == 0 && (info.tokens[0] | info.tokens[1]) != 0 ? Takers::kAll : Takers::kNone;
    const uint32_t bits = info.bits_from(first) & (~0u >> (32 - tokens));
    if (bits == 0) return Takers::kNone;
    if (tokens < 4) return Takers::kAll;  // a token has rows in more than one warp
    const int per_warp = tokens / 4, warp = (__ffs(bits) - 1) / per_warp;
    if (bits >> (warp * per_warp) >> per_warp != 0) return Takers::kAll;
    return warp == threadIdx.x % 128 / 32 ? Takers::kThisWarp : Takers::kOtherWarp;
  }

  __device__ __forceinline__ void load_branch(const Job& job, int branch, int first_row,
                                              RowPair& rows) const {
    const int group = launch_.args.common.group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // A row that is not there has gate 0 and exponentials 0.
      rows.lse_log2[i] = INFINITY;
      rows.delta[i] = rows.gate[i] = 0.0f;
      rows.keys[i] = {0, 0};
      if (rows.token[i] < 0) continue;
      const int64_t token = job.sequence.q_row + job.first + rows.token[i];
      const float4 x = __ldg(reinterpret_cast<const float4*>(
          launch_.args.common.stats +
          ((branch * p_.shape.heads_kv + job.head) * p_.shape.total_q + token) * group +
          head_of(first_row + 8 * i)));
      rows.lse_log2[i] = x.x;
      rows.delta[i] = x.y;
      rows.gate[i] = x.z;
      rows.keys[i] =
          visible_keys(branch, job.sequence.position(job.first + rows.token[i]), p_.config);
    }
  }

  /// Rows of Q as the A operand: in registers where there is room beside the accumulators, which
  /// takes a fifth of the load off shared memory.
  struct Operands {
    static constexpr bool kQInRegisters = kDimQk <= 128;
    uint32_t q[kQInRegisters ? kDimQk / 4 : 1];
    uint32_t q_tile, dout_tile;  // of the warpgroup
  };
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
  // `column` of a tile: 8 x 8 matrices in the order down, then right, or right, then down.
  static __device__ __forceinline__ uint32_t rows_patch(uint32_t tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    return patch(tile, row + lane % 16, column, lane / 16);
  }
  static __device__ __forceinline__ uint32_t columns_patch(uint32_t tile, int row, int column) {
    const int lane = threadIdx.x % 32;
    return patch(tile, row + lane % 8 + lane / 16 * 8, column, lane / 8 % 2);
  }
  static __device__ __forceinline__ uint32_t patch(uint32_t tile, int row, int column, int chunk) {
    return tile + column / 4 * kPanelBytes + row * 128 +
           (((column % 4 * 2 + chunk) ^ (row % 8)) << 4);
  }

  /// P of a tile from its scores, in place. Row i of the pair sees `seen[i]` only, relative to the
  /// tile.
  __device__ __forceinline__ void make_p(float (&s)[kScores], const RowPair& rows,
                                         const KeyRange (&seen)[2]) const {
    const bool whole =
        seen[0].begin <= 0 && seen[0].end >= kRows && seen[1].begin <= 0 && seen[1].end >= kRows;
    if (!__all_sync(kFullWarp, whole)) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        const int key = threadIdx.x % 4 * 2 + i / 4 * 8 + i % 2;
        const KeyRange& range = seen[i / 2 % 2];
        if (key < range.begin || key >= range.end) s[i] = -INFINITY;
      }
    }
    const float scale_log2 = static_cast<float>(p_.shape.softmax_scale * 1.4426950408889634);
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      s[i] = exp2_approx(fmaf(s[i], scale_log2, -rows.lse_log2[i / 2 % 2])) * rows.gate[i / 2 % 2];
  }
  static __device__ __forceinline__ void make_ds(const float (&s)[kScores],
                                                 const float (&dp)[kScores], const RowPair& rows,
                                                 uint32_t (&ds)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      const float delta = rows.delta[i % 2];
      ds[i] = pack2<T>(s[2 * i] * (dp[2 * i] - delta), s[2 * i + 1] * (dp[2 * i + 1] - delta));
    }
  }

  /// dq += dS K of one tile, by the warpgroup.
  __device__ __forceinline__ void add_tile(uint32_t k_tile, const RowPair& rows,
                                           const KeyRange (&seen)[2], const Operands& operands,
                                           float (&dq)[kDimQk / 2]) const {
    float s[kScores], dp[kScores];
    uint32_t ds[kScores / 2];
    wgmma_fence();
    if constexpr (Operands::kQInRegisters)
      issue_scores<T, kRows, kDimQk>(s, operands.q, k_tile);
    else
      issue_scores<T, kRows, kDimQk>(s, operands.q_tile, k_tile);
    wgmma_commit();
    issue_scores<T, kRows, kDimV>(dp, operands.dout_tile, k_tile + Shape::kKBytes);
    wgmma_commit();
    wgmma_wait<1>();
    pin(s);
    make_p(s, rows, seen);
    wgmma_wait<0>();
    pin(dp);
    make_ds(s, dp, rows, ds);
    wgmma_fence();
    issue_update<T, kDimQk, kRows / 16>(dq, ds, k_tile);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dq);
  }

  /// The same by one warp for its 16 rows, whose fragments are those of the warpgroup's products.
  __device__ __forceinline__ void add_tile_alone(uint32_t k_tile, const RowPair& rows,
                                                 const KeyRange (&seen)[2],
                                                 const Operands& operands,
                                                 float (&dq)[kDimQk / 2]) const {
    float s[kScores], dp[kScores];
    uint32_t ds[kScores / 2];
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = dp[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < kDimQk / 16; ++k) {
      uint32_t a[4];
      if constexpr (Operands::kQInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = operands.q[4 * k + i];
      } else {
        ldmatrix_x4(a, rows_patch(operands.q_tile, warp_row(), k));
      }
      multiply_keys(s, a, k_tile, k);
    }
    make_p(s, rows, seen);
#pragma unroll
    for (int k = 0; k < kDimV / 16; ++k) {
      uint32_t a[4];
      ldmatrix_x4(a, rows_patch(operands.dout_tile, warp_row(), k));
      multiply_keys(dp, a, k_tile + Shape::kKBytes, k);
    }
    make_ds(s, dp, rows, ds);
#pragma unroll
    for (int k = 0; k < kRows / 16; ++k)
#pragma unroll
      for (int d = 0; d < kDimQk / 16; ++d) {
        const uint32_t a[4] = {ds[4 * k], ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3]};
        uint32_t b[4];
        ldmatrix_x4_trans(b, rows_patch(k_tile, k * 16, d));
        mma_16816<T>(fragment(dq, 2 * d), a, b[0], b[1]);
        mma_16816<T>(fragment(dq, 2 * d + 1), a, b[2], b[3]);
      }
  }

  /// x += a B^T for 16 columns: a rows of Q or dO, B the 64 rows of a tile.
  static __device__ __forceinline__ void multiply_keys(float (&x)[kScores], const uint32_t (&a)[4],
                                                       uint32_t tile, int column) {
#pragma unroll
    for (int n = 0; n < kRows / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, columns_patch(tile, n * 16, column));
      mma_16816<T>(fragment(x, 2 * n), a, b[0], b[1]);
      mma_16816<T>(fragment(x, 2 * n + 1), a, b[2], b[3]);
    }
  }
  /// The accumulators of 8 columns.
  template <int kCount>
  static __device__ __forceinline__ float (&fragment(float (&x)[kCount], int n))[4] {
    return reinterpret_cast<float (&)[4]>(x[4 * n]);
  }

  /// Rows of 16 bytes a lane: the four lanes of a quad exchange their columns first.
  __device__ __forceinline__ void store(const Job& job, int first_row, const RowPair& rows,
                                        const float (&dq)[kDimQk / 2]) const {
    const float scale = static_cast<float>(p_.shape.softmax_scale);
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
  const int padded = 1 << launch.log2_group;
  launch.q = query_map(p.shape, p.q, kDimQk, padded, kRows / padded);
  launch.dout = query_map(p.shape, p.dout, kDimV, padded, kRows / padded);
  for (int c = 0; c < kNumBranches; ++c) {
    if (!p.branch[c].enabled) continue;
    launch.k[c] = key_map(p, c, p.branch[c].k, kDimQk);
    launch.v[c] = key_map(p, c, p.branch[c].v, kDimV);
  }
  int device, multiprocessors;
  NSA_CUDA_CHECK(cudaGetDevice(&device));
  NSA_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  launch_kernel(bwd_dq_kernel<Shape>, "sm90::bwd_dq_kernel",
                std::min(jobs, static_cast<unsigned>(multiprocessors)), kThreads,
                sizeof(typename Shape::Smem), stream, launch);
}

}  // namespace nsa::cuda::bwd::sm90
