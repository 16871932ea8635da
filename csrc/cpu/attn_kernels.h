// The attention kernels as a table of functions, one per instruction set and compute type.
#pragma once

#include <cstdint>

#include "cpu/attn_plan.h"

namespace nsa::cpu {

struct AttnKernels {
  int64_t lanes;  // elements of a vector
  int64_t panel;  // kPanel
  void (*pack)(const AttnPlan& plan, const PackItem& item, char* scratch);
  void (*fwd)(const FwdPlan& plan, const QueryItem& item, char* scratch);
  int64_t (*fwd_scratch)(const FwdPlan& plan);
  void (*dots)(const BwdPlan& plan, const QueryItem& item, char* scratch);
  void (*bwd)(const BwdPlan& plan, int64_t item, char* scratch);
  int64_t (*bwd_scratch)(const BwdPlan& plan);
  void (*reduce)(const BwdPlan& plan, const ReduceItem& item, char* scratch);
  int64_t (*rows_scratch)(const BwdPlan& plan);  // of dots and reduce
};

namespace avx512 {
extern const AttnKernels kAttnFloat, kAttnDouble;
}
namespace avx2 {
extern const AttnKernels kAttnFloat, kAttnDouble;
}
namespace baseline {
extern const AttnKernels kAttnFloat, kAttnDouble;
}

}  // namespace nsa::cpu
