// Compiles the rest of a translation unit for AVX-512. Include it after every standard header, so
// that no inline function shared with other translation units is emitted with these instructions,
// and before the kernel headers, whose code lives in namespace nsa::cpu::NSA_CPU_TARGET. Close with
// target_end.h.
#define NSA_CPU_TARGET avx512
#define NSA_CPU_VECTOR_BYTES 64
#define NSA_CPU_VECTOR_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
