#include "torch/runtime.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "torch/config.h"

namespace nsa::binding {

const cpu::Executor& torch_executor() {
  static thread_local cpu::Executor executor;
  executor.num_threads = static_cast<int>(torch::stable::get_num_threads());
  executor.parallel_for = [](int64_t n, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end); });
  };
  return executor;
}

#ifdef NSA_EXT_WITH_CUDA

namespace {

using GetStream = AOTITorchError (*)(int32_t, void**);

/// libtorch_cuda's entry point, looked up at the first CUDA call: a CPU-only torch does not have
/// it.
GetStream stream_getter() {
  static const GetStream getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) library = RTLD_DEFAULT;
    return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  return getter;
}

}  // namespace

void on_cuda(const Tensor& like, const std::function<int64_t()>& bytes,
             const std::function<void(void* workspace, cuda::Stream stream)>& launch) {
  STD_TORCH_CHECK(stream_getter() != nullptr, "this torch was built without CUDA");
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(stream_getter()(device, &stream));
  const int64_t size = bytes();
  if (size == 0) return launch(nullptr, stream);
  launch(empty(like, {size}, ScalarType::Byte).mutable_data_ptr(), stream);
}

#endif

namespace {

const char* const kBackendNames[] = {"auto", "sm80", "sm90"};

cuda::Backend parse_backend(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kBackendNames[i]) return static_cast<cuda::Backend>(i);
  }
  STD_TORCH_CHECK(false, "the CUDA backend must be auto, sm80 or sm90, got ", name);
  return cuda::Backend::kAuto;
}

std::atomic<cuda::Backend>& forced_backend() {
  static std::atomic<cuda::Backend> backend = [] {
    const char* name = std::getenv("NSA_EXT_CUDA_BACKEND");
    return name ? parse_backend(name) : cuda::Backend::kAuto;
  }();
  return backend;
}

}  // namespace

cuda::Backend cuda_backend() { return forced_backend().load(std::memory_order_relaxed); }

std::string set_cuda_backend(std::string name) {
  return kBackendNames[static_cast<int>(forced_backend().exchange(parse_backend(name)))];
}

std::string build_info() {
#ifdef NSA_EXT_WITH_CUDA
  const std::string archs = "\"" NSA_EXT_CUDA_ARCHS "\"";
#else
  const std::string archs = "null";
#endif
  return std::string("{\"version\": \"") + kVersion + "\", \"cpu_isa\": \"" + cpu::isa() +
         "\", \"cuda_archs\": " + archs + ", \"cuda_backend\": \"" +
         kBackendNames[static_cast<int>(cuda_backend())] + "\"}";
}

std::string supports(std::string device, std::string dtype, int64_t heads_q, int64_t heads_kv,
                     int64_t dim_qk, int64_t dim_v, std::vector<int64_t> config,
                     int64_t capability) {
  static const std::pair<const char*, DType> kDTypes[] = {{"float64", DType::kFloat64},
                                                          {"float32", DType::kFloat32},
                                                          {"bfloat16", DType::kBFloat16},
                                                          {"float16", DType::kFloat16}};
  AttnShape shape{};
  const auto found = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                  [&](const auto& entry) { return dtype == entry.first; });
  if (found == std::end(kDTypes))
    return "dtype must be float64, float32, bfloat16 or float16, got " + dtype;
  shape.dtype = found->second;
  shape.heads_q = heads_q;
  shape.heads_kv = heads_kv;
  shape.dim_qk = dim_qk;
  shape.dim_v = dim_v;
  std::vector<std::string> reasons;
  if (device == "cpu") {
    reasons = cpu::supports(shape, to_config(config));
  } else if (device == "cuda") {
#ifdef NSA_EXT_WITH_CUDA
    reasons = cuda::supports(shape, to_config(config), static_cast<int>(capability / 10),
                             static_cast<int>(capability % 10));
#else
    (void)capability;
    reasons = {"nsa_ext was built without CUDA kernels"};
#endif
  } else {
    reasons = {"device must be cpu or cuda, got " + device};
  }
  std::string text;
  for (const std::string& reason : reasons) text += (text.empty() ? "" : "\n") + reason;
  return text;
}

}  // namespace nsa::binding
