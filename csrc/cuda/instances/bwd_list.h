// The head dims (Dk, Dv) that the portable backward is compiled for, each for both 16-bit types.
// instances/bwd_<type>_<Dk>_<Dv>.cu holds one of them.
#pragma once

#define NSA_BWD_FOR_EACH_DIMS(X) \
  X(64, 64)                      \
  X(128, 128)                    \
  X(192, 128)
