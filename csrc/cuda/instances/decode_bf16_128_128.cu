#include "cuda/decode/kernels.cuh"

namespace nsa::cuda::decode {
template Shape shape_of<__nv_bfloat16, 128, 128>();
template void launch_decode<__nv_bfloat16, 128, 128>(const DecodeParams&, cudaStream_t);
}  // namespace nsa::cuda::decode
