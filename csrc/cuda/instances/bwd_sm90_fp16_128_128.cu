#include "cuda/sm90/bwd_instance.cuh"

NSA_BWD_SM90_INSTANCE(__half, 128, 128)
