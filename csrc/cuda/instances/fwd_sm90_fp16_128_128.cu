#include "cuda/sm90/fwd_launch.cuh"

namespace nsa::cuda::sm90 {
template void launch_fwd<__half, 128, 128>(const AttnShape&, FwdParams, void*, cudaStream_t);
}
