// Which instruction sets the kernels are compiled for, and which one this process runs on.
#pragma once

// Runtime dispatch needs per-function targets, which GCC and Clang have on x86-64. Elsewhere only
// the baseline kernels exist, compiled for what the compiler flags say.
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define NSA_CPU_DISPATCH 1
#else
#define NSA_CPU_DISPATCH 0
#endif

namespace nsa::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

/// The best instruction set of this machine; the environment variable NSA_EXT_CPU_ISA (avx512, avx2
/// or baseline), read once, asks for a lesser one when debugging.
Isa active_isa();

}  // namespace nsa::cpu
