// The second step of every reduction over tokens: float32 partial sums in the workspace, added in a
// fixed order, so that the same call gives the same bits.
#pragma once

#include "cuda/common.h"

namespace nsa::cuda::compress {

inline constexpr int kReduceColumns = 32, kReduceRows = 8;

/// store(group, column, sum over i < count of partial[group][i][column]).
template <class Store>
__global__ void __launch_bounds__(kReduceColumns* kReduceRows)
    reduce_partials_kernel(const float* partial, int64_t count, int64_t columns, Store store) {
  __shared__ float sums[kReduceRows][kReduceColumns];
  const int64_t group = blockIdx.y;
  const int64_t column = blockIdx.x * int64_t{kReduceColumns} + threadIdx.x;
  partial += group * count * columns;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t i = threadIdx.y; i < count; i += kReduceRows) sum += partial[i * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= columns) return;
#pragma unroll
  for (int i = 1; i < kReduceRows; ++i) sum += sums[i][threadIdx.x];
  store(group, column, sum);
}

template <class Store>
void reduce_partials(const float* partial, int64_t groups, int64_t count, int64_t columns,
                     const Store& store, cudaStream_t stream) {
  if (groups == 0 || columns == 0) return;
  const dim3 grid(grid_size(ceil_div<int64_t>(columns, kReduceColumns)), grid_size(groups));
  reduce_partials_kernel<<<grid, dim3(kReduceColumns, kReduceRows), 0, stream>>>(partial, count,
                                                                                 columns, store);
  check_launch("reduce_partials_kernel");
}

/// A `Store` for reduce_partials: rows of `columns` elements, rounded to Out.
template <class Out>
struct StoreSum {
  Out* out;
  int64_t columns;
  __device__ __forceinline__ void operator()(int64_t group, int64_t column, float sum) const {
    out[group * columns + column] = static_cast<Out>(sum);
  }
};

}  // namespace nsa::cuda::compress
