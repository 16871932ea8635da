#include "cuda/decode/kernels.cuh"

namespace nsa::cuda::decode {
template Shape shape_of<__half, 64, 64>();
template void launch_decode<__half, 64, 64>(const DecodeParams&, cudaStream_t);
}  // namespace nsa::cuda::decode
