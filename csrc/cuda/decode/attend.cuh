// Attention of one query tile over the tiles of a worker: a stream of 64-key tiles of K and V
// through a ring in shared memory, softmax online, one partial result for each segment.
//
// Four warps, 16 query rows each: with one group of 16 rows every warp takes 16 of the 64 keys,
// with four groups each takes all of them for its own rows. Only bandwidth counts: at 16 rows the
// tensor cores have a tenth of the work that would keep them busy. So the ring never drains between
// segments: the copies of the next one are under way while this one's warps merge.
#pragma once

#include "cuda/decode/source.cuh"
#include "cuda/device/ring.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tile.cuh"

namespace nsa::cuda::decode {

template <class T_, int kDk_, int kDv_, int kRowGroups_>
struct AttendTraits {
  using T = T_;
  static constexpr int kDk = kDk_, kDv = kDv_, kRowGroups = kRowGroups_;
  static constexpr int kWarps = 4, kThreads = 128;
  static constexpr int kKeyWarps = kWarps / kRowGroups;  // warps that share the keys of a tile
  static constexpr int kWarpKeys = kTileKeys / kKeyWarps;
  static constexpr int kRows = 16 * kRowGroups;
  static constexpr int kTileBytesK = kTileKeys * kDk * 2;
  static constexpr int kStageBytes = kTileKeys * (kDk + kDv) * 2;
  // Two warps' rows of O, and their maxima and sums, on the way to the warps that merge them.
  static constexpr int kMergeSlots = kKeyWarps > 1 ? 2 : 0;
  static constexpr int kMergeBytes = kMergeSlots * 16 * (kDv + 2) * 4;
  static constexpr int64_t shared_bytes(int stages) {
    return kMergeBytes + int64_t{stages} * (kStageBytes + kRingBarrierBytes);
  }
};

/// L2 keeps what is read again, weights and partial results, longer than the stream of K and V.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void cp_async_stream(uint32_t dst, const void* src, bool valid,
                                                uint64_t policy) {
  const int bytes = valid ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(dst),
      "l"(src), "r"(bytes), "l"(policy)
      : "memory");
}

template <class Traits>
class Attend {
  using T = typename Traits::T;
  static constexpr int kDk = Traits::kDk, kDv = Traits::kDv, kKeyWarps = Traits::kKeyWarps;
  static constexpr int kSteps = Traits::kWarpKeys / 16;  // groups of 16 keys of a warp's tile
  static constexpr int kSweepRows = Traits::kThreads / 8, kSweeps = kTileKeys / kSweepRows;

 public:
  __device__ __forceinline__ Attend(const DecodeParams& p, char* smem)
      : p_(p),
        lane_(threadIdx.x % 32),
        row_group_(threadIdx.x / 32 / kKeyWarps),
        key_warp_(threadIdx.x / 32 % kKeyWarps),
        policy_(evict_first_policy()),
        merge_(reinterpret_cast<float4*>(smem + p.stages * Traits::kStageBytes)),
        ring_(smem_addr(smem), Traits::kStageBytes,
              smem_addr(smem) + p.stages * Traits::kStageBytes + Traits::kMergeBytes, p.stages),
        reader_k_(lane_),
        reader_v_(lane_) {
    if (threadIdx.x == 0) ring_.init_barriers(Traits::kThreads, Traits::kWarps);
    __syncthreads();
  }

  /// The share of `worker` in the tiles of a branch. Called by all threads.
  template <class Source>
  __device__ __forceinline__ void run(const Source& source, const Share& share, int worker,
                                      int row_tile) {
    if (share.tiles == 0) return;
    Cursor cursor = share.cursor;
    Unit unit;
    Filler<Source> filler(*this, source, share);
    bool fresh = true;  // a segment begins
    // Each of the parts has one call: as little code as can be. The copies run ahead.
    for (int n = 1 - p_.stages; n < share.tiles; ++n) {
      if (fresh) {
        unit = source.unit(cursor.b, cursor.i);
        begin(source, unit, cursor.i);
        fresh = false;
      }
      filler.fill();
      if (n < 0) continue;
      attend(source, unit, unit.begin + cursor.tile * kTileKeys, ring_.wait());
      ring_.release();
      const bool last = n + 1 == share.tiles;
      if (last || cursor.tile + 1 == cursor.tiles)
        finish(source, slot(p_, source.branch(), worker, cursor.unit(p_, source.branch()),
                            source.head(), row_tile));
      if (!last) fresh = cursor.advance(p_, source.branch());
    }
  }

 private:
  /// Copies the tiles of a worker, one at a time. Their pages are looked up two tiles ahead.
  template <class Source>
  class Filler {
   public:
    __device__ __forceinline__ Filler(Attend& block, const Source& source, const Share& share)
        : block_(block),
          source_(source),
          cursor_(share.cursor),
          unit_(source.unit(cursor_.b, cursor_.i)),
          to_look_up_(share.tiles),
          to_copy_(share.tiles) {
      look_up(next_);
      look_up(after_next_);
    }
    __device__ __forceinline__ void fill() {
      if (to_copy_ == 0) return;
      --to_copy_;
      const uint32_t stage = block_.ring_.begin_fill();
      copy_rows<kDk>(block_.p_.k[source_.branch()], stage);
      copy_rows<kDv>(block_.p_.v[source_.branch()], stage + Traits::kTileBytesK);
      block_.ring_.end_fill();
      next_ = after_next_;
      look_up(after_next_);
    }

   private:
    struct Place {
      int first;           // offset of the tile's first key
      int pages[kSweeps];  // of this thread's rows; -1: zeros
    };
    // Eight threads copy 128 bytes of a row at once; a sweep of the block copies 16 rows.
    __device__ __forceinline__ static int row(int sweep) {
      return sweep * kSweepRows + (threadIdx.x >> 3);
    }
    __device__ __forceinline__ void look_up(Place& place) {
      if (to_look_up_ == 0) return;
      place.first = unit_.begin + cursor_.tile * kTileKeys;
#pragma unroll
      for (int sweep = 0; sweep < kSweeps; ++sweep)
        place.pages[sweep] = source_.page(unit_, place.first + row(sweep));
      if (--to_look_up_ > 0 && cursor_.advance(block_.p_, source_.branch()))
        unit_ = source_.unit(cursor_.b, cursor_.i);
    }
    template <int kDim>
    __device__ __forceinline__ void copy_rows(const PagedView& view, uint32_t tile) const {
      const int chunk = threadIdx.x & 7, mask = (1 << source_.page_shift()) - 1;
      const T* base = static_cast<const T*>(view.ptr) + source_.head() * view.head + chunk * 8;
#pragma unroll
      for (int sweep = 0; sweep < kSweeps; ++sweep) {
        const bool valid = next_.pages[sweep] >= 0;
        const T* src = base + (valid ? next_.pages[sweep] : 0) * view.page +
                       ((next_.first + row(sweep)) & mask) * view.seq;
        const uint32_t dst = tile + tile_offset<kDim>(row(sweep), chunk);
#pragma unroll
        for (int panel = 0; panel < kDim / 64; ++panel)
          cp_async_stream(dst + panel * 128, src + panel * 64, valid, block_.policy_);
      }
    }

    Attend& block_;
    const Source& source_;
    Cursor cursor_;
    Unit unit_;
    int to_look_up_, to_copy_;
    Place next_, after_next_;
  };

  /// This lane's rows of the block's query tile: g and g + 8 of its warp's group.
  __device__ __forceinline__ int row(int half) const {
    return row_group_ * 16 + half * 8 + (lane_ >> 2);
  }

  template <class Source>
  __device__ __forceinline__ void begin(const Source& source, const Unit& unit, int i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      source.bounds(unit, row(half), lo_[half], hi_[half]);
      rows_[half] = OnlineRow();
      const T* q = nullptr;
      if (source.row_exists(row(half))) {
        const int2 at = source.token_head(i, row(half));
        q = static_cast<const T*>(p_.q.ptr) + unit.b * p_.q.batch + at.x * p_.q.seq +
            (static_cast<int64_t>(source.head()) * p_.group + at.y) * p_.q.head + (lane_ & 3) * 2;
      }
#pragma unroll
      for (int step = 0; step < kDk / 16; ++step) {
#pragma unroll
        for (int k = 0; k < 2; ++k)
          q_[step][half + 2 * k] =
              q ? *reinterpret_cast<const uint32_t*>(q + step * 16 + k * 8) : 0;
      }
      if constexpr (Source::kHasWeights) {
        const int64_t weight_row =
            (static_cast<int64_t>(unit.b) * p_.heads_kv + source.head()) * p_.tokens * p_.group +
            source.global_row(row(half));
        const int blocks = kChunk >> (p_.select_shift - p_.stride_shift);
        weights_[half] = q ? p_.weights + weight_row * p_.chunks * blocks : nullptr;
        carries_[half] = q ? p_.carries + weight_row * p_.chunks : nullptr;
      }
    }
#pragma unroll
    for (int i = 0; i < kDv / 2; ++i) o_[i / 4][i % 4] = 0.0f;
  }

  /// The keys of this warp in a tile.
  template <class Source>
  __device__ __forceinline__ void attend(const Source& source, const Unit& unit, int first_key,
                                         uint32_t stage) {
    const int first = key_warp_ * Traits::kWarpKeys;
    float s[2 * kSteps][4];
#pragma unroll
    for (int i = 0; i < 8 * kSteps; ++i) s[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int step = 0; step < kDk / 16; ++step) {
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, reader_k_.at(stage, first + n * 16, step));
        mma_16816<T>(s[2 * n], q_[step], b[0], b[1]);
        mma_16816<T>(s[2 * n + 1], q_[step], b[2], b[3]);
      }
    }

    float max[2] = {negative_infinity(), negative_infinity()};
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
      const int key =
          source.key(unit, first_key + first + n / 2 * 16) + n % 2 * 8 + (lane_ & 3) * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, column = key + i % 2;
        if (column < lo_[half] || column >= hi_[half]) s[n][i] = negative_infinity();
        max[half] = fmaxf(max[half], s[n][i]);
      }
    }
    float reference[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = rows_[half].raise(quad_max(max[half]), p_.scale_log2, reference[half]);
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n) {
        o_[n][2 * half] *= factor;
        o_[n][2 * half + 1] *= factor;
      }
    }
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(fmaf(s[n][i], p_.scale_log2, -reference[i / 2]));
        rows_[i / 2].sum += s[n][i];
      }
    }

    if constexpr (Source::kHasWeights) {
#pragma unroll
      for (int n = 0; n < kSteps; ++n)
        source.block_weights().store(s[2 * n], s[2 * n + 1], reference, weights_, carries_,
                                     (first_key + first) / kChunk + n);
    }

#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      const uint32_t a[4] = {pack2<T>(s[2 * n][0], s[2 * n][1]), pack2<T>(s[2 * n][2], s[2 * n][3]),
                             pack2<T>(s[2 * n + 1][0], s[2 * n + 1][1]),
                             pack2<T>(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
      for (int d = 0; d < kDv / 16; ++d) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, reader_v_.at(stage + Traits::kTileBytesK, first + n * 16, d));
        mma_16816<T>(o_[2 * d], a, b[0], b[1]);
        mma_16816<T>(o_[2 * d + 1], a, b[2], b[3]);
      }
    }
  }

  /// Merges the warps that share rows, in a fixed order, and stores the segment's partial result.
  template <class Source>
  __device__ __forceinline__ void finish(const Source& source, int64_t slot) {
#pragma unroll
    for (int half = 0; half < 2; ++half) rows_[half].sum = quad_sum(rows_[half].sum);
    if constexpr (kKeyWarps > 1) {
      __syncthreads();  // the slots have been read
#pragma unroll 1
      for (int half_warps = kKeyWarps / 2; half_warps >= 1; half_warps /= 2) {
        // Two slots: in the second round of four warps, warp 1 writes the slot that it has read.
        const bool writes = key_warp_ >= half_warps && key_warp_ < 2 * half_warps;
        const int at = half_warps < kKeyWarps / 2
                           ? 1
                           : row_group_ * (kKeyWarps / 2) + key_warp_ - (writes ? half_warps : 0);
        float4* merge = merge_ + at * 4 * (kDv + 2);
        __syncwarp();  // the lanes of a quad read the same maxima
        if (writes) write_rows(merge);
        __syncthreads();
        if (key_warp_ < half_warps) add_rows(merge);
      }
    }
    if (key_warp_ != 0) return;
    const Partials& partials = p_.partials[source.branch()];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!source.row_exists(row(half))) continue;
      const int64_t at = slot * Traits::kRows + row(half);
      float* out = partials.out + at * kDv + (lane_ & 3) * 2;
#pragma unroll
      for (int n = 0; n < kDv / 8; ++n)
        *reinterpret_cast<float2*>(out + n * 8) = make_float2(o_[n][2 * half], o_[n][2 * half + 1]);
      if ((lane_ & 3) == 0)
        partials.sums[at] = make_float2(rows_[half].reference(p_.scale_log2), rows_[half].sum);
    }
  }

  // A warp's rows in a merge slot, lane by lane: accumulators, then (max, sum) of both rows.
  __device__ __forceinline__ void write_rows(float4* merge) const {
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n)
      merge[n * 32 + lane_] = make_float4(o_[n][0], o_[n][1], o_[n][2], o_[n][3]);
    if ((lane_ & 3) == 0)
      merge[kDv * 4 + (lane_ >> 2)] =
          make_float4(rows_[0].max, rows_[0].sum, rows_[1].max, rows_[1].sum);
  }
  __device__ __forceinline__ void add_rows(const float4* merge) {
    const float4 other = merge[kDv * 4 + (lane_ >> 2)];
    const float max[2] = {other.x, other.z}, sum[2] = {other.y, other.w};
    float factor[2], other_factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float reference;
      factor[half] = rows_[half].raise(max[half], p_.scale_log2, reference);
      other_factor[half] = exp2_approx(fmaf(max[half], p_.scale_log2, -reference));
      rows_[half].sum = fmaf(sum[half], other_factor[half], rows_[half].sum);
    }
#pragma unroll
    for (int n = 0; n < kDv / 8; ++n) {
      const float4 o = merge[n * 32 + lane_];
      o_[n][0] = fmaf(o_[n][0], factor[0], o.x * other_factor[0]);
      o_[n][1] = fmaf(o_[n][1], factor[0], o.y * other_factor[0]);
      o_[n][2] = fmaf(o_[n][2], factor[1], o.z * other_factor[1]);
      o_[n][3] = fmaf(o_[n][3], factor[1], o.w * other_factor[1]);
    }
  }

  const DecodeParams& p_;
  int lane_, row_group_, key_warp_;
  uint64_t policy_;
  float4* merge_;
  TileRing ring_;
  PatchReader<kDk, Patch::kColumnsFirst> reader_k_;
  PatchReader<kDv, Patch::kRowsFirst> reader_v_;

  // Of the current segment.
  uint32_t q_[kDk / 16][4];
  float o_[kDv / 8][4];
  OnlineRow rows_[2];
  int lo_[2], hi_[2];  // keys that the rows see
  float* weights_[2];  // compressed branch: rows of DecodeParams::weights and carries
  float2* carries_[2];
};

}  // namespace nsa::cuda::decode
