// csrc/cuda/device/ptx.cuh for the emulator: what the Hopper kernels use of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <type_traits>
#include <vector>

#include "emulator.h"

namespace nsa::cuda {

using bf16 = __nv_bfloat16;

inline uint32_t smem_addr(const void* p) { return emulator::shared_address(p); }
inline uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }
inline uint32_t keep(uint32_t x) { return x; }
template <class Object>
const Object* keep(const Object* x) {
  return x;
}
inline int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
template <class Object>
const Object* uniform(const Object* x) {
  const auto bits = reinterpret_cast<uint64_t>(x);
  return reinterpret_cast<const Object*>(
      static_cast<uint64_t>(uniform(static_cast<uint32_t>(bits >> 32))) << 32 |
      uniform(static_cast<uint32_t>(bits)));
}

inline void store_shared_16(uint32_t addr, const uint4& x) {
  std::memcpy(emulator::shared_pointer(addr), &x, 16);
}
inline uint4 load_shared_16(uint32_t addr) {
  uint4 x;
  std::memcpy(&x, emulator::shared_pointer(addr), 16);
  return x;
}

template <class Object>
Object& shared_object(uint32_t addr) {
  return *reinterpret_cast<Object*>(emulator::shared_pointer(addr));
}

/// 64 bits of shared memory, as an mbarrier is on the device.
struct Mbarrier {
  int16_t expected, missing;
  int32_t bytes : 31;
  uint32_t phase : 1;
  void complete() {
    if (missing < 0) std::abort();  // more arrivals than expected
    if (missing > 0 || bytes != 0) return;
    missing = expected;
    phase ^= 1;
  }
};
static_assert(sizeof(Mbarrier) == 8);
inline Mbarrier& mbarrier(uint32_t bar) {
  if (bar % 8 != 0) std::abort();
  return *reinterpret_cast<Mbarrier*>(emulator::shared_pointer(bar));
}

inline void mbarrier_init(uint32_t bar, int count) {
  mbarrier(bar) = {static_cast<int16_t>(count), static_cast<int16_t>(count), 0, 0};
}
inline void mbarrier_arrive(uint32_t bar) {
  --mbarrier(bar).missing;
  mbarrier(bar).complete();
}
inline constexpr int kWarpArrivals = 1;
inline void mbarrier_arrive_warp(uint32_t bar, int lane = threadIdx.x % 32) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(bar);
}
inline void mbarrier_wait(uint32_t bar, uint32_t parity) {
  while (mbarrier(bar).phase == parity) emulator::wait_in("mbarrier", static_cast<int>(bar));
}
/// Copies of a thread that no arrival waits for yet.
inline std::vector<std::function<void()>>& thread_copies() {
  static std::vector<std::function<void()>> copies[32 * emulator::kWarps];
  return copies[emulator::current.number()];
}
inline void mbarrier_arrive_cp_async(uint32_t bar) {
  emulator::later([bar, copies = std::move(thread_copies())] {
    for (const auto& copy : copies) copy();
    mbarrier_arrive(bar);
  });
  thread_copies().clear();
}
/// Groups of copies of a thread, which land when they are waited for.
inline std::deque<std::vector<std::function<void()>>>& thread_groups() {
  static std::deque<std::vector<std::function<void()>>> groups[32 * emulator::kWarps];
  return groups[emulator::current.number()];
}
inline void cp_async_16(uint32_t dst, const void* src) {
  if (dst % 16 != 0 || reinterpret_cast<uintptr_t>(src) % 16 != 0) std::abort();
  thread_copies().push_back([=] { std::memcpy(emulator::shared_pointer(dst), src, 16); });
}
inline void cp_async_commit() {
  thread_groups().push_back(std::move(thread_copies()));
  thread_copies().clear();
}
template <int kPending>
void cp_async_wait() {
  for (; thread_groups().size() > kPending; thread_groups().pop_front())
    for (const auto& copy : thread_groups().front()) copy();
}
inline void named_barrier_sync(int id, int threads) { emulator::sync_named(id, threads); }

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }

template <class T>
uint32_t pack2(float lo, float hi) {
  T pair[2];
  if constexpr (std::is_same_v<T, bf16>) {
    pair[0] = __float2bfloat16_rn(lo), pair[1] = __float2bfloat16_rn(hi);
  } else {
    pair[0] = __float2half_rn(lo), pair[1] = __float2half_rn(hi);
  }
  uint32_t bits;
  std::memcpy(&bits, static_cast<void*>(pair), 4);
  return bits;
}
template <class T>
float2 unpack2(uint32_t bits) {
  T pair[2];
  std::memcpy(static_cast<void*>(pair), &bits, 4);
  return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
}

/// Lane 8 j + i names row i of 8 x 8 matrix j; r[j] is row lane / 4, columns 2 (lane % 4) on.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  const int lane = emulator::current.lane();
  *emulator::words(lane) = addr;
  emulator::sync_warp();
  for (int j = 0; j < 4; ++j)
    std::memcpy(&r[j], emulator::shared_pointer(*emulator::words(8 * j + lane / 4) + lane % 4 * 4),
                4);
  emulator::sync_warp();
}

/// The same of the transposed matrices: column lane / 4, rows 2 (lane % 4) on.
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  const int lane = emulator::current.lane(), row = lane % 4 * 2;
  *emulator::words(lane) = addr;
  emulator::sync_warp();
  for (int j = 0; j < 4; ++j) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&pair[i],
                  emulator::shared_pointer(*emulator::words(8 * j + row + i) + lane / 4 * 2), 2);
    r[j] = pair[0] | uint32_t{pair[1]} << 16;
  }
  emulator::sync_warp();
}

/// Fragments as csrc/cuda/device/ptx.cuh has them.
template <class T>
void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulator::current.lane();
  uint32_t* const own = emulator::words(lane);
  std::copy(a, a + 4, own);
  own[4] = b0;
  own[5] = b1;
  emulator::sync_warp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; k += 2) {
      const int part = k % 8 / 2, right = k / 8;
      const float2 x = unpack2<T>(emulator::words(lane / 4 * 4 + part)[i / 2 + 2 * right]);
      const float2 y = unpack2<T>(emulator::words((lane % 4 * 2 + i % 2) * 4 + part)[4 + right]);
      c[i] += x.x * y.x + x.y * y.y;
    }
  emulator::sync_warp();
}

inline float to_float(bf16 x) { return __bfloat162float(x); }
inline float to_float(__half x) { return __half2float(x); }

}  // namespace nsa::cuda
