// The compression kernels of one instruction set.
#pragma once

#include "nsa/api.h"

namespace nsa::cpu {

struct CompressKernels {
  void (*pool_fwd)(const CompressPoolFwd&, const Executor&);
  void (*pool_bwd)(const CompressPoolBwd&, const Executor&);
  void (*mlp_fwd)(const CompressMlpFwd&, const Executor&);
  void (*mlp_bwd)(const CompressMlpBwd&, const Executor&);
};

const CompressKernels& compress_kernels_baseline();
const CompressKernels& compress_kernels_avx2();
const CompressKernels& compress_kernels_avx512();

}  // namespace nsa::cpu
