// Kernels run one after the other.
#pragma once

#include "cuda/common.h"

namespace nsa::cuda {

inline void launch_dependents() {}
inline void wait_for_previous() {}

template <class Params>
void launch_overlapping(void (*kernel)(Params), const char* name, dim3 grid, int threads,
                        int64_t shared_bytes, cudaStream_t stream, const Params& params) {
  launch_kernel(kernel, name, grid, threads, shared_bytes, stream, params);
}

}  // namespace nsa::cuda
