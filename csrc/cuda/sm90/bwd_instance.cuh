// What a file of instances/ consists of.
#pragma once

#include "cuda/sm90/bwd_dkv.cuh"
#include "cuda/sm90/bwd_dq.cuh"

#define NSA_BWD_SM90_INSTANCE(T, DIM_QK, DIM_V)                                        \
  namespace nsa::cuda::bwd::sm90 {                                                     \
  template void launch_bwd_dq<T, DIM_QK, DIM_V>(const DqArgs&, cudaStream_t stream);   \
  template void launch_bwd_dkv<T, DIM_QK, DIM_V>(const DkvArgs&, cudaStream_t stream); \
  }
