// The backward of phi's kinds `mlp` and `linear`: what its two translation units share.
//
//   dpre = (dout W2) * gelu'(pre), pre recomputed; `linear`: dpre = dout
//   dx   = dpre W1, gathered per key from the l/d tokens that cover it       (mlp_bwd.cu)
//   dW1  = dpre^T vec(x + pos), dW2 = dout^T gelu(pre), db1, db2: column sums (mlp_bwd_weights.cu)
//   dpos = db1 W1, since every token adds the same pos
#pragma once

#include "cuda/compress/mlp.cuh"

namespace nsa::cuda::compress {

/// Sizes that determine how the sums over tokens are split. Functions of the shape alone: the split
/// decides the rounding, and the same call must give the same bits on every GPU.
struct MlpBwdSplits {
  int64_t w1, w2;         // partial sums of dW1 and dW2 for each weight head
  int64_t column_chunks;  // partial column sums for each head
};

struct MlpBwdWorkspace {
  int64_t* x_offset;  // (rows): where a token starts in x, -1 if the row holds none
  void* dout;         // (heads, rows, padded_out) of the inputs' dtype, zero where no token is
  HiddenPartials partials;
  float* dhidden;  // (heads, rows, padded_hidden): dout W2
  void* hidden;    // (heads, rows, padded_hidden) of the inputs' dtype: gelu(pre)
  void* dpre;      // as hidden; `dout` itself when linear
  MlpBwdSplits splits;
  float* w1_partial;      // (Hw, splits.w1, hidden, l * D)
  float* w2_partial;      // (Hw, splits.w2, D_out, padded_hidden)
  float* column_partial;  // (heads, column_chunks, padded_hidden or padded_out)
  float* db1;             // (Hw, padded_hidden)
  int64_t bytes;
};

MlpBwdSplits mlp_bwd_splits(const MlpSizes& sizes);

/// dW1, db1, dW2, db2 and dpos, from dpre, dout and gelu(pre) in the workspace.
void mlp_bwd_weights(const CompressMlpBwd& params, const MlpSizes& sizes, const MlpBwdWorkspace& w,
                     cudaStream_t stream);

}  // namespace nsa::cuda::compress
