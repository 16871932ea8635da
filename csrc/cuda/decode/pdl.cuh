// Programmatic dependent launch: a kernel starts while the one before it still runs, and waits for
// it where it needs its results. Without effect before sm_90, where launches serialise.
#pragma once

#include "cuda/common.h"

namespace nsa::cuda::decode {

/// Lets the next kernel of the stream start once every block of this one has come here or ended.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until the kernel before this one has ended and its writes are visible. Every block calls
/// it before it ends, so that the end of a kernel implies the end of all before it.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Launches `kernel`; with `overlap` it may start before the previous kernel of the stream ends.
template <class Params>
void launch(void (*kernel)(Params), const Params& params, int64_t blocks, int threads,
            int64_t shared_bytes, bool overlap, cudaStream_t stream, const char* name) {
  allow_shared_memory(kernel, shared_bytes);
  // Kernels of unlike carve-outs cannot share a multiprocessor.
  NSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
  cudaFuncAttributes attributes;
  NSA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid_size(blocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  // Code for sm_80 that runs on a newer GPU holds no waits.
  config.numAttrs = overlap && attributes.ptxVersion >= 90;
  throw_if(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace nsa::cuda::decode
