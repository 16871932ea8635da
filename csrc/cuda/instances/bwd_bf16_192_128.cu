#include "cuda/sm80/bwd_instance.cuh"

NSA_BWD_INSTANCE(__nv_bfloat16, 192, 128)
