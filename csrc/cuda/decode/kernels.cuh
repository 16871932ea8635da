// The two kernels that read the cache, and the launches of a call in order.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "cuda/decode/attend.cuh"
#include "cuda/decode/combine.cuh"
#include "cuda/decode/launch.h"
#include "cuda/decode/select.h"
#include "cuda/device/pdl.cuh"

namespace nsa::cuda::decode {

/// The compressed branch and the weights of the selection blocks. Rows: the new tokens of a
/// sequence times the heads of a group, in `row_tiles` blocks that read the same keys side by side.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    compressed_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char smem[];
  const int row_tile = blockIdx.x % p.row_tiles, rest = blockIdx.x / p.row_tiles;
  const int head = rest % p.heads_kv, worker = rest / p.heads_kv;
  Attend<Traits> block(p, smem);
  // Whatever precedes has ended before the next kernels of the call start, which read lengths,
  // pages and the window ahead of their own waits.
  wait_for_previous();
  launch_dependents();
  const Share share = Schedule(p, kCompressed, threadIdx.x % 32).share(worker);
  block.run(CompressedSource(p, head, row_tile), share, worker, row_tile);
}

/// The window, which needs no selection and so runs beside the kernels before this one; then the
/// selected blocks. Rows: the heads of one new token.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    token_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) char smem[];
  launch_dependents();
  const int head = blockIdx.x % p.heads_kv, worker = blockIdx.x / p.heads_kv;
  Attend<Traits> block(p, smem);
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const int branch = pass == 0 ? kWindow : kSelected;
    // The tiles of a small call go to other blocks of threads than its window.
    const int turned = branch == kWindow ? worker : worker + p.workers[kSelected] / 2;
    const int own = turned < p.workers[branch] ? turned : turned - p.workers[branch];
    const Share share = Schedule(p, branch, threadIdx.x % 32).share(own);
    if (branch == kSelected) wait_for_previous();
    block.run(TokenSource(p, branch, head), share, own, 0);
  }
}

struct DeviceLimits {
  int processors, shared_per_block, shared_per_processor;
  DeviceLimits() {
    int device;
    NSA_CUDA_CHECK(cudaGetDevice(&device));
    const auto get = [device](int& value, cudaDeviceAttr attribute) {
      NSA_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    };
    get(processors, cudaDevAttrMultiProcessorCount);
    get(shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    get(shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
};

/// Tiles of the ring, so that two blocks of threads fit on a multiprocessor or else one does. More
/// than 128 KB together are no gain: with 192 KB a batch of 32 takes 1 % longer on an H100.
template <class T, int kDk, int kDv>
Shape shape_of() {
  using Traits = AttendTraits<T, kDk, kDv, 1>;  // the most shared memory
  const DeviceLimits limits;
  for (int blocks = 2; blocks >= 1; --blocks) {
    // 1 KB of each block is the system's.
    const int64_t room =
        std::min(limits.shared_per_block, limits.shared_per_processor / blocks - 1024);
    const int most = (128 << 10) / blocks / Traits::kStageBytes;
    for (int stages = std::max(most, 2); stages >= 2; --stages) {
      if (Traits::shared_bytes(stages) <= room) return {stages, blocks * limits.processors};
    }
  }
  throw std::runtime_error("decode: two tiles do not fit into shared memory");
}

template <class T, int kDk, int kDv, int kRowGroups>
void launch_compressed(const DecodeParams& p, cudaStream_t stream) {
  using Traits = AttendTraits<T, kDk, kDv, kRowGroups>;
  launch_overlapping(compressed_kernel<Traits>, "decode compressed_kernel",
                     grid_size(int64_t{p.workers[kCompressed]} * p.heads_kv * p.row_tiles),
                     Traits::kThreads, Traits::shared_bytes(p.stages), stream, p);
}
template <class T, int kDk, int kDv, int kRowGroups>
void launch_tokens(const DecodeParams& p, cudaStream_t stream) {
  using Traits = AttendTraits<T, kDk, kDv, kRowGroups>;
  launch_overlapping(token_kernel<Traits>, "decode token_kernel",
                     grid_size(int64_t{p.workers[kSelected]} * p.heads_kv), Traits::kThreads,
                     Traits::shared_bytes(p.stages), stream, p);
}

template <class T, int kDk, int kDv>
void launch_decode(const DecodeParams& p, cudaStream_t stream) {
  switch (p.rows[kCompressed]) {
    case 16:
      launch_compressed<T, kDk, kDv, 1>(p, stream);
      break;
    case 32:
      launch_compressed<T, kDk, kDv, 2>(p, stream);
      break;
    default:
      launch_compressed<T, kDk, kDv, 4>(p, stream);
  }
  launch_select(p, stream);
  switch (p.rows[kSelected]) {
    case 16:
      launch_tokens<T, kDk, kDv, 1>(p, stream);
      break;
    case 32:
      launch_tokens<T, kDk, kDv, 2>(p, stream);
      break;
    default:
      launch_tokens<T, kDk, kDv, 4>(p, stream);
  }
  launch_combine<T, kDv>(p, stream);
}

}  // namespace nsa::cuda::decode
