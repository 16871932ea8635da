// Defines the table of attention kernels of the target. Include a target_*.h first.
#pragma once

#include "cpu/attn_bwd.h"
#include "cpu/attn_fwd.h"
#include "cpu/attn_kernels.h"

namespace nsa::cpu::NSA_CPU_TARGET {

template <class T>
constexpr AttnKernels attn_kernels() {
  return {kLanes<T>,
          kPanel<T>,
          pack_item<T>,
          fwd_item<T>,
          tile_scratch<FwdTile<T>, FwdPlan>,
          dots_item<T>,
          bwd_item<T>,
          tile_scratch<BwdTile<T>, BwdPlan>,
          reduce_item<T>,
          rows_scratch<T>};
}

const AttnKernels kAttnFloat = attn_kernels<float>();
const AttnKernels kAttnDouble = attn_kernels<double>();

}  // namespace nsa::cpu::NSA_CPU_TARGET
