// The head dimensions and types that the attention kernels are compiled for: X(T, Dk, Dv). Each has
// its translation units beside this file; a missing one fails to link.
#pragma once

#define NSA_ATTN_INSTANCES(X) \
  X(__nv_bfloat16, 64, 64)    \
  X(__nv_bfloat16, 128, 128)  \
  X(__nv_bfloat16, 192, 128)  \
  X(__half, 64, 64)           \
  X(__half, 128, 128)         \
  X(__half, 192, 128)
