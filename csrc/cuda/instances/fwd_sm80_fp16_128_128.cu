#include "cuda/sm80/fwd_launch.cuh"

namespace nsa::cuda::sm80 {
template void launch_fwd<__half, 128, 128>(FwdParams, cudaStream_t);
}
