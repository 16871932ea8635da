// Where a call runs: torch's thread pool on the CPU; device guard, current stream and workspace on
// CUDA.
#pragma once

#include <functional>
#include <string>

#include "nsa/api.h"
#include "torch/tensors.h"

namespace nsa::binding {

const cpu::Executor& torch_executor();

#ifdef NSA_EXT_WITH_CUDA

/// Runs `launch(workspace, stream)` on the device and the current stream of `like`, with `bytes()`
/// of workspace from torch's allocator. The workspace may be freed at once: the allocator reuses it
/// in stream order.
void on_cuda(const Tensor& like, const std::function<int64_t()>& bytes,
             const std::function<void(void* workspace, cuda::Stream stream)>& launch);

#endif

/// Runs an operator where `like` lives: `on_cpu()`, or on_cuda(like, bytes, launch).
template <class Cpu, class Bytes, class Launch>
void run(const Tensor& like, Cpu&& on_cpu, [[maybe_unused]] Bytes&& bytes,
         [[maybe_unused]] Launch&& launch) {
  if (like.is_cpu()) return on_cpu();
#ifdef NSA_EXT_WITH_CUDA
  on_cuda(like, bytes, launch);
#endif
}

/// The CUDA backend that calls of this process use: NSA_EXT_CUDA_BACKEND at load, then
/// set_cuda_backend.
cuda::Backend cuda_backend();
/// Sets it ("auto", "sm80", "sm90") and returns the one before.
std::string set_cuda_backend(std::string name);
std::string build_info();
std::string supports(std::string device, std::string dtype, int64_t heads_q, int64_t heads_kv,
                     int64_t dim_qk, int64_t dim_v, std::vector<int64_t> config,
                     int64_t capability);

}  // namespace nsa::binding
