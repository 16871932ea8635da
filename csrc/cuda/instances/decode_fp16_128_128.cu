#include "cuda/decode/kernels.cuh"

namespace nsa::cuda::decode {
template Shape shape_of<__half, 128, 128>();
template void launch_decode<__half, 128, 128>(const DecodeParams&, cudaStream_t);
}  // namespace nsa::cuda::decode
