#include "cpu/isa.h"

#if NSA_CPU_DISPATCH

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/attn_kernels.h"
// The target comes after every header whose code other translation units share.
#include "cpu/target_avx512.h"
// What it applies to.
#include "cpu/attn_table.h"
// The end.
#include "cpu/target_end.h"

#endif
