// What the instances of the decode kernels offer (csrc/cuda/instances/decode_*.cu).
#pragma once

#include <cuda_runtime.h>

#include "cuda/decode/params.h"

namespace nsa::cuda::decode {

/// What the kernels ask of the current device.
struct Shape {
  int stages;    // tiles of a ring
  int resident;  // blocks of threads that run at the same time
};
template <class T, int kDk, int kDv>
Shape shape_of();

/// The four kernels of a call.
template <class T, int kDk, int kDv>
void launch_decode(const DecodeParams& params, cudaStream_t stream);

}  // namespace nsa::cuda::decode
