// What the Hopper dQ and dK/dV kernels share: ring positions, the two score products of a tile, and
// tensor maps.
//
// Query rows are padded: a token takes P = G rounded up to a power of two rows of a tile, 64 / P
// tokens to 64 rows. TMA fills the rows of absent heads and what lies outside of a tensor with
// zeros.
#pragma once

#include "cuda/device/tma.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/sm80/bwd_sequence.cuh"
#include "cuda/sm90/bwd.h"
#include "cuda/sm90/tensor_map.h"

namespace nsa::cuda::bwd::sm90 {

inline constexpr uint32_t kFullWarp = 0xffffffffu;
inline constexpr int kRows = 64;                 // rows or keys of a tile
inline constexpr int kPanelBytes = kRows * 128;  // 64 columns of it

/// Consumer warpgroups and a producer. At launch their threads share the registers equally;
/// setmaxnreg hands out the same sum.
template <int kConsumers, int kConsumer>
struct Registers {
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kAtLaunch = 65536 / kThreads / 8 * 8;
  static constexpr int kConsumerRegisters = kConsumer;
  static constexpr int kProducerRegisters = (kConsumers + 1) * kAtLaunch - kConsumers * kConsumer;
};

template <int kDim>
inline constexpr int kTileBytes = kRows * kDim * 2;

inline constexpr uint32_t kBarrierBytes = sizeof(uint64_t);

/// A place in a ring of kStages slots: the address of the slot's `full` barrier, and the parity of
/// its phase. The slots' `full` barriers lie one after the other, then their `empty` ones. What
/// else a slot has is found from the address, without a slot number.
template <int kStages>
struct RingPosition {
  uint32_t full, last;
  uint32_t parity = 0;
  __device__ __forceinline__ explicit RingPosition(uint32_t first_full)
      : full(first_full), last(keep(first_full + (kStages - 1) * kBarrierBytes)) {}
  __device__ __forceinline__ uint32_t empty() const { return full + kStages * kBarrierBytes; }
  __device__ __forceinline__ void advance() {
    if (full == last) {
      full -= (kStages - 1) * kBarrierBytes;
      parity ^= 1;
    } else {
      full += kBarrierBytes;
    }
  }
};

/// Where a ring's things of kBytes a slot are, by the address of the slot's barrier.
template <uint32_t kBytes>
struct RingAddress {
  uint32_t offset;
  __device__ __forceinline__ RingAddress(uint32_t things, uint32_t first_barrier)
      : offset(keep(things - first_barrier * (kBytes / kBarrierBytes))) {
    static_assert(kBytes % kBarrierBytes == 0);
  }
  __device__ __forceinline__ uint32_t at(uint32_t barrier) const {
    return offset + barrier * (kBytes / kBarrierBytes);
  }
};

// The descriptor words of operands are uniform(), for descriptors to be made in uniform registers,
// where the products want them: otherwise each product waits for four words to be moved there.

/// x = A B^T, or x += A B^T, over kDim columns, both tiles K-major; `a` and `b` name where their
/// rows start in the first panel. The caller commits.
template <class T, int kN, int kDim, bool kAdd = false>
__device__ __forceinline__ void issue_scores(float (&x)[kN / 2], uint32_t a, uint32_t b) {
  const uint64_t a_desc = descriptor(a), b_desc = descriptor(b);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const uint32_t step = (k / 4 * kPanelBytes + k % 4 * 32) / 16;
    if (k == 0 && !kAdd)
      wgmma_ss_first<T, kN>(x, a_desc, b_desc);
    else
      wgmma_ss<T, kN>(x, a_desc + step, b_desc + step, true);
  }
}

/// acc += A B: A from registers, B the kSteps * 16 rows of kDim columns that `b` names the start
/// of. The caller commits.
template <class T, int kDim, int kSteps>
__device__ __forceinline__ void issue_update(float (&acc)[kDim / 2],
                                             const uint32_t (&a)[kSteps * 4], uint32_t b) {
  const uint64_t desc = mn_major_descriptor(b, kPanelBytes);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) wgmma_rs<T, kDim>(acc, a + 4 * k, desc + k * (2048 / 16));
}

/// Q or dO: (D, G, Hkv, Sq, B), read as the padded groups of `tokens` tokens.
inline CUtensorMap query_map(const AttnShape& shape, const InView& view, int64_t dim,
                             int padded_group, int tokens) {
  const bool packed = shape.cu_seqlens_q != nullptr;
  const int64_t group = shape.heads_q / shape.heads_kv;
  return cuda::sm90::make_tensor_map(view.ptr, shape.dtype, dim,
                                     {{group, view.head, padded_group},
                                      {shape.heads_kv, group * view.head, 1},
                                      {packed ? shape.total_q : shape.seqlen_q, view.seq, tokens},
                                      {packed ? 1 : shape.batch, view.batch, 1}});
}

/// K or V of a branch: (D, Hkv, Sk, B), read 64 rows at a time. Without a key nothing is read, and
/// there is no map of nothing.
inline CUtensorMap key_map(const AttnBwd& p, int branch, const InView& view, int64_t dim) {
  const AttnShape& shape = p.shape;
  const bool packed = shape.cu_seqlens_k != nullptr;
  int64_t keys = packed ? shape.total_k : shape.seqlen_k;
  if (branch == kCompressed)
    keys = packed ? packed_row(shape.total_k, p.config.block_stride)
                  : num_compressed(shape.seqlen_k, p.config.block_size, p.config.block_stride);
  if (keys == 0) return CUtensorMap{};
  return cuda::sm90::make_tensor_map(view.ptr, shape.dtype, dim,
                                     {{shape.heads_kv, view.head, 1},
                                      {keys, view.seq, kRows},
                                      {packed ? 1 : shape.batch, view.batch, 1}});
}

/// Row of key_map's tensor where a branch of the sequence starts.
__device__ __forceinline__ int first_key_row(const Sequence& sequence, int branch,
                                             const BlockConfig& config) {
  return static_cast<int>(branch == kCompressed ? packed_row(sequence.k_first, config.block_stride)
                                                : sequence.k_first);
}

}  // namespace nsa::cuda::bwd::sm90
