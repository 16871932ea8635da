// Attention straight from the definitions, O(S^2) and in double: each branch is a softmax over an
// explicit list of visible keys. Inputs, expected outputs and gradients, and the comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "nsa/api.h"
#include "nsa/geometry.h"
#include "tensor.h"

namespace testing {

using nsa::AttnBwd;
using nsa::AttnFwd;
using nsa::BlockConfig;
using nsa::kNumBranches;

inline constexpr double kInf = std::numeric_limits<double>::infinity();

struct Lengths {
  int64_t q, k;
};

struct Problem {
  std::string name;
  DType dtype = DType::kFloat32;
  std::vector<Lengths> sequences = {{65, 65}};
  bool packed = false;  // else all sequences have the lengths of the first
  int64_t heads_kv = 2, group = 2, dim_qk = 64, dim_v = 64;
  BlockConfig config;
  bool enabled[3] = {true, true, true};
  bool gates = true;
  bool share_window = false;  // K and V of the window are the selected branch's, and so their grads
  Layout layout = Layout::kContiguous;
  int32_t given_indices = 0;  // selected branch alone: entries of random rows
  double scale = 0;           // 0: Dk**-0.5

  int64_t batch() const { return sequences.size(); }
  int64_t heads_q() const { return heads_kv * group; }
};

/// Inputs and outputs of a problem; outputs start as NaN.
struct Data {
  Problem p;
  std::vector<int32_t> cu_q{0}, cu_k{0};
  int64_t rows_q = 0, rows_k = 0, rows_cmp = 0, outer = 1;  // of the tensors
  Tensor q, gates, out, dout, dq, dgates;
  Tensor k[3], v[3], branch_out[3], lse[3], dk[3], dv[3];
  std::vector<int32_t> indices;
  int32_t index_count = 0;

  explicit Data(const Problem& problem, unsigned seed) : p(problem) {
    std::mt19937 random(seed);
    Lengths longest{0, 0};
    for (const Lengths& s : p.sequences) {
      cu_q.push_back(cu_q.back() + static_cast<int32_t>(s.q));
      cu_k.push_back(cu_k.back() + static_cast<int32_t>(s.k));
      longest = {std::max(longest.q, s.q), std::max(longest.k, s.k)};
    }
    max = longest;
    outer = p.packed ? 1 : p.batch();
    rows_q = p.packed ? cu_q.back() : longest.q;
    rows_k = p.packed ? cu_k.back() : longest.k;
    const BlockConfig& c = p.config;
    rows_cmp = p.packed ? rows_k / c.block_stride
                        : nsa::num_compressed(rows_k, c.block_size, c.block_stride);
    q = input(random, rows_q, p.heads_q(), p.dim_qk);
    dout = input(random, rows_q, p.heads_q(), p.dim_v);
    gates = input(random, rows_q, p.heads_q(), 3);
    out = output(rows_q, p.heads_q(), p.dim_v);
    dq = output(rows_q, p.heads_q(), p.dim_qk);
    dgates = output(rows_q, p.heads_q(), 3);
    const DType lse_type = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    for (int b = 0; b < 3; ++b) {
      const int64_t rows = b == nsa::kCompressed ? rows_cmp : rows_k;
      k[b] = input(random, rows, p.heads_kv, p.dim_qk);
      v[b] = input(random, rows, p.heads_kv, p.dim_v);
      branch_out[b] = output(rows_q, p.heads_q(), p.dim_v);
      lse[b] = Tensor(lse_type, outer, rows_q, p.heads_q(), 1, Layout::kHeadsFirst);
      dk[b] = output(rows, p.heads_kv, p.dim_qk);
      dv[b] = output(rows, p.heads_kv, p.dim_v);
    }
    if (p.share_window) {
      k[nsa::kWindow] = k[nsa::kSelected];
      v[nsa::kWindow] = v[nsa::kSelected];
    }
    index_count = p.given_indices ? p.given_indices : c.num_selected;
    indices.assign(outer * rows_q * p.heads_kv * index_count, -7);
    if (p.given_indices) {
      // Any order, with entries out of range, repeated, absent and in the future.
      const int64_t blocks = (longest.k + c.select_size - 1) / c.select_size;
      std::uniform_int_distribution<int32_t> draw(-2, static_cast<int32_t>(blocks) + 1);
      for (int32_t& index : indices) index = draw(random);
    }
  }

  Lengths max{};

  Tensor input(std::mt19937& random, int64_t rows, int64_t heads, int64_t dim) const {
    Tensor tensor(p.dtype, outer, rows, heads, dim, p.layout);
    tensor.fill_random(random, 1);
    return tensor;
  }
  Tensor output(int64_t rows, int64_t heads, int64_t dim) const {
    return Tensor(p.dtype, outer, rows, heads, dim,
                  p.layout == Layout::kExpanded ? Layout::kContiguous : p.layout);
  }

  nsa::AttnShape shape() const {
    nsa::AttnShape s{};
    s.dtype = p.dtype;
    s.batch = p.batch();
    s.seqlen_q = max.q;
    s.seqlen_k = max.k;
    s.total_q = outer * rows_q;
    s.total_k = outer * rows_k;
    s.heads_q = p.heads_q();
    s.heads_kv = p.heads_kv;
    s.dim_qk = p.dim_qk;
    s.dim_v = p.dim_v;
    s.cu_seqlens_q = p.packed ? cu_q.data() : nullptr;
    s.cu_seqlens_k = p.packed ? cu_k.data() : nullptr;
    s.softmax_scale = scale();
    return s;
  }
  double scale() const { return p.scale ? p.scale : 1 / std::sqrt(p.dim_qk); }
  template <class T>
  nsa::View<T> index_view(T* ptr) const {
    return {ptr, rows_q * p.heads_kv * index_count, p.heads_kv * index_count, index_count};
  }

  AttnFwd fwd() {
    AttnFwd f{};
    f.shape = shape();
    f.config = p.config;
    f.q = q.in();
    for (int b = 0; b < 3; ++b) {
      if (!p.enabled[b]) continue;
      f.branch[b] = {true, k[b].in(), v[b].in(), branch_out[b].out(), lse[b].out()};
    }
    if (p.enabled[nsa::kCompressed] || p.enabled[nsa::kSelected]) {
      f.block_indices = index_view(indices.data());
    }
    f.index_count = index_count;
    if (p.gates) {
      f.gates = gates.in();
      f.out = out.out();
    }
    return f;
  }
  AttnBwd bwd() {
    AttnBwd g{};
    g.shape = shape();
    g.config = p.config;
    g.q = q.in();
    g.dout = dout.in();
    for (int b = 0; b < 3; ++b) {
      if (!p.enabled[b]) continue;
      g.branch[b] = {true,        k[b].in(),   v[b].in(),  branch_out[b].in(),
                     lse[b].in(), dk[b].out(), dv[b].out()};
    }
    if (p.share_window) g.branch[nsa::kWindow].dk = g.branch[nsa::kWindow].dv = {};
    g.block_indices = index_view<const int32_t>(indices.data());
    g.index_count = index_count;
    if (p.gates) {
      g.gates = gates.in();
      g.dgates = dgates.out();
    }
    g.dq = dq.out();
    return g;
  }

  /// Rows of sequence b.
  int64_t batch_of(int64_t b) const { return p.packed ? 0 : b; }
  int64_t q_row(int64_t b) const { return p.packed ? cu_q[b] : 0; }
  int64_t k_row(int64_t b) const { return p.packed ? cu_k[b] : 0; }
  int64_t cmp_row(int64_t b) const { return p.packed ? cu_k[b] / p.config.block_stride : 0; }
  const int32_t* index_row(int64_t b, int64_t i, int64_t head) const {
    return indices.data() +
           ((batch_of(b) * rows_q + q_row(b) + i) * p.heads_kv + head) * index_count;
  }
};

/// Rows (in the branch's tensors) of the keys that query i of sequence b sees.
inline std::vector<int64_t> visible(const Data& d, int branch, int64_t b, int64_t i, int64_t head) {
  const BlockConfig& c = d.p.config;
  const Lengths s = d.p.sequences[b];
  const int64_t t = i + s.k - s.q;
  std::vector<int64_t> keys;
  if (branch == nsa::kCompressed) {
    for (int64_t x = 0; x * c.block_stride + c.block_size <= s.k; ++x) {
      if (x * c.block_stride + c.block_size - 1 <= t) keys.push_back(d.cmp_row(b) + x);
    }
  } else if (branch == nsa::kWindow) {
    for (int64_t x = 0; x < s.k; ++x) {
      if (t - c.window < x && x <= t) keys.push_back(d.k_row(b) + x);
    }
  } else {
    const int32_t* row = d.index_row(b, i, head);
    for (int64_t j : std::set<int64_t>(row, row + d.index_count)) {
      for (int64_t x = std::max<int64_t>(j, 0) * c.select_size;
           j >= 0 && x < std::min((j + 1) * c.select_size, s.k); ++x) {
        if (x <= t) keys.push_back(d.k_row(b) + x);
      }
    }
  }
  return keys;
}

/// Softmax of a row: weights of its keys, and log-sum-exp.
inline std::vector<double> weights(const Data& d, int branch, int64_t b, int64_t i, int64_t head,
                                   const std::vector<int64_t>& keys, double* lse) {
  std::vector<double> p(keys.size());
  double top = -kInf, sum = 0;
  for (size_t x = 0; x < keys.size(); ++x) {
    double dot = 0;
    for (int64_t e = 0; e < d.p.dim_qk; ++e) {
      dot += d.q.at(d.batch_of(b), d.q_row(b) + i, head, e) *
             d.k[branch].at(d.batch_of(b), keys[x], head / d.p.group, e);
    }
    p[x] = dot * d.scale();
    top = std::max(top, p[x]);
  }
  for (double& x : p) sum += x = std::exp(x - top);
  for (double& x : p) x /= sum;
  *lse = keys.empty() ? -kInf : top + std::log(sum);
  return p;
}

/// The written block_indices are what eq. 8-11 say, up to importances that tie within rounding.
inline void check_selection(const Data& d) {
  const BlockConfig& c = d.p.config;
  const double tolerance = d.p.dtype == DType::kFloat64 ? 1e-12 : 2e-5;
  bool ok = true;
  for (int64_t b = 0; b < d.p.batch(); ++b) {
    for (int64_t i = 0; i < d.p.sequences[b].q; ++i) {
      const int64_t t = i + d.p.sequences[b].k - d.p.sequences[b].q;
      const int64_t candidates = t < 0 ? 0 : t / c.select_size + 1;
      for (int64_t head = 0; head < d.p.heads_kv; ++head) {
        std::vector<double> importance(candidates);
        for (int64_t g = 0; g < d.p.group; ++g) {
          const std::vector<int64_t> keys =
              visible(d, nsa::kCompressed, b, i, head * d.p.group + g);
          double lse;
          const std::vector<double> p =
              weights(d, nsa::kCompressed, b, i, head * d.p.group + g, keys, &lse);
          for (size_t x = 0; x < keys.size(); ++x) {
            for (int64_t j = 0; j < candidates; ++j) {
              importance[j] += p[x] * nsa::overlap_weight(keys[x] - d.cmp_row(b), j, c);
            }
          }
        }
        const int32_t* row = d.index_row(b, i, head);
        const int64_t count = std::min<int64_t>(candidates, d.index_count);
        std::vector<bool> chosen(candidates);
        double least = kInf, best = -kInf;
        for (int64_t x = 0; x < d.index_count; ++x) {
          if (x >= count) {
            ok = ok && row[x] == -1;
          } else {
            ok = ok && row[x] >= 0 && row[x] < candidates && (x == 0 || row[x - 1] < row[x]);
            if (!ok) break;
            chosen[row[x]] = true;
          }
        }
        for (int64_t j = 0; j < candidates; ++j) {
          if (nsa::is_forced(j, t, c)) {
            ok = ok && chosen[j];
          } else if (chosen[j]) {
            least = std::min(least, importance[j]);
          } else {
            best = std::max(best, importance[j]);
          }
        }
        ok = ok && best <= least * (1 + tolerance) + tolerance * 1e-6;
      }
    }
  }
  CHECK_MESSAGE(ok, "selection");
}

struct Gradients {
  std::vector<double> dq, dgates, dk[3], dv[3];
};

inline size_t flat(const Tensor& tensor, int64_t b, int64_t s, int64_t h, int64_t e = 0) {
  return ((b * tensor.seq() + s) * tensor.heads() + h) * tensor.dim() + e;
}

inline void check_forward(const Data& d) {
  const Problem& p = d.p;
  std::vector<double> sum(d.out.size());
  const double lse_tolerance = p.dtype == DType::kFloat64 ? 1e-13 : 2e-6;
  for (int branch = 0; branch < 3; ++branch) {
    if (!p.enabled[branch]) continue;
    std::vector<double> out(d.out.size());
    double worst = 0;
    for (int64_t b = 0; b < p.batch(); ++b) {
      for (int64_t i = 0; i < p.sequences[b].q; ++i) {
        for (int64_t head = 0; head < p.heads_q(); ++head) {
          const std::vector<int64_t> keys = visible(d, branch, b, i, head / p.group);
          double lse;
          const std::vector<double> weight = weights(d, branch, b, i, head, keys, &lse);
          const int64_t row = d.q_row(b) + i;
          for (int64_t e = 0; e < p.dim_v; ++e) {
            double value = 0;
            for (size_t x = 0; x < keys.size(); ++x) {
              value += weight[x] * d.v[branch].at(d.batch_of(b), keys[x], head / p.group, e);
            }
            const size_t at = flat(d.out, d.batch_of(b), row, head, e);
            out[at] = value;
            sum[at] += value * d.gates.at(d.batch_of(b), row, head, branch);
          }
          const double got = d.lse[branch].at(d.batch_of(b), row, head, 0);
          const double error = got == lse ? 0 : std::fabs(got - lse) / (1 + std::fabs(lse));
          if (!(error <= worst)) worst = error;
        }
      }
    }
    const std::string name = "branch " + std::to_string(branch);
    check_close(d.branch_out[branch], out, 1, name + " out");
    CHECK_MESSAGE(worst <= lse_tolerance, name + " lse off by " + std::to_string(worst));
  }
  if (p.gates) check_close(d.out, sum, 4, "out");
}

/// Gradients from the definition; dO . O uses the saved outputs, as the contract says.
inline Gradients backward(const Data& d) {
  const Problem& p = d.p;
  Gradients g;
  g.dq.assign(d.dq.size(), 0);
  g.dgates.assign(d.dgates.size(), 0);
  for (int branch = 0; branch < 3; ++branch) {
    const int to = p.share_window && branch == nsa::kWindow ? int{nsa::kSelected} : branch;
    g.dk[branch].resize(d.dk[branch].size());
    g.dv[branch].resize(d.dv[branch].size());
    if (!p.enabled[branch]) continue;
    for (int64_t b = 0; b < p.batch(); ++b) {
      const int64_t o = d.batch_of(b);
      for (int64_t i = 0; i < p.sequences[b].q; ++i) {
        const int64_t row = d.q_row(b) + i;
        for (int64_t head = 0; head < p.heads_q(); ++head) {
          const int64_t kv = head / p.group;
          const std::vector<int64_t> keys = visible(d, branch, b, i, kv);
          double lse, dot = 0;
          const std::vector<double> weight = weights(d, branch, b, i, head, keys, &lse);
          for (int64_t e = 0; e < p.dim_v; ++e) {
            dot += d.dout.at(o, row, head, e) * d.branch_out[branch].at(o, row, head, e);
          }
          g.dgates[flat(d.dgates, o, row, head, branch)] = dot;
          const double gate = p.gates ? d.gates.at(o, row, head, branch) : 1;
          for (size_t x = 0; x < keys.size(); ++x) {
            double dp = 0;
            for (int64_t e = 0; e < p.dim_v; ++e) {
              const double upstream = d.dout.at(o, row, head, e);
              dp += upstream * d.v[branch].at(o, keys[x], kv, e);
              g.dv[to][flat(d.dv[to], o, keys[x], kv, e)] += gate * weight[x] * upstream;
            }
            const double ds = gate * weight[x] * (dp - dot) * d.scale();
            for (int64_t e = 0; e < p.dim_qk; ++e) {
              g.dq[flat(d.dq, o, row, head, e)] += ds * d.k[branch].at(o, keys[x], kv, e);
              g.dk[to][flat(d.dk[to], o, keys[x], kv, e)] += ds * d.q.at(o, row, head, e);
            }
          }
        }
      }
    }
  }
  return g;
}

inline double largest(const std::vector<double>& values) {
  double top = 1;
  for (double x : values) top = std::max(top, std::fabs(x));
  return top;
}

inline void check_backward(const Data& d) {
  const Gradients g = backward(d);
  check_close(d.dq, g.dq, 4 * largest(g.dq), "dq");
  if (d.p.gates) check_close(d.dgates, g.dgates, 4 * largest(g.dgates), "dgates");
  for (int b = 0; b < 3; ++b) {
    if (!d.p.enabled[b] || (d.p.share_window && b == nsa::kWindow)) continue;
    const std::string name = std::to_string(b);
    check_close(d.dk[b], g.dk[b], 4 * largest(g.dk[b]), "dk " + name);
    check_close(d.dv[b], g.dv[b], 4 * largest(g.dv[b]), "dv " + name);
  }
}

}  // namespace testing
