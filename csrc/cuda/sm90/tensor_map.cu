#include <stdexcept>
#include <string>

#include "cuda/common.h"
#include "cuda/sm90/tensor_map.h"

namespace nsa::cuda::sm90 {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's entry point, asked of the runtime: nothing links against libcuda.
Encode encoder() {
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    NSA_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                    cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("this CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(entry);
  }();
  return encode;
}

}  // namespace

CUtensorMap make_tensor_map(const void* ptr, DType dtype, int64_t dim,
                            std::initializer_list<MapAxis> axes) {
  cuuint64_t sizes[5] = {static_cast<cuuint64_t>(dim)};
  cuuint64_t strides[4];
  cuuint32_t box[5] = {64}, steps[5] = {1, 1, 1, 1, 1};
  cuuint32_t rank = 1;
  for (const MapAxis& axis : axes) {
    sizes[rank] = static_cast<cuuint64_t>(axis.size);
    // The stride of an axis of one element is never used, but must be a valid one.
    strides[rank - 1] = static_cast<cuuint64_t>(axis.size > 1 ? axis.stride : dim) * 2;
    box[rank] = static_cast<cuuint32_t>(axis.box * axis.step);
    steps[rank] = static_cast<cuuint32_t>(axis.step);
    ++rank;
  }
  CUtensorMap map;
  const CUresult status =
      encoder()(&map,
                dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                rank, const_cast<void*>(ptr), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(status)));
  return map;
}

}  // namespace nsa::cuda::sm90
