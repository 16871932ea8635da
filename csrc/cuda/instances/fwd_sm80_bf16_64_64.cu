#include "cuda/sm80/fwd_launch.cuh"

namespace nsa::cuda::sm80 {
template void launch_fwd<__nv_bfloat16, 64, 64>(FwdParams, cudaStream_t);
}
