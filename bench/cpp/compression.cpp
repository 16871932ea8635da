#include <cmath>

#include "attention.h"

namespace nsa::bench {

namespace {

/// phi of one tensor, K or V: inputs, weights, gradients.
class Phi {
 public:
  Phi(const Case& c, const BlockConfig& config, int64_t dim, bool backward, uint64_t seed)
      : kind_(c.compress), backward_(backward), dim_(dim) {
    const DType dtype = c.type();
    tokens_ = num_compressed(c.length, config.block_size, config.block_stride);
    shape_ = {dtype, c.batch, c.length,          c.batch * c.length,  c.kv_heads,
              dim,   1,       config.block_size, config.block_stride, nullptr};
    x_ = Buffer(c.batch * c.length * c.kv_heads * dim * 2);
    out_ = Buffer(c.batch * tokens_ * c.kv_heads * dim * 2);
    fill_normal(x_, dtype, seed);
    const auto weight = [&](Buffer& buffer, int64_t count, double scale) {
      buffer = Buffer(count * 2);
      fill_normal(buffer, dtype, ++seed, static_cast<float>(scale));
    };
    const double flat = double(config.block_size) * dim;
    if (kind_ == "weighted") weight(weight_, config.block_size, 1.0 / config.block_size);
    if (kind_ != "mean") weight(pos_, config.block_size * dim, 0.02);
    if (kind_ == "linear" || kind_ == "mlp") {
      weight(w1_, dim * config.block_size * dim, 1 / std::sqrt(flat));
      weight(b1_, dim, 0.02);
    }
    if (kind_ == "mlp") {
      weight(w2_, dim * dim, 1 / std::sqrt(double(dim)));
      weight(b2_, dim, 0.02);
    }
    if (!backward) {
      if (!pools()) workspace_ = Buffer(cuda::compress_mlp_fwd_workspace(mlp_fwd()));
      return;
    }
    dout_ = Buffer(out_.bytes());
    fill_normal(dout_, dtype, ++seed);
    dx_ = Buffer(x_.bytes());
    for (const auto& [from, to] :
         {std::pair{&weight_, &dweight_}, std::pair{&pos_, &dpos_}, std::pair{&w1_, &dw1_},
          std::pair{&b1_, &db1_}, std::pair{&w2_, &dw2_}, std::pair{&b2_, &db2_}})
      if (from->ptr()) *to = Buffer(from->bytes());
    workspace_ = Buffer(pools() ? cuda::compress_pool_bwd_workspace(pool_bwd())
                                : cuda::compress_mlp_bwd_workspace(mlp_bwd()));
  }

  void launch(cudaStream_t stream) {
    if (pools() && backward_)
      cuda::compress_pool_bwd(pool_bwd(), workspace_.ptr(), stream);
    else if (pools())
      cuda::compress_pool_fwd(
          {shape_, raw<InView>(x_), weight_.ptr(), pos_.ptr(), cmp<OutView>(out_)}, stream);
    else if (backward_)
      cuda::compress_mlp_bwd(mlp_bwd(), workspace_.ptr(), stream);
    else
      cuda::compress_mlp_fwd(mlp_fwd(), workspace_.ptr(), stream);
  }

 private:
  bool pools() const { return kind_ == "mean" || kind_ == "weighted"; }
  template <class V>
  V raw(const Buffer& buffer) const {
    return view_of<V>(buffer, shape_.seqlen, shape_.heads, dim_);
  }
  template <class V>
  V cmp(const Buffer& buffer) const {
    return view_of<V>(buffer, tokens_, shape_.heads, dim_);
  }
  CompressPoolBwd pool_bwd() const {
    return {shape_,     cmp<InView>(dout_), raw<InView>(x_), weight_.ptr(),
            pos_.ptr(), raw<OutView>(dx_),  dweight_.ptr(),  dpos_.ptr()};
  }
  CompressMlpFwd mlp_fwd() const {
    return {shape_,    dim_,      dim_,      raw<InView>(x_), pos_.ptr(),
            w1_.ptr(), b1_.ptr(), w2_.ptr(), b2_.ptr(),       cmp<OutView>(out_)};
  }
  CompressMlpBwd mlp_bwd() const {
    return {shape_,      dim_,       dim_,       cmp<InView>(dout_), raw<InView>(x_),
            pos_.ptr(),  w1_.ptr(),  b1_.ptr(),  w2_.ptr(),          raw<OutView>(dx_),
            dpos_.ptr(), dw1_.ptr(), db1_.ptr(), dw2_.ptr(),         db2_.ptr()};
  }

  std::string kind_;
  bool backward_;
  int64_t dim_, tokens_;
  CompressShape shape_{};
  Buffer x_, out_, weight_, pos_, w1_, b1_, w2_, b2_;
  Buffer dout_, dx_, dweight_, dpos_, dw1_, db1_, dw2_, db2_, workspace_;
};

class Compression : public Operator {
 public:
  Compression(const Case& c, const Options& options)
      : k_(c, options.config, c.dims.qk, c.kernel == "compress_bwd", 16 * options.seed + 1),
        v_(c, options.config, c.dims.v, c.kernel == "compress_bwd", 16 * options.seed + 8) {}
  void launch(cudaStream_t stream) override {
    k_.launch(stream);
    v_.launch(stream);
  }

 private:
  Phi k_, v_;
};

}  // namespace

std::unique_ptr<Operator> make_compression(const Case& c, const Options& options) {
  return std::make_unique<Compression>(c, options);
}

}  // namespace nsa::bench
