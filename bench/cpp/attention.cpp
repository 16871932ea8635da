#include "attention.h"

#include <cmath>

#include "selection.h"

namespace nsa::bench {

double Operator::neighbours_share() const { return std::nan(""); }

AttnInputs::AttnInputs(const Case& c, const Options& options) : c(c), config(options.config) {
  const auto seed = static_cast<uint64_t>(options.seed) * 16;
  const DType dtype = c.type();
  tokens = num_compressed(c.length, config.block_size, config.block_stride);
  shape.dtype = dtype;
  shape.batch = c.batch;
  shape.seqlen_q = shape.seqlen_k = c.length;
  shape.total_q = shape.total_k = c.batch * c.length;
  shape.heads_q = c.heads;
  shape.heads_kv = c.kv_heads;
  shape.dim_qk = c.dims.qk;
  shape.dim_v = c.dims.v;
  shape.softmax_scale = 1 / std::sqrt(double(c.dims.qk));

  const int64_t rows = c.batch * c.length;
  q = Buffer(rows * c.heads * c.dims.qk * 2);
  k = Buffer(kv_bytes(kSelected, c.dims.qk));
  v = Buffer(kv_bytes(kSelected, c.dims.v));
  gates = Buffer(rows * c.heads * 3 * 2);
  indices = Buffer(rows * c.kv_heads * config.num_selected * 4);
  fill_queries(q, dtype, c.batch, c.length, c.heads * c.dims.qk, c.selection(), seed + 1);
  fill_normal(k, dtype, seed + 2);
  fill_normal(v, dtype, seed + 3);
  fill_unit(gates, dtype, seed + 4);

  k_cmp = Buffer(kv_bytes(kCompressed, c.dims.qk));
  v_cmp = Buffer(kv_bytes(kCompressed, c.dims.v));
  const auto compress = [&](const Buffer& x, const Buffer& x_cmp, int64_t dim) {
    CompressPoolFwd call{};
    call.shape = {
        dtype,  c.batch, c.length, rows, c.kv_heads, dim, 1, config.block_size, config.block_stride,
        nullptr};
    call.x = kv_view<InView>(x, kSelected, dim);
    call.out = kv_view<OutView>(x_cmp, kCompressed, dim);
    cuda::compress_pool_fwd(call, nullptr);
  };
  compress(k, k_cmp, c.dims.qk);
  compress(v, v_cmp, c.dims.v);

  const Branches branches(c.kernel);
  if (branches.enabled[kSelected] && !branches.enabled[kCompressed]) {
    const std::vector<int32_t> lists =
        make_selection(c.batch, c.length, c.kv_heads, config, c.selection(), seed + 5);
    NSA_BENCH_CHECK(
        cudaMemcpy(indices.ptr(), lists.data(), lists.size() * 4, cudaMemcpyHostToDevice));
  }
}

AttnFwd AttnInputs::forward(const std::string& kernel, bool keep) {
  const Branches branches(kernel);
  AttnFwd call{};
  call.shape = shape;
  call.config = config;
  call.q = q_view<InView>(q);
  call.index_count = config.num_selected;
  const int64_t rows = c.batch * c.length;
  for (int branch = 0; branch < kNumBranches; ++branch) {
    if (!branches.enabled[branch]) continue;
    const bool compressed = branch == kCompressed;
    BranchFwd& target = call.branch[branch];
    target.enabled = true;
    target.k = kv_view<InView>(compressed ? k_cmp : k, branch, c.dims.qk);
    if (kernel != "select") target.v = kv_view<InView>(compressed ? v_cmp : v, branch, c.dims.v);
    if (!keep) continue;
    if (branch_out[branch].ptr() == nullptr) {
      branch_out[branch] = Buffer(rows * c.heads * c.dims.v * 2);
      lse[branch] = Buffer(rows * c.heads * 4);
    }
    target.out = out_view<OutView>(branch_out[branch]);
    target.lse = lse_view<OutView>(lse[branch]);
  }
  const bool ranks = kernel == "select" || kernel == "compressed_select" || branches.count() > 1;
  if (ranks || branches.enabled[kSelected])
    call.block_indices = view_of<View<int32_t>>(indices, c.length, c.kv_heads, config.num_selected);
  if (branches.count() > 1) {
    if (out.ptr() == nullptr) out = Buffer(rows * c.heads * c.dims.v * 2);
    call.gates = view_of<InView>(gates, c.length, c.heads, 3);
    call.out = out_view<OutView>(out);
  }
  return call;
}

cuda::Backend AttnInputs::backend() const {
  return c.backend == "sm80"   ? cuda::Backend::kSm80
         : c.backend == "sm90" ? cuda::Backend::kSm90
                               : cuda::Backend::kAuto;
}

double AttnInputs::neighbours_share() const {
  std::vector<int32_t> lists(c.batch * c.length * c.kv_heads * config.num_selected);
  NSA_BENCH_CHECK(
      cudaMemcpy(lists.data(), indices.ptr(), lists.size() * 4, cudaMemcpyDeviceToHost));
  return shared_fraction(lists, c.batch, c.length, c.kv_heads, config);
}

namespace {

class Attention : public Operator {
 public:
  Attention(const Case& c, const Options& options)
      : inputs_(c, options),
        // Only the gated sum of the whole forward is wanted, as in inference.
        call_(inputs_.forward(c.kernel, c.kernel != "forward" && c.kernel != "select")),
        workspace_(cuda::attn_fwd_workspace(call_, inputs_.backend())) {}

  void launch(cudaStream_t stream) override {
    cuda::attn_fwd(call_, workspace_.ptr(), stream, inputs_.backend());
  }
  double neighbours_share() const override {
    return call_.block_indices.ptr ? inputs_.neighbours_share() : Operator::neighbours_share();
  }

 private:
  AttnInputs inputs_;
  AttnFwd call_;
  Buffer workspace_;
};

class AttentionBwd : public Operator {
 public:
  AttentionBwd(const Case& c, const Options& options) : inputs_(c, options) {
    // What a forward leaves behind.
    const std::string forward = c.kernel == "backward"       ? "forward"
                                : c.kernel == "selected_bwd" ? "selected"
                                : c.kernel == "window_bwd"   ? "window"
                                                             : "compressed";
    const AttnFwd saved = inputs_.forward(forward, true);
    const Buffer scratch(cuda::attn_fwd_workspace(saved, inputs_.backend()));
    cuda::attn_fwd(saved, scratch.ptr(), nullptr, inputs_.backend());
    NSA_BENCH_CHECK(cudaDeviceSynchronize());

    const DType dtype = c.type();
    dout_ = Buffer(c.batch * c.length * c.heads * c.dims.v * 2);
    fill_normal(dout_, dtype, static_cast<uint64_t>(options.seed) * 16 + 6);
    dq_ = Buffer(inputs_.q.bytes());
    call_.shape = inputs_.shape;
    call_.config = inputs_.config;
    call_.q = saved.q;
    call_.dout = inputs_.out_view<InView>(dout_);
    call_.dq = inputs_.q_view<OutView>(dq_);
    call_.index_count = saved.index_count;
    const View<int32_t>& lists = saved.block_indices;
    call_.block_indices = {lists.ptr, lists.batch, lists.seq, lists.head};
    for (int branch = 0; branch < kNumBranches; ++branch) {
      const BranchFwd& from = saved.branch[branch];
      if (!from.enabled) continue;
      BranchBwd& to = call_.branch[branch];
      to.enabled = true;
      to.k = from.k;
      to.v = from.v;
      to.out = inputs_.out_view<InView>(inputs_.branch_out[branch]);
      to.lse = inputs_.lse_view<InView>(inputs_.lse[branch]);
      if (branch == kWindow && c.kernel == "backward") continue;  // adds into the selected's
      dk_[branch] = Buffer(inputs_.kv_bytes(branch, c.dims.qk));
      dv_[branch] = Buffer(inputs_.kv_bytes(branch, c.dims.v));
      to.dk = inputs_.kv_view<OutView>(dk_[branch], branch, c.dims.qk);
      to.dv = inputs_.kv_view<OutView>(dv_[branch], branch, c.dims.v);
    }
    if (saved.gates.ptr) {
      dgates_ = Buffer(inputs_.gates.bytes());
      call_.gates = saved.gates;
      call_.dgates = view_of<OutView>(dgates_, c.length, c.heads, 3);
    }
    workspace_ = Buffer(cuda::attn_bwd_workspace(call_, inputs_.backend()));
  }

  void launch(cudaStream_t stream) override {
    cuda::attn_bwd(call_, workspace_.ptr(), stream, inputs_.backend());
  }
  double neighbours_share() const override {
    return call_.block_indices.ptr ? inputs_.neighbours_share() : Operator::neighbours_share();
  }

 private:
  AttnInputs inputs_;
  Buffer dout_, dq_, dgates_, dk_[kNumBranches], dv_[kNumBranches], workspace_;
  AttnBwd call_{};
};

}  // namespace

std::unique_ptr<Operator> make_attention(const Case& c, const Options& options) {
  return std::make_unique<Attention>(c, options);
}
std::unique_ptr<Operator> make_attention_bwd(const Case& c, const Options& options) {
  return std::make_unique<AttentionBwd>(c, options);
}

}  // namespace nsa::bench
