// The second step of every reduction over tokens: float32 partial sums in the workspace, added in a
// fixed order, so that the same call gives the same bits.
#pragma once

#include "cuda/common.h"

namespace nsa::cuda::compress {

/// store(group, column, sum over i < count of partial[group][i][column]). A thread adds kVector
/// neighbouring columns of every kRows-th partial; a block is 32 x kRows threads.
template <int kRows, int kVector, class Store>
__global__ void __launch_bounds__(32 * kRows)
    reduce_partials_kernel(const float* partial, int64_t count, int64_t columns, Store store) {
  struct alignas(4 * kVector) Vector {
    float v[kVector];
  };
  __shared__ Vector sums[kRows][32];
  const int64_t group = blockIdx.y;
  const int64_t column = (blockIdx.x * int64_t{32} + threadIdx.x) * kVector;
  partial += group * count * columns + column;
  Vector sum = {};
  if (column < columns) {
#pragma unroll 8
    for (int64_t i = threadIdx.y; i < count; i += kRows) {
      const Vector value = *reinterpret_cast<const Vector*>(partial + i * columns);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum.v[j] += value.v[j];
    }
  }
  if constexpr (kRows > 1) {
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
  }
  if (threadIdx.y || column >= columns) return;
#pragma unroll
  for (int i = 1; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum.v[j] += sums[i][threadIdx.x].v[j];
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j) store(group, column + j, sum.v[j]);
}

/// Few partials of many columns (kRows = 4, 16-byte loads), or many partials of few columns.
template <class Store>
void reduce_partials(const float* partial, int64_t groups, int64_t count, int64_t columns,
                     const Store& store, cudaStream_t stream) {
  if (groups == 0 || columns == 0) return;
  const auto launch = [&](auto kernel, int rows, int vector) {
    const dim3 grid(grid_size(ceil_div<int64_t>(columns, 32 * vector)), grid_size(groups));
    kernel<<<grid, dim3(32, rows), 0, stream>>>(partial, count, columns, store);
    check_launch("reduce_partials_kernel");
  };
  if (count <= 16 && columns % 4 == 0)
    launch(reduce_partials_kernel<4, 4, Store>, 4, 4);
  else
    launch(reduce_partials_kernel<32, 1, Store>, 32, 1);
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
