// What every translation unit of the CUDA backend needs: errors, launches, integer helpers,
// workspaces, 16-bit dispatch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "nsa/params.h"

namespace nsa::cuda {

inline void throw_if(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ")");
}

/// Throws std::runtime_error with the text of the call that failed.
#define NSA_CUDA_CHECK(call) ::nsa::cuda::throw_if((call), #call)

/// Reports the error of the launch just made; it neither waits for the kernel nor breaks a capture.
inline void check_launch(const char* kernel_name) { throw_if(cudaGetLastError(), kernel_name); }

/// The x extent of a grid; more blocks than CUDA can launch throw.
inline unsigned grid_size(int64_t blocks) {
  if (blocks < 0 || blocks > INT32_MAX)
    throw std::runtime_error("too many blocks for one launch: " + std::to_string(blocks));
  return static_cast<unsigned>(blocks);
}

/// What is set and known of a kernel on one device.
struct KernelState {
  int64_t shared_bytes = 0;  // dynamic shared memory that was asked for
  int ptx_version = 0;       // of its code; 0: not asked yet
};

/// Calls body(state) with that of `kernel` on the current device, one caller at a time: CUDA is
/// asked once, not at each launch.
inline void with_kernel_state(const void* kernel, const std::function<void(KernelState&)>& body) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KernelState> states;
  int device;
  NSA_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  body(states[{kernel, device}]);
}

/// Lets `kernel` use `bytes` of dynamic shared memory; more than 48 KB must be asked for.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int64_t bytes) {
  if (bytes <= 48 * 1024) return;
  with_kernel_state(reinterpret_cast<const void*>(kernel), [&](KernelState& state) {
    if (bytes <= state.shared_bytes) return;
    NSA_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
    state.shared_bytes = bytes;
  });
}

/// Of the current device.
struct ComputeCapability {
  int major, minor;
  ComputeCapability() {
    int device;
    NSA_CUDA_CHECK(cudaGetDevice(&device));
    NSA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    NSA_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  }
};

/// Of the current device.
inline int multiprocessor_count() {
  int device, count;
  NSA_CUDA_CHECK(cudaGetDevice(&device));
  NSA_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

/// Rows are read and written 16 bytes at a time: throws std::invalid_argument where they do not lie
/// so. The stride of an axis of one element is free.
template <class View>
void check_rows_aligned(const View& view, const char* name, int64_t batch, int64_t heads) {
  if (view.ptr == nullptr) return;
  if (reinterpret_cast<uintptr_t>(view.ptr) % 16 == 0 && (batch == 1 || view.batch % 8 == 0) &&
      view.seq % 8 == 0 && (heads == 1 || view.head % 8 == 0))
    return;
  throw std::invalid_argument(std::string(name) +
                              " must be 16-byte aligned on CUDA: its address a multiple of 16 "
                              "bytes, its strides of 8 elements");
}

/// Launches a kernel; an error throws under the kernel's name.
template <class... Parameters, class... Args>
void launch_kernel(void (*kernel)(Parameters...), const char* name, dim3 blocks, int threads,
                   int64_t shared_bytes, [[maybe_unused]] cudaStream_t stream,
                   const Args&... args) {
#ifndef NSA_EMULATION
  allow_shared_memory(kernel, shared_bytes);
  kernel<<<blocks, threads, static_cast<size_t>(shared_bytes), stream>>>(args...);
  check_launch(name);
#else  // on the CPU (tests/emulation)
  if (!emulator::run(blocks, threads, shared_bytes, [&] { kernel(args...); }))
    throw std::runtime_error(std::string(name) + ": too much shared memory");
#endif
}

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}
template <class Int>
__host__ __device__ constexpr Int round_up(Int a, Int b) {
  return ceil_div(a, b) * b;
}

/// Hands out consecutive pieces of a workspace, each 256-byte aligned. With a null base it only
/// counts, so that a *_workspace function and its launcher share one layout.
class WorkspaceCursor {
 public:
  explicit WorkspaceCursor(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ ? base_ + bytes_ : nullptr;
    bytes_ += round_up<int64_t>(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

template <class T>
struct TypeTag {
  using type = T;
};

/// Calls body(TypeTag<T>{}) with the CUDA type of a 16-bit `dtype`; other types throw.
template <class Body>
decltype(auto) dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return body(TypeTag<__half>{});
    default:
      throw std::runtime_error("the CUDA kernels take bfloat16 and float16 only");
  }
}

}  // namespace nsa::cuda
