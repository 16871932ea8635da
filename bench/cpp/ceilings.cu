#include <algorithm>

#include "ceilings.h"
#include "cuda/common.h"
#include "cuda/device/ptx.cuh"
#include "cuda/device/tma.cuh"
#include "cuda/device/wgmma.cuh"

namespace nsa::bench {

namespace {

using cuda::bf16;

constexpr int kBlockBytes = 32768;  // 64 rows of K and of V, head dim 128, 16 bits
constexpr int kStages = 6;
constexpr int kLoads =
    4096;  // blocks for each multiprocessor: 17.7 GB on 132 of them, about 2.5 ms
constexpr int kGatherSmem = kStages * kBlockBytes + 1024;
constexpr int kCpAsyncStages = 3;  // 96 KB: what sm_80 and sm_86 have as well
constexpr int kCpAsyncThreads = 256;

/// Which block comes next: a full-period generator a thread block, its high bits.
__device__ __forceinline__ uint32_t next_block(uint32_t& state, uint32_t blocks) {
  state = state * 1664525u + 1013904223u;
  return static_cast<uint32_t>((uint64_t{state} * blocks) >> 32);
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void bulk_load(uint32_t dst, const void* src, uint32_t bytes,
                                          uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}
#endif

/// One thread asks for blocks, another gives the stages back. Sets *ran where the target has bulk
/// copies.
__global__ void __launch_bounds__(64)
    gather_bulk_kernel(const char* data, uint32_t blocks, int loads, int* ran) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(1024) char smem[];
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t full = cuda::smem_addr(barriers), empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * kStages; ++i) cuda::mbarrier_init(full + 8 * i, 1);
    cuda::fence_barrier_init();
    *ran = 1;
  }
  __syncthreads();
  int stage = 0;
  uint32_t parity = 0, state = blockIdx.x * 7919u + 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < loads; ++i) {
      cuda::mbarrier_wait(empty + 8 * stage, parity ^ 1);
      cuda::mbarrier_arrive_expect(full + 8 * stage, kBlockBytes);
      const char* src = data + int64_t{next_block(state, blocks)} * kBlockBytes;
      const uint32_t dst = cuda::smem_addr(smem) + stage * kBlockBytes;
      bulk_load(dst, src, kBlockBytes / 2, full + 8 * stage);
      bulk_load(dst + kBlockBytes / 2, src + kBlockBytes / 2, kBlockBytes / 2, full + 8 * stage);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  } else if (threadIdx.x == 32) {
    for (int i = 0; i < loads; ++i) {
      cuda::mbarrier_wait(full + 8 * stage, parity);
      cuda::mbarrier_arrive(empty + 8 * stage);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
  }
#endif
}

__global__ void __launch_bounds__(kCpAsyncThreads)
    gather_cp_async_kernel(const char* data, uint32_t blocks, int loads) {
  extern __shared__ __align__(1024) char smem[];
  uint32_t state = blockIdx.x * 7919u + 1;
  for (int i = 0; i < loads; ++i) {
    const char* src = data + int64_t{next_block(state, blocks)} * kBlockBytes + threadIdx.x * 16;
    const uint32_t dst =
        cuda::smem_addr(smem) + (i % kCpAsyncStages) * kBlockBytes + threadIdx.x * 16;
#pragma unroll
    for (int piece = 0; piece < kBlockBytes; piece += kCpAsyncThreads * 16)
      cuda::cp_async_16(dst + piece, src + piece);
    cuda::cp_async_commit();
    cuda::cp_async_wait<kCpAsyncStages - 1>();
  }
  cuda::cp_async_wait<0>();
}

// ---- Matrix products ---------------------------------------------------------------------------

constexpr int kWarpgroups = 2, kSteps = 16;         // products between two waits
constexpr int kTileBytes = 16384;                   // 128 rows of 64 columns; A takes half a tile
constexpr int kMatmulSmem = 2 * kTileBytes + 1024;  // the tiles start at a multiple of 1024 bytes

__device__ __forceinline__ uint32_t random_pair(uint32_t i) {  // two bf16 of magnitude about 1
  i = (i ^ 61u) ^ (i >> 16);
  i *= 9u;
  i ^= i >> 4;
  i *= 0x27d4eb2du;
  i ^= i >> 15;
  return (i & 0x80ff80ffu) | 0x3f003f00u;
}

__global__ void __launch_bounds__(kWarpgroups * 128)
    matmul_wgmma_kernel(float* sink, int iterations, int* ran) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char smem[];
  for (int i = threadIdx.x; i < kMatmulSmem / 4; i += kWarpgroups * 128)
    reinterpret_cast<uint32_t*>(smem)[i] = random_pair(i + blockIdx.x);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint32_t base = (cuda::smem_addr(smem) + 1023) & ~1023u;
  const uint32_t a = base + (threadIdx.x / 128) * (kTileBytes / 2), b = base + kTileBytes;
  float d[64];
#pragma unroll
  for (float& x : d) x = 0.0f;
  for (int i = 0; i < iterations; ++i) {
    cuda::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t k16 = (step % 4) * 32;  // bytes of 16 columns
      cuda::wgmma_ss<bf16, 128>(d, cuda::desc_k_major(a + k16), cuda::desc_k_major(b + k16), true);
    }
    cuda::wgmma_commit();
    cuda::wgmma_wait<0>();
    cuda::pin(d);
  }
  float sum = 0.0f;
#pragma unroll
  for (const float x : d) sum += x;
  if (sum == 0.12345f) *sink = sum;  // keeps the products
  if (threadIdx.x == 0) *ran = 1;
#endif
}

constexpr int kMmaTiles = 16;

__global__ void __launch_bounds__(256) matmul_mma_kernel(float* sink, int iterations) {
  uint32_t a[2][4], b[kMmaTiles / 2][2];
  float c[kMmaTiles][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = random_pair(threadIdx.x * 8 + i);
#pragma unroll
  for (int i = 0; i < kMmaTiles; ++i) b[i / 2][i % 2] = random_pair(threadIdx.x * 64 + i);
#pragma unroll
  for (int i = 0; i < kMmaTiles * 4; ++i) c[i / 4][i % 4] = 0.0f;
  for (int i = 0; i < iterations; ++i) {
#pragma unroll
    for (int tile = 0; tile < kMmaTiles; ++tile)
      cuda::mma_16816<bf16>(c[tile], a[tile % 2], b[tile / 2][0], b[tile / 2][1]);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMmaTiles * 4; ++i) sum += c[i / 4][i % 4];
  if (sum == 0.12345f) *sink = sum;
}

Row ceiling(const char* kernel, const char* variant, const Spread& spread) {
  Row row;
  row.set("kernel", kernel).set("variant", variant);
  set_spread(row, spread);
  return row;
}

int multiprocessors() {
  int device, count;
  NSA_BENCH_CHECK(cudaGetDevice(&device));
  NSA_BENCH_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

/// Whether a kernel set its flag: its body exists for this GPU only where it did.
bool read_flag(const Buffer& flag) {
  int value;
  NSA_BENCH_CHECK(cudaMemcpy(&value, flag.ptr(), sizeof value, cudaMemcpyDeviceToHost));
  return value == 1;
}

Row copy_row(Timer& timer, const Effort& effort) {
  const int64_t bytes = int64_t{1} << 30;
  const Buffer from(bytes), to(bytes);
  fill_normal(from, DType::kBFloat16, 1);
  const Spread spread = timer.time(
      [&](cudaStream_t stream) {
        NSA_BENCH_CHECK(
            cudaMemcpyAsync(to.ptr(), from.ptr(), bytes, cudaMemcpyDeviceToDevice, stream));
      },
      effort, false);
  return ceiling("ceiling_copy", "memcpy", spread).set("tbps", 2.0 * bytes / spread.median / 1e9);
}

void gather_rows(Timer& timer, const Effort& effort, std::vector<Row>& rows) {
  const int sms = multiprocessors();
  const Buffer flag(sizeof(int));
  cuda::allow_shared_memory(gather_cp_async_kernel, kCpAsyncStages * kBlockBytes);
  int device, limit;
  NSA_BENCH_CHECK(cudaGetDevice(&device));
  NSA_BENCH_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const bool bulk_fits = limit >= kGatherSmem;
  if (bulk_fits) cuda::allow_shared_memory(gather_bulk_kernel, kGatherSmem);
  for (const int64_t mb : {4, 8, 16, 32, 64}) {
    const Buffer data(mb << 20);
    fill_normal(data, DType::kBFloat16, 2);
    const auto* bytes = static_cast<const char*>(data.ptr());
    const auto blocks = static_cast<uint32_t>((mb << 20) / kBlockBytes);
    const auto add = [&](const char* variant, const Launch& launch) {
      const Spread spread = timer.time(launch, effort, false);
      const double moved = double(sms) * kLoads * kBlockBytes;
      rows.push_back(ceiling("ceiling_gather", variant, spread)
                         .set("resident_mb", mb)
                         .set("tbps", moved / spread.median / 1e9));
    };
    NSA_BENCH_CHECK(cudaMemset(flag.ptr(), 0, sizeof(int)));
    if (bulk_fits)
      add("bulk", [&](cudaStream_t stream) {
        gather_bulk_kernel<<<sms, 64, kGatherSmem, stream>>>(bytes, blocks, kLoads,
                                                             static_cast<int*>(flag.ptr()));
        NSA_BENCH_CHECK(cudaGetLastError());
      });
    if (bulk_fits && !read_flag(flag)) rows.pop_back();
    add("cp.async", [&](cudaStream_t stream) {
      gather_cp_async_kernel<<<sms, kCpAsyncThreads, kCpAsyncStages * kBlockBytes, stream>>>(
          bytes, blocks, kLoads);
      NSA_BENCH_CHECK(cudaGetLastError());
    });
  }
}

void matmul_rows(Timer& timer, const Effort& effort, std::vector<Row>& rows) {
  // About 50 ms a launch: in bursts of 5 ms an H100 keeps its highest clock and shows 958 TFLOP/s,
  // which no kernel that runs for long can reach.
  const int blocks = 2 * multiprocessors(), iterations = 20000;
  const Buffer sink(sizeof(float)), flag(sizeof(int));
  NSA_BENCH_CHECK(cudaMemset(flag.ptr(), 0, sizeof(int)));
  const auto add = [&](const char* variant, double products, const Launch& launch) {
    const Spread spread = timer.time(launch, effort, false);
    rows.push_back(ceiling("ceiling_matmul", variant, spread)
                       .set("tflops", 2 * products / spread.median / 1e9));
  };
  add("wgmma", double(blocks) * kWarpgroups * iterations * kSteps * 64 * 128 * 16,
      [&](cudaStream_t stream) {
        matmul_wgmma_kernel<<<blocks, kWarpgroups * 128, kMatmulSmem, stream>>>(
            static_cast<float*>(sink.ptr()), iterations, static_cast<int*>(flag.ptr()));
        NSA_BENCH_CHECK(cudaGetLastError());
      });
  if (!read_flag(flag)) rows.pop_back();
  add("mma.sync", double(blocks) * 8 * iterations * 8 * kMmaTiles * 16 * 8 * 16,
      [&](cudaStream_t stream) {
        matmul_mma_kernel<<<blocks, 256, 0, stream>>>(static_cast<float*>(sink.ptr()),
                                                      8 * iterations);
        NSA_BENCH_CHECK(cudaGetLastError());
      });
}

}  // namespace

std::vector<Row> measure_ceilings(Timer& timer, const Effort& effort) {
  std::vector<Row> rows{copy_row(timer, effort)};
  gather_rows(timer, effort, rows);
  matmul_rows(timer, effort, rows);
  return rows;
}

Ceilings::Ceilings(const std::vector<Row>& rows) {
  for (const Row& row : rows) {
    const std::string& kernel = std::get<std::string>(*row.find("kernel"));
    if (kernel == "ceiling_copy") copy_tbps = std::max(copy_tbps, row.number("tbps"));
    if (kernel == "ceiling_matmul") matmul_tflops = std::max(matmul_tflops, row.number("tflops"));
    if (kernel != "ceiling_gather") continue;
    const double mb = row.number("resident_mb"), tbps = row.number("tbps");
    if (!gather.empty() && gather.back().first == mb)
      gather.back().second = std::max(gather.back().second, tbps);
    else
      gather.emplace_back(mb, tbps);
  }
}

double Ceilings::gather_tbps(double resident_bytes) const {
  for (const auto& [mb, tbps] : gather)
    if (resident_bytes <= mb * 1048576) return tbps;
  return gather.empty() ? 0 : gather.back().second;
}

}  // namespace nsa::bench
