// Importance of the selection blocks and the choice of the best (eq. 8-11), streamed: the forward
// main loop hands over the softmax of one tile of 64 compressed tokens after the other, and nothing
// longer than a tile is ever kept.
//
// The G heads of each token are summed in registers, which leaves 64 column sums per token and
// tile. Every 2^score_shift tiles these give, with the last few before them, the scores of the
// blocks that end there, and those enter the token's list of the best so far. All of it stays
// within the warp that holds the token's rows (two warps for padded groups of 64).
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/topk.cuh"
#include "cuda/sm80/fwd_job.cuh"
#include "cuda/sm80/fwd_source.cuh"

namespace nsa::cuda::sm80 {

/// Column sums of a token: 8 from before (a compressed token reaches at most l/d - 1 <= 7 strides
/// into the next block), then 64 for each tile that is scored at a time.
inline constexpr int kHalo = 8;

/// Sums v[i] over the lanes that differ in bits 2 .. kSteps + 1. Each step halves what a lane
/// keeps: of 16 values (n8 tile i / 2, column i % 2) a lane ends with 16 >> kSteps, those of the n8
/// tiles from the returned one on.
template <int kSteps, int kStep = 0>
__device__ __forceinline__ int scatter_sum(float (&v)[16], int lane) {
  if constexpr (kStep == kSteps) {
    return 0;
  } else {
    constexpr int kHalf = 8 >> kStep, kBit = 4 << kStep;
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = v[i], high = v[i + kHalf];
      v[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kBit);
    }
    return (upper ? kHalf / 2 : 0) + scatter_sum<kSteps, kStep + 1>(v, lane);
  }
}

template <int kGroups, int kWarps>
class Selection {
 public:
  static constexpr int kRows = kGroups * kWarps * 16;
  static int64_t slots(const FwdParams& p) {
    const int64_t tokens = p.tile_tokens;
    return tokens > kWarps ? tokens : kWarps;
  }
  static int64_t smem_bytes(const FwdParams& p) {
    return slots(p) * (columns(p) + TopList::words(p.index_count)) * sizeof(float);
  }

  __device__ __forceinline__ Selection(const FwdParams& p, const Job& job, int warp, char* smem)
      : p_(p), job_(job), warp_(warp), columns_(reinterpret_cast<float*>(smem)) {
    lists_ = columns_ + max(p.tile_tokens, kWarps) * columns(p);
  }

  __device__ void begin(int lane) const {
    for (int i = 0; i < tokens(); ++i) list(first_token() + i).clear(lane);
    for (int i = 0; i < slots_per_warp(); ++i) {
      for (int c = lane; c < columns(p_); c += 32) slot_columns(first_slot() + i)[c - kHalo] = 0.0f;
    }
    __syncwarp();
  }

  /// The softmax p of tile `tile`, for the warp's kGroups * 16 rows; tiles come in order.
  __device__ __forceinline__ void observe(int tile, const float (&p)[kGroups][8][4],
                                          int lane) const {
    sum_heads(tile, p, lane);
    advance(tile, lane);
  }
  /// observe() in two steps: p is not needed after the first.
  __device__ __forceinline__ void sum_heads(int tile, const float (&p)[kGroups][8][4],
                                            int lane) const {
    if (p_.log2_group >= 4) {
      // Each group of 16 rows is a token, or all groups are heads of one.
      float v[kGroups][16];
#pragma unroll
      for (int m = 0; m < kGroups; ++m) {
#pragma unroll
        for (int i = 0; i < 16; ++i) v[m][i] = p[m][i / 2][i % 2] + p[m][i / 2][2 + i % 2];
      }
      if (p_.log2_group == 4) {
        int n8 = 0;
#pragma unroll
        for (int m = 0; m < kGroups; ++m) n8 = scatter_sum<3>(v[m], lane);
#pragma unroll
        for (int m = 0; m < kGroups; ++m) store_columns<3>(tile, first_slot() + m, n8, v[m], lane);
      } else {
#pragma unroll
        for (int m = 1; m < kGroups; ++m) {
#pragma unroll
          for (int i = 0; i < 16; ++i) v[0][i] += v[m][i];
        }
        const int n8 = scatter_sum<3>(v[0], lane);
        store_columns<3>(tile, first_slot(), n8, v[0], lane);
      }
    } else {
#pragma unroll
      for (int m = 0; m < kGroups; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float v[16];
#pragma unroll
          for (int i = 0; i < 16; ++i) v[i] = p[m][i / 2][2 * half + i % 2];
          const int row = (warp_ * kGroups + m) * 16 + half * 8 + (lane >> 2);
          const int token = row >> p_.log2_group;
          int n8;
          switch (p_.log2_group) {
            case 0:
              n8 = scatter_sum<0>(v, lane);
              store_columns<0>(tile, token, n8, v, lane);
              break;
            case 1:
              n8 = scatter_sum<1>(v, lane);
              store_columns<1>(tile, token, n8, v, lane);
              break;
            case 2:
              n8 = scatter_sum<2>(v, lane);
              store_columns<2>(tile, token, n8, v, lane);
              break;
            default:
              n8 = scatter_sum<3>(v, lane);
              store_columns<3>(tile, token, n8, v, lane);
          }
        }
      }
    }
  }
  __device__ __forceinline__ void advance(int tile, int lane) const {
    const int last = score_tiles() - 1;
    if ((tile & last) == last) score_columns(tile - last, lane);
  }

  /// After the last observed tile: candidates past it, then the rows of block_indices.
  __device__ void finish(int observed_tiles, int lane) {
    const int last = job_.position(job_.tokens - 1) >> p_.select_shift;
    for (int tile = observed_tiles;
         (tile & (score_tiles() - 1)) != 0 || (tile << blocks_shift()) <= last; ++tile) {
      for (int i = 0; i < slots_per_warp(); ++i) {
        float* columns = tile_columns(tile, first_slot() + i);
        columns[lane] = columns[lane + 32] = 0.0f;
      }
      advance(tile, lane);
    }
    for (int i = 0; i < tokens(); ++i) {
      const int token = first_token() + i;
      if (token >= job_.tokens) break;
      list(token).merge(lane);
      write_indices(token, lane);
    }
  }

 private:
  __host__ __device__ __forceinline__ static int columns(const FwdParams& p) {
    return kHalo + (kTileKeys << p.score_shift);
  }
  __device__ __forceinline__ int score_tiles() const { return 1 << p_.score_shift; }
  /// The first column sum after the halo of a slot, and that of a tile.
  __device__ __forceinline__ float* slot_columns(int slot) const {
    return columns_ + slot * columns(p_) + kHalo;
  }
  __device__ __forceinline__ float* tile_columns(int tile, int slot) const {
    return slot_columns(slot) + (tile & (score_tiles() - 1)) * kTileKeys;
  }

  /// Forced blocks of a token: [0, init) and [local, own].
  struct Forced {
    int own, init, local;
    __device__ __forceinline__ Forced(const FwdParams& p, int t) {
      own = max(-1, t >> p.select_shift);
      init = min(p.config.num_init, own + 1);
      local = max(init, own + 1 - p.config.num_local);
    }
    __device__ __forceinline__ int capacity(int index_count) const {
      return index_count - init - (own + 1 - local);
    }
  };

  /// log2 of the compressed tokens that start in a block, and of the blocks of a tile.
  __device__ __forceinline__ int strides_shift() const { return p_.select_shift - p_.stride_shift; }
  __device__ __forceinline__ int blocks_shift() const { return 6 - strides_shift(); }
  // The warp's rows belong to tokens [first_token, first_token + tokens). Column sums lie in slots:
  // one for each token, or for each warp where a warp holds one token or half of one.
  __device__ __forceinline__ bool shared_token() const { return p_.log2_group == 6; }
  __device__ __forceinline__ int first_token() const {
    return (warp_ * kGroups * 16) >> p_.log2_group;
  }
  __device__ __forceinline__ int tokens() const {
    if (shared_token()) return warp_ % 2 == 0;
    return min(max(1, (kGroups * 16) >> p_.log2_group), max(0, p_.tile_tokens - first_token()));
  }
  __device__ __forceinline__ int first_slot() const {
    return shared_token() ? warp_ : first_token();
  }
  __device__ __forceinline__ int slots_per_warp() const { return shared_token() ? 1 : tokens(); }
  __device__ __forceinline__ void sync_token() const {
    if (shared_token()) {
      named_barrier_sync(1 + warp_ / 2, 64);
    } else {
      __syncwarp();
    }
  }
  __device__ __forceinline__ TopList list(int token) const {
    const int n = p_.index_count;
    const Forced forced(p_, job_.position(token));
    return TopList(lists_ + token * TopList::words(n), n, forced.capacity(n));
  }

  template <int kSteps>
  __device__ __forceinline__ void store_columns(int tile, int slot, int n8, const float (&v)[16],
                                                int lane) const {
    if (!shared_token() && slot >= p_.tile_tokens) return;
    float* columns = tile_columns(tile, slot) + (lane & 3) * 2;
#pragma unroll
    for (int i = 0; i < (8 >> kSteps); ++i)
      *reinterpret_cast<float2*>(columns + (n8 + i) * 8) = make_float2(v[2 * i], v[2 * i + 1]);
  }

  /// Scores of the blocks that end in the tiles from first_tile on.
  __device__ void score_columns(int first_tile, int lane) const {
    sync_token();
    const int strides = 1 << strides_shift(), reach = p_.config.block_size >> p_.stride_shift;
    const int blocks = 1 << (blocks_shift() + p_.score_shift);  // per token, a power of two
    const int items = tokens() * blocks;
    for (int base = 0; base < items; base += 32) {
      const int item = base + lane;
      const int local_block = item & (blocks - 1);
      const int token = first_token() + (item >> (p_.score_shift + blocks_shift()));
      const int block = (first_tile << blocks_shift()) + local_block;
      float score = 0.0f;
      bool candidate = false;
      if (item < items && token < job_.tokens) {
        const Forced forced(p_, job_.position(token));
        candidate = block >= forced.init && block < forced.local;
        if (candidate) {
          const int slot = shared_token() ? warp_ : token;
          const float* column = slot_columns(slot) + local_block * strides;
          for (int k = 1 - reach; k < strides; ++k) {
            float sum = column[k];
            if (shared_token()) sum += column[columns(p_) + k];
            score += sum * static_cast<float>(k < 0 ? reach + k : min(reach, strides - k));
          }
        }
      }
      keep_best(token, block, candidate, score, min(32, blocks), lane);
    }
    sync_token();
    for (int i = 0; i < slots_per_warp(); ++i) {
      float* halo = slot_columns(first_slot() + i) - kHalo;
      if (lane < kHalo) halo[lane] = halo[score_tiles() * kTileKeys + lane];
    }
    __syncwarp();
  }

  /// Offers one block of each lane to the list of its token; `width` lanes share a token.
  __device__ __forceinline__ void keep_best(int token, int block, bool candidate, float score,
                                            int width, int lane) const {
    const TopList best = list(token);
    const uint32_t peers = (width == 32 ? ~0u : (1u << width) - 1) << (lane & ~(width - 1));
    for (;;) {
      const bool admitted = candidate && best.admits(score);
      const uint32_t all_admitted = __ballot_sync(0xffffffffu, admitted);
      if (all_admitted == 0) return;
      const uint32_t mine = all_admitted & peers;
      const uint32_t full = __ballot_sync(0xffffffffu, admitted && best.overflows(__popc(mine)));
      if (full == 0) {
        if (admitted) best.append(score, block, mine, lane);
        __syncwarp();
        return;
      }
      list(__shfl_sync(0xffffffffu, token, __ffs(full) - 1)).merge(lane);
    }
  }

  /// The forced blocks and the list, ascending, padded with -1.
  __device__ void write_indices(int token, int lane) const {
    const View<int32_t>& view = p_.block_indices;
    int32_t* row = view.ptr + job_.batch * view.batch + (job_.row_q + token) * view.seq +
                   job_.head_kv * view.head;
    const Forced forced(p_, job_.position(token));
    const TopList best = list(token);
    int chosen = 0;
    for (int base = 0; base < best.capacity(); base += 32) {
      const int index = base + lane < best.capacity() ? best.index(base + lane) : -1;
      chosen += __popc(__ballot_sync(0xffffffffu, index >= 0));
      if (index < 0) continue;
      int rank = forced.init;
      for (int i = 0; i < best.capacity(); ++i) {
        const int other = best.index(i);
        rank += other >= 0 && other < index;
      }
      row[rank] = index;
    }
    const int local_rank = forced.init + chosen;
    const int total = local_rank + forced.own + 1 - forced.local;
    for (int i = lane; i < p_.index_count; i += 32) {
      if (i < forced.init) {
        row[i] = i;
      } else if (i >= total) {
        row[i] = -1;
      } else if (i >= local_rank) {
        row[i] = forced.local + i - local_rank;
      }
    }
  }

  const FwdParams& p_;
  const Job& job_;
  int warp_;
  float *columns_, *lists_;
};

}  // namespace nsa::cuda::sm80
