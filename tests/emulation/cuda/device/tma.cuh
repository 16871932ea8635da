// csrc/cuda/device/tma.cuh for the emulator, and what a tensor map stands for in it.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdlib>
#include <vector>

#include "cuda/device/ptx.cuh"

namespace nsa::cuda {

inline char* dynamic_shared_memory() { return emulator::shared_memory(); }
inline char* aligned_shared_memory() { return emulator::shared_memory() - 16; }

/// The axes of a map from inner to outer, strides in bytes. A CUtensorMap holds its number.
struct EmulatedMap {
  const char* ptr;
  int rank;
  std::array<int64_t, 5> size, stride, box, step;
};
inline std::vector<EmulatedMap>& emulated_maps() {
  static std::vector<EmulatedMap> maps;
  return maps;
}

inline void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  mbarrier(bar).bytes += static_cast<int32_t>(bytes);
  mbarrier_arrive(bar);
}
inline void fence_barrier_init() {}

/// Rows of 128 bytes with the 128-byte swizzle; zeros outside of the tensor.
inline void emulate_load(uint32_t dst, const CUtensorMap* map, uint32_t bar,
                         const std::array<int, 5>& at) {
  if (dst % 128 != 0) std::abort();
  int number;
  std::memcpy(&number, map, sizeof number);
  const EmulatedMap m = emulated_maps().at(number);
  emulator::later([=] {
    int rows = 1;
    for (int axis = 1; axis < m.rank; ++axis) rows *= static_cast<int>(m.box[axis]);
    for (int row = 0; row < rows; ++row) {
      const char* src = m.ptr;
      bool inside = true;
      for (int axis = 1, rest = row; axis < m.rank; ++axis) {
        const int64_t index = at[axis] + rest % m.box[axis] * m.step[axis];
        rest /= static_cast<int>(m.box[axis]);
        inside = inside && index >= 0 && index < m.size[axis];
        src += index * m.stride[axis];
      }
      for (int chunk = 0; chunk < 8; ++chunk) {
        const uint32_t line = dst + row * 128;
        char* to = emulator::shared_pointer(line + ((chunk ^ (line >> 7 & 7)) << 4));
        const int64_t column = at[0] + chunk * 8;
        if (inside && column < m.size[0]) {
          std::memcpy(to, src + column * 2, 16);
        } else {
          std::memset(to, 0, 16);
        }
      }
    }
    mbarrier(bar).bytes -= rows * 128;
    mbarrier(bar).complete();
  });
}
inline void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2,
                     int c3) {
  emulate_load(dst, map, bar, {c0, c1, c2, c3, 0});
}
inline void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, int c0, int c1, int c2,
                     int c3, int c4) {
  emulate_load(dst, map, bar, {c0, c1, c2, c3, c4});
}

inline void prefetch_l2(const void*) {}

template <int kRegisters>
void raise_registers() {}
template <int kRegisters>
void lower_registers() {}

inline bool elect_lane() {
  __syncwarp();
  return threadIdx.x % 32 == 0;
}

}  // namespace nsa::cuda
