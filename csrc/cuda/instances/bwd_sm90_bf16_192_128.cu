#include "cuda/sm90/bwd_instance.cuh"

NSA_BWD_SM90_INSTANCE(__nv_bfloat16, 192, 128)
