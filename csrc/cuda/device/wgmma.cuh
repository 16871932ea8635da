// Warpgroup matrix products, 64 rows a warpgroup, from shared memory tiles with 128-byte swizzle:
// sm_90a.
//
// A tile of 16-bit rows is stored as panels of 64 columns (128 bytes a row, 8 rows = one 1024-byte
// swizzle atom), as TMA writes them with CU_TENSOR_MAP_SWIZZLE_128B. The accumulators of a thread
// are those of mma.m16n8k16 (ptx.cuh), warp w of the warpgroup holding rows 16w..16w+15.
#pragma once

#include "cuda/device/ptx.cuh"

namespace nsa::cuda {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving uses of accumulators across the asynchronous product's wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

/// Operand whose k runs along the rows' 128 bytes (K-major): 64 columns are one panel.
__device__ __forceinline__ uint64_t desc_k_major(uint32_t addr) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) |
         ((addr & 0x3ffff) >> 4);
}
/// B operand whose k runs over rows (MN-major), its n columns over panels `panel_bytes` apart.
__device__ __forceinline__ uint64_t desc_mn_major(uint32_t addr, uint32_t panel_bytes) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) |
         (static_cast<uint64_t>(panel_bytes >> 4) << 16) | ((addr & 0x3ffff) >> 4);
}

// An operand is named by the low word of its K-major descriptor; the high word is the same for all.

__device__ __forceinline__ uint32_t descriptor_word(uint32_t addr) {
  return static_cast<uint32_t>(desc_k_major(addr));
}
__device__ __forceinline__ uint64_t descriptor(uint32_t word) {
  return desc_k_major(0) >> 32 << 32 | word;
}
/// Of the same place as an MN-major operand.
__device__ __forceinline__ uint64_t mn_major_descriptor(uint32_t word, uint32_t panel_bytes) {
  return descriptor(word) + (desc_mn_major(0, panel_bytes) - desc_k_major(0));
}

/// d (+)= A B for one k16 step; A and B K-major in shared memory. Overwrites d where !accumulate.
template <class T, int kN>
__device__ __forceinline__ void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b,
                                         bool accumulate);
/// d = A B for one k16 step, as above; what d held before is no operand, so that its registers are
/// free until here.
template <class T, int kN>
__device__ __forceinline__ void wgmma_ss_first(float (&d)[kN / 2], uint64_t a, uint64_t b);
/// The same two with A in registers (the fragment of mma.m16n8k16).
template <class T, int kN>
__device__ __forceinline__ void wgmma_rs_k_major(float (&d)[kN / 2], const uint32_t* a, uint64_t b);
template <class T, int kN>
__device__ __forceinline__ void wgmma_rs_k_major_first(float (&d)[kN / 2], const uint32_t* a,
                                                       uint64_t b);
/// d += A B for one k16 step; A in registers (the fragment of mma.m16n8k16), B MN-major.
template <class T, int kN>
__device__ __forceinline__ void wgmma_rs(float (&d)[kN / 2], const uint32_t* a, uint64_t b);

#define NSA_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NSA_ACC16_AT(d, i) \
  NSA_ACC4(d, i), NSA_ACC4(d, i + 4), NSA_ACC4(d, i + 8), NSA_ACC4(d, i + 12)
#define NSA_ACC32_AT(d, i) NSA_ACC16_AT(d, i), NSA_ACC16_AT(d, i + 16)
#define NSA_ACC16(d) NSA_ACC16_AT(d, 0)
#define NSA_ACC32(d) NSA_ACC32_AT(d, 0)
#define NSA_ACC64(d) NSA_ACC32_AT(d, 0), NSA_ACC32_AT(d, 32)
#define NSA_ACC72(d) NSA_ACC32_AT(d, 0), NSA_ACC32_AT(d, 32), NSA_ACC4(d, 64), NSA_ACC4(d, 68)
#define NSA_ACC88(d) \
  NSA_ACC32_AT(d, 0), NSA_ACC32_AT(d, 32), NSA_ACC16_AT(d, 64), NSA_ACC4(d, 80), NSA_ACC4(d, 84)
#define NSA_ACC96(d) NSA_ACC32_AT(d, 0), NSA_ACC32_AT(d, 32), NSA_ACC32_AT(d, 64)

#define NSA_OUT4(d, i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
#define NSA_OUT16_AT(d, i) \
  NSA_OUT4(d, i), NSA_OUT4(d, i + 4), NSA_OUT4(d, i + 8), NSA_OUT4(d, i + 12)
#define NSA_OUT32_AT(d, i) NSA_OUT16_AT(d, i), NSA_OUT16_AT(d, i + 16)
#define NSA_OUT16(d) NSA_OUT16_AT(d, 0)
#define NSA_OUT32(d) NSA_OUT32_AT(d, 0)
#define NSA_OUT64(d) NSA_OUT32_AT(d, 0), NSA_OUT32_AT(d, 32)
#define NSA_OUT96(d) NSA_OUT32_AT(d, 0), NSA_OUT32_AT(d, 32), NSA_OUT32_AT(d, 64)

#define NSA_D32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"

#define NSA_D64                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"

#define NSA_D128                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define NSA_D144 NSA_D128 ", %64, %65, %66, %67, %68, %69, %70, %71"

#define NSA_D176                                                                  \
  NSA_D144                                                                        \
  ", %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
  "%87"

#define NSA_D192                                                                     \
  NSA_D128                                                                           \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, "    \
  "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, " \
  "%95"

#define NSA_DEFINE_WGMMA_SS(T, TYPE, N, R, A, B, P)                                            \
  template <>                                                                                  \
  __device__ __forceinline__ void wgmma_ss<T, N>(float (&d)[R], uint64_t a, uint64_t b,        \
                                                 bool accumulate) {                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P                                        \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NSA_D##N \
                 "}, %" A ", %" B ", p, 1, 1, 0, 0;\n}"                                        \
                 : NSA_ACC##R(d)                                                               \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                         \
  }
#define NSA_DEFINE_WGMMA(T, TYPE, N, R, A, B, P, A0, A1, A2, A3, BR)                             \
  NSA_DEFINE_WGMMA_SS(T, TYPE, N, R, A, B, P)                                                    \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma_ss_first<T, N>(float (&d)[R], uint64_t a, uint64_t b) {  \
    asm volatile(                                                                                \
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                               \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NSA_D##N            \
        "}, %" A ", %" B ", p, 1, 1, 0, 0;\n}"                                                   \
        : NSA_OUT##R(d)                                                                          \
        : "l"(a), "l"(b));                                                                       \
  }                                                                                              \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma_rs_k_major<T, N>(float (&d)[R], const uint32_t* a,       \
                                                         uint64_t b) {                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NSA_D##N   \
                 "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" BR ", 1, 1, 1, 0;"                 \
                 : NSA_ACC##R(d)                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
  }                                                                                              \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma_rs_k_major_first<T, N>(float (&d)[R], const uint32_t* a, \
                                                               uint64_t b) {                     \
    asm volatile(                                                                                \
        "{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                               \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NSA_D##N            \
        "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" BR ", p, 1, 1, 0;\n}"                       \
        : NSA_OUT##R(d)                                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
  }                                                                                              \
  template <>                                                                                    \
  __device__ __forceinline__ void wgmma_rs<T, N>(float (&d)[R], const uint32_t* a, uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NSA_D##N   \
                 "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" BR ", 1, 1, 1, 1;"                 \
                 : NSA_ACC##R(d)                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
  }
NSA_DEFINE_WGMMA(bf16, "bf16", 32, 16, "16", "17", "18", "16", "17", "18", "19", "20")
NSA_DEFINE_WGMMA(__half, "f16", 32, 16, "16", "17", "18", "16", "17", "18", "19", "20")
NSA_DEFINE_WGMMA(bf16, "bf16", 64, 32, "32", "33", "34", "32", "33", "34", "35", "36")
NSA_DEFINE_WGMMA(__half, "f16", 64, 32, "32", "33", "34", "32", "33", "34", "35", "36")
NSA_DEFINE_WGMMA(bf16, "bf16", 128, 64, "64", "65", "66", "64", "65", "66", "67", "68")
NSA_DEFINE_WGMMA(__half, "f16", 128, 64, "64", "65", "66", "64", "65", "66", "67", "68")
NSA_DEFINE_WGMMA_SS(bf16, "bf16", 144, 72, "72", "73", "74")
NSA_DEFINE_WGMMA_SS(__half, "f16", 144, 72, "72", "73", "74")
NSA_DEFINE_WGMMA_SS(bf16, "bf16", 176, 88, "88", "89", "90")
NSA_DEFINE_WGMMA_SS(__half, "f16", 176, 88, "88", "89", "90")
NSA_DEFINE_WGMMA(bf16, "bf16", 192, 96, "96", "97", "98", "96", "97", "98", "99", "100")
NSA_DEFINE_WGMMA(__half, "f16", 192, 96, "96", "97", "98", "96", "97", "98", "99", "100")

#undef NSA_DEFINE_WGMMA_SS
#undef NSA_DEFINE_WGMMA
#undef NSA_D32
#undef NSA_D64
#undef NSA_D128
#undef NSA_D144
#undef NSA_D176
#undef NSA_D192
#undef NSA_OUT4
#undef NSA_OUT16_AT
#undef NSA_OUT32_AT
#undef NSA_OUT16
#undef NSA_OUT32
#undef NSA_OUT64
#undef NSA_OUT96
#undef NSA_ACC4
#undef NSA_ACC16_AT
#undef NSA_ACC32_AT
#undef NSA_ACC16
#undef NSA_ACC32
#undef NSA_ACC64
#undef NSA_ACC72
#undef NSA_ACC88
#undef NSA_ACC96

}  // namespace nsa::cuda
