// One new token of every sequence over a contiguous cache; the window has K and V of its own.
#include "nsa/decode.h"

#include <cmath>

#include "nsa/geometry.h"
#include "operators.h"

namespace nsa::bench {

namespace {

class Decode : public Operator {
 public:
  Decode(const Case& c, const Options& options) {
    const BlockConfig& config = options.config;
    const DType dtype = c.type();
    const auto seed = static_cast<uint64_t>(options.seed) * 16;
    call_.config = config;
    call_.max_pages = num_select_blocks(c.length, config.select_size);
    const int64_t capacity = call_.max_pages * config.select_size;
    AttnShape& shape = call_.shape;
    shape.dtype = dtype;
    shape.batch = shape.total_q = c.batch;
    shape.seqlen_q = 1;
    shape.seqlen_k = capacity;
    shape.total_k = c.batch * capacity;
    shape.heads_q = c.heads;
    shape.heads_kv = c.kv_heads;
    shape.dim_qk = c.dims.qk;
    shape.dim_v = c.dims.v;
    shape.softmax_scale = 1 / std::sqrt(double(c.dims.qk));

    const std::vector<int32_t> lengths(c.batch, static_cast<int32_t>(c.length));
    seqlens_ = Buffer(c.batch * 4);
    NSA_BENCH_CHECK(
        cudaMemcpy(seqlens_.ptr(), lengths.data(), c.batch * 4, cudaMemcpyHostToDevice));
    call_.seqlens_k = static_cast<const int32_t*>(seqlens_.ptr());

    for (int branch = 0; branch < kNumBranches; ++branch) {
      const int64_t rows =
          branch == kCompressed ? config.select_size / config.block_stride : config.select_size;
      const auto pages = [&](Buffer& buffer, int64_t dim, uint64_t which) {
        const int64_t row = c.kv_heads * dim;
        buffer = Buffer(c.batch * call_.max_pages * rows * row * 2);
        fill_normal(buffer, dtype, seed + which);
        return PagedView{buffer.ptr(), rows * row, row, dim};
      };
      call_.k[branch] = pages(k_[branch], c.dims.qk, 2 * branch);
      call_.v[branch] = pages(v_[branch], c.dims.v, 2 * branch + 1);
    }

    // (B, 1, H, D)
    const auto view = [&](auto view, const Buffer& buffer, int64_t heads, int64_t dim) {
      view.ptr = static_cast<decltype(view.ptr)>(buffer.ptr());
      view.head = dim;
      view.batch = view.seq = heads * dim;
      return view;
    };
    q_ = Buffer(c.batch * c.heads * c.dims.qk * 2);
    gates_ = Buffer(c.batch * c.heads * 3 * 2);
    out_ = Buffer(c.batch * c.heads * c.dims.v * 2);
    fill_normal(q_, dtype, seed + 7);
    fill_unit(gates_, dtype, seed + 8);
    call_.q = view(InView{}, q_, c.heads, c.dims.qk);
    call_.gates = view(InView{}, gates_, c.heads, 3);
    call_.out = view(OutView{}, out_, c.heads, c.dims.v);
    workspace_ = Buffer(cuda::decode_fwd_workspace(call_));
  }

  void launch(cudaStream_t stream) override { cuda::decode_fwd(call_, workspace_.ptr(), stream); }

 private:
  DecodeFwd call_{};
  Buffer seqlens_, k_[kNumBranches], v_[kNumBranches], q_, gates_, out_, workspace_;
};

}  // namespace

std::unique_ptr<Operator> make_decode(const Case& c, const Options& options) {
  return std::make_unique<Decode>(c, options);
}

}  // namespace nsa::bench
