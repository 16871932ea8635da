// Query-stationary dQ: a block of threads owns up to 176 query rows (whole tokens) and walks the
// keys that they see in all branches, so that their sum stays in registers and is rounded once.
//
//   S = Q K^T     P = gate * exp2(scale S - lse)     dP = dO V^T     dS = P * (dP - delta)
//   dQ += scale dS K
//
// All warps but the last own 16 rows each; the last one copies the key tiles of all branches into a
// ring. With G = 16 a warp is one token: it passes over the selected blocks that the token did not
// choose without waiting for the warps that did.
#pragma once

#include "cuda/sm80/bwd_kernels.h"
#include "cuda/sm80/bwd_keys.cuh"

namespace nsa::cuda::bwd {

template <int kDimQk_, int kDimV_>
struct DqTraits {
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kReaders = query_tile_warps(kDimQk), kRows = kReaders * 16;
  static constexpr int kThreads = (kReaders + 1) * 32;
  // dO stays in registers; Q only where there is room beside the accumulators.
  static constexpr bool kQInSmem = kDimQk > 64;
  using Ring = KeyRing<kDimQk, kDimV>;
  static constexpr int kQBytes = kQInSmem ? kRows * kDimQk * 2 : 0;
  static constexpr int kMaxStages = 12;
  // dQ leaves through the memory of Q, or of the ring.
  static constexpr int kMinStages = kQInSmem ? 2 : ceil_div(kRows * kDimQk * 2, Ring::kTileBytes);
  static constexpr int smem_bytes(int stages) { return kQBytes + stages * Ring::kStageBytes; }
};

/// A thread's two rows of a warp's 16: what the current branch says about them.
struct RowPair {
  int token[2];   // within the query tile
  bool valid[2];  // padding rows see nothing and hold zeros
  float lse_log2[2], minus_delta[2], gate[2];
  KeyRange keys[2];

  __device__ __forceinline__ void load_branch(const DqArgs& args, const QueryTile& tile, int branch,
                                              int first_row) {
    const AttnBwd& p = args.common.p;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lse_log2[i] = INFINITY;
      minus_delta[i] = gate[i] = 0.0f;
      keys[i] = {0, 0};
      if (!valid[i]) continue;
      const int64_t row = tile.sequence.q_row + tile.first + token[i];
      const int head = first_row + 8 * i - token[i] * args.common.group;
      const RowStats stats =
          args.common.stats[((branch * p.shape.heads_kv + tile.head) * p.shape.total_q + row) *
                                args.common.group +
                            head];
      lse_log2[i] = stats.lse_log2;
      minus_delta[i] = stats.minus_delta;
      gate[i] = stats.gate;
      keys[i] = visible_keys(branch, tile.sequence.position(tile.first + token[i]), p.config);
    }
  }

  /// The keys of a tile that row i sees, relative to its first.
  __device__ __forceinline__ KeyRange within(int i, const KeyTileInfo& info) const {
    const uint32_t bits = token[i] < 32 ? info.tokens[0] : info.tokens[1];
    const bool looks = (bits >> (token[i] % 32)) & 1;
    return {keys[i].begin - info.key, looks ? min(keys[i].end, info.end) - info.key : 0};
  }
};

/// One warp's 16 rows against tiles of keys.
template <class T, class Traits>
class KeyTileProducts {
  static constexpr int kDimQk = Traits::kDimQk, kDimV = Traits::kDimV;

 public:
  /// Rows lane / 4 and lane / 4 + 8 of Q and dO in global memory, null for padding; the warp's rows
  /// of Q in shared memory, where kQInSmem.
  __device__ __forceinline__ KeyTileProducts(const T* q0, const T* q1, const T* dout0,
                                             const T* dout1, uint32_t q_smem, int lane,
                                             float scale_log2)
      : q_smem_(q_smem),
        lane_(lane),
        scale_log2_(scale_log2),
        q_reader_(lane),
        k_reader_(lane),
        v_reader_(lane),
        k_transposed_reader_(lane) {
    if constexpr (!Traits::kQInSmem) load_operand(q_, q0, q1);
    load_operand(dout_, dout0, dout1);
  }

  /// acc += dS K. Masked: row i of the pair sees `keys[i]` only, relative to the tile. Not a
  /// run-time condition, so that the common case is one block of code to schedule.
  template <bool kMasked>
  __device__ __forceinline__ void run(uint32_t k_tile, const RowPair& rows,
                                      const KeyRange (&keys)[2],
                                      float (&acc)[kDimQk / 8][4]) const {
    const uint32_t v_tile = k_tile + Traits::Ring::kKBytes;
    float s[kKeyTile / 8][4] = {}, dp[kKeyTile / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kDimQk / 16; ++k) {
      uint32_t a[4], b[4];
      if constexpr (Traits::kQInSmem)
        ldmatrix_x4(a, q_reader_.at(q_smem_, 0, k));
      else
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = q_[k][i];
#pragma unroll
      for (int n = 0; n < kKeyTile / 16; ++n) {
        ldmatrix_x4(b, k_reader_.at(k_tile, n * 16, k));
        mma_16816<T>(s[2 * n], a, b[0], b[1]);
        mma_16816<T>(s[2 * n + 1], a, b[2], b[3]);
        if (k >= kDimV / 16) continue;
        ldmatrix_x4(b, v_reader_.at(v_tile, n * 16, k));
        mma_16816<T>(dp[2 * n], dout_[k], b[0], b[1]);
        mma_16816<T>(dp[2 * n + 1], dout_[k], b[2], b[3]);
      }
    }
    uint32_t ds[kKeyTile / 16][4];
#pragma unroll
    for (int n = 0; n < kKeyTile / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = exp2_approx(fmaf(s[n][i], scale_log2_, -rows.lse_log2[i / 2])) * rows.gate[i / 2];
        if (kMasked) {
          const int key = n * 8 + 2 * (lane_ % 4) + i % 2;
          if (key < keys[i / 2].begin || key >= keys[i / 2].end) x = 0.0f;
        }
        s[n][i] = x * (dp[n][i] + rows.minus_delta[i / 2]);
      }
      ds[n / 2][n % 2 * 2] = pack2<T>(s[n][0], s[n][1]);
      ds[n / 2][n % 2 * 2 + 1] = pack2<T>(s[n][2], s[n][3]);
    }
#pragma unroll
    for (int k = 0; k < kKeyTile / 16; ++k)
#pragma unroll
      for (int d = 0; d < kDimQk / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, k_transposed_reader_.at(k_tile, k * 16, d));
        mma_16816<T>(acc[2 * d], ds[k], b[0], b[1]);
        mma_16816<T>(acc[2 * d + 1], ds[k], b[2], b[3]);
      }
  }

 private:
  template <int kFragments>
  __device__ __forceinline__ void load_operand(uint32_t (&fragments)[kFragments][4], const T* row0,
                                               const T* row1) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* row = i ? row1 : row0;
#pragma unroll
      for (int k = 0; k < kFragments; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          fragments[k][half * 2 + i] =
              row ? *reinterpret_cast<const uint32_t*>(row + k * 16 + half * 8 + 2 * (lane_ % 4))
                  : 0u;
    }
  }

  uint32_t q_[Traits::kQInSmem ? 1 : kDimQk / 16][4], dout_[kDimV / 16][4];
  uint32_t q_smem_;
  int lane_;
  float scale_log2_;
  PatchReader<kDimQk, Patch::kRowsFirst> q_reader_;
  PatchReader<kDimQk, Patch::kColumnsFirst> k_reader_;
  PatchReader<kDimV, Patch::kColumnsFirst> v_reader_;
  PatchReader<kDimQk, Patch::kRowsFirst> k_transposed_reader_;
};

template <class T, class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_dq_kernel(const __grid_constant__ DqArgs args) {
  constexpr int kDimQk = Traits::kDimQk, kDimV = Traits::kDimV;
  using Ring = typename Traits::Ring;
  extern __shared__ __align__(128) char smem[];

  const AttnBwd& p = args.common.p;
  const int group = args.common.group;
  QueryTile tile;
  // One kv head at a time, so that its K and V stay in L2; long rows first.
  tile.head = static_cast<int>(blockIdx.x / args.tiles.count);
  const int number = args.tiles.count - 1 - static_cast<int>(blockIdx.x % args.tiles.count);
  {
    const TileMap::Place place = args.tiles.place(number);
    tile.sequence = load_sequence(p.shape, place.batch);
    tile.first = place.index * args.tile_tokens;
    tile.count = min(args.tile_tokens, tile.sequence.q_len - tile.first);
  }
  if (tile.count <= 0) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // The address of a row of q, dout or dq; null past the last row.
  const auto row_of = [&](const auto& view, int row) {
    const int token = row / group;
    return token < tile.count
               ? tile.sequence.queries(view) + (tile.first + token) * view.seq +
                     (static_cast<int64_t>(tile.head) * group + row - token * group) * view.head
               : nullptr;
  };

  Ring ring{smem + Traits::kQBytes, args.stages};
  if (threadIdx.x == 0) ring.init(Traits::kReaders);
  const uint32_t q_smem = smem_addr(smem);
  if constexpr (Traits::kQInSmem) {
    for (int row = warp; row < Traits::kRows; row += Traits::kThreads / 32) {
      const T* src = row_of(typed<T>(p.q), row);
      if (lane < kDimQk / 8)
        cp_async_16(q_smem + tile_offset<kDimQk>(row, lane), src + lane * 8, src != nullptr);
    }
    cp_async_commit();
    cp_async_wait<0>();
  }
  __syncthreads();

  if (warp == Traits::kReaders) {
    if (p.branch[kCompressed].enabled)
      fill_ring<T, kDimQk, kDimV>(ring, args, tile, kCompressed,
                                  DenseKeys(tile, kCompressed, p.config));
    if (p.branch[kSelected].enabled)
      fill_ring<T, kDimQk, kDimV>(ring, args, tile, kSelected, GatheredKeys(args, tile, number));
    if (p.branch[kWindow].enabled)
      fill_ring<T, kDimQk, kDimV>(ring, args, tile, kWindow, DenseKeys(tile, kWindow, p.config));
    close_ring(ring);
    return;
  }

  const int first_row = warp * 16 + lane / 4;  // and 8 rows further
  RowPair rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.token[i] = min((first_row + 8 * i) / group, kMaxTileTokens - 1);
    rows.valid[i] = (first_row + 8 * i) / group < tile.count;
  }
  KeyTileProducts<T, Traits> tile_products(
      row_of(typed<T>(p.q), first_row), row_of(typed<T>(p.q), first_row + 8),
      row_of(typed<T>(p.dout), first_row), row_of(typed<T>(p.dout), first_row + 8),
      q_smem + warp * 16 * kDimQk * 2, lane,
      static_cast<float>(p.shape.softmax_scale * 1.4426950408889634));
  float acc[kDimQk / 8][4] = {};
  int branch = -1;
  while (true) {
    mbarrier_wait(ring.full(), ring.parity);
    const KeyTileInfo info = *ring.info();
    if (info.branch < 0) break;
    if (info.branch != branch) {
      branch = info.branch;
      rows.load_branch(args, tile, branch, first_row);
    }
    const KeyRange keys[2] = {rows.within(0, info), rows.within(1, info)};
    bool sees = false, whole = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sees |= rows.valid[i] && keys[i].end > 0 && keys[i].begin < kKeyTile;
      whole &= !rows.valid[i] || (keys[i].begin <= 0 && keys[i].end >= kKeyTile);
    }
    if (__any_sync(kFullWarp, sees)) {
      if (__all_sync(kFullWarp, whole))
        tile_products.template run<false>(ring.tile(), rows, keys, acc);
      else
        tile_products.template run<true>(ring.tile(), rows, keys, acc);
    }
    mbarrier_arrive_warp(ring.empty());
    ring.advance();
  }

  // Out through shared memory, for stores of whole rows. After the barrier no warp reads Q or a
  // tile any more, and each uses its own rows only.
  named_barrier_sync(1, Traits::kReaders * 32);
  const float scale = static_cast<float>(p.shape.softmax_scale);
  char* out = smem + warp * 16 * kDimQk * 2;
#pragma unroll
  for (int d = 0; d < kDimQk / 8; ++d)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<uint32_t*>(out + tile_offset<kDimQk>(lane / 4 + 8 * i, d) + lane % 4 * 4) =
          pack2<T>(acc[d][2 * i] * scale, acc[d][2 * i + 1] * scale);
  __syncwarp();
  const View<T> dq = typed<T>(p.dq);
#pragma unroll
  for (int i = lane; i < 16 * kDimQk / 8; i += 32) {
    const int row = i / (kDimQk / 8), chunk = i % (kDimQk / 8);
    T* dst = row_of(dq, warp * 16 + row);
    if (dst)
      *reinterpret_cast<uint4*>(dst + chunk * 8) =
          *reinterpret_cast<const uint4*>(out + tile_offset<kDimQk>(row, chunk));
  }
}

template <class T, int kDimQk, int kDimV>
void launch_bwd_dq(const DqArgs& args, cudaStream_t stream) {
  using Traits = DqTraits<kDimQk, kDimV>;
  const int64_t blocks = args.common.p.shape.heads_kv * args.tiles.count;
  if (blocks == 0) return;
  int device, available;
  NSA_CUDA_CHECK(cudaGetDevice(&device));
  NSA_CUDA_CHECK(
      cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  DqArgs launched = args;
  launched.stages = (available - Traits::kQBytes) / Traits::Ring::kStageBytes;
  if (launched.stages > Traits::kMaxStages) launched.stages = Traits::kMaxStages;
  if (launched.stages < Traits::kMinStages)
    throw std::runtime_error("this GPU has too little shared memory for the attention backward");
  auto* kernel = bwd_dq_kernel<T, Traits>;
  const int bytes = Traits::smem_bytes(launched.stages);
  allow_shared_memory(kernel, bytes);
  kernel<<<grid_size(blocks), Traits::kThreads, bytes, stream>>>(launched);
  check_launch("bwd_dq_kernel");
}

}  // namespace nsa::cuda::bwd
