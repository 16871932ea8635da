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
  int64_t (*dots_scratch)(const BwdPlan& plan);
  void (*dq)(const BwdPlan& plan, const QueryItem& item, char* scratch);
  int64_t (*dq_scratch)(const BwdPlan& plan);
  void (*keys)(const BwdPlan& plan, const KeyItem& item, char* scratch);
  int64_t (*keys_scratch)(const BwdPlan& plan);
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
