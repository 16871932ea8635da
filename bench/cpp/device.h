// Device memory, inputs, timing: what the benchmarks ask of CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "nsa/params.h"
#include "options.h"
#include "result.h"

namespace nsa::bench {

/// Throws std::runtime_error with the text of the call that failed.
void check(cudaError_t status, const char* call);
#define NSA_BENCH_CHECK(call) ::nsa::bench::check((call), #call)

/// Device memory, never initialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  void* ptr() const { return ptr_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* ptr_ = nullptr;
  int64_t bytes_ = 0;
};

/// Standard normals times `scale`, by position and seed.
void fill_normal(const Buffer& buffer, DType dtype, uint64_t seed, float scale = 1.0f);
/// Values between 0 and 1, as gates are.
void fill_unit(const Buffer& buffer, DType dtype, uint64_t seed);
/// Queries (B, S, `row`) whose selections follow `pattern`: independent normals; a slow walk along
/// S, AR(1) with rho 0.975; or one query for 64 positions.
void fill_queries(const Buffer& buffer, DType dtype, int64_t batch, int64_t length, int64_t row,
                  Pattern pattern, uint64_t seed);

using Launch = std::function<void(cudaStream_t)>;

/// How often and how long something is timed.
struct Effort {
  int64_t repeats, warmup;
  double max_seconds;
};

/// Times launches one by one, with events. A launch is queued behind a kernel that only waits, so
/// that the time of the host is not part of it.
class Timer {
 public:
  Timer();
  ~Timer();
  Timer(const Timer&) = delete;
  cudaStream_t stream() const { return stream_; }

  /// `cold`: before each launch L2 is filled by reading other memory.
  Spread time(const Launch& launch, const Effort& effort, bool cold);

  struct Part {
    std::string name;  // of the kernel, without namespace and template arguments, numbered
    Spread spread;
  };
  /// The kernels that one launch consists of, in their order, each timed by itself inside of a
  /// captured graph; a few microseconds of event overhead are part of each.
  std::vector<Part> time_parts(const Launch& launch, const Effort& effort);

 private:
  void refill_l2();
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
  Buffer other_;  // twice the size of L2
};

/// GPU, driver, machine, commit; the fields of results' environment.
Row describe_environment(const std::string& command);
/// The ones that every row repeats.
const std::vector<std::string>& provenance();

}  // namespace nsa::bench
