// Key-stationary dK and dV on Hopper: each of the two consumer warpgroups of a block of threads
// owns 64 keys and walks the query rows that see them, in tiles of 64.
//
//   S^T = K Q^T          P^T = gate * exp2(scale S^T - lse)      dV += P^T dO
//   dP^T = V dO^T        dS^T = P^T * (dP^T - delta)             dK += scale dS^T Q
//
// Keys are the rows of every product, so P^T and dS^T leave one product where the next one wants
// its A operand: in registers. With ranges the 128 keys are one task and both warpgroups read every
// tile; with lists the warpgroups have a task each, neighbours: lists of their own, and the tokens
// whose window reaches both, which they read together.
//
// Barriers: `full` of a slot takes the warps that load and describe it, their copies, and the bytes
// of Q and dO; `empty` a warp each of both warpgroups, read or not.
#pragma once

#include "cuda/sm90/bwd_rows.cuh"

namespace nsa::cuda::bwd::sm90 {

template <class T_, int kDimQk_, int kDimV_, bool kList_>
struct DkvShape : Registers<2, 240> {
  using T = T_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr bool kList = kList_;
  static constexpr int kTaskKeys = kList ? kListTaskKeys : kRangeTaskKeys;
  static constexpr int kTasks = kList ? 2 : 1;  // of a block of threads
  // Query rows of a product: with Dk = 192 the accumulators leave no room for 64.
  static constexpr int kColumns = kDimQk > 128 ? 32 : 64;
  static constexpr int kSteps = kRows / kColumns;  // products that a tile takes
  static constexpr int kQBytes = kTileBytes<kDimQk>, kDoutBytes = kTileBytes<kDimV>;
  static constexpr int kStageBytes = kQBytes + kDoutBytes;
  // What 227 KB hold beside K and V.
  static constexpr int kFitting =
      (227 * 1024 - 1024 - 2 * kStageBytes) / (kStageBytes + int{sizeof(RowTileInfo)});
  static constexpr int kStages = kFitting < 8 ? kFitting : 8;
  // A warpgroup releases a tile when its next one is there.
  static_assert(kStages > kTasks);

  struct Smem {
    alignas(1024) char k[2][kQBytes];  // a warpgroup's
    alignas(1024) char v[2][kDoutBytes];
    alignas(1024) char ring[kStages][kStageBytes];  // Q, then dO
    RowTileInfo info[kStages];
    uint64_t full[kStages], empty[kStages], keys_full[kTasks];
    RowWalk walk[kTasks];
    KeyRange keys[2];  // a warpgroup's, counted like those of RowTileInfo
  };
};

template <class Shape>
class DkvKernel {
  using T = typename Shape::T;
  using Smem = typename Shape::Smem;
  using Position = RingPosition<Shape::kStages>;
  static constexpr int kDimQk = Shape::kDimQk, kDimV = Shape::kDimV, kColumns = Shape::kColumns;
  static constexpr int kScores = kColumns / 2;

 public:
  __device__ __forceinline__ DkvKernel(const DkvLaunch& launch, const KeyTask* tasks, int count,
                                       char* smem)
      : launch_(launch),
        p_(launch.args.common.p),
        tasks_(tasks),
        count_(count),
        smem_(*reinterpret_cast<Smem*>(smem)) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        mbarrier_init(smem_addr(&smem_.full[i]), kRowArrivals<Shape::kList>);
        mbarrier_init(smem_addr(&smem_.empty[i]), (Shape::kList ? 4 * count_ : 8) * kWarpArrivals);
      }
      for (uint64_t& full : smem_.keys_full) mbarrier_init(smem_addr(&full), 1);
      fence_barrier_init();
    }
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0 && warp < count_)
      make_walk<Shape::kList>(launch_, tasks_, count_, warp, smem_.walk[warp]);
    if (threadIdx.x % 32 == 0 && warp < 2) describe_keys(warp);
    __syncthreads();
    if (threadIdx.x < 128) {
      lower_registers<Shape::kProducerRegisters>();
      if constexpr (Shape::kList)
        produce(warp % 2, warp < 2, 0);
      else if (warp < 3)
        produce(0, warp == 0, warp - 1);
    } else {
      const int consumer = threadIdx.x / 128 - 1;
      if (Shape::kList && consumer >= count_) return;
      raise_registers<Shape::kConsumerRegisters>();
      consume(consumer);
    }
  }

 private:
  /// Which keys of its task's walk a warpgroup owns.
  __device__ __forceinline__ void describe_keys(int consumer) {
    KeyRange keys{0, 0};
    if constexpr (Shape::kList) {
      if (consumer < count_) {
        keys.begin = tasks_[consumer].key - smem_.walk[consumer].base_key;
        keys.end = keys.begin + tasks_[consumer].keys;
      }
    } else {
      keys = {consumer * kRows, min((consumer + 1) * kRows, tasks_[0].keys)};
    }
    smem_.keys[consumer] = keys;
  }

  /// A warp of the producer.
  __device__ __forceinline__ void produce(int task, bool loads, int half) {
    if (task >= count_) return;
    const RowWalk& walk = smem_.walk[task];
    if (loads) {
      if (threadIdx.x % 32 == 0) load_keys(task);
      __syncwarp();
      load_rows<Shape>(launch_, walk, smem_);
    } else {
      describe_rows<Shape>(launch_, walk, half, smem_);
    }
  }

  __device__ __forceinline__ void load_keys(int number) {
    constexpr int kTiles = 2 / Shape::kTasks;  // of a task
    const KeyTask& task = tasks_[number];
    const Sequence sequence = load_sequence(p_.shape, task.batch);
    const uint32_t full = smem_addr(&smem_.keys_full[number]);
    mbarrier_arrive_expect(full, kTiles * Shape::kStageBytes);
    const int row = first_key_row(sequence, launch_.args.plan.branch, p_.config) + task.key;
    const int batch = static_cast<int>(sequence.batch);
    for (int i = 0; i < kTiles; ++i) {
      for (int panel = 0; panel < kDimQk / 64; ++panel)
        tma_load(smem_addr(smem_.k[number + i]) + panel * kPanelBytes, &launch_.k, full, panel * 64,
                 task.head, row + i * kRows, batch);
      for (int panel = 0; panel < kDimV / 64; ++panel)
        tma_load(smem_addr(smem_.v[number + i]) + panel * kPanelBytes, &launch_.v, full, panel * 64,
                 task.head, row + i * kRows, batch);
    }
  }

  // ---- Consumers --------------------------------------------------------------------------------

  __device__ __forceinline__ void wait_full(const Position& at) {
    mbarrier_wait(smem_addr(&smem_.full[at.slot]), at.parity);
  }

  /// Releases `count` tiles unread. An arrival before the tile is there would count for the tile
  /// before it.
  __device__ __forceinline__ void pass_over(int count, Position& at) {
    for (int i = 0; i < count; ++i) {
      wait_full(at);
      arrive_warp(smem_.empty[at.slot]);
      at.advance();
    }
  }

  __device__ __forceinline__ void consume(int consumer) {
    const int number = Shape::kList ? consumer : 0;
    const KeyTask& task = tasks_[number];
    const RowWalk& walk = smem_.walk[number];
    Position at;
    int count = walk.tiles;
    if constexpr (!Shape::kList) {
      const TileRange seen = tiles_seen(consumer);
      pass_over(seen.first, at);
      count = seen.count;
    }
    float dk[kDimQk / 2], dv[kDimV / 2];
#pragma unroll
    for (int i = 0; i < kDimQk / 2; ++i) dk[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kDimV / 2; ++i) dv[i] = 0.0f;
    pin(dk);
    pin(dv);
    mbarrier_wait(smem_addr(&smem_.keys_full[number]), 0);
    if (count > 0) walk_tiles(consumer, walk, count, at, dk, dv);
    if constexpr (Shape::kList) {
      pass_over(walk.places_left(), at);
    } else {
      const TileRange seen = tiles_seen(consumer);  // rather than kept: there are no registers
      pass_over(walk.tiles - seen.first - seen.count, at);
    }

    const Sequence sequence = load_sequence(p_.shape, task.batch);
    const BranchBwd& branch = p_.branch[launch_.args.plan.branch];
    const int first_key = Shape::kList ? 0 : consumer * kRows;
    store<kDimQk>(dk, static_cast<float>(p_.shape.softmax_scale), task, sequence, first_key,
                  branch.dk, 0);
    store<kDimV>(dv, 1.0f, task, sequence, first_key, branch.dv, Shape::kTaskKeys * kDimQk);
  }

  struct TileRange {
    int first, count;
  };
  /// Tiles of a range with queries that see some of a warpgroup's keys.
  __device__ __forceinline__ TileRange tiles_seen(int consumer) const {
    const KeyTask& task = tasks_[0];
    const int first_key = consumer * kRows, keys = min(kRows, task.keys - first_key);
    if (keys <= 0) return {0, 0};
    const Sequence sequence = load_sequence(p_.shape, task.batch);
    const QueryRange range = range_queries(sequence, launch_.args.plan.range_branch,
                                           task.key + first_key, keys, p_.config);
    const int begin = max(range.begin - task.token_begin, 0);
    const int end = min(range.begin + range.count - task.token_begin, task.token_count);
    if (begin >= end) return {0, 0};
    const int shift = 6 - launch_.log2_group, first = begin >> shift;
    return {first, ((end + (1 << shift) - 1) >> shift) - first};
  }

  /// dK of a step waits for the next one, so that the tensor cores have that product, S^T and dP^T
  /// to work on before the exponentials, and dV while dS^T is made. Accumulators that are read are
  /// never in flight from one step to the next: the compiler would wait for every product.
  __device__ __forceinline__ void walk_tiles(int consumer, const RowWalk& walk, int count,
                                             Position& at, float (&dk)[kDimQk / 2],
                                             float (&dv)[kDimV / 2]) {
    const uint32_t k_tile = smem_addr(smem_.k[consumer]), v_tile = smem_addr(smem_.v[consumer]);
    const float scale_log2 = static_cast<float>(p_.shape.softmax_scale * 1.4426950408889634);
    // Before the first step: zeros, times rows that are there.
    uint32_t ds_packed[kScores / 2];
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) ds_packed[i] = 0;
    if (Shape::kList && walk.passes_one(0)) pass_over(1, at);
    uint32_t previous_q = smem_addr(smem_.ring[at.slot]);
    int previous_slot = -1;
    for (int tile = 0; tile < count; ++tile) {
      if (Shape::kList && tile > 0 && walk.passes_one(tile)) pass_over(1, at);
      wait_full(at);
      const RowTileInfo& info = smem_.info[at.slot];
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        const uint32_t q = smem_addr(smem_.ring[at.slot]) + step * kColumns * 128;
        const uint32_t dout = q + Shape::kQBytes;
        const int column = step * kColumns + threadIdx.x % 4 * 2;
        float s[kScores], dp[kScores];
        wgmma_fence();
        issue_update<T, kDimQk, kColumns / 16>(dk, ds_packed, uniform(previous_q));
        issue_scores<T, kColumns, kDimQk>(s, uniform(k_tile), uniform(q));
        wgmma_commit();
        issue_scores<T, kColumns, kDimV>(dp, uniform(v_tile), uniform(dout));
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        pin(dk);
        if (step == 0 && previous_slot >= 0) arrive_warp(smem_.empty[previous_slot]);
        if (info.masked[0][consumer] | info.masked[1][consumer])
          mask(s, info, smem_.keys[consumer].begin, column);
        uint32_t p_packed[kScores / 2];
        make_p(s, p_packed, info, column, scale_log2);
        wgmma_fence();
        issue_update<T, kDimV, kColumns / 16>(dv, p_packed, uniform(dout));
        wgmma_commit();
        wgmma_wait<1>();
        pin(dp);
        make_ds(p_packed, dp, ds_packed, info, column);
        wgmma_wait<0>();
        pin(dv);
        previous_q = q;
      }
      previous_slot = at.slot;
      at.advance();
    }
    wgmma_fence();
    issue_update<T, kDimQk, kColumns / 16>(dk, ds_packed, uniform(previous_q));
    wgmma_commit();
    wgmma_wait<0>();
    pin(dk);
    arrive_warp(smem_.empty[previous_slot]);
  }

  /// P^T of a step, as the A operand of its product with dO.
  static __device__ __forceinline__ void make_p(const float (&s)[kScores],
                                                uint32_t (&packed)[kScores / 2],
                                                const RowTileInfo& info, int column,
                                                float scale_log2) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const float2 lse = *reinterpret_cast<const float2*>(&info.lse_log2[column + n * 8]);
      const float2 gate = *reinterpret_cast<const float2*>(&info.gate[column + n * 8]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        packed[2 * n + i] =
            pack2<T>(exp2_approx(fmaf(s[4 * n + 2 * i], scale_log2, -lse.x)) * gate.x,
                     exp2_approx(fmaf(s[4 * n + 2 * i + 1], scale_log2, -lse.y)) * gate.y);
    }
  }
  /// dS^T from P^T, which is rounded by now, and dP^T.
  static __device__ __forceinline__ void make_ds(const uint32_t (&p_packed)[kScores / 2],
                                                 const float (&dp)[kScores],
                                                 uint32_t (&packed)[kScores / 2],
                                                 const RowTileInfo& info, int column) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(&info.delta[column + n * 8]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 p = unpack2<T>(p_packed[2 * n + i]);
        packed[2 * n + i] =
            pack2<T>(p.x * (dp[4 * n + 2 * i] - delta.x), p.y * (dp[4 * n + 2 * i + 1] - delta.y));
      }
    }
  }

  /// Scores of keys that the column's row does not see become -inf.
  __device__ __forceinline__ void mask(float (&s)[kScores], const RowTileInfo& info, int first_key,
                                       int column) {
    const int first = first_key + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const int2 begin = *reinterpret_cast<const int2*>(&info.key_begin[column + n * 8]);
      const int2 end = *reinterpret_cast<const int2*>(&info.key_end[column + n * 8]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first + i / 2 * 8;
        if (key < (i % 2 ? begin.y : begin.x) || key >= (i % 2 ? end.y : end.x))
          s[4 * n + i] = -INFINITY;
      }
    }
  }

  /// The accumulators of a warpgroup's keys, times `factor`: to the task's partial result, at
  /// `offset` of its slot, or as T to `view`.
  template <int kDim>
  __device__ __forceinline__ void store(const float (&acc)[kDim / 2], float factor,
                                        const KeyTask& task, const Sequence& sequence,
                                        int first_key, const OutView& view, int offset) {
    const int lane = threadIdx.x % 32;
    const int key = first_key + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const int slot = task.slot;
    float* partial = launch_.args.plan.partial +
                     static_cast<int64_t>(slot) * Shape::kTaskKeys * (kDimQk + kDimV) + offset;
    T* dst = branch_keys(typed<T>(view), sequence, launch_.args.plan.branch, p_.config) +
             task.head * view.head + task.key * view.seq;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = key + half * 8;
      if (row >= task.keys) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int column = n * 8 + 2 * (lane % 4);
        const float x = acc[4 * n + 2 * half] * factor, y = acc[4 * n + 2 * half + 1] * factor;
        if (slot >= 0)
          *reinterpret_cast<float2*>(partial + row * kDim + column) = make_float2(x, y);
        else
          *reinterpret_cast<uint32_t*>(dst + row * view.seq + column) = pack2<T>(x, y);
      }
    }
  }

  const DkvLaunch& launch_;
  const AttnBwd& p_;
  const KeyTask* tasks_;
  int count_;
  Smem& smem_;
};

/// Which task of a range a block takes; -1: none. Blocks go head by head and piece by piece, the
/// last queries first, so that blocks that run together walk the same rows: Q and dO of a head, 512
/// MB at 65536 tokens, then come from L2 rather than once for every 128 keys from memory.
__device__ __forceinline__ int range_task(const KeyPlan& plan) {
  const int block = blockIdx.x, tiles = plan.groups.count, per_head = tiles * plan.max_pieces;
  const int head = block / per_head, piece = block % per_head / tiles;
  const SplitTile& tile = plan.tiles[head * tiles + block % tiles];
  return piece < tile.tasks ? tile.task + tile.tasks - 1 - piece : -1;
}

/// The same of lists, which all are walked from the last queries on: the first of a pair of tasks.
/// Tasks that run together share rows where they are at the same place, so they start together: the
/// keys of a head from the last ones, with the shortest lists, to the first, every other round of
/// the multiprocessors the other way round, so that who starts late in one ends early in the next.
/// The head that ends the launch ends with its short tasks.
__device__ __forceinline__ int list_tasks(const KeyPlan& plan, int heads, int multiprocessors) {
  const int tasks = *plan.num_tasks, pairs = (tasks + 1) / 2, block = blockIdx.x;
  if (block >= pairs) return -1;
  // Where the pairs of the second head start; the first head comes last.
  const int last = heads > 1 ? plan.tiles[plan.groups.count * plan.parts].task / 2 : pairs;
  const int turned = pairs - last;
  if (block >= turned) return 2 * (block - turned);
  const int round = block / multiprocessors * multiprocessors, i = block - round;
  const int size = min(multiprocessors, turned - round);
  return 2 * (pairs - 1 - (round + (round / multiprocessors % 2 ? size - 1 - i : i)));
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    bwd_dkv_kernel(const __grid_constant__ DkvLaunch launch) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // other targets get an empty body that is never launched
  char* const smem = aligned_shared_memory();
  const KeyPlan& plan = launch.args.plan;
  const int heads = static_cast<int>(launch.args.common.p.shape.heads_kv);
  const int task =
      Shape::kList ? list_tasks(plan, heads, launch.multiprocessors) : range_task(plan);
  if (task < 0) return;
  const int count = Shape::kList ? min(2, *plan.num_tasks - task) : 1;
  DkvKernel<Shape>(launch, plan.tasks + task, count, smem).run();
#endif
}

template <class Shape>
void launch_bwd_dkv_shape(const DkvLaunch& launch, cudaStream_t stream) {
  const KeyPlan& plan = launch.args.plan;
  const int64_t blocks =
      Shape::kList ? ceil_div(plan.max_tasks, 2)
                   : launch.args.common.p.shape.heads_kv * plan.groups.count * plan.max_pieces;
  if (blocks == 0) return;
  launch_kernel(bwd_dkv_kernel<Shape>, "sm90::bwd_dkv_kernel", grid_size(blocks), Shape::kThreads,
                sizeof(typename Shape::Smem), stream, launch);
}

template <class T, int kDimQk, int kDimV>
void launch_bwd_dkv(const DkvArgs& args, cudaStream_t stream) {
  const AttnBwd& p = args.common.p;
  const BranchBwd& branch = p.branch[args.plan.branch];
  DkvLaunch launch{args};
  launch.multiprocessors = multiprocessor_count();
  launch.log2_group = log2_padded_group(args.common.group);
  const int padded = 1 << launch.log2_group;
  if (p.shape.total_q > 0) {
    launch.q = query_map(p.shape, p.q, kDimQk, padded, kRows / padded);
    launch.dout = query_map(p.shape, p.dout, kDimV, padded, kRows / padded);
    launch.q_token = query_map(p.shape, p.q, kDimQk, padded, 1);
    launch.dout_token = query_map(p.shape, p.dout, kDimV, padded, 1);
  }
  launch.k = key_map(p, args.plan.branch, branch.k, kDimQk);
  launch.v = key_map(p, args.plan.branch, branch.v, kDimV);
  if (args.plan.has_list)
    launch_bwd_dkv_shape<DkvShape<T, kDimQk, kDimV, true>>(launch, stream);
  else
    launch_bwd_dkv_shape<DkvShape<T, kDimQk, kDimV, false>>(launch, stream);
}

}  // namespace nsa::cuda::bwd::sm90
