// Attention of the CPU backend against a naive O(S^2) oracle in double, written from the
// definitions: each branch is a softmax over an explicit list of visible keys.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "executors.h"
#include "nsa/api.h"
#include "nsa/geometry.h"
#include "tensor.h"

namespace {

using nsa::AttnBwd;
using nsa::AttnFwd;
using nsa::BlockConfig;
using nsa::DType;
using nsa::kNumBranches;
using testing::Layout;
using testing::Tensor;

constexpr double kInf = std::numeric_limits<double>::infinity();

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
std::vector<int64_t> visible(const Data& d, int branch, int64_t b, int64_t i, int64_t head) {
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
std::vector<double> weights(const Data& d, int branch, int64_t b, int64_t i, int64_t head,
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
void check_selection(const Data& d) {
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

size_t flat(const Tensor& tensor, int64_t b, int64_t s, int64_t h, int64_t e = 0) {
  return ((b * tensor.seq() + s) * tensor.heads() + h) * tensor.dim() + e;
}

void check_forward(const Data& d) {
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
    testing::check_close(d.branch_out[branch], out, 1, name + " out");
    CHECK_MESSAGE(worst <= lse_tolerance, name + " lse off by " + std::to_string(worst));
  }
  if (p.gates) testing::check_close(d.out, sum, 4, "out");
}

/// Gradients from the definition; dO . O uses the saved outputs, as the contract says.
Gradients backward(const Data& d) {
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

double largest(const std::vector<double>& values) {
  double top = 1;
  for (double x : values) top = std::max(top, std::fabs(x));
  return top;
}

void check_backward(const Data& d) {
  const Gradients g = backward(d);
  testing::check_close(d.dq, g.dq, 4 * largest(g.dq), "dq");
  if (d.p.gates) testing::check_close(d.dgates, g.dgates, 4 * largest(g.dgates), "dgates");
  for (int b = 0; b < 3; ++b) {
    if (!d.p.enabled[b] || (d.p.share_window && b == nsa::kWindow)) continue;
    const std::string name = std::to_string(b);
    testing::check_close(d.dk[b], g.dk[b], 4 * largest(g.dk[b]), "dk " + name);
    testing::check_close(d.dv[b], g.dv[b], 4 * largest(g.dv[b]), "dv " + name);
  }
}

std::vector<const std::vector<unsigned char>*> outputs(const Data& d) {
  std::vector<const std::vector<unsigned char>*> all{&d.out.bytes(), &d.dq.bytes(),
                                                     &d.dgates.bytes()};
  for (int b = 0; b < 3; ++b) {
    for (const Tensor* tensor : {&d.branch_out[b], &d.lse[b], &d.dk[b], &d.dv[b]}) {
      all.push_back(&tensor->bytes());
    }
  }
  return all;
}

void run(Data& d, const nsa::cpu::Executor& executor) {
  nsa::cpu::attn_fwd(d.fwd(), executor);
  if (d.p.gates || d.p.enabled[0] + d.p.enabled[1] + d.p.enabled[2] == 1) {
    nsa::cpu::attn_bwd(d.bwd(), executor);
  }
}

unsigned seed = 1;

void test(Problem p) {
  check::context() = p.name + " " + testing::name(p.dtype);
  ++seed;
  Data d(p, seed);
  run(d, executors::serial());
  if (p.enabled[nsa::kCompressed]) check_selection(d);
  check_forward(d);
  const bool backward = p.gates || p.enabled[0] + p.enabled[1] + p.enabled[2] == 1;
  if (backward) check_backward(d);
  for (const Tensor* tensor : {&d.dq, &d.dk[0], &d.dk[1], &d.dv[0], &d.dv[2]}) {
    if (p.layout != Layout::kContiguous && tensor->written() > tensor->size()) {
      CHECK_MESSAGE(false, "wrote outside a tensor");
    }
  }

  Data again(p, seed);
  run(again, executors::shuffled(3));
  const auto a = outputs(d), b = outputs(again);
  bool same = d.indices == again.indices;
  for (size_t i = 0; i < a.size(); ++i) same = same && *a[i] == *b[i];
  CHECK_MESSAGE(same, "the bits depend on the threads");
}

BlockConfig small_config() { return {8, 4, 16, 5, 1, 2, 24}; }

void test_lengths() {
  for (int64_t n : {1, 31, 32, 33, 63, 64, 65, 113}) {
    for (bool share : {false, true}) {
      Problem p;
      p.name = "length " + std::to_string(n) + (share ? " shared" : "");
      p.sequences = {{n, n}};
      p.share_window = share;
      p.config.num_selected = 4;
      test(p);
    }
    Problem p;
    p.name = "small blocks, length " + std::to_string(n);
    p.sequences = {{n, n}, {n, n}};
    p.config = small_config();
    p.dim_qk = 40;
    p.dim_v = 24;
    test(p);
  }
  Problem p;
  p.name = "length 1023";
  p.sequences = {{1023, 1023}};
  p.heads_kv = 1;
  p.dim_qk = p.dim_v = 32;
  p.config.num_selected = 6;
  p.config.window = 100;
  test(p);
  p.name = "length 1023 shared, default config";
  p.config = BlockConfig{};
  p.share_window = true;
  test(p);
}

void test_groups() {
  for (int64_t group : {1, 2, 3, 4, 6, 8, 12, 16, 32, 80}) {
    Problem p;
    p.name = "group " + std::to_string(group);
    p.group = group;
    p.heads_kv = group > 16 ? 1 : 2;
    p.sequences = {{97, 97}};
    p.dim_qk = 24;
    p.dim_v = 16;
    p.config = small_config();
    test(p);
  }
}

void test_dtypes_and_dims() {
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (Layout layout : {Layout::kContiguous, Layout::kPadded, Layout::kHeadsFirst}) {
      Problem p;
      p.name = "layout " + std::to_string(static_cast<int>(layout));
      p.dtype = dtype;
      p.layout = layout;
      p.sequences = {{113, 113}, {113, 113}};
      p.config = small_config();
      p.dim_qk = 40;
      p.dim_v = 17;
      test(p);
    }
    Problem p;
    p.name = "192/128";
    p.dtype = dtype;
    p.dim_qk = 192;
    p.dim_v = 128;
    p.heads_kv = 1;
    p.sequences = {{130, 130}};
    p.config.num_selected = 3;
    p.config.window = 40;
    p.share_window = true;
    test(p);
    p.name = "1/1";
    p.dim_qk = p.dim_v = 1;
    test(p);
  }
}

void test_lengths_differ() {
  for (Lengths s :
       {Lengths{1, 200}, {7, 300}, {40, 33}, {100, 20}, {64, 1}, {0, 50}, {50, 0}, {0, 0}}) {
    for (bool share : {false, true}) {
      Problem p;
      p.name = "Sq " + std::to_string(s.q) + " Sk " + std::to_string(s.k);
      p.sequences = {s, s};
      p.config = small_config();
      p.share_window = share;
      p.dim_qk = p.dim_v = 16;
      test(p);
      p.config = BlockConfig{32, 16, 64, 2, 0, 1, 20};
      test(p);
    }
  }
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    for (bool share : {false, true}) {
      Problem p;
      p.name = "packed";
      p.dtype = dtype;
      p.packed = true;
      p.share_window = share;
      p.sequences = {{0, 0},   {37, 37},  {1, 90}, {50, 9}, {0, 21}, {5, 0},
                     {65, 65}, {33, 100}, {0, 0},  {3, 3},  {0, 7}};
      p.config = small_config();
      p.dim_qk = 16;
      p.dim_v = 24;
      test(p);
      p.config = BlockConfig{16, 16, 16, 4, 1, 1, 5};
      test(p);
    }
  }
}

void test_configs() {
  const BlockConfig configs[] = {
      {1, 1, 1, 7, 2, 3, 1},     {4, 4, 4, 3, 0, 0, 3},      {8, 2, 24, 2, 1, 1, 1000},
      {16, 16, 80, 2, 0, 1, 64}, {64, 16, 128, 2, 1, 1, 65}, {32, 16, 64, 100, 1, 2, 512},
      {12, 4, 20, 4, 0, 4, 33},  {16, 1, 16, 6, 6, 0, 17},   {32, 8, 640, 1, 0, 0, 600},
  };
  for (const BlockConfig& config : configs) {
    for (bool share : {false, true}) {
      Problem p;
      p.name = "config " + std::to_string(config.block_size) + "/" +
               std::to_string(config.block_stride) + "/" + std::to_string(config.select_size) +
               (share ? " shared" : "");
      p.config = config;
      p.share_window = share;
      p.sequences = {
          {config.select_size > 500 ? 1300 : 190, config.select_size > 500 ? 1300 : 190}};
      p.heads_kv = 1;
      p.dim_qk = p.dim_v = 16;
      test(p);
    }
  }
}

void test_branches() {
  for (int mask = 1; mask < 8; ++mask) {
    for (bool gates : {false, true}) {
      for (bool packed : {false, true}) {
        Problem p;
        p.name = "branches " + std::to_string(mask) + (gates ? " gated" : "");
        p.packed = packed;
        p.sequences = {{70, 70}, {70, 70}};
        for (int b = 0; b < 3; ++b) p.enabled[b] = mask >> b & 1;
        if (p.enabled[nsa::kSelected] && !p.enabled[nsa::kCompressed]) p.given_indices = 9;
        p.gates = gates;
        p.config = small_config();
        p.dim_qk = p.dim_v = 32;
        test(p);
      }
    }
  }
  // One branch says nothing about the block lengths of the others.
  Problem p;
  p.name = "selected alone, a configuration of its own";
  p.enabled[0] = p.enabled[2] = p.gates = false;
  p.given_indices = 4;
  p.config = BlockConfig{32, 16, 8, 16, 1, 2, 512};
  test(p);
}

/// More rows than one tile holds, all of which select block 0.
void test_long_sequence() {
  Problem p;
  p.name = "long sequence";
  p.sequences = {{9000, 9000}};
  p.heads_kv = 1;
  p.group = 1;
  p.dim_qk = p.dim_v = 4;
  p.config = BlockConfig{4, 4, 4, 2, 1, 1, 3};
  p.enabled[nsa::kCompressed] = false;
  p.given_indices = 3;
  for (bool share : {false, true}) {
    p.share_window = share;
    check::context() = p.name;
    Data d(p, ++seed);
    for (int64_t i = 0; i < 9000; ++i) d.indices[i * 3] = 0;
    run(d, executors::threads(2));
    check_forward(d);
    check_backward(d);
  }
}

/// Without a value tensor the compressed branch only selects; equal importance goes to the lower
/// index.
void test_select_only() {
  check::context() = "select only";
  Problem p;
  p.sequences = {{300, 300}};
  p.config = BlockConfig{8, 4, 16, 5, 1, 1, 24};
  p.enabled[1] = p.enabled[2] = p.gates = false;
  Data d(p, ++seed);
  AttnFwd f = d.fwd();
  f.branch[0].v = {};
  f.branch[0].out = f.branch[0].lse = {};
  nsa::cpu::attn_fwd(f, executors::serial());
  check_selection(d);

  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kFloat16}) {
    p.dtype = dtype;
    // Tokens of one stride each: all blocks are equally important.
    p.config = BlockConfig{4, 4, 16, 5, 1, 1, 24};
    Data tie(p, ++seed);
    for (int64_t i = 0; i < tie.k[0].size(); ++i) tie.k[0].set_flat(i, 1);
    nsa::cpu::attn_fwd(tie.fwd(), executors::serial());
    bool lowest = true;
    for (int64_t i = 16 * 10; i < 300; ++i) {
      for (int32_t x = 0; x < 5; ++x) {
        lowest = lowest && tie.index_row(0, i, 0)[x] == (x < 4 ? x : i / 16);
      }
    }
    CHECK_MESSAGE(lowest, "ties");
  }
}

/// The backward is the derivative of the forward: central differences of sum(out * dout).
void test_finite_differences() {
  check::context() = "finite differences";
  Problem p;
  p.dtype = DType::kFloat64;
  p.sequences = {{21, 29}, {40, 40}, {9, 4}};
  p.packed = true;
  p.dim_qk = 6;
  p.dim_v = 5;
  p.config = BlockConfig{4, 2, 8, 3, 1, 1, 7};
  for (bool share : {false, true}) {
    p.share_window = share;
    Data d(p, ++seed);
    run(d, executors::serial());
    const auto loss = [&] {
      const std::vector<int32_t> before = d.indices;
      AttnFwd f = d.fwd();
      if (p.share_window) {
        f.branch[nsa::kWindow].k = f.branch[nsa::kSelected].k;
        f.branch[nsa::kWindow].v = f.branch[nsa::kSelected].v;
      }
      nsa::cpu::attn_fwd(f, executors::serial());
      CHECK_MESSAGE(before == d.indices, "the selection moved");
      double sum = 0;
      for (int64_t i = 0; i < d.out.size(); ++i) sum += d.out.flat(i) * d.dout.flat(i);
      return sum;
    };
    std::mt19937 random(7);
    const auto probe = [&](Tensor& x, const Tensor& grad, const std::string& what) {
      for (int n = 0; n < 25; ++n) {
        const int64_t i = std::uniform_int_distribution<int64_t>(0, x.size() - 1)(random);
        const double at = x.flat(i), step = 1e-5;
        x.set_flat(i, at + step);
        const double up = loss();
        x.set_flat(i, at - step);
        const double down = loss();
        x.set_flat(i, at);
        const double slope = (up - down) / (2 * step);
        CHECK_MESSAGE(std::fabs(slope - grad.flat(i)) <= 1e-7 * (1 + std::fabs(slope)), what);
      }
    };
    probe(d.q, d.dq, "dq");
    probe(d.gates, d.dgates, "dgates");
    for (int b = 0; b < 3; ++b) {
      if (share && b == nsa::kWindow) continue;
      probe(d.k[b], d.dk[b], "dk");
      probe(d.v[b], d.dv[b], "dv");
    }
  }
}

void test_invalid() {
  check::context() = "invalid";
  const auto refused = [](void (*spoil)(AttnFwd&)) {
    Data d(Problem{}, 3);
    AttnFwd f = d.fwd();
    spoil(f);
    CHECK_THROWS(nsa::cpu::attn_fwd(f, executors::serial()), std::invalid_argument);
    CHECK_EQ(d.out.written(), 0);
  };
  refused([](AttnFwd& f) { f.shape.heads_q = 3; });
  refused([](AttnFwd& f) { f.shape.dim_qk = 0; });
  refused([](AttnFwd& f) { f.config.block_stride = 5; });
  refused([](AttnFwd& f) { f.index_count = 3; });
  refused([](AttnFwd& f) { f.block_indices = {}; });
  refused([](AttnFwd& f) { f.out = {}; });
  refused([](AttnFwd& f) { f.gates = {}; });
  refused([](AttnFwd& f) { f.q = {}; });
  refused([](AttnFwd& f) { f.branch[nsa::kWindow].v = {}; });
  refused([](AttnFwd& f) { f.shape.cu_seqlens_q = &f.index_count; });
  const auto refused_bwd = [](void (*spoil)(AttnBwd&)) {
    Data d(Problem{}, 3);
    nsa::cpu::attn_fwd(d.fwd(), executors::serial());
    AttnBwd g = d.bwd();
    spoil(g);
    CHECK_THROWS(nsa::cpu::attn_bwd(g, executors::serial()), std::invalid_argument);
    CHECK_EQ(d.dq.written(), 0);
  };
  refused_bwd([](AttnBwd& g) { g.gates = {}; });
  refused_bwd([](AttnBwd& g) { g.branch[nsa::kSelected].dk = {}; });
  refused_bwd([](AttnBwd& g) { g.branch[nsa::kWindow].dv = {}; });
  refused_bwd([](AttnBwd& g) { g.branch[nsa::kCompressed].lse = {}; });
  refused_bwd([](AttnBwd& g) { g.dq = {}; });
}

}  // namespace

int main() {
  std::printf("isa %s\n", nsa::cpu::isa());
  test_lengths();
  test_groups();
  test_dtypes_and_dims();
  test_lengths_differ();
  test_configs();
  test_branches();
  test_long_sequence();
  test_select_only();
  test_finite_differences();
  test_invalid();
  return check::report();
}
