// Key-stationary dK and dV: a block of threads owns 64 keys and walks the query rows that see them.
//
//   S^T = K Q^T          P^T = gate * exp2(scale S^T - lse)      dV += P^T dO
//   dP^T = V dO^T        dS^T = P^T * (dP^T - delta)             dK += scale dS^T Q
//
// Warps work in pairs on 16 * kKeyTiles keys: one makes P and dV, the other dS and dK, two products
// each, so that both keep their operand (K or V) and their accumulator (dV or dK) in registers, and
// every fragment of Q and dO read from shared memory serves kKeyTiles products. P reaches the
// second warp through shared memory, rounded to T as the product with dO needs it anyway. Its
// fragment layout is that of dP, so each lane reads back what the same lane of the first warp
// wrote. An mbarrier for each pair and half tile says that P is there.
#pragma once

#include "cuda/sm80/bwd_kernels.h"
#include "cuda/sm80/bwd_rows.cuh"

namespace nsa::cuda::bwd {

template <int kDimQk_, int kDimV_>
struct DkvTraits {
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kMaxDim = kDimQk > kDimV ? kDimQk : kDimV;
  // 2: 128 accumulators and 64 operand registers a thread at head dim 128. 192 needs 1.
  static constexpr int kKeyTiles = kMaxDim > 128 ? 1 : 2;
  static constexpr int kPairKeys = 16 * kKeyTiles;
  static constexpr int kPairs = kTaskKeys / kPairKeys;
  static constexpr int kThreads = kPairs * 64;
  static constexpr int kBlocksPerSm = kMaxDim <= 64 ? 3 : kMaxDim <= 128 ? 2 : 1;
  static constexpr int kStages = 4;
  static constexpr int kQBytes = kRowTile * kDimQk * 2, kDoutBytes = kRowTile * kDimV * 2;
  static constexpr int kStageBytes = kQBytes + kDoutBytes;
  static constexpr int kInfoOffset = kStages * kStageBytes;
  static constexpr int kExchangeOffset = kInfoOffset + kStages * sizeof(RowTileInfo);
  // Of a pair: P of a tile, then a barrier for each half of it.
  static constexpr int kExchangeTile = kPairKeys * kRowTile * 2;
  static constexpr int kExchangeBytes = kExchangeTile + kRowTile / 16 * 8;
  static constexpr int kSmemBytes = kExchangeOffset + kPairs * kExchangeBytes;
  // K and V pass through the ring's stages on their way into registers.
  static_assert(kTaskKeys * (kDimQk + kDimV) * 2 <= kStages * kStageBytes);
};

/// One warp's part of a row tile. kMakesP: first product K Q^T, second P^T dO; else V dO^T, dS^T Q.
/// The mask is a template parameter so that the common case is one block of code to schedule.
template <class T, int kFirstDim, int kSecondDim, int kKeyTiles, bool kMakesP, bool kMasked>
struct RowTileProducts {
  template <int kFragments, int kColumns>
  static __device__ __forceinline__ void run(uint32_t first_tile, uint32_t second_tile,
                                             const RowTileInfo& info, uint32_t exchange,
                                             uint32_t parity, int pair, int lane, float scale_log2,
                                             const uint32_t (&operand)[kKeyTiles][kFragments][4],
                                             float (&acc)[kKeyTiles][kColumns][4]) {
    const PatchReader<kFirstDim, Patch::kColumnsFirst> first_reader(lane);
    const PatchReader<kSecondDim, Patch::kRowsFirst> second_reader(lane);
#pragma unroll
    for (int half = 0; half < kRowTile / 16; ++half) {
      float x[kKeyTiles][2][4] = {};  // S^T or dP^T: keys x 16 rows
#pragma unroll
      for (int k = 0; k < kFirstDim / 16; ++k) {
        uint32_t b[4];
        ldmatrix_x4(b, first_reader.at(first_tile, half * 16, k));
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) {
          mma_16816<T>(x[m][0], operand[m][k], b[0], b[1]);
          mma_16816<T>(x[m][1], operand[m][k], b[2], b[3]);
        }
      }
      const uint32_t barrier = exchange + kKeyTiles * 16 * kRowTile * 2 + half * 8;
      const uint32_t slot = exchange + ((half * kKeyTiles) * 32 + lane) * 16;
      uint32_t a[kKeyTiles][4];  // P^T or dS^T as the A operand
      if (kMakesP) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int column = half * 16 + n * 8 + 2 * (lane % 4);
          const float2 lse = *reinterpret_cast<const float2*>(&info.lse_log2[column]);
          const float2 gate = *reinterpret_cast<const float2*>(&info.gate[column]);
#pragma unroll
          for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              x[m][n][i] = exp2_approx(fmaf(x[m][n][i], scale_log2, -(i % 2 ? lse.y : lse.x))) *
                           (i % 2 ? gate.y : gate.x);
          if (kMasked) {
            const int2 begin = *reinterpret_cast<const int2*>(&info.key_begin[column]);
            const int2 end = *reinterpret_cast<const int2*>(&info.key_end[column]);
#pragma unroll
            for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const int key = (pair * kKeyTiles + m) * 16 + lane / 4 + (i / 2) * 8;
                if (key < (i % 2 ? begin.y : begin.x) || key >= (i % 2 ? end.y : end.x))
                  x[m][n][i] = 0.0f;
              }
          }
#pragma unroll
          for (int m = 0; m < kKeyTiles; ++m) {
            a[m][2 * n] = pack2<T>(x[m][n][0], x[m][n][1]);
            a[m][2 * n + 1] = pack2<T>(x[m][n][2], x[m][n][3]);
          }
        }
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) store_shared(slot + m * 512, a[m]);
        mbarrier_arrive_warp(barrier);
      } else {
        mbarrier_wait(barrier, parity);
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) load_shared(a[m], slot + m * 512);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int column = half * 16 + n * 8 + 2 * (lane % 4);
          const float2 minus_delta = *reinterpret_cast<const float2*>(&info.minus_delta[column]);
#pragma unroll
          for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float2 p = unpack2<T>(a[m][2 * n + i]);
              a[m][2 * n + i] = pack2<T>(p.x * (x[m][n][2 * i] + minus_delta.x),
                                         p.y * (x[m][n][2 * i + 1] + minus_delta.y));
            }
        }
      }
#pragma unroll
      for (int d = 0; d < kSecondDim / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, second_reader.at(second_tile, half * 16, d));
#pragma unroll
        for (int m = 0; m < kKeyTiles; ++m) {
          mma_16816<T>(acc[m][2 * d], a[m], b[0], b[1]);
          mma_16816<T>(acc[m][2 * d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

/// The accumulators of one warp, times `factor`: to `partial` (64 x kDim floats), or as T to `dst`
/// (rows `stride` apart) for the task's keys.
template <class T, int kDim, int kKeyTiles, int kColumns>
__device__ __forceinline__ void store_keys(const float (&acc)[kKeyTiles][kColumns][4], float factor,
                                           int first_key, int keys, int lane, float* partial,
                                           T* dst, int64_t stride) {
#pragma unroll
  for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = first_key + m * 16 + half * 8 + lane / 4;
      if (key >= keys) continue;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int column = n * 8 + 2 * (lane % 4);
        const float x = acc[m][n][2 * half] * factor, y = acc[m][n][2 * half + 1] * factor;
        if (partial)
          *reinterpret_cast<float2*>(partial + key * kDim + column) = make_float2(x, y);
        else
          *reinterpret_cast<uint32_t*>(dst + key * stride + column) = pack2<T>(x, y);
      }
    }
}

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    bwd_dkv_kernel(const __grid_constant__ DkvArgs args) {
  if (blockIdx.x >= *args.plan.num_tasks) return;
  constexpr int kDimQk = Traits::kDimQk, kDimV = Traits::kDimV, kKeyTiles = Traits::kKeyTiles;
  constexpr int kThreads = Traits::kThreads, kStages = Traits::kStages;
  extern __shared__ __align__(128) char smem[];
  const uint32_t ring = smem_addr(smem);
  auto* infos = reinterpret_cast<RowTileInfo*>(smem + Traits::kInfoOffset);

  const AttnBwd& p = args.common.p;
  const KeyTask task = args.plan.tasks[blockIdx.x];
  const Sequence sequence = load_sequence(p.shape, task.batch);
  const BranchBwd& branch = p.branch[args.plan.branch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pair = warp % Traits::kPairs;
  const bool makes_p = warp < Traits::kPairs;
  const bool active = pair * Traits::kPairKeys < task.keys;

  // This warp's operand, K or V: A fragments of its 16 * kKeyTiles keys.
  uint32_t operand[kKeyTiles][Traits::kMaxDim / 16][4];
  {
    constexpr uint32_t kVTile = kTaskKeys * kDimQk * 2;
    const auto source = [&](const InView& view) {
      const T* first = branch_keys(typed<T>(view), sequence, args.plan.branch, p.config) +
                       task.head * view.head + task.key * view.seq;
      return [first, stride = view.seq, keys = task.keys](int row) {
        return row < keys ? first + row * stride : nullptr;
      };
    };
    load_tile<kDimQk, kTaskKeys, kThreads>(ring, threadIdx.x, source(branch.k));
    load_tile<kDimV, kTaskKeys, kThreads>(ring + kVTile, threadIdx.x, source(branch.v));
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int row = pair * Traits::kPairKeys;
    if (makes_p) {
      const PatchReader<kDimQk, Patch::kRowsFirst> reader(lane);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
        for (int k = 0; k < kDimQk / 16; ++k)
          ldmatrix_x4(operand[m][k], reader.at(ring, row + m * 16, k));
    } else {
      const PatchReader<kDimV, Patch::kRowsFirst> reader(lane);
#pragma unroll
      for (int m = 0; m < kKeyTiles; ++m)
#pragma unroll
        for (int k = 0; k < kDimV / 16; ++k)
          ldmatrix_x4(operand[m][k], reader.at(ring + kVTile, row + m * 16, k));
    }
    __syncthreads();
  }

  const uint32_t exchange =
      smem_addr(smem + Traits::kExchangeOffset) + pair * Traits::kExchangeBytes;
  // The __syncthreads of the first tile comes before the first use.
  if (makes_p && lane < kRowTile / 16)
    mbarrier_init(exchange + Traits::kExchangeTile + lane * 8, kWarpArrivals);

  RowSource<T, kDimQk, kDimV, kThreads> source(args, task, sequence);
  const int tiles = source.tiles();
  const auto load = [&](int tile) {
    if (tile < tiles) {
      const uint32_t stage = ring + (tile % kStages) * Traits::kStageBytes;
      source.load(stage, stage + Traits::kQBytes, infos + tile % kStages);
    }
    cp_async_commit();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);

  float acc[kKeyTiles][Traits::kMaxDim / 8][4] = {};
  const float scale_log2 = static_cast<float>(p.shape.softmax_scale * 1.4426950408889634);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the tile is there, and everyone is done with the one before it
    load(tile + kStages - 1);
    const uint32_t q_tile = ring + (tile % kStages) * Traits::kStageBytes;
    const uint32_t dout_tile = q_tile + Traits::kQBytes;
    const RowTileInfo& info = infos[tile % kStages];
    const uint32_t parity = tile % 2;
    if (!active) continue;
    if (!makes_p)
      RowTileProducts<T, kDimV, kDimQk, kKeyTiles, false, false>::run(
          dout_tile, q_tile, info, exchange, parity, pair, lane, scale_log2, operand, acc);
    else if (info.masked)
      RowTileProducts<T, kDimQk, kDimV, kKeyTiles, true, true>::run(
          q_tile, dout_tile, info, exchange, parity, pair, lane, scale_log2, operand, acc);
    else
      RowTileProducts<T, kDimQk, kDimV, kKeyTiles, true, false>::run(
          q_tile, dout_tile, info, exchange, parity, pair, lane, scale_log2, operand, acc);
  }
  if (!active) return;

  float* partial = nullptr;
  if (task.slot >= 0)
    partial = args.plan.partial + static_cast<int64_t>(task.slot) * kTaskKeys * (kDimQk + kDimV);
  const auto store = [&](auto dim, const OutView& view, float factor, float* tile_partial) {
    T* dst = branch_keys(typed<T>(view), sequence, args.plan.branch, p.config) +
             task.head * view.head + task.key * view.seq;
    store_keys<T, decltype(dim)::value>(acc, factor, pair * Traits::kPairKeys, task.keys, lane,
                                        tile_partial, dst, view.seq);
  };
  if (makes_p)
    store(std::integral_constant<int, kDimV>{}, branch.dv, 1.0f,
          partial ? partial + kTaskKeys * kDimQk : nullptr);
  else
    store(std::integral_constant<int, kDimQk>{}, branch.dk,
          static_cast<float>(p.shape.softmax_scale), partial);
}

template <class T, int kDimQk, int kDimV>
void launch_bwd_dkv(const DkvArgs& args, cudaStream_t stream) {
  using Traits = DkvTraits<kDimQk, kDimV>;
  if (args.plan.max_tasks == 0) return;
  auto* kernel = bwd_dkv_kernel<T, Traits>;
  allow_shared_memory(kernel, Traits::kSmemBytes);
  kernel<<<grid_size(args.plan.max_tasks), Traits::kThreads, Traits::kSmemBytes, stream>>>(args);
  check_launch("bwd_dkv_kernel");
}

}  // namespace nsa::cuda::bwd
