// Entry points of the compression: checks, then the kernels of this machine's instruction set.
#include <stdexcept>
#include <string>

#include "cpu/compress_kernels.h"
#include "cpu/isa.h"

namespace nsa::cpu {

namespace {

void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(std::string("compress: ") + message);
}

void check(const CompressShape& shape) {
  require(shape.dtype == DType::kFloat64 || shape.dtype == DType::kFloat32 ||
              shape.dtype == DType::kBFloat16 || shape.dtype == DType::kFloat16,
          "unknown dtype");
  require(shape.block_size >= 1 && shape.block_stride >= 1 &&
              shape.block_size % shape.block_stride == 0,
          "block_stride must divide block_size");
  require(shape.batch >= 0 && shape.seqlen >= 0 && shape.total >= 0 && shape.heads >= 0,
          "batch, seqlen and heads must not be negative");
  require(shape.dim >= 1, "dim must be at least 1");
  require(shape.weight_heads == 1 || shape.weight_heads == shape.heads,
          "weight_heads must be 1 or the number of heads");
  require(!shape.cu_seqlens || shape.cu_seqlens[0] == 0, "cu_seqlens must start at 0");
  for (int64_t b = 0; shape.cu_seqlens && b < shape.batch; ++b)
    require(
        shape.cu_seqlens[b] <= shape.cu_seqlens[b + 1] && shape.cu_seqlens[b + 1] <= shape.total,
        "cu_seqlens must ascend to at most the rows of x");
}

template <class Params>
void check_mlp(const Params& params) {
  check(params.shape);
  require(params.hidden >= 1 && params.dim_out >= 1, "hidden and dim_out must be at least 1");
  require(params.w1, "w1 is missing");
  require(params.w2 || params.hidden == params.dim_out, "without w2, hidden must equal dim_out");
}

const CompressKernels& kernels() {
#if NSA_CPU_DISPATCH
  if (active_isa() == Isa::kAvx512) return avx512::kCompressKernels;
  if (active_isa() == Isa::kAvx2) return avx2::kCompressKernels;
#endif
  return baseline::kCompressKernels;
}

}  // namespace

void compress_pool_fwd(const CompressPoolFwd& params, const Executor& executor) {
  check(params.shape);
  kernels().pool_fwd(params, executor);
}

void compress_pool_bwd(const CompressPoolBwd& params, const Executor& executor) {
  check(params.shape);
  require(params.weight || !params.dweight, "dweight needs weight");
  require(params.pos || !params.dpos, "dpos needs pos");
  kernels().pool_bwd(params, executor);
}

void compress_mlp_fwd(const CompressMlpFwd& params, const Executor& executor) {
  check_mlp(params);
  require(params.w2 || !params.b2, "b2 needs w2");
  kernels().mlp_fwd(params, executor);
}

void compress_mlp_bwd(const CompressMlpBwd& params, const Executor& executor) {
  check_mlp(params);
  require(params.pos || !params.dpos, "dpos needs pos");
  require(params.w2 || !(params.dw2 || params.db2), "dw2 and db2 need w2");
  kernels().mlp_bwd(params, executor);
}

}  // namespace nsa::cpu
