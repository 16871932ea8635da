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

}  // namespace nsa::cuda::bwd
