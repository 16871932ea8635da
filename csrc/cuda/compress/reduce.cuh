// The second step of every reduction over tokens: float32 partial sums in the workspace, added in a
// fixed order, so that the same call gives the same bits.
#pragma once

#include "cuda/common.h"

namespace nsa::cuda::compress {

inline constexpr int kReduceColumns = 32, kReduceRows = 8;

/// Sum of partial[group][0..count)[column] in the order of the threads, for the column of this
/// thread; valid in threads with threadIdx.y == 0. Block of kReduceColumns x kReduceRows threads.
__device__ __forceinline__ float sum_partials(const float* partial, int64_t count, int64_t columns,
                                              int64_t column) {
  __shared__ float sums[kReduceRows][kReduceColumns];
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < count; i += kReduceRows) sum += partial[i * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0) {
#pragma unroll
    for (int i = 1; i < kReduceRows; ++i) sum += sums[i][threadIdx.x];
  }
  return sum;
}

/// out[group][column] = sum over i of partial[group][i][column], in float32.
static __global__ void reduce_partials_kernel(const float* partial, int64_t count, int64_t columns,
                                              float* out) {
  const int64_t group = blockIdx.y;
  const int64_t column = blockIdx.x * int64_t{kReduceColumns} + threadIdx.x;
  const float sum = sum_partials(partial + group * count * columns, count, columns, column);
  if (threadIdx.y == 0 && column < columns) out[group * columns + column] = sum;
}

inline void reduce_partials(const float* partial, int64_t groups, int64_t count, int64_t columns,
                            float* out, cudaStream_t stream) {
  const dim3 grid(grid_size(ceil_div<int64_t>(columns, kReduceColumns)), grid_size(groups));
  reduce_partials_kernel<<<grid, dim3(kReduceColumns, kReduceRows), 0, stream>>>(partial, count,
                                                                                 columns, out);
  check_launch("reduce_partials_kernel");
}

}  // namespace nsa::cuda::compress
