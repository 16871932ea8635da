// Compiles the rest of a translation unit for what the compiler flags say; see target_avx512.h.
#define NSA_CPU_TARGET baseline
#define NSA_CPU_VECTOR_BYTES 16
#define NSA_CPU_VECTOR_REGISTERS 16
