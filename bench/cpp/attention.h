// Inputs and outputs of an attention call, laid out (B, S, H, D).
#pragma once

#include "device.h"
#include "nsa/api.h"
#include "nsa/geometry.h"
#include "operators.h"

namespace nsa::bench {

template <class V>
V view_of(const Buffer& buffer, int64_t length, int64_t heads, int64_t dim) {
  V view;
  view.ptr = static_cast<decltype(view.ptr)>(buffer.ptr());
  view.head = dim;
  view.seq = heads * dim;
  view.batch = length * heads * dim;
  return view;
}

/// Which branches a benchmark of this name runs.
struct Branches {
  bool enabled[kNumBranches] = {};
  explicit Branches(const std::string& kernel) {
    const bool all = kernel == "forward" || kernel == "backward";
    const auto is = [&](const char* start) { return all || kernel.rfind(start, 0) == 0; };
    enabled[kCompressed] = is("compressed") || kernel == "select";
    enabled[kSelected] = is("selected");
    enabled[kWindow] = is("window");
  }
  int count() const { return enabled[0] + enabled[1] + enabled[2]; }
};

/// Random inputs; compressed keys and values are means of the raw ones. A selected branch without
/// the compressed one reads lists drawn by the pattern of the case; else its ranking writes them.
class AttnInputs {
 public:
  AttnInputs(const Case& c, const Options& options);

  /// The branches of `kernel`. `keep`: every branch writes its output and lse.
  AttnFwd forward(const std::string& kernel, bool keep);
  cuda::Backend backend() const;
  double neighbours_share() const;

  Case c;
  BlockConfig config;
  int64_t tokens;  // Tc
  AttnShape shape{};
  Buffer q, k, v, k_cmp, v_cmp, gates, indices, out;
  Buffer branch_out[kNumBranches], lse[kNumBranches];

  template <class V>
  V q_view(const Buffer& buffer) const {
    return view_of<V>(buffer, c.length, c.heads, c.dims.qk);
  }
  template <class V>
  V out_view(const Buffer& buffer) const {
    return view_of<V>(buffer, c.length, c.heads, c.dims.v);
  }
  template <class V>
  V kv_view(const Buffer& buffer, int branch, int64_t dim) const {
    return view_of<V>(buffer, branch == kCompressed ? tokens : c.length, c.kv_heads, dim);
  }
  template <class V>
  V lse_view(const Buffer& buffer) const {
    V view;
    view.ptr = static_cast<decltype(view.ptr)>(buffer.ptr());
    view.seq = 1;
    view.head = c.length;
    view.batch = c.length * c.heads;
    return view;
  }
  int64_t kv_bytes(int branch, int64_t dim) const {
    return c.batch * (branch == kCompressed ? tokens : c.length) * c.kv_heads * dim * 2;
  }
};

}  // namespace nsa::bench
