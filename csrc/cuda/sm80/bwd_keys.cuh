// The key tiles that a query tile walks: one warp copies them, branch after branch, into a ring in
// shared memory; the other warps follow, each at its own pace.
#pragma once

#include "cuda/device/tile.cuh"
#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm80/bwd_sequence.cuh"

namespace nsa::cuda::bwd {

inline constexpr int kKeyTile = 32;

/// What a reader must know of a stage.
struct alignas(32) KeyTileInfo {
  int branch;          // -1: the walk is over
  int key, end;        // keys [key, min(key + 32, end))
  uint32_t tokens[2];  // of the query tile, that look at these keys
  int unused[3];
};

/// A query tile: `count` tokens of a sequence from `first` on.
struct QueryTile {
  Sequence sequence;
  int head;
  int first, count;
};

// BlockSource policies of the dQ kernel: for_each(visit) calls visit(key, end, tokens) for every
// tile [key, min(key + 32, end)) of keys that some token of the query tile sees, the bits of the
// tokens given.

/// Every tile between the first key that the first token sees and the last that the last one does:
/// the causal staircase over compressed tokens, or a sliding window.
struct DenseKeys {
  int begin, end;

  __device__ __forceinline__ DenseKeys(const QueryTile& tile, int branch,
                                       const BlockConfig& config) {
    begin = visible_keys(branch, tile.sequence.position(tile.first), config).begin;
    end = visible_keys(branch, tile.sequence.position(tile.first + tile.count - 1), config).end;
    begin = begin / kKeyTile * kKeyTile;
  }
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    for (int key = begin; key < end; key += kKeyTile) visit(key, end, ~0u, ~0u);
  }
};

/// The union of the blocks that the tokens chose.
struct GatheredKeys {
  const UnionBlock* blocks;
  int count, block_size;
  int end;  // keys that the last token sees

  __device__ __forceinline__ GatheredKeys(const DqArgs& args, const QueryTile& tile, int number) {
    const AttnBwd& p = args.common.p;
    const int64_t list = static_cast<int64_t>(tile.head) * args.tiles.count + number;
    blocks = args.union_blocks + list * args.tile_tokens * p.index_count;
    count = args.union_counts[list];
    block_size = p.config.select_size;
    end = tile.sequence.position(tile.first + tile.count - 1) + 1;
  }
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < count; base += 32) {
      UnionBlock own{};
      if (base + lane < count) own = blocks[base + lane];
      for (int i = 0; i < min(32, count - base); ++i) {
        const int block = __shfl_sync(kFullWarp, own.block, i);
        const uint32_t low = __shfl_sync(kFullWarp, own.tokens[0], i);
        const uint32_t high = __shfl_sync(kFullWarp, own.tokens[1], i);
        const int block_end = min((block + 1) * block_size, end);
        for (int key = block * block_size; key < block_end; key += kKeyTile)
          visit(key, block_end, low, high);
      }
    }
  }
};

/// Shared memory of a ring: tiles of K rows, then V rows; what they are; two barriers a stage. The
/// number of stages is what the device's shared memory holds: a selected block is often read by one
/// warp alone, and the more blocks are at hand, the more warps find work.
template <int kDimQk, int kDimV>
struct KeyRing {
  static constexpr int kKBytes = kKeyTile * kDimQk * 2;
  static constexpr int kTileBytes = kKBytes + kKeyTile * kDimV * 2;
  static constexpr int kStageBytes = kTileBytes + sizeof(KeyTileInfo) + 16;

  char* smem;
  int stages;
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t tile() const { return smem_addr(smem) + stage * kTileBytes; }
  __device__ __forceinline__ KeyTileInfo* info() const {
    return reinterpret_cast<KeyTileInfo*>(smem + stages * kTileBytes) + stage;
  }
  __device__ __forceinline__ uint32_t full() const { return barrier(stage); }
  __device__ __forceinline__ uint32_t empty() const { return barrier(stage) + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  /// One thread calls this; the block synchronises before the ring is used.
  __device__ void init(int readers) const {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(barrier(i), 33);  // the copies of 32 lanes, and the info
      mbarrier_init(barrier(i) + 8, readers * kWarpArrivals);
    }
  }

 private:
  __device__ __forceinline__ uint32_t barrier(int i) const {
    return smem_addr(smem) + stages * (kTileBytes + static_cast<int>(sizeof(KeyTileInfo))) + i * 16;
  }
};

/// Copies `rows` rows, up to kKeyTile, with one warp, eight lanes to 128 bytes of a row; zeroes the
/// rest of the tile.
template <int kDim, bool kWhole, class T>
__device__ __forceinline__ void copy_keys(uint32_t dst, const T* first, int64_t stride, int rows,
                                          int lane) {
  const int own_row = lane / 8, chunk = lane % 8;
  const T* src = first + own_row * stride + chunk * 8;
  const uint32_t even = dst + tile_offset<kDim>(own_row, chunk);
  const uint32_t odd = dst + tile_offset<kDim>(own_row + 4, chunk);
#pragma unroll
  for (int sweep = 0; sweep < kKeyTile / 4; ++sweep) {
    const uint32_t row_dst = (sweep % 2 ? odd : even) + sweep / 2 * 8 * kDim * 2;
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
      if (kWhole)
        cp_async_16(row_dst + panel * 128, src + panel * 64);
      else
        cp_async_16(row_dst + panel * 128, src + panel * 64, sweep * 4 + own_row < rows);
    }
    src += 4 * stride;
  }
}

/// The copying warp: all tiles of one branch.
template <class T, int kDimQk, int kDimV, class Ring, class Source>
__device__ __forceinline__ void fill_ring(Ring& ring, const DqArgs& args, const QueryTile& tile,
                                          int branch, const Source& source) {
  const AttnBwd& p = args.common.p;
  const InView &k_view = p.branch[branch].k, &v_view = p.branch[branch].v;
  const T* k =
      branch_keys(typed<T>(k_view), tile.sequence, branch, p.config) + tile.head * k_view.head;
  const T* v =
      branch_keys(typed<T>(v_view), tile.sequence, branch, p.config) + tile.head * v_view.head;
  const int lane = threadIdx.x % 32;
  source.for_each([&](int key, int end, uint32_t low, uint32_t high) {
    mbarrier_wait(ring.empty(), ring.parity ^ 1);
    const T *k_rows = k + key * k_view.seq, *v_rows = v + key * v_view.seq;
    const uint32_t k_tile = ring.tile(), v_tile = k_tile + Ring::kKBytes;
    const int rows = end - key;
    if (rows >= kKeyTile) {  // the copying warp is often what everyone waits for
      copy_keys<kDimQk, true>(k_tile, k_rows, k_view.seq, rows, lane);
      copy_keys<kDimV, true>(v_tile, v_rows, v_view.seq, rows, lane);
    } else {
      copy_keys<kDimQk, false>(k_tile, k_rows, k_view.seq, rows, lane);
      copy_keys<kDimV, false>(v_tile, v_rows, v_view.seq, rows, lane);
    }
    mbarrier_arrive_cp_async(ring.full());
    if (lane == 0) {
      *ring.info() = KeyTileInfo{branch, key, end, {low, high}, {}};
      mbarrier_arrive(ring.full());
    }
    ring.advance();
  });
}

/// Tells the readers that no tile follows.
template <class Ring>
__device__ __forceinline__ void close_ring(const Ring& ring) {
  mbarrier_wait(ring.empty(), ring.parity ^ 1);
  mbarrier_arrive_cp_async(ring.full());
  if (threadIdx.x % 32 == 0) {
    ring.info()->branch = -1;
    mbarrier_arrive(ring.full());
  }
}

}  // namespace nsa::cuda::bwd
