// dQ of selected blocks that one token of a warpgroup chose. Keys are the rows of the products, so
// that the token's query rows are all of their columns:
//
//   S^T = K Q^T     P^T = exp2(scale S^T - lse)     dP^T = V dO^T     dQ^T += K^T dS^T
//
// A quarter of what the 64 rows of a warpgroup's tokens take. dS^T goes through shared memory, to
// be the B operand of its product; K is read there in both directions. Each token has a sum of its
// own, and together they take the registers of the warpgroup's dQ, which they become in the end.
#pragma once

#include "cuda/sm90/bwd_tiles.cuh"

namespace nsa::cuda::bwd::sm90 {

/// Query rows of a token: columns of its products.
inline constexpr int kTokenRows = 16;
inline constexpr int kLog2TokenRows = 4;
/// Tokens of a warpgroup.
inline constexpr int kTokens = kRows / kTokenRows;

/// A tile of keys in shared memory, and its barriers. K and V are waited for and released apart.
struct KeySlot {
  uint32_t k, v;
  uint32_t k_full, k_empty, v_full, v_empty;
  uint32_t k_parity, v_parity;
};

/// What a warpgroup keeps in shared memory.
struct TokenSmem {
  // dS of a tile: 16 rows of 64 keys, with the 128-byte swizzle. A tile's second successor writes
  // where all warps are done reading: each has met the others at the tile between.
  alignas(1024) char ds[2][kTokenRows * 128];
  float4 stats[kRows];  // lse_log2, gate, gate * delta
};

template <class Shape>
class TokenProducts {
  using T = typename Shape::T;
  static constexpr int kDimQk = Shape::kDimQk, kDimV = Shape::kDimV;
  static constexpr int kScores = kTokenRows / 2;
  static constexpr int kPanels = kDimQk / 64;
  static constexpr int kDsBytes = kTokenRows * 128;

 public:
  /// `smem` and `rows`: where the warpgroup's TokenSmem and its Q and dO are; `barrier` the number
  /// of its named barrier.
  __device__ __forceinline__ TokenProducts(uint32_t smem, uint32_t rows, int barrier,
                                           float scale_log2)
      : smem_(smem),
        rows_(rows),
        ds_place_(smem + ds_offset()),
        barrier_(barrier),
        scale_log2_(scale_log2) {
    asm volatile("" : "+r"(ds_place_));  // otherwise worked out anew between dP and dS
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) sums_[t][p][i] = 0.0f;
        pin(sums_[t][p]);
      }
  }

  /// All rows are written before the first tile; a row that is not there has gate 0 and
  /// exponentials 0.
  __device__ __forceinline__ void write_stats(int row, float lse_log2, float gate,
                                              float gated_delta) const {
    store_shared_16(stats(row), make_uint4(__float_as_uint(lse_log2), __float_as_uint(gate),
                                           __float_as_uint(gated_delta), 0));
  }
  __device__ __forceinline__ void meet() const { named_barrier_sync(barrier_, 128); }

  /// A tile, of which the token sees the first `seen` keys. Releases it.
  __device__ __forceinline__ void add_tile(const KeySlot& slot, int token, int seen) {
    float s[kScores], dp[kScores];
    const uint32_t q = uniform(rows_ + token * (kTokenRows * 128));
    const uint32_t ds_tile = uniform(smem_ + buffer_);
    wgmma_fence();
    issue_scores<T, kTokenRows, kDimQk>(s, slot.k, q);
    wgmma_commit();
    mbarrier_wait(slot.v_full, slot.v_parity);
    wgmma_fence();
    issue_scores<T, kTokenRows, kDimV>(dp, slot.v, q + Shape::kKBytes);
    wgmma_commit();
    // The thread's columns: i % 4 / 2 tells its keys, 8 apart, the rest its query rows.
    const int lane = threadIdx.x % 32, key = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const auto column = [](int i) { return i / 4 * 2 + i % 2; };
    float lse_log2[4], gate[4], gated_delta[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 row =
          load_shared_16(stats(token * kTokenRows + lane % 4 * 2 + i / 2 * 8 + i % 2));
      lse_log2[i] = __uint_as_float(row.x);
      gate[i] = __uint_as_float(row.y);
      gated_delta[i] = __uint_as_float(row.z);
    }
    const uint32_t keep = __any_sync(kFullWarp, seen > 0) ? ~0u : 0;
    wgmma_wait<1>();
    pin(s);
    // A block of code of its own: otherwise the compiler takes the exponentials after dP's wait.
    if (keep != 0) {
      if (seen < kRows) {
#pragma unroll
        for (int i = 0; i < kScores; ++i)
          if (key + i % 4 / 2 * 8 >= seen) s[i] = -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < kScores; ++i)
        s[i] = exp2_approx(fmaf(s[i], scale_log2_, -lse_log2[column(i)]));
    }
    wgmma_wait<0>();
    pin(dp);
    mbarrier_arrive_warp(slot.v_empty);
    uint32_t ds[kScores / 2];
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      const int left = column(2 * i), right = left + 1;
      ds[i] = pack2<T>(s[2 * i] * fmaf(gate[left], dp[2 * i], -gated_delta[left]),
                       s[2 * i + 1] * fmaf(gate[right], dp[2 * i + 1], -gated_delta[right])) &
              keep;
    }
    stmatrix_x4_trans(ds_place_ + buffer_, ds);
    fence_proxy_async();
    meet();
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (__any_sync(kFullWarp, t == token)) update(sums_[t], slot.k, ds_tile);
    mbarrier_arrive_warp(slot.k_empty);
    buffer_ ^= kDsBytes;
  }

  /// The sums as the rows of dQ: warp w holds the 16 rows of token w. In rounds, of which each
  /// moves 8 columns of dQ by 8 rows from each warp and token.
  __device__ __forceinline__ void to_rows(float (&dq)[kDimQk / 2]) const {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const auto place = [&](int from, int token, int column, int row) {
      return smem_ + ((from * kTokens + token) * 64 + column * 8 + row) * 4;
    };
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        meet();
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            cuda::store_shared(place(warp, t, lane / 4, lane % 4 * 2 + i),
                               __float_as_uint(sums_[t][p][2 * part + i]));
        meet();
#pragma unroll
        for (int from = 0; from < 4; ++from)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            dq[(p * 8 + from * 2 + part % 2) * 4 + part / 2 * 2 + i] =
                __uint_as_float(cuda::load_shared(place(from, warp, lane % 4 * 2 + i, lane / 4)));
      }
    }
  }

 private:
  __device__ __forceinline__ uint32_t stats(int row) const {
    return smem_ + offsetof(TokenSmem, stats) + row * sizeof(float4);
  }

  /// Where a lane stores dS: a warp has 16 keys of all rows.
  static __device__ __forceinline__ uint32_t ds_offset() {
    static_assert(kTokenRows == 16);  // two groups of keys by two of rows
    const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8;
    const int chunk = threadIdx.x % 128 / 32 * 2 + lane / 8 % 2;
    return row * 128 + ((chunk ^ (row & 7)) << 4);
  }

  /// A token's sum += K^T dS^T.
  static __device__ __forceinline__ void update(float (&sum)[kPanels][kScores], uint32_t k,
                                                uint32_t ds) {
    const uint64_t a_desc = desc_mn_major(k, kPanelBytes), b_desc = desc_k_major(ds);
#pragma unroll
    for (int p = 0; p < kPanels; ++p) pin(sum[p]);
    wgmma_fence();
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
#pragma unroll
      for (int step = 0; step < kRows / 16; ++step)
        wgmma_ss_mn_major<T, kTokenRows>(sum[p], a_desc + (p * kPanelBytes + step * 2048) / 16,
                                         b_desc + step * 32 / 16);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int p = 0; p < kPanels; ++p) pin(sum[p]);
  }

  uint32_t smem_, rows_, ds_place_;
  int barrier_;
  float scale_log2_;
  uint32_t buffer_ = 0;
  float sums_[kTokens][kPanels][kScores];
};

}  // namespace nsa::cuda::bwd::sm90
