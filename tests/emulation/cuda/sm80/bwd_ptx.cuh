// csrc/cuda/sm80/bwd_ptx.cuh for the emulator: what the Hopper backward uses of it.
#pragma once

#include "cuda/device/ptx.cuh"

namespace nsa::cuda::bwd {

inline constexpr uint32_t kFullWarp = 0xffffffffu;

inline void cp_async_4(uint32_t dst, const void* src, bool valid) {
  thread_copies().push_back([=] {
    if (valid)
      std::memcpy(emulator::shared_pointer(dst), src, 4);
    else
      std::memset(emulator::shared_pointer(dst), 0, 4);
  });
}

inline uint32_t transpose_8x8(uint32_t x) {
  const int lane = emulator::current.lane();
  *emulator::words(lane) = x;
  emulator::sync_warp();
  uint32_t y = 0;
  for (int i = 0; i < 2; ++i) {
    const int row = lane % 4 * 2 + i, column = lane / 4;
    y |= (*emulator::words(row * 4 + column / 2) >> column % 2 * 16 & 0xffff) << 16 * i;
  }
  emulator::sync_warp();
  return y;
}

}  // namespace nsa::cuda::bwd
