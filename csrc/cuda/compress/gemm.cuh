// One 128 x kBlockN tile of C[m][n] = sum_k A[m][k] * B[n][k] on mma.sync, 16-bit operands, float32
// accumulators. Every matrix product of phi, forward and backward, is this loop; the products
// differ in where the rows of their operands come from (the Problem) and in what becomes of C (the
// epilogue).
//
// 8 warps, tiles of 64 in k, a ring of kStages tile pairs filled by cp.async. With three stages of
// 32 KB two blocks fit on a Hopper SM, and 128 registers a thread let them.
#pragma once

#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/device/tile.cuh"

namespace nsa::cuda::compress {

inline constexpr int kGemmThreads = 256;
inline constexpr int kBlockM = 128, kBlockK = 64;
inline constexpr int kStages = 3;

/// How an operand lies in memory and in its tile: rows of m (or n) with k contiguous, or rows of k
/// with m (or n) contiguous; the latter is transposed on the way into the registers.
enum class Major { kK, kMN };

template <Major kMajor, int kBlock>
struct OperandTile {
  static constexpr int kRows = kMajor == Major::kK ? kBlock : kBlockK;
  static constexpr int kColumns = kMajor == Major::kK ? kBlockK : kBlock;
  static constexpr int kBytes = kRows * kColumns * 2;
};

template <Major kMajorA, Major kMajorB, int kBlockN>
constexpr int gemm_shared_bytes() {
  return kStages * (OperandTile<kMajorA, kBlockM>::kBytes + OperandTile<kMajorB, kBlockN>::kBytes);
}

/// Loads an operand's tile: `source(row, sweep)` is where row `row` of it starts, or null for a
/// row of zeros; a thread asks for one row in each sweep. Columns from `columns` on are zero. Rows
/// that are not 16-byte aligned, or not a multiple of 8 long, are read element by element
/// (`aligned` is the same for the whole grid).
template <class Tile, class T, class Source>
__device__ __forceinline__ void load_operand(uint32_t smem, int columns, bool aligned,
                                             const Source& source) {
  constexpr int kRowsPerSweep = kGemmThreads / 8;
  const int chunk = threadIdx.x & 7, first = threadIdx.x >> 3;
#pragma unroll
  for (int sweep = 0; sweep < Tile::kRows / kRowsPerSweep; ++sweep) {
    const int row = sweep * kRowsPerSweep + first;
    const T* src = source(row, sweep);
#pragma unroll
    for (int panel = 0; panel < Tile::kColumns / 64; ++panel) {
      const int column = panel * 64 + chunk * 8;
      const uint32_t dst = smem + tile_offset<Tile::kColumns>(row, panel * 8 + chunk);
      if (aligned) {
        cp_async_16(dst, src + column, src != nullptr && column < columns);
      } else {
        const uint16_t* bits = reinterpret_cast<const uint16_t*>(src) + column;
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool lo = src && column + 2 * i < columns, hi = src && column + 2 * i + 1 < columns;
          pairs[i] =
              (lo ? __ldg(bits + 2 * i) : 0u) | (hi ? uint32_t{__ldg(bits + 2 * i + 1)} << 16 : 0u);
        }
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(pairs[0]),
                     "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                     : "memory");
      }
    }
  }
}

/// Runs the tile. `problem.load(smem_a, smem_b)` starts loading the next k step, each in turn;
/// `epilogue(row, column, values)` receives C, four neighbouring columns (a multiple of 4) at a
/// time.
template <class T, Major kMajorA, Major kMajorB, int kBlockN, class Problem, class Epilogue>
__device__ __forceinline__ void gemm_tile(int steps, Problem& problem, const Epilogue& epilogue) {
  using TileA = OperandTile<kMajorA, kBlockM>;
  using TileB = OperandTile<kMajorB, kBlockN>;
  constexpr int kWarpN = 32, kWarpsN = kBlockN / kWarpN;
  constexpr int kWarpM = kBlockM / (kGemmThreads / 32 / kWarpsN);
  constexpr int kFragsM = kWarpM / 16, kPairsN = kWarpN / 16;
  constexpr bool kTransA = kMajorA == Major::kMN, kTransB = kMajorB == Major::kMN;

  extern __shared__ __align__(128) char gemm_smem[];
  const uint32_t smem_a = smem_addr(gemm_smem), smem_b = smem_a + kStages * TileA::kBytes;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_m = warp / kWarpsN * kWarpM, warp_n = warp % kWarpsN * kWarpN;
  const PatchReader<TileA::kColumns, kTransA ? Patch::kColumnsFirst : Patch::kRowsFirst> read_a(
      lane);
  const PatchReader<TileB::kColumns, kTransB ? Patch::kRowsFirst : Patch::kColumnsFirst> read_b(
      lane);

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) problem.load(smem_a + stage * TileA::kBytes, smem_b + stage * TileB::kBytes);
    cp_async_commit();
  }
  int read_stage = 0, write_stage = kStages - 1;
  float acc[kFragsM][2 * kPairsN][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's tiles have landed, and everyone is done with the last step's
    if (step + kStages - 1 < steps)
      problem.load(smem_a + write_stage * TileA::kBytes, smem_b + write_stage * TileB::kBytes);
    cp_async_commit();
    const uint32_t a_tile = smem_a + read_stage * TileA::kBytes;
    const uint32_t b_tile = smem_b + read_stage * TileB::kBytes;
#pragma unroll
    for (int k16 = 0; k16 < kBlockK / 16; ++k16) {
      uint32_t a[kFragsM][4], b[kPairsN][4];
#pragma unroll
      for (int i = 0; i < kFragsM; ++i) {
        if constexpr (kTransA)
          ldmatrix_x4_trans(a[i], read_a.at(a_tile, 16 * k16, warp_m / 16 + i));
        else
          ldmatrix_x4(a[i], read_a.at(a_tile, warp_m + 16 * i, k16));
      }
#pragma unroll
      for (int j = 0; j < kPairsN; ++j) {
        if constexpr (kTransB)
          ldmatrix_x4_trans(b[j], read_b.at(b_tile, 16 * k16, warp_n / 16 + j));
        else
          ldmatrix_x4(b[j], read_b.at(b_tile, warp_n + 16 * j, k16));
      }
#pragma unroll
      for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
        for (int j = 0; j < kPairsN; ++j) {
          mma_16816<T>(acc[i][2 * j], a[i], b[j][0], b[j][1]);
          mma_16816<T>(acc[i][2 * j + 1], a[i], b[j][2], b[j][3]);
        }
      }
    }
    read_stage = read_stage + 1 == kStages ? 0 : read_stage + 1;
    write_stage = write_stage + 1 == kStages ? 0 : write_stage + 1;
  }

  // Even lanes take four columns of the first n8 tile of a pair, odd lanes of the second, so that
  // the four lanes of a row store one full 32-byte sector.
  const bool odd = lane & 1;
  const int column = warp_n + (odd ? 8 : 0) + 2 * (lane & 2);
#pragma unroll
  for (int i = 0; i < kFragsM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_m + 16 * i + 8 * half + (lane >> 2);
#pragma unroll
      for (int j = 0; j < kPairsN; ++j) {
        const float2 first = {acc[i][2 * j][2 * half], acc[i][2 * j][2 * half + 1]};
        const float2 second = {acc[i][2 * j + 1][2 * half], acc[i][2 * j + 1][2 * half + 1]};
        const float2 keep = odd ? second : first, send = odd ? first : second;
        float2 other;
        other.x = __shfl_xor_sync(0xffffffffu, send.x, 1);
        other.y = __shfl_xor_sync(0xffffffffu, send.y, 1);
        const float2 lo = odd ? other : keep, hi = odd ? keep : other;
        epilogue(row, column + 16 * j, make_float4(lo.x, lo.y, hi.x, hi.y));
      }
    }
  }
}

/// Writes the columns column .. column + 3 that exist (below `columns`) of a row of 16-bit
/// elements.
template <class T>
__device__ __forceinline__ void store4(T* row, int64_t column, int64_t columns, bool aligned,
                                       float4 v) {
  if (aligned && column + 4 <= columns) {
    *reinterpret_cast<uint2*>(row + column) = make_uint2(pack2<T>(v.x, v.y), pack2<T>(v.z, v.w));
  } else {
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column + i < columns) row[column + i] = static_cast<T>(values[i]);
  }
}

/// Tiles of kBlockN = 64 or 128 columns: 64 where the last tile of 128 would be half empty.
inline int choose_block_n(int64_t columns) {
  const int64_t rest = columns % 128;
  return rest > 0 && rest <= 64 ? 64 : 128;
}

}  // namespace nsa::cuda::compress
