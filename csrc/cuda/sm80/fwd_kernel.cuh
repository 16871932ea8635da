// The forward main loop of every branch: softmax(scale q k^T) v over the tiles of a BlockSource,
// and with kSelect the importance of the selection blocks and the choice of the best.
//
// A block of threads owns 16 * kGroups * kWarps rows (tokens x heads of one kv head), a warp
// 16 * kGroups of them from the scores to the output. Without kSelect the softmax is online. With
// it a first pass over the keys finds the lse, and the second computes exp(s - lse), which serves
// both P V and the importance.
#pragma once

#include "cuda/device/ring.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/fwd/gates.cuh"
#include "cuda/sm80/fwd_mma.cuh"
#include "cuda/sm80/fwd_selection.cuh"
#include "cuda/sm80/fwd_source.cuh"

namespace nsa::cuda::sm80 {

template <class T_, int kDk_, int kDv_, int kGroups_, int kWarps_, int kBlocksPerSm_,
          template <int> class Source_, bool kSelect_>
struct FwdTraits {
  using T = T_;
  using Source = Source_<kGroups_>;
  static constexpr int kDk = kDk_, kDv = kDv_, kGroups = kGroups_, kWarps = kWarps_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr bool kSelect = kSelect_;
  // Gathered tiles are copied by two more warps, one for K and one for V: the others work at
  // different times. (The registers of ten warps are those of twelve: 168 a thread.)
  static constexpr bool kProducer = Source::kSparse;
  static constexpr int kThreads = 32 * (kWarps + 2 * kProducer);
  static constexpr int kFillThreads = kProducer ? 32 : kThreads;
  static constexpr int kWarpRows = 16 * kGroups, kRows = kWarpRows * kWarps;
  static constexpr int kTileBytesK = kTileKeys * kDk * 2, kTileBytesV = kTileKeys * kDv * 2;
  static constexpr int kQueryBytes = kRows * kDk * 2;
  static_assert(kDv <= kDk, "the output is staged in the shared memory of Q");
};

/// Offsets into dynamic shared memory: Q, the rings of K and V, their barriers and one for Q, then
/// what the source and the selection keep.
template <class Traits>
struct FwdSmem {
  int k, v, barriers_k, barriers_v, barrier_q, extra;
  __host__ __device__ __forceinline__ explicit FwdSmem(const FwdParams& p) {
    k = Traits::kQueryBytes;
    v = k + p.stages_k * Traits::kTileBytesK;
    barriers_k = v + p.stages_v * Traits::kTileBytesV;
    barriers_v = barriers_k + p.stages_k * kRingBarrierBytes;
    barrier_q = barriers_v + p.stages_v * kRingBarrierBytes;
    extra = barrier_q + 16;
  }
  static int64_t bytes(const FwdParams& p) {
    int64_t bytes = FwdSmem(p).extra + Traits::Source::smem_bytes(p);
    if (Traits::kSelect) bytes += Selection<Traits::kGroups, Traits::kWarps>::smem_bytes(p);
    return bytes;
  }
};

template <class Traits>
class FwdBlock {
  using T = typename Traits::T;
  using Source = typename Traits::Source;
  static constexpr int kDk = Traits::kDk, kDv = Traits::kDv, kGroups = Traits::kGroups;
  static constexpr int kFillThreads = Traits::kFillThreads;
  // 16 rows a warp leave room for Q in registers; 32 rows next to the output's 128 do not.
  static constexpr bool kQueryInRegisters = kGroups == 1;
  static constexpr bool kQueryInRegistersForLse = kGroups * kDk <= 256;

 public:
  __device__ __forceinline__ static void run(const FwdParams& p, const Job& job, char* smem) {
    const FwdSmem<Traits> layout(p);
    const uint32_t base = smem_addr(smem);
    TileRing ring_k(base + layout.k, Traits::kTileBytesK, base + layout.barriers_k, p.stages_k);
    TileRing ring_v(base + layout.v, Traits::kTileBytesV, base + layout.barriers_v, p.stages_v);
    if (threadIdx.x == 0) {
      ring_k.init_barriers(kFillThreads, Traits::kWarps);
      ring_v.init_barriers(kFillThreads, Traits::kWarps);
      mbarrier_init(base + layout.barrier_q, 32 * Traits::kWarps);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp < Traits::kWarps) load_query(p, job, base, base + layout.barrier_q);

    const int warp_row = warp * Traits::kWarpRows;
    const Source source(p, job, warp_row, smem + layout.extra);
    const int tiles = source.tiles();

    const T* const k = static_cast<const T*>(p.k.ptr) + job.batch * p.k.batch +
                       job.row_k * p.k.seq + job.head_kv * p.k.head;
    const T* const v = static_cast<const T*>(p.v.ptr) + job.batch * p.v.batch +
                       job.row_k * p.v.seq + job.head_kv * p.v.head;
    const int fill_thread = Traits::kProducer ? lane : threadIdx.x;
    // With kSelect the ring of K carries the tiles twice, once for each pass.
    const int fills_k = Traits::kSelect ? 2 * tiles : tiles, fills_v = p.has_output ? tiles : 0;
    const auto fill_k = [&](int i) {
      if (i >= fills_k) return;
      load_segments<kDk, kFillThreads>(ring_k.begin_fill(), fill_thread, k, p.k.seq, source,
                                       i < tiles ? i : i - tiles);
      ring_k.end_fill();
    };
    const auto fill_v = [&](int i) {
      if (i >= fills_v) return;
      load_segments<kDv, kFillThreads>(ring_v.begin_fill(), fill_thread, v, p.v.seq, source, i);
      ring_v.end_fill();
    };
    if constexpr (Traits::kProducer) {
      if (warp >= Traits::kWarps) {
        for (int tile = 0; tile < tiles; ++tile) {
          if (warp == Traits::kWarps) {
            fill_k(tile);
          } else {
            fill_v(tile);
          }
        }
        cp_async_commit();
        cp_async_wait<0>();
        return;
      }
    } else {
      for (int i = 0; i < p.stages_k; ++i) fill_k(i);
      for (int i = 0; i < p.stages_v; ++i) fill_v(i);
    }

    mbarrier_wait(base + layout.barrier_q, 0);
    const uint32_t query_rows = base + warp_row * kDk * 2;
    const PatchReader<kDk, Patch::kColumnsFirst> reader_k(lane);
    const PatchReader<kDv, Patch::kRowsFirst> reader_v(lane);

    OnlineRow rows[kGroups][2];
    float negative_lse2[kGroups][2];  // kSelect only
    if constexpr (Traits::kSelect) {
      const QueryRows<T, kDk, kGroups, kQueryInRegistersForLse> query(query_rows, lane);
      for (int tile = 0; tile < tiles; ++tile) {
        const TileView view = source.view(tile);
        const uint32_t keys = ring_k.wait();
        if (view.active) {
          float s[kGroups][8][4];
          scores<T, kDk, kGroups>(s, query, keys, reader_k, ~0u);
          ring_k.release();
          mask_scores(p, source, view, warp_row, lane, s);
          accumulate_lse(p, s, rows);
        } else {
          ring_k.release();
        }
        fill_k(tile + p.stages_k);
      }
      finish_lse(p, job, warp_row, lane, rows, negative_lse2);
    }

    Selection<kGroups, Traits::kWarps> selection(p, job, warp, smem + layout.extra);
    if constexpr (Traits::kSelect) selection.begin(lane);
    int observed = 0;

    const QueryRows<T, kDk, kGroups, kQueryInRegisters> query(query_rows, lane);
    float o[kGroups][kDv / 8][4];
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
#pragma unroll
      for (int i = 0; i < kDv / 2; ++i) o[m][i / 4][i % 4] = 0.0f;
    }
    for (int tile = 0; tile < tiles; ++tile) {
      const TileView view = source.view(tile);
      const uint32_t groups = Source::kSparse ? view.active : ~0u;
      uint32_t packed[kGroups][kTileKeys / 16][4];
      const uint32_t keys = ring_k.wait();
      // The copies of a tile wait for the slowest warp to release what it replaces; each warp
      // issues its share half a tile after its own release.
      const bool refill = !Traits::kProducer;
      if (view.active) {
        float s[kGroups][8][4];
        scores<T, kDk, kGroups>(s, query, keys, reader_k, groups);
        ring_k.release();
        if (refill && tile > 0) fill_v(tile - 1 + p.stages_v);
        mask_scores(p, source, view, warp_row, lane, s);
        if constexpr (Traits::kSelect) {
          exponentials(p, s, negative_lse2);
          selection.sum_heads(tile, s, lane);
          observed = tile + 1;
        } else {
          online_softmax(p, groups, s, rows, o);
        }
#pragma unroll
        for (int m = 0; m < kGroups; ++m) pack_probabilities<T>(packed[m], s[m]);
        if constexpr (Traits::kSelect) selection.advance(tile, lane);
      } else {
        ring_k.release();
        if (refill && tile > 0) fill_v(tile - 1 + p.stages_v);
      }
      if (refill) fill_k((Traits::kSelect ? tiles : 0) + tile + p.stages_k);
      if (p.has_output) {
        const uint32_t values = ring_v.wait();
        if (view.active) accumulate<T, kDv, kGroups>(o, packed, values, reader_v, groups);
        ring_v.release();
      }
    }

    if constexpr (Traits::kSelect) {
      selection.finish(observed, lane);
    } else {
      normalise(p, job, warp_row, lane, rows, o);
    }
    if (p.has_output) store_output(p, job, warp_row, lane, query_rows, o);
  }

 private:
  __device__ __forceinline__ static int token_of(const FwdParams& p, int row) {
    return row >> p.log2_group;
  }
  __device__ __forceinline__ static int head_of(const FwdParams& p, int row) {
    return row & ((1 << p.log2_group) - 1);
  }
  __device__ __forceinline__ static bool row_exists(const FwdParams& p, const Job& job, int row) {
    return token_of(p, row) < job.tokens && head_of(p, row) < p.group;
  }

  __device__ __forceinline__ static void load_query(const FwdParams& p, const Job& job,
                                                    uint32_t tile, uint32_t barrier) {
    load_tile<kDk, Traits::kRows, 32 * Traits::kWarps>(tile, threadIdx.x, [&](int row) {
      return row_exists(p, job, row)
                 ? query_row<const T>(p.q, p, job, token_of(p, row), head_of(p, row))
                 : nullptr;
    });
    mbarrier_arrive_cp_async(barrier);
  }

  /// -inf where a row does not see a key.
  __device__ __forceinline__ static void mask_scores(const FwdParams& p, const Source& source,
                                                     const TileView& view, int warp_row, int lane,
                                                     float (&s)[kGroups][8][4]) {
    if (!view.masked) return;
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = token_of(p, warp_row + m * 16 + half * 8 + (lane >> 2));
#pragma unroll
        for (int segment = 0; segment < 2; ++segment) {
          int lo, hi;
          source.bounds(view, segment, token, lo, hi);
          const int first = view.base[segment] + (lane & 3) * 2;
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int key = first + (i / 2) * 8 + i % 2;
            float& score = s[m][segment * 4 + i / 2][half * 2 + i % 2];
            if (key < lo || key >= hi) score = negative_infinity();
          }
        }
      }
    }
  }

  __device__ __forceinline__ static float lane_max(const float (&s)[8][4], int half) {
    float value = s[0][half * 2];
#pragma unroll
    for (int i = 1; i < 16; ++i) value = fmaxf(value, s[i / 2][half * 2 + i % 2]);
    return value;
  }

  /// First pass: every lane keeps the reference and sum of its own columns; quads merge at the end.
  /// Sums in float32 have room for scores far above the reference, so that is raised to the maximum
  /// only where a sum grows large: no maxima are computed for most tiles.
  __device__ __forceinline__ static void accumulate_lse(const FwdParams& p,
                                                        const float (&s)[kGroups][8][4],
                                                        OnlineRow (&rows)[kGroups][2]) {
    constexpr float kLarge = 1 << 30;
    float sums[kGroups][2];
    bool raise = false;
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const OnlineRow& row = rows[m][half];
        sums[m][half] = lane_sum(p, s[m], half, row.reference(p.scale_log2));
        raise |= row.max == negative_infinity() || sums[m][half] > kLarge;
      }
    }
    raise = __any_sync(0xffffffffu, raise);
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        OnlineRow& row = rows[m][half];
        // Only where it is needed: a row's result must not depend on its neighbours' scores.
        if (raise && (row.max == negative_infinity() || sums[m][half] > kLarge)) {
          float reference;
          row.raise(lane_max(s[m], half), p.scale_log2, reference);
          sums[m][half] = lane_sum(p, s[m], half, reference);
        }
        row.sum += sums[m][half];
      }
    }
  }
  __device__ __forceinline__ static float lane_sum(const FwdParams& p, const float (&s)[8][4],
                                                   int half, float reference) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      sum += exp2_approx(fmaf(s[i / 2][half * 2 + i % 2], p.scale_log2, -reference));
    return sum;
  }

  __device__ __forceinline__ static void finish_lse(const FwdParams& p, const Job& job,
                                                    int warp_row, int lane,
                                                    OnlineRow (&rows)[kGroups][2],
                                                    float (&negative_lse2)[kGroups][2]) {
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows[m][half].merge_quad(p.scale_log2);
        const float lse2 = rows[m][half].lse2(p.scale_log2);
        const int row = warp_row + m * 16 + half * 8 + (lane >> 2);
        // Rows that exist only to fill the tile, and those that see nothing, weigh nothing.
        const bool weighs = row_exists(p, job, row) && lse2 != negative_infinity();
        negative_lse2[m][half] = weighs ? -lse2 : negative_infinity();
        store_lse(p, job, row, lane, lse2);
      }
    }
  }

  __device__ __forceinline__ static void store_lse(const FwdParams& p, const Job& job, int row,
                                                   int lane, float lse2) {
    if (p.lse.ptr == nullptr || (lane & 3) != 0 || !row_exists(p, job, row)) return;
    *query_row<float>(p.lse, p, job, token_of(p, row), head_of(p, row)) = lse2 * kLn2;
  }

  /// Second pass: s becomes exp(scale s - lse).
  __device__ __forceinline__ static void exponentials(const FwdParams& p, float (&s)[kGroups][8][4],
                                                      const float (&negative_lse2)[kGroups][2]) {
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        float& x = s[m][i / 4][i % 4];
        x = exp2_approx(fmaf(x, p.scale_log2, negative_lse2[m][i / 2 % 2]));
      }
    }
  }

  /// s becomes exp(scale (s - maximum so far)). The output so far is rescaled, and the quad agrees
  /// on a new maximum, only where a row of the warp has one. (A reference that may lag behind the
  /// maximum saves more of these, but then the weight of the key that dominates a row is not 1 but
  /// rounded like any other: twice the error of a softmax that is nearly one-hot.)
  __device__ __forceinline__ static void online_softmax(const FwdParams& p, uint32_t groups,
                                                        float (&s)[kGroups][8][4],
                                                        OnlineRow (&rows)[kGroups][2],
                                                        float (&o)[kGroups][kDv / 8][4]) {
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      if (kGroups > 1 && !(groups >> m & 1)) continue;
      const float max[2] = {lane_max(s[m], 0), lane_max(s[m], 1)};
      if (__any_sync(0xffffffffu, max[0] > rows[m][0].max || max[1] > rows[m][1].max)) {
        float factor[2], reference;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // The row's own maximum decides: its result must not depend on its neighbours' scores.
          OnlineRow& row = rows[m][half];
          const float top = quad_max(max[half]);
          factor[half] = 1.0f;
          if (top > row.max) factor[half] = row.raise(top, p.scale_log2, reference);
        }
#pragma unroll
        for (int i = 0; i < kDv / 2; ++i) o[m][i / 4][i % 4] *= factor[i / 2 % 2];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float reference = rows[m][half].reference(p.scale_log2);
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          float& x = s[m][i / 2][half * 2 + i % 2];
          x = exp2_approx(fmaf(x, p.scale_log2, -reference));
          sum += x;
        }
        rows[m][half].sum += sum;
      }
    }
  }

  __device__ __forceinline__ static void normalise(const FwdParams& p, const Job& job, int warp_row,
                                                   int lane, OnlineRow (&rows)[kGroups][2],
                                                   float (&o)[kGroups][kDv / 8][4]) {
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      float inverse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        OnlineRow& row = rows[m][half];
        row.sum = quad_sum(row.sum);
        inverse[half] = row.sum > 0.0f ? 1.0f / row.sum : 0.0f;
        store_lse(p, job, warp_row + m * 16 + half * 8 + (lane >> 2), lane, row.lse2(p.scale_log2));
      }
#pragma unroll
      for (int i = 0; i < kDv / 2; ++i) o[m][i / 4][i % 4] *= inverse[i / 2 % 2];
    }
  }

  /// Writes the warp's rows: the branch's own output, and its share of the gated sum. The warp's
  /// rows of Q have been read; they become the staging area that turns fragments into 16-byte
  /// pieces of rows.
  __device__ __forceinline__ static void store_output(const FwdParams& p, const Job& job,
                                                      int warp_row, int lane, uint32_t staging,
                                                      const float (&o)[kGroups][kDv / 8][4]) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
#pragma unroll
      for (int i = 0; i < kDv / 4; ++i) {
        const int chunk = i / 2, half = i % 2;
        const uint32_t address =
            staging + tile_offset<kDv>(m * 16 + half * 8 + (lane >> 2), chunk) + (lane & 3) * 4;
        store_shared(address, pack2<T>(o[m][chunk][half * 2], o[m][chunk][half * 2 + 1]));
      }
    }
    __syncwarp();
    constexpr int kChunks = kDv / 8, kRowsAtOnce = 32 / kChunks;
    const int chunk = lane % kChunks;
#pragma unroll 2
    for (int i = 0; i < Traits::kWarpRows; i += kRowsAtOnce) {
      const int row = i + lane / kChunks;
      const int token = token_of(p, warp_row + row), head = head_of(p, warp_row + row);
      if (!row_exists(p, job, warp_row + row)) continue;
      const uint4 value[1] = {load_shared_16(staging + tile_offset<kDv>(row, chunk))};
      store_chunks<T>(p, job, token, head, chunk * 8, 0, value);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    attn_fwd_kernel(const __grid_constant__ FwdParams p) {
  extern __shared__ __align__(128) char fwd_smem[];
  Job job;
  if (make_job(p, blockIdx.x, job)) FwdBlock<Traits>::run(p, job, fwd_smem);
}

}  // namespace nsa::cuda::sm80
