// TMA descriptors of (batch, seq, heads, dim) views.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

#include "nsa/params.h"

namespace nsa::cuda::sm90 {

/// One axis of a tensor map behind the first: its length, its stride in elements, the box along it.
struct MapAxis {
  int64_t size, stride;
  int box;
};

/// Map of 16-bit elements whose innermost axis has `dim` contiguous elements, read in boxes of 64
/// with 128-byte swizzle; rows outside of the tensor read as zeros. `axes` from inner to outer.
CUtensorMap make_tensor_map(const void* ptr, DType dtype, int64_t dim,
                            std::initializer_list<MapAxis> axes);

}  // namespace nsa::cuda::sm90
