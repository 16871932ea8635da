#include "cuda/decode/kernels.cuh"

namespace nsa::cuda::decode {
template Shape shape_of<__nv_bfloat16, 64, 64>();
template void launch_decode<__nv_bfloat16, 64, 64>(const DecodeParams&, cudaStream_t);
}  // namespace nsa::cuda::decode
