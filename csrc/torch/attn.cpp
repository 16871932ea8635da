// compressed_attn, selected_attn, window_attn, sparse_attn and select_blocks: each fills the one
// attention struct of the kernel library with the branches it has.
#include "nsa/geometry.h"
#include "torch/config.h"
#include "torch/ops.h"
#include "torch/runtime.h"

namespace nsa::binding {

namespace {

struct Seqlens {
  const OptTensor &cu_q, &cu_k;
  int64_t max_q, max_k;
};

/// An attention call being put together: checks tensors against the sizes of q and makes the
/// outputs.
template <class Params>
struct Call {
  const Tensor& q;
  bool packed;
  Params params{};
  std::vector<int64_t> rows_q;  // (B, Sq) or (total_q)

  /// `k` is the first key tensor; its rows are raw keys, or compressed tokens of stride
  /// `compressed_stride`.
  Call(const Tensor& q, const Tensor& k, const char* k_name, int64_t dim_v, const Seqlens& seqlens,
       const BlockConfig& config, double softmax_scale, int64_t compressed_stride = 0)
      : q(q), packed(seqlens.cu_q.has_value()) {
    STD_TORCH_CHECK(packed == seqlens.cu_k.has_value(),
                    "cu_seqlens_q and cu_seqlens_k go together");
    const int64_t dims = packed ? 3 : 4;
    STD_TORCH_CHECK(q.dim() == dims, "q must have ", dims, " dims, got ", shape_string(q));
    STD_TORCH_CHECK(k.dim() == dims, k_name, " must have ", dims, " dims, got ", shape_string(k));
    check(q, "q", std::vector<int64_t>(dims, -1), q.scalar_type(), q);
    rows_q.assign(q.sizes().begin(), q.sizes().end() - 2);
    AttnShape& shape = params.shape;
    shape.dtype = to_dtype(q, "q");
    shape.batch = packed ? seqlens.cu_q->numel() - 1 : q.size(0);
    shape.seqlen_q = packed ? seqlens.max_q : q.size(1);
    shape.seqlen_k = seqlens.max_k;
    STD_TORCH_CHECK(shape.seqlen_k >= 0 && shape.seqlen_q >= 0, "max_seqlen must not be negative");
    const int64_t scale = compressed_stride ? compressed_stride : 1;
    shape.total_q = packed ? q.size(0) : shape.batch * shape.seqlen_q;
    shape.total_k = packed ? k.size(0) * scale : shape.batch * shape.seqlen_k;
    shape.heads_q = q.size(dims - 2);
    shape.heads_kv = k.size(dims - 2);
    STD_TORCH_CHECK(shape.heads_kv >= 1 && shape.heads_q % shape.heads_kv == 0, "the ",
                    shape.heads_q, " query heads must be a multiple of the ", shape.heads_kv,
                    " key-value heads");
    shape.dim_qk = q.size(dims - 1);
    shape.dim_v = dim_v;
    shape.softmax_scale = softmax_scale;
    if (packed) {
      check(*seqlens.cu_k, "cu_seqlens_k", {shape.batch + 1}, ScalarType::Int, q);
      shape.cu_seqlens_q =
          cu_seqlens_ptr(seqlens.cu_q, "cu_seqlens_q", shape.total_q, shape.seqlen_q, q);
      shape.cu_seqlens_k =
          cu_seqlens_ptr(seqlens.cu_k, "cu_seqlens_k", shape.total_k, shape.seqlen_k, q, scale - 1);
    }
    params.config = config;
    params.q = view(q, packed);
  }

  const AttnShape& shape() const { return params.shape; }

  std::vector<int64_t> sizes_q(int64_t heads, int64_t dim) const {
    std::vector<int64_t> sizes = rows_q;
    sizes.insert(sizes.end(), {heads, dim});
    return sizes;
  }
  std::vector<int64_t> sizes_k(int64_t dim) const {
    if (packed) return {shape().total_k, shape().heads_kv, dim};
    return {shape().batch, shape().seqlen_k, shape().heads_kv, dim};
  }
  std::vector<int64_t> sizes_cmp(int64_t dim) const {
    const BlockConfig& c = params.config;
    if (packed) return {shape().total_k / c.block_stride, shape().heads_kv, dim};
    return {shape().batch, num_compressed(shape().seqlen_k, c.block_size, c.block_stride),
            shape().heads_kv, dim};
  }
  std::vector<int64_t> sizes_lse() const {
    if (packed) return {shape().heads_q, shape().total_q};
    return {shape().batch, shape().heads_q, shape().seqlen_q};
  }
  ScalarType dtype() const { return q.scalar_type(); }
  ScalarType lse_dtype() const {
    return dtype() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  InView input(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) const {
    check(tensor, name, sizes, dtype(), q);
    return view(tensor, packed);
  }
  /// k and v of a branch, both raw or both compressed.
  template <class BranchParams>
  void set_kv(BranchParams& branch, const Tensor& k, const char* k_name, const Tensor& v,
              const char* v_name, bool compressed) const {
    const AttnShape& s = shape();
    branch.enabled = true;
    branch.k = input(k, k_name, compressed ? sizes_cmp(s.dim_qk) : sizes_k(s.dim_qk));
    branch.v = input(v, v_name, compressed ? sizes_cmp(s.dim_v) : sizes_k(s.dim_v));
  }
  Tensor new_out() const { return empty(q, sizes_q(shape().heads_q, shape().dim_v), dtype()); }
  Tensor new_lse() const { return empty(q, sizes_lse(), lse_dtype()); }

  template <class T>
  View<T> indices(const Tensor& tensor, const char* name, int64_t count) {
    check(tensor, name, sizes_q(shape().heads_kv, count), ScalarType::Int, q);
    params.index_count = static_cast<int32_t>(count);
    return view<T>(tensor, packed);
  }
  Tensor new_indices() {
    const int64_t count = params.config.num_selected;
    const Tensor tensor = empty(q, sizes_q(shape().heads_kv, count), ScalarType::Int);
    params.block_indices = indices<int32_t>(tensor, "block_indices", count);
    return tensor;
  }
};

using Forward = Call<AttnFwd>;

struct Backward : Call<AttnBwd> {
  using Call::Call;

  void set_dout(const Tensor& dout, bool deterministic) {
    params.dout = input(dout, "dout", sizes_q(shape().heads_q, shape().dim_v));
    params.deterministic = deterministic;
  }
  void set_saved(BranchBwd& branch, const Tensor& out, const Tensor& lse) const {
    branch.out = input(out, "out", sizes_q(shape().heads_q, shape().dim_v));
    check(lse, "lse", sizes_lse(), lse_dtype(), q);
    branch.lse = lse_view(lse, packed);
  }
  Tensor new_grad(OutView& target, const Tensor& like) const {
    const Tensor grad = empty_as(like);
    target = view<void>(grad, packed);
    return grad;
  }
};

void launch(const Forward& call) {
  const AttnFwd& params = call.params;
  run(
      call.q, [&] { cpu::attn_fwd(params, torch_executor()); },
      [&] { return cuda::attn_fwd_workspace(params, cuda_backend()); },
      [&](void* workspace, cuda::Stream stream) {
        cuda::attn_fwd(params, workspace, stream, cuda_backend());
      });
}

void launch(const Backward& call) {
  const AttnBwd& params = call.params;
  run(
      call.q, [&] { cpu::attn_bwd(params, torch_executor()); },
      [&] { return cuda::attn_bwd_workspace(params, cuda_backend()); },
      [&](void* workspace, cuda::Stream stream) {
        cuda::attn_bwd(params, workspace, stream, cuda_backend());
      });
}

/// Gradients of q, k and v of a call of one branch.
Tensor3 launch(Backward& call, BranchBwd& branch, const Tensor& k, const Tensor& v) {
  const Tensor dq = call.new_grad(call.params.dq, call.q);
  const Tensor dk = call.new_grad(branch.dk, k), dv = call.new_grad(branch.dv, v);
  launch(call);
  return {dq, dk, dv};
}

BlockConfig checked_config(const std::vector<int64_t>& list) {
  const BlockConfig config = to_config(list);
  const char* error = config_error(config);
  STD_TORCH_CHECK(error == nullptr, error);
  return config;
}

BlockConfig select_config(int64_t select_size) {
  STD_TORCH_CHECK(select_size >= 1 && select_size <= INT32_MAX,
                  "select_size must be at least 1, got ", select_size);
  BlockConfig config;
  config.select_size = static_cast<int32_t>(select_size);
  return config;
}

BlockConfig window_config(int64_t window) {
  STD_TORCH_CHECK(window >= 1 && window <= INT32_MAX, "window must be at least 1, got ", window);
  BlockConfig config;
  config.window = static_cast<int32_t>(window);
  return config;
}

/// The branch's own output and lse as new tensors.
Tensor2 set_new_outputs(const Forward& call, BranchFwd& branch) {
  const Tensor out = call.new_out(), lse = call.new_lse();
  branch.out = view<void>(out, call.packed);
  branch.lse = lse_view<void>(lse, call.packed);
  return {out, lse};
}

/// Branch `c` of a (3, ...) tensor; torch::stable::select would go through the dispatcher.
Tensor branch_of(const Tensor& tensor, int c) {
  AtenTensorHandle branch = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), tensor.dim() - 1, tensor.sizes().data() + 1,
                                     tensor.strides().data() + 1, c * tensor.stride(0), &branch));
  return Tensor(branch);
}

constexpr const char* kNames[kNumBranches][2] = {
    {"k_cmp", "v_cmp"}, {"k_slc", "v_slc"}, {"k_win", "v_win"}};

}  // namespace

Tensor3 compressed_attn_fwd(Tensor q, Tensor k_cmp, Tensor v_cmp, OptTensor cu_seqlens_q,
                            OptTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                            std::vector<int64_t> config, double softmax_scale,
                            bool /*deterministic*/) {
  const BlockConfig blocks = checked_config(config);
  Forward call(q, k_cmp, "k_cmp", last_size(v_cmp),
               {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}, blocks, softmax_scale,
               blocks.block_stride);
  BranchFwd& branch = call.params.branch[kCompressed];
  call.set_kv(branch, k_cmp, "k_cmp", v_cmp, "v_cmp", true);
  const auto [out, lse] = set_new_outputs(call, branch);
  const Tensor block_indices = call.new_indices();
  launch(call);
  return {out, lse, block_indices};
}

Tensor select_blocks(Tensor q, Tensor k_cmp, OptTensor cu_seqlens_q, OptTensor cu_seqlens_k,
                     int64_t max_seqlen_q, int64_t max_seqlen_k, std::vector<int64_t> config,
                     double softmax_scale) {
  const BlockConfig blocks = checked_config(config);
  const int64_t dim = last_size(q);
  Forward call(q, k_cmp, "k_cmp", dim, {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
               blocks, softmax_scale, blocks.block_stride);
  call.params.branch[kCompressed].enabled = true;
  call.params.branch[kCompressed].k = call.input(k_cmp, "k_cmp", call.sizes_cmp(dim));
  const Tensor block_indices = call.new_indices();
  launch(call);
  return block_indices;
}

Tensor3 compressed_attn_bwd(Tensor dout, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor out,
                            Tensor lse, OptTensor cu_seqlens_q, OptTensor cu_seqlens_k,
                            int64_t max_seqlen_q, int64_t max_seqlen_k, std::vector<int64_t> config,
                            double softmax_scale, bool deterministic) {
  const BlockConfig blocks = checked_config(config);
  Backward call(q, k_cmp, "k_cmp", last_size(v_cmp),
                {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}, blocks, softmax_scale,
                blocks.block_stride);
  BranchBwd& branch = call.params.branch[kCompressed];
  call.set_kv(branch, k_cmp, "k_cmp", v_cmp, "v_cmp", true);
  call.set_dout(dout, deterministic);
  call.set_saved(branch, out, lse);
  return launch(call, branch, k_cmp, v_cmp);
}

Tensor2 selected_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor block_indices,
                          OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, int64_t max_seqlen_q,
                          int64_t max_seqlen_k, int64_t select_size, double softmax_scale,
                          bool /*deterministic*/) {
  Forward call(q, k, "k", last_size(v), {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
               select_config(select_size), softmax_scale);
  BranchFwd& branch = call.params.branch[kSelected];
  call.set_kv(branch, k, "k", v, "v", false);
  call.params.block_indices =
      call.indices<int32_t>(block_indices, "block_indices", last_size(block_indices));
  const auto [out, lse] = set_new_outputs(call, branch);
  launch(call);
  return {out, lse};
}

Tensor3 selected_attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                          Tensor block_indices, OptTensor cu_seqlens_q, OptTensor cu_seqlens_k,
                          int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t select_size,
                          double softmax_scale, bool deterministic) {
  Backward call(q, k, "k", last_size(v), {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                select_config(select_size), softmax_scale);
  BranchBwd& branch = call.params.branch[kSelected];
  call.set_kv(branch, k, "k", v, "v", false);
  call.params.block_indices =
      call.indices<const int32_t>(block_indices, "block_indices", last_size(block_indices));
  call.set_dout(dout, deterministic);
  call.set_saved(branch, out, lse);
  return launch(call, branch, k, v);
}

Tensor2 window_attn_fwd(Tensor q, Tensor k, Tensor v, OptTensor cu_seqlens_q,
                        OptTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                        int64_t window, double softmax_scale, bool /*deterministic*/) {
  Forward call(q, k, "k", last_size(v), {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
               window_config(window), softmax_scale);
  BranchFwd& branch = call.params.branch[kWindow];
  call.set_kv(branch, k, "k", v, "v", false);
  const auto [out, lse] = set_new_outputs(call, branch);
  launch(call);
  return {out, lse};
}

Tensor3 window_attn_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
                        OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, int64_t window, double softmax_scale,
                        bool deterministic) {
  Backward call(q, k, "k", last_size(v), {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                window_config(window), softmax_scale);
  BranchBwd& branch = call.params.branch[kWindow];
  call.set_kv(branch, k, "k", v, "v", false);
  call.set_dout(dout, deterministic);
  call.set_saved(branch, out, lse);
  return launch(call, branch, k, v);
}

Tensor4 sparse_attn_fwd(Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc,
                        OptTensor k_win, OptTensor v_win, Tensor gates, OptTensor cu_seqlens_q,
                        OptTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                        std::vector<int64_t> config, double softmax_scale, bool save_branches,
                        bool /*deterministic*/) {
  STD_TORCH_CHECK(k_win.has_value() == v_win.has_value(), "k_win and v_win go together");
  Forward call(q, k_slc, "k_slc", last_size(v_slc),
               {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}, checked_config(config),
               softmax_scale);
  AttnFwd& params = call.params;
  const Tensor* const kv[kNumBranches][2] = {
      {&k_cmp, &v_cmp}, {&k_slc, &v_slc}, {k_win ? &*k_win : &k_slc, v_win ? &*v_win : &v_slc}};
  std::vector<int64_t> out_sizes = call.sizes_q(params.shape.heads_q, params.shape.dim_v);
  std::vector<int64_t> lse_sizes = call.sizes_lse();
  out_sizes.insert(out_sizes.begin(), save_branches ? kNumBranches : 0);
  lse_sizes.insert(lse_sizes.begin(), save_branches ? kNumBranches : 0);
  const Tensor branch_out = empty(q, out_sizes, call.dtype()),
               branch_lse = empty(q, lse_sizes, call.lse_dtype());
  for (int c = 0; c < kNumBranches; ++c) {
    BranchFwd& branch = params.branch[c];
    call.set_kv(branch, *kv[c][0], kNames[c][0], *kv[c][1], kNames[c][1], c == kCompressed);
    if (!save_branches) continue;
    branch.out = view<void>(branch_of(branch_out, c), call.packed);
    branch.lse = lse_view<void>(branch_of(branch_lse, c), call.packed);
  }
  params.gates = call.input(gates, "gates", call.sizes_q(params.shape.heads_q, kNumBranches));
  const Tensor out = call.new_out(), block_indices = call.new_indices();
  params.out = view<void>(out, call.packed);
  launch(call);
  return {out, branch_out, branch_lse, block_indices};
}

Tensor8 sparse_attn_bwd(Tensor dout, Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc,
                        Tensor v_slc, OptTensor k_win, OptTensor v_win, Tensor gates,
                        Tensor branch_out, Tensor branch_lse, Tensor block_indices,
                        OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, std::vector<int64_t> config, double softmax_scale,
                        bool deterministic) {
  STD_TORCH_CHECK(k_win.has_value() == v_win.has_value(), "k_win and v_win go together");
  Backward call(q, k_slc, "k_slc", last_size(v_slc),
                {cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k}, checked_config(config),
                softmax_scale);
  AttnBwd& params = call.params;
  const Tensor* const kv[kNumBranches][2] = {
      {&k_cmp, &v_cmp}, {&k_slc, &v_slc}, {k_win ? &*k_win : &k_slc, v_win ? &*v_win : &v_slc}};
  STD_TORCH_CHECK(branch_out.dim() == q.dim() + 1 && branch_out.size(0) == kNumBranches,
                  "branch_out must have shape (3, ...), got ", shape_string(branch_out));
  STD_TORCH_CHECK(branch_lse.dim() >= 1 && branch_lse.size(0) == kNumBranches,
                  "branch_lse must have shape (3, ...), got ", shape_string(branch_lse));
  call.set_dout(dout, deterministic);
  Tensor grads[kNumBranches][2];
  for (int c = 0; c < kNumBranches; ++c) {
    BranchBwd& branch = params.branch[c];
    call.set_kv(branch, *kv[c][0], kNames[c][0], *kv[c][1], kNames[c][1], c == kCompressed);
    call.set_saved(branch, branch_of(branch_out, c), branch_of(branch_lse, c));
    const bool shared = c == kWindow && !k_win;
    grads[c][0] = shared ? absent(q) : call.new_grad(branch.dk, *kv[c][0]);
    grads[c][1] = shared ? absent(q) : call.new_grad(branch.dv, *kv[c][1]);
  }
  params.block_indices =
      call.indices<const int32_t>(block_indices, "block_indices", params.config.num_selected);
  params.gates = call.input(gates, "gates", call.sizes_q(params.shape.heads_q, kNumBranches));
  const Tensor dq = call.new_grad(params.dq, q), dgates = call.new_grad(params.dgates, gates);
  launch(call);
  return {dq, grads[0][0], grads[0][1], grads[1][0], grads[1][1], grads[2][0], grads[2][1], dgates};
}

}  // namespace nsa::binding
