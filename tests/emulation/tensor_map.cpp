// csrc/cuda/sm90/tensor_map.cu for the emulator.
#include "cuda/sm90/tensor_map.h"

#include "cuda/device/tma.cuh"

namespace nsa::cuda::sm90 {

CUtensorMap make_tensor_map(const void* ptr, DType, int64_t dim,
                            std::initializer_list<MapAxis> axes) {
  EmulatedMap map{static_cast<const char*>(ptr), 1, {dim}, {2}, {64}, {1}};
  for (const MapAxis& axis : axes) {
    map.size[map.rank] = axis.size;
    map.stride[map.rank] = axis.stride * 2;
    map.box[map.rank] = axis.box;
    map.step[map.rank] = axis.step;
    ++map.rank;
  }
  const int number = static_cast<int>(emulated_maps().size());
  emulated_maps().push_back(map);
  CUtensorMap result{};
  std::memcpy(&result, &number, sizeof number);
  return result;
}

}  // namespace nsa::cuda::sm90
