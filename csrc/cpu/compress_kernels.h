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

namespace avx512 {
extern const CompressKernels kCompressKernels;
}
namespace avx2 {
extern const CompressKernels kCompressKernels;
}
namespace baseline {
extern const CompressKernels kCompressKernels;
}

}  // namespace nsa::cpu
