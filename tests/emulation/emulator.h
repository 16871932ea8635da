// Runs CUDA kernels on a CPU, to test what they compute and how their threads wait for each other
// where there is no GPU: every thread of a block is a coroutine, warps take turns in random order,
// and asynchronous copies land late and in random order. Included ahead of a kernel's source, with
// tests/emulation before csrc on the include path, so that the headers of this folder stand in for
// csrc/cuda/device/{ptx,tma,wgmma}.cuh. It tells nothing about speed, nor about memory ordering.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#define __global__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __shared__
#define __shared__ static  // blocks run one after the other
#define __CUDA_ARCH_FEAT_SM90_ALL
#define NSA_EMULATION

namespace emulator {

inline constexpr int kSharedBytes = 227 * 1024, kWarps = 32;

struct Thread {
  uint3 index, block;
  dim3 grid, block_size;
  int number() const { return static_cast<int>(index.x); }
  int warp() const { return number() / 32; }
  int lane() const { return number() % 32; }
};
/// The thread that runs.
extern Thread current;
/// Shared memory of its block; 16 bytes short of the alignment that the kernels make for
/// themselves.
char* shared_memory();
/// Byte offset from a multiple of 1024 to address, and back. A wild one aborts.
uint32_t shared_address(const void* pointer);
char* shared_pointer(uint32_t address);

/// Lets other threads run; called where one waits. Aborts with each thread's place when none gets
/// on.
void wait_in(const char* what, int detail);
void sync_block();
void sync_warp(unsigned mask = ~0u);
void sync_named(int barrier, int threads);
/// Does `copy` at some later time.
void later(std::function<void()> copy);
/// Eight words of each lane of the current warp, for exchanges between two sync_warp().
uint32_t* words(int lane);

/// Calls kernel for each block and thread; false where more shared memory is asked for than there
/// is.
bool run(dim3 blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

template <class T>
T exchange(T value, int lane) {
  static_assert(sizeof(T) == 4);
  std::memcpy(words(current.lane()), &value, 4);
  sync_warp();
  T result;
  std::memcpy(&result, words(lane & 31), 4);
  sync_warp();
  return result;
}

}  // namespace emulator

#define threadIdx (emulator::current.index)
#define blockIdx (emulator::current.block)
#define gridDim (emulator::current.grid)
#define blockDim (emulator::current.block_size)

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::sync_warp(mask); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int bits) {
  return emulator::exchange(value, emulator::current.lane() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = emulator::current.lane();
  return emulator::exchange(value, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  *emulator::words(emulator::current.lane()) = vote;
  emulator::sync_warp();
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= *emulator::words(lane) << lane;
  emulator::sync_warp();
  return result;
}
inline int __reduce_min_sync(unsigned, int value) {
  *emulator::words(emulator::current.lane()) = static_cast<uint32_t>(value);
  emulator::sync_warp();
  int result = value;
  for (int lane = 0; lane < 32; ++lane)
    result = std::min(result, static_cast<int>(*emulator::words(lane)));
  emulator::sync_warp();
  return result;
}
inline unsigned __match_any_sync(unsigned, int value) {
  *emulator::words(emulator::current.lane()) = static_cast<uint32_t>(value);
  emulator::sync_warp();
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane)
    result |= unsigned{*emulator::words(lane) == static_cast<uint32_t>(value)} << lane;
  emulator::sync_warp();
  return result;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline unsigned atomicOr(unsigned* to, unsigned bits) {
  const unsigned before = *to;
  *to |= bits;
  return before;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
using std::max;
using std::min;
