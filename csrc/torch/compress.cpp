// compress_pool_{fwd,bwd}, compress_mlp_{fwd,bwd}.
#include "nsa/geometry.h"
#include "torch/ops.h"
#include "torch/runtime.h"

namespace nsa::binding {

namespace {

CompressShape compress_shape(const Tensor& x, const OptTensor& cu_seqlens, int64_t max_seqlen,
                             int64_t block_size, int64_t block_stride, int64_t weight_heads) {
  const bool packed = cu_seqlens.has_value();
  STD_TORCH_CHECK(x.dim() == (packed ? 3 : 4), "x must have ", packed ? 3 : 4, " dims, got ",
                  shape_string(x));
  STD_TORCH_CHECK(block_stride >= 1 && block_size >= block_stride && block_size % block_stride == 0,
                  "block_stride must divide block_size, got ", block_stride, " and ", block_size);
  check(x, "x", std::vector<int64_t>(x.dim(), -1), x.scalar_type(), x);
  CompressShape shape{};
  shape.dtype = to_dtype(x, "x");
  shape.batch = packed ? cu_seqlens->numel() - 1 : x.size(0);
  shape.seqlen = packed ? max_seqlen : x.size(1);
  shape.total = packed ? x.size(0) : x.size(0) * x.size(1);
  shape.heads = x.size(packed ? 1 : 2);
  shape.dim = x.size(packed ? 2 : 3);
  shape.weight_heads = weight_heads;
  shape.block_size = static_cast<int32_t>(block_size);
  shape.block_stride = static_cast<int32_t>(block_stride);
  shape.cu_seqlens = cu_seqlens_ptr(cu_seqlens, "cu_seqlens", shape.total, max_seqlen, x);
  STD_TORCH_CHECK(weight_heads == 1 || weight_heads == shape.heads, "phi's weights must have 1 or ",
                  shape.heads, " heads, got ", weight_heads);
  return shape;
}

std::vector<int64_t> compressed_sizes(const CompressShape& shape, int64_t dim_out) {
  if (shape.cu_seqlens) return {shape.total / shape.block_stride, shape.heads, dim_out};
  return {shape.batch, num_compressed(shape.seqlen, shape.block_size, shape.block_stride),
          shape.heads, dim_out};
}

void check_weight(const OptTensor& weight, const char* name, const std::vector<int64_t>& sizes,
                  const Tensor& x) {
  if (!weight) return;
  check(*weight, name, sizes, x.scalar_type(), x);
  check_contiguous(*weight, name);
}

Tensor empty_like_or_absent(const OptTensor& tensor, const Tensor& like) {
  return tensor ? empty_as(*tensor) : absent(like);
}

void* output_or_null(const OptTensor& present, const Tensor& output) {
  return present ? output.mutable_data_ptr() : nullptr;
}

struct Pool {
  CompressShape shape;
  bool packed;
};

Pool check_pool(const Tensor& x, const OptTensor& weight, const OptTensor& pos,
                const OptTensor& cu_seqlens, int64_t max_seqlen, int64_t block_size,
                int64_t block_stride) {
  const int64_t weight_heads = weight && weight->dim() == 2 ? weight->size(0)
                               : pos && pos->dim()          ? pos->size(0)
                                                            : 1;
  const CompressShape shape =
      compress_shape(x, cu_seqlens, max_seqlen, block_size, block_stride, weight_heads);
  check_weight(weight, "weight", {weight_heads, block_size}, x);
  check_weight(pos, "pos", {weight_heads, block_size, shape.dim}, x);
  return {shape, cu_seqlens.has_value()};
}

struct Mlp {
  CompressShape shape;
  int64_t hidden, dim_out;
  bool packed;
};

Mlp check_mlp(const Tensor& x, const OptTensor& pos, const Tensor& w1, const OptTensor& b1,
              const OptTensor& w2, const OptTensor& b2, const OptTensor& cu_seqlens,
              int64_t max_seqlen, int64_t block_size, int64_t block_stride) {
  STD_TORCH_CHECK(w1.dim() == 3, "w1 must have shape (heads, hidden, block_size * dim), got ",
                  shape_string(w1));
  STD_TORCH_CHECK(!w2 || w2->dim() == 3, "w2 must have shape (heads, dim_out, hidden)");
  STD_TORCH_CHECK(w2 || !b2, "b2 needs w2");
  const int64_t heads = w1.size(0), hidden = w1.size(1), dim_out = w2 ? w2->size(1) : hidden;
  const CompressShape shape =
      compress_shape(x, cu_seqlens, max_seqlen, block_size, block_stride, heads);
  check_weight(pos, "pos", {heads, block_size, shape.dim}, x);
  check_weight(w1, "w1", {heads, hidden, block_size * shape.dim}, x);
  check_weight(b1, "b1", {heads, hidden}, x);
  check_weight(w2, "w2", {heads, dim_out, hidden}, x);
  check_weight(b2, "b2", {heads, dim_out}, x);
  return {shape, hidden, dim_out, cu_seqlens.has_value()};
}

}  // namespace

Tensor compress_pool_fwd(Tensor x, OptTensor weight, OptTensor pos, OptTensor cu_seqlens,
                         int64_t max_seqlen, int64_t block_size, int64_t block_stride) {
  const auto [shape, packed] =
      check_pool(x, weight, pos, cu_seqlens, max_seqlen, block_size, block_stride);
  const Tensor out = empty(x, compressed_sizes(shape, shape.dim), x.scalar_type());
  const CompressPoolFwd params{shape, view(x, packed), data_or_null(weight), data_or_null(pos),
                               view<void>(out, packed)};
  run(
      x, [&] { cpu::compress_pool_fwd(params, torch_executor()); }, [] { return int64_t{0}; },
      [&](void*, cuda::Stream stream) { cuda::compress_pool_fwd(params, stream); });
  return out;
}

Tensor3 compress_pool_bwd(Tensor dout, Tensor x, OptTensor weight, OptTensor pos,
                          OptTensor cu_seqlens, int64_t max_seqlen, int64_t block_size,
                          int64_t block_stride) {
  const auto [shape, packed] =
      check_pool(x, weight, pos, cu_seqlens, max_seqlen, block_size, block_stride);
  check(dout, "dout", compressed_sizes(shape, shape.dim), x.scalar_type(), x);
  const Tensor dx = empty_as(x);
  const Tensor dweight = empty_like_or_absent(weight, x), dpos = empty_like_or_absent(pos, x);
  const CompressPoolBwd params{shape,
                               view(dout, packed),
                               view(x, packed),
                               data_or_null(weight),
                               data_or_null(pos),
                               view<void>(dx, packed),
                               output_or_null(weight, dweight),
                               output_or_null(pos, dpos)};
  run(
      x, [&] { cpu::compress_pool_bwd(params, torch_executor()); },
      [&] { return cuda::compress_pool_bwd_workspace(params); },
      [&](void* workspace, cuda::Stream stream) {
        cuda::compress_pool_bwd(params, workspace, stream);
      });
  return {dx, dweight, dpos};
}

Tensor compress_mlp_fwd(Tensor x, OptTensor pos, Tensor w1, OptTensor b1, OptTensor w2,
                        OptTensor b2, OptTensor cu_seqlens, int64_t max_seqlen, int64_t block_size,
                        int64_t block_stride) {
  const auto [shape, hidden, dim_out, packed] =
      check_mlp(x, pos, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, block_stride);
  const Tensor out = empty(x, compressed_sizes(shape, dim_out), x.scalar_type());
  const CompressMlpFwd params{shape,
                              hidden,
                              dim_out,
                              view(x, packed),
                              data_or_null(pos),
                              w1.const_data_ptr(),
                              data_or_null(b1),
                              data_or_null(w2),
                              data_or_null(b2),
                              view<void>(out, packed)};
  run(
      x, [&] { cpu::compress_mlp_fwd(params, torch_executor()); },
      [&] { return cuda::compress_mlp_fwd_workspace(params); },
      [&](void* workspace, cuda::Stream stream) {
        cuda::compress_mlp_fwd(params, workspace, stream);
      });
  return out;
}

Tensor6 compress_mlp_bwd(Tensor dout, Tensor x, OptTensor pos, Tensor w1, OptTensor b1,
                         OptTensor w2, OptTensor b2, OptTensor cu_seqlens, int64_t max_seqlen,
                         int64_t block_size, int64_t block_stride) {
  const auto [shape, hidden, dim_out, packed] =
      check_mlp(x, pos, w1, b1, w2, b2, cu_seqlens, max_seqlen, block_size, block_stride);
  check(dout, "dout", compressed_sizes(shape, dim_out), x.scalar_type(), x);
  const Tensor dx = empty_as(x);
  const Tensor dpos = empty_like_or_absent(pos, x), dw1 = empty_as(w1);
  const Tensor db1 = empty_like_or_absent(b1, x), dw2 = empty_like_or_absent(w2, x),
               db2 = empty_like_or_absent(b2, x);
  const CompressMlpBwd params{shape,
                              hidden,
                              dim_out,
                              view(dout, packed),
                              view(x, packed),
                              data_or_null(pos),
                              w1.const_data_ptr(),
                              data_or_null(b1),
                              data_or_null(w2),
                              view<void>(dx, packed),
                              output_or_null(pos, dpos),
                              dw1.mutable_data_ptr(),
                              output_or_null(b1, db1),
                              output_or_null(w2, dw2),
                              output_or_null(b2, db2)};
  run(
      x, [&] { cpu::compress_mlp_bwd(params, torch_executor()); },
      [&] { return cuda::compress_mlp_bwd_workspace(params); },
      [&](void* workspace, cuda::Stream stream) {
        cuda::compress_mlp_bwd(params, workspace, stream);
      });
  return {dx, dpos, dw1, db1, dw2, db2};
}

}  // namespace nsa::binding
