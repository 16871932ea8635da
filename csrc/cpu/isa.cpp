#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "nsa/api.h"

namespace nsa::cpu {

namespace {

Isa detect() {
  Isa best = Isa::kBaseline;
#if NSA_CPU_DISPATCH
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) best = Isa::kAvx2;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    best = Isa::kAvx512;
  }
#endif
  Isa wanted = best;
  if (const char* name = std::getenv("NSA_EXT_CPU_ISA")) {
    if (!std::strcmp(name, "avx2")) wanted = Isa::kAvx2;
    if (!std::strcmp(name, "baseline")) wanted = Isa::kBaseline;
  }
  return wanted < best ? wanted : best;
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa() {
  switch (active_isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace nsa::cpu
