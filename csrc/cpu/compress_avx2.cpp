#include "cpu/isa.h"

#if NSA_CPU_DISPATCH

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/compress_kernels.h"
#include "cpu/compress_plan.h"
#include "cpu/schedule.h"
// The target comes after every header whose code other translation units share.
#include "cpu/target_avx2.h"
// What it applies to.
#include "cpu/compress_target.h"
// The end.
#include "cpu/target_end.h"

#endif
