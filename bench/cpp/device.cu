#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <utility>

#include "cuda/common.h"
#include "cuda/device/ptx.cuh"
#include "device.h"

namespace nsa::bench {

namespace {

constexpr int kThreads = 256;
constexpr float kRho = 0.975f;  // as bench/run.py: neighbours then share about 3/4 of their picks
constexpr int kGroup = 64;
// Longer than the host takes to queue the kernels of a backward.
constexpr int64_t kHeadStartNs = 150'000;

__device__ uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
__device__ float unit(uint64_t bits) { return ((bits >> 40) + 0.5f) * 0x1p-24f; }
__device__ float normal(uint64_t seed, int64_t i) {
  const uint64_t bits = mix(mix(seed) ^ static_cast<uint64_t>(i));
  return sqrtf(-2.0f * logf(unit(bits))) * cospif(2.0f * unit(mix(bits)));
}

template <class T>
__global__ void normal_kernel(T* out, int64_t count, uint64_t seed, float scale) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads)
    out[i] = T(scale * normal(seed, i));
}

template <class T>
__global__ void unit_kernel(T* out, int64_t count, uint64_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads)
    out[i] = T(unit(mix(mix(seed) ^ static_cast<uint64_t>(i))));
}

/// A thread walks one column of one sequence.
template <class T>
__global__ void walk_kernel(T* out, int64_t batch, int64_t length, int64_t row, bool groups,
                            uint64_t seed) {
  const int64_t column = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (column >= batch * row) return;
  const int64_t first = column / row * length * row + column % row;
  const float innovation = sqrtf(1.0f - kRho * kRho);
  float x = 0.0f;
  for (int64_t t = 0; t < length; ++t) {
    const int64_t i = first + t * row;
    if (groups) {
      if (t % kGroup == 0) x = normal(seed, i);
    } else {
      x = t == 0 ? normal(seed, i) : kRho * x + innovation * normal(seed, i);
    }
    out[i] = T(x);
  }
}

__global__ void wait_kernel(int64_t nanoseconds) {
  const int64_t start = clock64();  // bounded: at most 2 cycles a nanosecond on current GPUs
  while (clock64() - start < 2 * nanoseconds) __nanosleep(500);
}

__global__ void read_kernel(const uint4* data, int64_t count, uint32_t* sink) {
  uint32_t sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    const uint4 x = data[i];
    sum ^= x.x ^ x.y ^ x.z ^ x.w;
  }
  if (sum == 0x9e3779b9u) *sink = sum;  // keeps the loads
}

unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(std::min<int64_t>(cuda::ceil_div<int64_t>(count, kThreads), 4096));
}

}  // namespace

void check(cudaError_t status, const char* call) { cuda::throw_if(status, call); }

Buffer::Buffer(int64_t bytes) : bytes_(std::max<int64_t>(bytes, 256)) {
  NSA_BENCH_CHECK(cudaMalloc(&ptr_, bytes_));
}
Buffer::~Buffer() { cudaFree(ptr_); }
Buffer::Buffer(Buffer&& other) noexcept
    : ptr_(std::exchange(other.ptr_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(ptr_, other.ptr_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void fill_normal(const Buffer& buffer, DType dtype, uint64_t seed, float scale) {
  const int64_t count = buffer.bytes() / 2;
  cuda::dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    normal_kernel<<<blocks_for(count), kThreads>>>(static_cast<T*>(buffer.ptr()), count, seed,
                                                   scale);
  });
  NSA_BENCH_CHECK(cudaGetLastError());
}

void fill_unit(const Buffer& buffer, DType dtype, uint64_t seed) {
  const int64_t count = buffer.bytes() / 2;
  cuda::dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    unit_kernel<<<blocks_for(count), kThreads>>>(static_cast<T*>(buffer.ptr()), count, seed);
  });
  NSA_BENCH_CHECK(cudaGetLastError());
}

void fill_queries(const Buffer& buffer, DType dtype, int64_t batch, int64_t length, int64_t row,
                  Pattern pattern, uint64_t seed) {
  if (pattern == Pattern::kRandom) return fill_normal(buffer, dtype, seed);
  cuda::dispatch_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto blocks = static_cast<unsigned>(cuda::ceil_div<int64_t>(batch * row, kThreads));
    walk_kernel<<<blocks, kThreads>>>(static_cast<T*>(buffer.ptr()), batch, length, row,
                                      pattern == Pattern::kGroups, seed);
  });
  NSA_BENCH_CHECK(cudaGetLastError());
}

Timer::Timer() {
  NSA_BENCH_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  NSA_BENCH_CHECK(cudaEventCreate(&begin_));
  NSA_BENCH_CHECK(cudaEventCreate(&end_));
  int device, l2;
  NSA_BENCH_CHECK(cudaGetDevice(&device));
  NSA_BENCH_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device));
  other_ = Buffer(2 * int64_t{l2} + 4096);
  NSA_BENCH_CHECK(cudaMemset(other_.ptr(), 0, other_.bytes()));
}

Timer::~Timer() {
  cudaEventDestroy(begin_);
  cudaEventDestroy(end_);
  cudaStreamDestroy(stream_);
}

// Reading, not writing: dirty lines would have to leave L2 while the kernel under test runs.
void Timer::refill_l2() {
  const int64_t count = (other_.bytes() - 4096) / 16;
  const auto* data = static_cast<const uint4*>(other_.ptr());
  read_kernel<<<blocks_for(count), kThreads, 0, stream_>>>(
      data, count, reinterpret_cast<uint32_t*>(static_cast<char*>(other_.ptr()) + count * 16));
}

Spread Timer::time(const Launch& launch, const Effort& effort, bool cold) {
  NSA_BENCH_CHECK(cudaDeviceSynchronize());  // inputs are filled on another stream
  for (int64_t i = 0; i < effort.warmup; ++i) launch(stream_);
  NSA_BENCH_CHECK(cudaStreamSynchronize(stream_));
  using Clock = std::chrono::steady_clock;
  const auto started = Clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(Clock::now() - started).count();
  };
  std::vector<double> times;
  while (static_cast<int64_t>(times.size()) < effort.repeats &&
         (times.empty() || seconds() < effort.max_seconds)) {
    if (cold) refill_l2();
    wait_kernel<<<1, 1, 0, stream_>>>(kHeadStartNs);
    NSA_BENCH_CHECK(cudaEventRecord(begin_, stream_));
    launch(stream_);
    NSA_BENCH_CHECK(cudaEventRecord(end_, stream_));
    NSA_BENCH_CHECK(cudaEventSynchronize(end_));
    float ms;
    NSA_BENCH_CHECK(cudaEventElapsedTime(&ms, begin_, end_));
    times.push_back(ms);
  }
  return spread_of(std::move(times));
}

}  // namespace nsa::bench
