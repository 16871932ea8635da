// Importance of the selection blocks and the choice of the best (eq. 8-11), streamed: the forward
// main loop hands over the softmax of one tile of 64 compressed tokens after the other, and nothing
// longer than a tile is ever kept.
//
// The G heads of each token are summed in registers, which leaves 64 column sums per token and
// tile. Every 2^score_shift tiles these give, with the last few before them, the scores of the
// blocks that end there, and those enter the token's list of the best so far. All of it stays
// within the warp that holds the token's rows (two warps for padded groups of 64).
#pragma once

#include "cuda/sm80/fwd_ranking.cuh"
#include "cuda/sm80/fwd_source.cuh"

namespace nsa::cuda::sm80 {

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

  /// The softmax p of tile `tile`, for the warp's kGroups * 16 rows; tiles come in order. advance()
  /// follows, which needs p no more.
  __device__ __forceinline__ void sum_heads(int tile, const float (&p)[kGroups][8][4],
                                            int lane) const {
    const auto store = [&](int slot, int n8, int count, const float (&v)[16]) {
      if (!shared_token() && slot >= p_.tile_tokens) return;
      float* columns = tile_columns(tile, slot) + n8 * 8 + (lane & 3) * 2;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count)
          *reinterpret_cast<float2*>(columns + i * 8) = make_float2(v[2 * i], v[2 * i + 1]);
    };
    if (p_.log2_group >= 4) {
      sum_heads_large<kGroups>(p_.log2_group, warp_, p, lane, store);
    } else {
      sum_heads_small<kGroups>(p_.log2_group, warp_, p, lane, store);
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
      write_indices(p_, job_, token, Forced(p_, job_.position(token)), list(token), lane);
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

  /// Scores of the blocks that end in the tiles from first_tile on.
  __device__ void score_columns(int first_tile, int lane) const {
    sync_token();
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
        candidate = forced.leaves_open(block);
        if (candidate) {
          const float* column =
              slot_columns(shared_token() ? warp_ : token) + (local_block << strides_shift());
          const int other = shared_token() ? columns(p_) : 0;  // of the token's second warp
          score = block_score(
              p_, [&](int k) { return other ? column[k] + column[other + k] : column[k]; });
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

  const FwdParams& p_;
  const Job& job_;
  int warp_;
  float *columns_, *lists_;
};

}  // namespace nsa::cuda::sm80
