// Programmatic dependent launch: a kernel starts while the one before it still runs, and waits for
// it where it needs its results. Without effect before sm_90, where launches serialise.
#pragma once

#include "cuda/common.h"

namespace nsa::cuda {

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

/// Launches `kernel`, which may start before the previous kernel of the stream ends, whatever that
/// is: until wait_for_previous() it touches nothing that others write, unless the kernels before it
/// see to that.
template <class Params>
void launch_overlapping(void (*kernel)(Params), const char* name, dim3 grid, int threads,
                        int64_t shared_bytes, cudaStream_t stream, const Params& params) {
  allow_shared_memory(kernel, shared_bytes);
  int ptx_version = 0;
  with_kernel_state(reinterpret_cast<const void*>(kernel), [&](KernelState& state) {
    if (state.ptx_version == 0) {
      // Kernels of unlike carve-outs cannot share a multiprocessor.
      NSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared));
      cudaFuncAttributes attributes;
      NSA_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
      state.ptx_version = attributes.ptxVersion;
    }
    ptx_version = state.ptx_version;
  });
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  // Code for sm_80 that runs on a newer GPU holds no waits.
  config.numAttrs = ptx_version >= 90;
  throw_if(cudaLaunchKernelEx(&config, kernel, params), name);
}

}  // namespace nsa::cuda
