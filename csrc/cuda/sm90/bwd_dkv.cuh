// Key-stationary dK and dV on Hopper: a block of threads owns 128 keys (of a range) or 64 (of a
// selected block) and walks the query rows that see them, in tiles of 64.
//
//   S^T = K Q^T            P^T = exp2(scale S^T - lse + log2 gate)  dV += P^T dO
//   dP^T = V dO^T - delta  dS^T = P^T * dP^T                        dK += scale dS^T Q
//
// Rows of negative gates change their sign afterwards.
//
// Keys are the rows of every product, so P^T and dS^T leave one product where the next one wants
// its A operand: in registers. With ranges each of the two consumer warpgroups owns 64 keys and
// both read every tile; with lists both own the same keys, take every other tile, and add up at the
// end.
//
// Barriers: `full` of a slot takes the three producer warps, their copies, and the bytes of Q and
// dO; `empty` the consumers' warps, those that only pass over the tile too: who waits two phases
// ahead of a barrier, or behind it, does not see its own.
#pragma once

#include "cuda/sm90/bwd_rows.cuh"

namespace nsa::cuda::bwd::sm90 {

template <class T_, int kDimQk_, int kDimV_, bool kList_>
struct DkvShape : Registers<2, 240> {
  using T = T_;
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr bool kList = kList_;
  static constexpr int kTaskKeys = kList ? kListTaskKeys : kRangeTaskKeys;
  static constexpr int kKeyTiles = kTaskKeys / kRows;
  // Query rows of a product: with Dk = 192 the accumulators leave no room for 64.
  static constexpr int kColumns = kDimQk > 128 ? 32 : 64;
  static constexpr int kSteps = kRows / kColumns;  // products that a tile takes
  static constexpr int kQBytes = kTileBytes<kDimQk>, kDoutBytes = kTileBytes<kDimV>;
  static constexpr int kStageBytes = kQBytes + kDoutBytes;
  // What 227 KB hold beside K and V.
  static constexpr int kFitting =
      (227 * 1024 - 1024 - kKeyTiles * kStageBytes) / (kStageBytes + int{sizeof(RowTileInfo)});
  static constexpr int kStages = kFitting < 8 ? kFitting : 8;
  static_assert(kStages >= 2);

  struct Smem {
    alignas(1024) char k[kKeyTiles][kQBytes];
    alignas(1024) char v[kKeyTiles][kDoutBytes];
    alignas(1024) char ring[kStages][kStageBytes];  // Q, then dO
    RowTileInfo info[kStages];
    uint64_t full[kStages], empty[kStages], keys_full;
  };
  // Two warpgroups exchange half of their sums through the ring.
  static_assert(!kList || kStages * kStageBytes >= 128 * (kDimQk + kDimV) * 2);
};

template <class Shape>
class DkvKernel {
  using T = typename Shape::T;
  using Smem = typename Shape::Smem;
  using Position = RingPosition<Shape::kStages>;
  static constexpr int kDimQk = Shape::kDimQk, kDimV = Shape::kDimV, kColumns = Shape::kColumns;
  static constexpr int kScores = kColumns / 2;

 public:
  __device__ __forceinline__ DkvKernel(const DkvLaunch& launch, const KeyTask& task, char* smem)
      : launch_(launch),
        p_(launch.args.common.p),
        task_(task),
        smem_(*reinterpret_cast<Smem*>(smem)) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Shape::kStages; ++i) {
        mbarrier_init(smem_addr(&smem_.full[i]), kRowArrivals);
        mbarrier_init(smem_addr(&smem_.empty[i]), 8 * kWarpArrivals);
      }
      mbarrier_init(smem_addr(&smem_.keys_full), 1);
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      lower_registers<Shape::kProducerRegisters>();
      const int warp = uniform(static_cast<int>(threadIdx.x / 32));
      if (warp > 2) return;
      const Sequence sequence = load_sequence(p_.shape, task_.batch);
      const RowWalk walk(launch_, task_);
      if (warp == 0) {
        if (threadIdx.x == 0) load_keys(sequence);
        __syncwarp();
        load_rows<Shape>(launch_, walk, sequence, smem_);
      } else {
        describe_rows<Shape>(launch_, walk, sequence, warp - 1, smem_);
      }
    } else {
      raise_registers<Shape::kConsumerRegisters>();
      consume(uniform(static_cast<int>(threadIdx.x / 128) - 1));
    }
  }

 private:
  __device__ __forceinline__ void load_keys(const Sequence& sequence) {
    const uint32_t full = smem_addr(&smem_.keys_full);
    mbarrier_arrive_expect(full, Shape::kKeyTiles * Shape::kStageBytes);
    const int row = first_key_row(sequence, launch_.args.plan.branch, p_.config) + task_.key;
    const int batch = static_cast<int>(sequence.batch);
    for (int i = 0; i < Shape::kKeyTiles; ++i) {
      for (int panel = 0; panel < kDimQk / 64; ++panel)
        tma_load(smem_addr(smem_.k[i]) + panel * kPanelBytes, &launch_.k, full, panel * 64,
                 task_.head, row + i * kRows, batch);
      for (int panel = 0; panel < kDimV / 64; ++panel)
        tma_load(smem_addr(smem_.v[i]) + panel * kPanelBytes, &launch_.v, full, panel * 64,
                 task_.head, row + i * kRows, batch);
    }
  }

  // ---- Consumers --------------------------------------------------------------------------------

  /// Releases `count` tiles unread. An arrival before the tile is there would count for the tile
  /// before it.
  __device__ __forceinline__ void pass_over(int count, Position& at) {
    for (int i = 0; i < count; ++i) {
      mbarrier_wait(at.full, at.parity);
      mbarrier_arrive_warp(at.empty());
      at.advance();
    }
  }

  __device__ __forceinline__ void consume(int consumer) {
    int first, count, total;
    {
      const RowWalk walk(launch_, task_);
      total = uniform(walk.tiles);
      if constexpr (Shape::kList) {
        first = min(consumer, total);
        count = (total + 1 - consumer) / 2;
      } else {
        const QueryRange seen = queries_of(consumer);
        first = uniform(seen.begin >> (6 - launch_.log2_group));
        count = uniform((seen.begin + seen.count + walk.tokens - 1) >> (6 - launch_.log2_group)) -
                first;
        if (uniform(seen.count) <= 0) first = count = 0;
      }
    }
    Position at(smem_addr(smem_.full));
    pass_over(first, at);
    float dk[kDimQk / 2], dv[kDimV / 2];
#pragma unroll
    for (int i = 0; i < kDimQk / 2; ++i) dk[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kDimV / 2; ++i) dv[i] = 0.0f;
    pin(dk);
    pin(dv);
    mbarrier_wait(smem_addr(&smem_.keys_full), 0);
    if (count > 0) walk_tiles(consumer, count, at, dk, dv);
    pass_over(total - first - (Shape::kList ? max(2 * count - 1, 0) : count), at);
    if constexpr (Shape::kList) add_up(consumer, dk, dv);

    // With lists each warpgroup holds one of the sums.
    const Sequence sequence = load_sequence(p_.shape, task_.batch);
    const BranchBwd& branch = p_.branch[launch_.args.plan.branch];
    const int first_key = Shape::kList ? 0 : consumer * kRows;
    if (!Shape::kList || consumer == 0)
      store<kDimQk>(dk, static_cast<float>(p_.shape.softmax_scale), sequence, first_key, branch.dk,
                    0);
    if (!Shape::kList || consumer == 1)
      store<kDimV>(dv, 1.0f, sequence, first_key, branch.dv, Shape::kTaskKeys * kDimQk);
  }

  /// Queries, counted from the task's first, that see some of a warpgroup's keys.
  __device__ __forceinline__ QueryRange queries_of(int consumer) const {
    const int first = consumer * kRows, keys = min(kRows, task_.keys - first);
    if (keys <= 0) return {0, 0};
    const Sequence sequence = load_sequence(p_.shape, task_.batch);
    const QueryRange range =
        range_queries(sequence, launch_.args.plan.range_branch, task_.key + first, keys, p_.config);
    const int begin = max(range.begin - task_.token_begin, 0);
    const int end = min(range.begin + range.count - task_.token_begin, task_.token_count);
    return {begin, end - begin};
  }

  /// dK of a step waits for the next one, so that the tensor cores have that product, S^T and dP^T
  /// to work on before the exponentials, and dV while dS^T is made. Accumulators that are read are
  /// never in flight from one step to the next: the compiler would wait for every product.
  __device__ __forceinline__ void walk_tiles(int consumer, int count, Position& at,
                                             float (&dk)[kDimQk / 2], float (&dv)[kDimV / 2]) {
    const int key_tile = Shape::kList ? 0 : consumer;
    const uint32_t k_word = uniform(descriptor_word(smem_addr(smem_.k[key_tile])));
    const uint32_t v_word = uniform(descriptor_word(smem_addr(smem_.v[key_tile])));
    const uint32_t first_full = smem_addr(smem_.full);
    const RingAddress<Shape::kStageBytes / 16> words(descriptor_word(smem_addr(smem_.ring)),
                                                     first_full);
    const RingAddress<sizeof(RowTileInfo)> infos(smem_addr(smem_.info), first_full);
    const float scale_log2 = static_cast<float>(p_.shape.softmax_scale * 1.4426950408889634);
    // Before the first step: zeros, times rows that are there.
    uint32_t packed[kScores / 2];
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) packed[i] = 0;
    uint32_t previous_q = uniform(words.at(at.full)), previous_empty = 0;
    for (int i = 0; i < count; ++i) {
      mbarrier_wait(at.full, at.parity);
      const uint32_t tile = uniform(words.at(at.full));
      const RowTileInfo& info = shared_object<const RowTileInfo>(infos.at(at.full));
      const bool negative = info.any_negative();
#pragma unroll
      for (int step = 0; step < Shape::kSteps; ++step) {
        const uint32_t q = tile + step * kColumns * 128 / 16, dout = q + Shape::kQBytes / 16;
        const int row = step * kColumns;
        float s[kScores], dp[kScores];
        start_dp(dp, info, row);
        wgmma_fence();
        issue_update<T, kDimQk, kColumns / 16>(dk, packed, previous_q);
        issue_scores<T, kColumns, kDimQk>(s, k_word, q);
        wgmma_commit();
        issue_scores<T, kColumns, kDimV, true>(dp, v_word, dout);
        wgmma_commit();
        wgmma_wait<1>();
        pin(s);
        pin(dk);
        if (step == 0 && previous_empty != 0) mbarrier_arrive_warp(previous_empty);
        if (info.masked() >> key_tile & 1) mask(s, info, key_tile, row);
        make_p(s, info, row, scale_log2);
        if (negative) apply_signs(s, info, row);
        pack(s, packed);
        wgmma_fence();
        issue_update<T, kDimV, kColumns / 16>(dv, packed, dout);
        wgmma_commit();
        wgmma_wait<1>();
        pin(dp);
#pragma unroll
        for (int i = 0; i < kScores; ++i) s[i] *= dp[i];
        wgmma_wait<0>();
        pin(dv);
        pin(s);  // packing needs no registers beside those of P^T
        pack(s, packed);
        previous_q = q;
      }
      previous_empty = at.empty();
      at.advance();
      if (Shape::kList && i + 1 < count) pass_over(1, at);
    }
    wgmma_fence();
    issue_update<T, kDimQk, kColumns / 16>(dk, packed, previous_q);
    wgmma_commit();
    wgmma_wait<0>();
    pin(dk);
    mbarrier_arrive_warp(previous_empty);
  }

  /// S^T becomes P^T, but for the gates' signs.
  static __device__ __forceinline__ void make_p(float (&s)[kScores], const RowTileInfo& info,
                                                int row, float scale_log2) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      const auto lse = RowTileInfo::of_thread<float4>(info.gated_lse_log2, row + k * 16);
      const float lses[] = {lse.x, lse.y, lse.z, lse.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        s[8 * k + i] = exp2_approx(fmaf(s[8 * k + i], scale_log2, -lses[i / 4 * 2 + i % 2]));
    }
  }
  static __device__ __forceinline__ void apply_signs(float (&s)[kScores], const RowTileInfo& info,
                                                     int row) {
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      const auto gate = RowTileInfo::of_thread<float4>(info.gate, row + k * 16);
      const float gates[] = {gate.x, gate.y, gate.z, gate.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) s[8 * k + i] = copysignf(s[8 * k + i], gates[i / 4 * 2 + i % 2]);
    }
  }
  /// What dP^T is added to.
  static __device__ __forceinline__ void start_dp(float (&dp)[kScores], const RowTileInfo& info,
                                                  int row) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const auto x = RowTileInfo::of_thread<float4>(info.minus_delta[n % 2], row + n / 2 * 16);
      dp[4 * n] = x.x;
      dp[4 * n + 1] = x.y;
      dp[4 * n + 2] = x.z;
      dp[4 * n + 3] = x.w;
    }
  }
  /// The A operand of a product.
  static __device__ __forceinline__ void pack(const float (&s)[kScores],
                                              uint32_t (&packed)[kScores / 2]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) packed[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
  }

  /// Scores of keys that the column's row does not see become -inf.
  __device__ __forceinline__ void mask(float (&s)[kScores], const RowTileInfo& info, int key_tile,
                                       int row) const {
    const KeySight sight(launch_.args.plan.range_branch, task_.key, p_.config);
    const int key = key_tile * kRows + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    const int first[2] = {sight.first + key * sight.unit, sight.first + (key + 8) * sight.unit};
    const auto reach = static_cast<uint32_t>(info.halves[0].reach);
#pragma unroll
    for (int pair = 0; pair < kColumns / 16; ++pair) {
      const auto rows = RowTileInfo::of_thread<int4>(info.position, row + pair * 16);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int position = i / 4 ? (i % 2 ? rows.w : rows.z) : (i % 2 ? rows.y : rows.x);
        if (static_cast<uint32_t>(position - first[i / 2 % 2]) >= reach)
          s[8 * pair + i] = -INFINITY;
      }
    }
  }

  /// The first warpgroup gets the sum of both dK, the second that of both dV.
  __device__ __forceinline__ void add_up(int consumer, float (&dk)[kDimQk / 2],
                                         float (&dv)[kDimV / 2]) {
    float* mine = reinterpret_cast<float*>(smem_.ring[0]) + threadIdx.x % 128;
    float* dk_place = mine;
    float* dv_place = mine + 128 * (kDimQk / 2);
    named_barrier_sync(1, 256);  // nobody reads the ring any more
    if (consumer == 0) {
#pragma unroll
      for (int i = 0; i < kDimV / 2; ++i) dv_place[i * 128] = dv[i];
    } else {
#pragma unroll
      for (int i = 0; i < kDimQk / 2; ++i) dk_place[i * 128] = dk[i];
    }
    named_barrier_sync(1, 256);
    if (consumer == 0) {
#pragma unroll
      for (int i = 0; i < kDimQk / 2; ++i) dk[i] += dk_place[i * 128];
    } else {
#pragma unroll
      for (int i = 0; i < kDimV / 2; ++i) dv[i] += dv_place[i * 128];
    }
  }

  /// The accumulators of a warpgroup's keys, times `factor`: to the task's partial result, at
  /// `offset` of its slot, or as T to `view`.
  template <int kDim>
  __device__ __forceinline__ void store(const float (&acc)[kDim / 2], float factor,
                                        const Sequence& sequence, int first_key,
                                        const OutView& view, int offset) {
    const int lane = threadIdx.x % 32;
    const int key = first_key + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const int slot = task_.slot;
    float* partial = launch_.args.plan.partial +
                     static_cast<int64_t>(slot) * Shape::kTaskKeys * (kDimQk + kDimV) + offset;
    T* dst = branch_keys(typed<T>(view), sequence, launch_.args.plan.branch, p_.config) +
             task_.head * view.head + task_.key * view.seq;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = key + half * 8;
      if (row >= task_.keys) continue;
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
  const KeyTask& task_;
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

/// The same of lists, which all are walked from the last queries on. Tasks that run together share
/// rows where they are at the same place, so they start together: the keys of a head from the last
/// ones, with the shortest lists, to the first, every other round of the multiprocessors the other
/// way round, so that who starts late in one ends early in the next. The head that ends the launch
/// ends with its short tasks.
__device__ __forceinline__ int list_task(const KeyPlan& plan, int heads, int multiprocessors) {
  const int tasks = *plan.num_tasks, block = blockIdx.x;
  if (block >= tasks) return -1;
  // Where the tasks of the second head start; the first head comes last.
  const int last = heads > 1 ? plan.tiles[plan.groups.count * plan.parts].task : tasks;
  const int turned = tasks - last;
  if (block >= turned) return block - turned;
  const int round = block / multiprocessors * multiprocessors, i = block - round;
  const int size = min(multiprocessors, turned - round);
  return tasks - 1 - (round + (round / multiprocessors % 2 ? size - 1 - i : i));
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    bwd_dkv_kernel(const __grid_constant__ DkvLaunch launch) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // other targets get an empty body that is never launched
  char* const smem = aligned_shared_memory();
  const KeyPlan& plan = launch.args.plan;
  const int heads = static_cast<int>(launch.args.common.p.shape.heads_kv);
  const int task = Shape::kList ? list_task(plan, heads, launch.multiprocessors) : range_task(plan);
  if (task >= 0) DkvKernel<Shape>(launch, plan.tasks[task], smem).run();
#endif
}

template <class Shape>
void launch_bwd_dkv_shape(const DkvLaunch& launch, cudaStream_t stream) {
  const KeyPlan& plan = launch.args.plan;
  const int64_t blocks =
      Shape::kList ? plan.max_tasks
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
