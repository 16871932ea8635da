#include "cuda/sm80/bwd_instance.cuh"

NSA_BWD_INSTANCE(__half, 192, 128)
