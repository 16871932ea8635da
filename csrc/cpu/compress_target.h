// The table of compress_{avx512,avx2,baseline}.cpp. Include a target_*.h first.
#pragma once

#include "cpu/compress_kernels.h"
#include "cpu/compress_mlp.h"
#include "cpu/compress_mlp_bwd.h"
#include "cpu/compress_pool.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// The kernel of the parameters' compute type.
template <auto kDouble, auto kFloat, class Params>
void by_compute_type(const Params& params, const Executor& executor) {
  if (params.shape.dtype == DType::kFloat64)
    kDouble(params, executor);
  else
    kFloat(params, executor);
}

const CompressKernels kCompressKernels = {
    by_compute_type<pool_fwd<double>, pool_fwd<float>, CompressPoolFwd>,
    by_compute_type<pool_bwd<double>, pool_bwd<float>, CompressPoolBwd>,
    by_compute_type<mlp_fwd<double>, mlp_fwd<float>, CompressMlpFwd>,
    by_compute_type<mlp_bwd<double>, mlp_bwd<float>, CompressMlpBwd>,
};

}  // namespace nsa::cpu::NSA_CPU_TARGET
