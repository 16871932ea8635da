// TMA descriptors of (batch, seq, heads, dim) views.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>

#include "nsa/params.h"

namespace nsa::cuda::sm90 {

/// Whether the copy engine takes the view's strides: from 1 to 2^40 - 1 bytes. That of an axis of
/// one element is free.
inline bool can_map(const InView& view, int64_t batch, int64_t heads) {
  const auto fits = [](int64_t size, int64_t stride) {
    return size <= 1 || (stride > 0 && stride < int64_t{1} << 39);
  };
  return fits(batch, view.batch) && fits(2, view.seq) && fits(heads, view.head);
}

/// One axis of a tensor map behind the first: its length, its stride in elements, the box along it,
/// of every `step`-th.
struct MapAxis {
  int64_t size, stride;
  int box;
  int step = 1;
};

/// Map of 16-bit elements whose innermost axis has `dim` contiguous elements, read in boxes of 64
/// with 128-byte swizzle; rows outside of the tensor read as zeros. `axes` from inner to outer.
CUtensorMap make_tensor_map(const void* ptr, DType dtype, int64_t dim,
                            std::initializer_list<MapAxis> axes);

}  // namespace nsa::cuda::sm90
