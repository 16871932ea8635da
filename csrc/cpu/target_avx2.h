// Compiles the rest of a translation unit for AVX2 and FMA; see target_avx512.h.
#define NSA_CPU_TARGET avx2
#define NSA_CPU_VECTOR_BYTES 32
#define NSA_CPU_VECTOR_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
