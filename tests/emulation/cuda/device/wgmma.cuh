// csrc/cuda/device/wgmma.cuh for the emulator: a product is done where it is issued. Operands are
// found through the descriptors' fields, as the device finds them.
#pragma once

#include "cuda/device/ptx.cuh"

namespace nsa::cuda {

/// Products are a warpgroup's: one whose warps do not all come to them hangs.
inline void wgmma_fence() { emulator::sync_named(12 + emulator::current.warp() / 4, 128); }
inline void wgmma_commit() {}
template <int kPending>
void wgmma_wait() {}
template <int kCount>
void pin(float (&)[kCount]) {}

inline uint64_t desc_k_major(uint32_t addr) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | (addr >> 4);
}
inline uint64_t desc_mn_major(uint32_t addr, uint32_t panel_bytes) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) |
         (static_cast<uint64_t>(panel_bytes >> 4) << 16) | (addr >> 4);
}
inline uint32_t descriptor_word(uint32_t addr) { return static_cast<uint32_t>(desc_k_major(addr)); }
inline uint64_t descriptor(uint32_t word) { return desc_k_major(0) >> 32 << 32 | word; }
inline uint64_t mn_major_descriptor(uint32_t word, uint32_t panel_bytes) {
  return descriptor(word) + (desc_mn_major(0, panel_bytes) - desc_k_major(0));
}

inline uint32_t desc_field(uint64_t desc, int bit) {
  return static_cast<uint32_t>(desc >> bit & 0x3fff) << 4;
}
/// A 16-bit element; bits 7-9 of an address are xored into bits 4-6.
template <class T>
float swizzled(uint32_t addr) {
  T x;
  std::memcpy(static_cast<void*>(&x), emulator::shared_pointer(addr ^ ((addr >> 7 & 7) << 4)),
              sizeof x);
  return static_cast<float>(x);
}
/// Row `row`, column k of the step: groups of 8 rows lie a stride apart.
template <class T>
float k_major(uint64_t desc, int row, int k) {
  return swizzled<T>(desc_field(desc, 0) + row / 8 * desc_field(desc, 32) + row % 8 * 128 + k * 2);
}
/// Row k of the step, column n: panels of 64 columns, groups of 8 rows.
template <class T>
float mn_major(uint64_t desc, int n, int k) {
  return swizzled<T>(desc_field(desc, 0) + n / 64 * desc_field(desc, 16) +
                     k / 8 * desc_field(desc, 32) + k % 8 * 128 + n % 64 * 2);
}

/// d (+)= a b(n, k) for this thread's rows and columns; a[half][k] is row g + 8 half of its warp.
template <int kN, class B>
void multiply(float (&d)[kN / 2], const float (&a)[2][16], bool accumulate, const B& b) {
  for (int i = 0; i < kN / 2; ++i) {
    const int column = i / 4 * 8 + emulator::current.lane() % 4 * 2 + i % 2;
    float sum = accumulate ? d[i] : 0.0f;
    for (int k = 0; k < 16; ++k) sum += a[i / 2 % 2][k] * b(column, k);
    d[i] = sum;
  }
}

template <class T, int kN>
void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  const int row = emulator::current.warp() % 4 * 16 + emulator::current.lane() / 4;
  float rows[2][16];
  for (int k = 0; k < 16; ++k) {
    rows[0][k] = k_major<T>(a, row, k);
    rows[1][k] = k_major<T>(a, row + 8, k);
  }
  multiply<kN>(d, rows, accumulate, [&](int n, int k) { return k_major<T>(b, n, k); });
}

template <class T, int kN>
void wgmma_ss_first(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  wgmma_ss<T, kN>(d, a, b, false);
}

/// A from the registers of the warp.
template <class T>
void register_rows(float (&rows)[2][16], const uint32_t* a) {
  const int lane = emulator::current.lane();
  std::copy(a, a + 4, emulator::words(lane));
  emulator::sync_warp();
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; k += 2) {
      const float2 pair = unpack2<T>(emulator::words(lane / 4 * 4 + k % 8 / 2)[half + k / 8 * 2]);
      rows[half][k] = pair.x;
      rows[half][k + 1] = pair.y;
    }
  }
  emulator::sync_warp();
}
template <class T, int kN>
void wgmma_rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b) {
  float rows[2][16];
  register_rows<T>(rows, a);
  multiply<kN>(d, rows, true, [&](int n, int k) { return mn_major<T>(b, n, k); });
}
template <class T, int kN>
void wgmma_rs_k_major(float (&d)[kN / 2], const uint32_t* a, uint64_t b, bool accumulate = true) {
  float rows[2][16];
  register_rows<T>(rows, a);
  multiply<kN>(d, rows, accumulate, [&](int n, int k) { return k_major<T>(b, n, k); });
}
template <class T, int kN>
void wgmma_rs_k_major_first(float (&d)[kN / 2], const uint32_t* a, uint64_t b) {
  wgmma_rs_k_major<T, kN>(d, a, b, false);
}

}  // namespace nsa::cuda
