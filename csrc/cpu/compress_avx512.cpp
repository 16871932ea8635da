// Standard and shared headers come first: see target_avx512.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/compress_kernels.h"
#include "cpu/compress_plan.h"
#include "cpu/isa.h"
#include "cpu/schedule.h"

#if NSA_CPU_DISPATCH

// clang-format off
#include "cpu/target_avx512.h"
#include "cpu/compress_target.h"
// clang-format on

namespace nsa::cpu {

const CompressKernels& compress_kernels_avx512() { return avx512::kCompressKernels; }

}  // namespace nsa::cpu

#include "cpu/target_end.h"

#endif
