// The Hopper forward, its threads run on the CPU, against the CPU kernels: outputs, lse and
// selected blocks of all branches; and that no barrier of it hangs or is passed too early.
#include <cmath>
#include <random>

#include "../cpp/executors.h"
#include "../cpp/tensor.h"
#include "cuda/fwd/branches.h"
#include "cuda/sm90/fwd.h"

using nsa::AttnFwd;
using nsa::BlockConfig;
using nsa::DType;
using nsa::kCompressed;
using nsa::kNumBranches;
using testing::Layout;
using testing::Tensor;

namespace {

struct Case {
  const char* name;
  int64_t batch, seqlen_q, seqlen_k, heads_q, heads_kv, dim_qk, dim_v;
  BlockConfig config;  // l, d, l', n, initial, local, w
  Layout layout = Layout::kContiguous;
  DType dtype = DType::kBFloat16;
  double spread = 1.0;  // of the queries
};

const Case kCases[] = {
    {"groups of 16", 1, 40, 900, 16, 1, 128, 128, {32, 16, 64, 8, 1, 2, 100}},
    {"causal", 2, 150, 150, 16, 1, 64, 64, {32, 16, 64, 3, 1, 1, 70}},
    {"groups of 4", 1, 70, 700, 8, 2, 128, 128, {32, 16, 64, 6, 1, 2, 130}, Layout::kHeadsFirst},
    {"groups of 1", 1, 90, 400, 2, 2, 64, 64, {32, 16, 64, 3, 1, 1, 40}},
    {"groups of 6", 1, 33, 333, 12, 2, 64, 64, {32, 16, 64, 3, 0, 1, 64}},
    {"groups of 12", 1, 20, 900, 12, 1, 64, 64, {32, 16, 64, 5, 1, 1, 64}},
    {"groups of 32", 1, 12, 900, 32, 1, 64, 64, {32, 16, 64, 8, 1, 2, 512}},
    {"groups of 64", 1, 7, 500, 64, 1, 64, 64, {32, 16, 64, 5, 1, 2, 64}},
    {"blocks of 128", 1, 30, 1500, 16, 1, 64, 64, {32, 32, 128, 5, 1, 1, 64}},
    {"blocks of 32", 1, 30, 700, 16, 1, 64, 64, {16, 16, 32, 12, 1, 1, 64}},
    {"no keys for the first", 1, 60, 40, 16, 1, 64, 64, {32, 16, 64, 3, 1, 1, 9}},
    {"values of 128", 1, 20, 600, 16, 1, 192, 128, {32, 16, 64, 6, 1, 2, 100}},
    {"float16",
     1,
     20,
     600,
     16,
     1,
     64,
     64,
     {64, 16, 64, 6, 1, 2, 100},
     Layout::kContiguous,
     DType::kFloat16},
    {"64 blocks", 1, 16, 5000, 8, 1, 64, 64, {32, 16, 64, 64, 1, 2, 64}},
    {"33 blocks", 1, 20, 6000, 16, 1, 64, 64, {32, 16, 64, 33, 1, 2, 64}},
    {"32 blocks", 1, 20, 6000, 16, 1, 64, 64, {32, 16, 64, 32, 1, 2, 64}},
    {"groups of 4, of one stride", 1, 70, 2300, 4, 1, 64, 64, {16, 16, 64, 6, 0, 0, 64}},
    {"groups of 8", 1, 40, 5000, 8, 1, 64, 64, {32, 16, 64, 16, 1, 2, 64}},
    {"ends of tiles", 1, 80, 2100, 16, 1, 64, 64, {32, 16, 64, 5, 0, 0, 64}},
    {"lists of 12 tokens", 1, 37, 12000, 16, 1, 128, 128, {32, 16, 64, 16, 1, 2, 64}},
    {"window of 512", 1, 20, 900, 16, 1, 128, 128, {32, 16, 64, 5, 1, 2, 512}},
    {"window of 512, groups of 4", 1, 70, 1100, 4, 1, 64, 64, {32, 16, 64, 5, 1, 2, 512}},
    {"window of 512, values of 128", 1, 20, 900, 16, 1, 192, 128, {32, 16, 64, 5, 1, 2, 512}},
    {"many keys, no ranking", 1, 70, 6100, 2, 1, 64, 64, {32, 16, 64, 3, 1, 1, 600}},
    {"many tiles", 1, 24, 9000, 16, 1, 64, 64, {32, 16, 64, 16, 1, 2, 64}},
    // All blocks are forced: heads that see one key only make equal importances.
    {"scores that exceed those of the first tile by far",
     1,
     12,
     9000,
     16,
     1,
     64,
     64,
     {32, 16, 64, 3, 1, 2, 64},
     Layout::kContiguous,
     DType::kBFloat16,
     100.0},
};

Tensor normal(std::mt19937& random, const Case& c, int64_t seq, int64_t heads, int64_t dim,
              double spread = 1.0) {
  Tensor tensor(c.dtype, c.batch, seq, heads, dim, c.layout);
  tensor.fill_random(random, spread);
  return tensor;
}

struct Results {
  Tensor out, branch[kNumBranches], lse[kNumBranches];
  std::vector<int32_t> blocks;
};

/// The call with results of its own.
AttnFwd make_call(const Case& c, const Tensor& q, const Tensor (&k)[2], const Tensor (&v)[2],
                  const Tensor& gates, Results& results) {
  AttnFwd call{};
  call.shape = {
      c.dtype,   c.batch,    c.seqlen_q, c.seqlen_k, c.batch * c.seqlen_q, c.batch * c.seqlen_k,
      c.heads_q, c.heads_kv, c.dim_qk,   c.dim_v};
  call.shape.softmax_scale = 1.0 / std::sqrt(static_cast<double>(c.dim_qk));
  call.config = c.config;
  call.q = q.in();
  call.gates = gates.in();
  results.out = Tensor(c.dtype, c.batch, c.seqlen_q, c.heads_q, c.dim_v);
  call.out = results.out.out();
  for (int b = 0; b < kNumBranches; ++b) {
    results.branch[b] = Tensor(c.dtype, c.batch, c.seqlen_q, c.heads_q, c.dim_v);
    results.lse[b] =
        Tensor(DType::kFloat32, c.batch, c.seqlen_q, c.heads_q, 1, Layout::kHeadsFirst);
    call.branch[b] = {true, k[b != kCompressed].in(), v[b != kCompressed].in(),
                      results.branch[b].out(), results.lse[b].out()};
  }
  call.index_count = c.config.num_selected;
  const int64_t row = call.index_count, rows = c.batch * c.seqlen_q * c.heads_kv;
  results.blocks.assign(rows * row, -7);
  call.block_indices = {results.blocks.data(), c.seqlen_q * c.heads_kv * row, c.heads_kv * row,
                        row};
  return call;
}

/// Root mean square of the difference over that of `right`, over the rows that `counts` names.
template <class Counts>
double difference(const Case& c, const Tensor& x, const Tensor& right, const Counts& counts) {
  double error = 0, size = 1e-30;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t i = 0; i < c.seqlen_q; ++i)
      for (int64_t h = 0; h < c.heads_q; ++h) {
        if (!counts(b, i, h)) continue;
        for (int64_t d = 0; d < c.dim_v; ++d) {
          const double value = x.at(b, i, h, d), expected = right.at(b, i, h, d);
          error += (value - expected) * (value - expected);
          size += expected * expected;
        }
      }
  return std::sqrt(error / size);
}

/// Importance of the selection blocks of a query and kv head, in double precision (eq. 8-10).
std::vector<double> importance(const Case& c, const Tensor& q, const Tensor& k, int64_t b,
                               int64_t i, int64_t head_kv) {
  const BlockConfig& config = c.config;
  const int64_t position = i + c.seqlen_k - c.seqlen_q, group = c.heads_q / c.heads_kv;
  std::vector<double> sums(c.seqlen_k / config.select_size + 1);
  for (int64_t head = head_kv * group; head < (head_kv + 1) * group; ++head) {
    std::vector<double> weights;
    double most = -1e300, total = 0;
    for (int64_t t = 0; t * config.block_stride + config.block_size - 1 <= position; ++t) {
      double score = 0;
      for (int64_t d = 0; d < c.dim_qk; ++d) score += q.at(b, i, head, d) * k.at(b, t, head_kv, d);
      weights.push_back(score / std::sqrt(static_cast<double>(c.dim_qk)));
      most = std::max(most, weights.back());
    }
    for (double& weight : weights) total += weight = std::exp(weight - most);
    for (size_t t = 0; t < weights.size(); ++t)
      for (int64_t at = t * config.block_stride, end = at + config.block_size; at < end;
           at += config.block_stride)
        sums[at / config.select_size] += weights[t] / total;
  }
  return sums;
}

/// The first of two rows of block indices holds no block that is less important, by more than 1e-3,
/// than one of the second that it lacks.
bool near_tie(const std::vector<double>& importance, const int32_t* x, const int32_t* right,
              int64_t n) {
  double least = 1e300, most = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] >= 0 && !std::count(right, right + n, x[i])) least = std::min(least, importance[x[i]]);
    if (right[i] >= 0 && !std::count(x, x + n, right[i]))
      most = std::max(most, importance[right[i]]);
  }
  return least >= most * (1 - 1e-3);
}

/// What a call gets: raw and compressed keys and values.
struct Inputs {
  Tensor q, k[2], v[2], gates;

  explicit Inputs(const Case& c) {
    std::mt19937 random(7);
    q = normal(random, c, c.seqlen_q, c.heads_q, c.dim_qk, c.spread);
    for (int raw = 0; raw < 2; ++raw) {
      const int64_t keys = raw ? c.seqlen_k : compressed(c, c.seqlen_k);
      k[raw] = normal(random, c, keys, c.heads_kv, c.dim_qk);
      v[raw] = normal(random, c, keys, c.heads_kv, c.dim_v);
    }
    gates = normal(random, c, c.seqlen_q, c.heads_q, 3);
  }
  /// Compressed tokens of the first `keys` keys.
  static int64_t compressed(const Case& c, int64_t keys) {
    return keys < c.config.block_size ? 0
                                      : (keys - c.config.block_size) / c.config.block_stride + 1;
  }
};

/// The Hopper kernels of a call, which rank; other kernels' ranking is given by `ranked`.
void run_hopper(const Case& c, const Inputs& x, Results& results,
                const std::vector<int32_t>& ranked) {
  const AttnFwd call = make_call(c, x.q, x.k, x.v, x.gates, results);
  nsa::cuda::for_each_branch(call, nullptr, [&](const nsa::cuda::FwdParams& branch) {
    nsa::cuda::FwdParams params = branch;
    if (!nsa::cuda::sm90::fwd_takes(params)) {
      results.blocks = ranked;
      params.block_indices.ptr = nullptr;
    }
    std::vector<char> workspace(nsa::cuda::sm90::fwd_workspace(params) + 256, '\xff');  // NaN
    const auto at = (reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256;
    nsa::cuda::sm90::attn_fwd_branch(call.shape, params, reinterpret_cast<void*>(at), nullptr);
  });
}

void run(const Case& c) {
  const Inputs inputs(c);
  const Tensor& q = inputs.q;
  const Tensor(&k)[2] = inputs.k;
  Results hopper, cpu;
  nsa::cpu::attn_fwd(make_call(c, q, k, inputs.v, inputs.gates, cpu), executors::serial());
  run_hopper(c, inputs, hopper, cpu.blocks);

  // Near ties may fall either way; what depends on the selection is compared where it is the same.
  const int64_t n = c.config.num_selected, rows = c.batch * c.seqlen_q * c.heads_kv;
  const auto same_blocks = [&](int64_t b, int64_t i, int64_t h) {
    const int64_t row = ((b * c.seqlen_q + i) * c.heads_kv + h * c.heads_kv / c.heads_q) * n;
    return std::equal(&hopper.blocks[row], &hopper.blocks[row] + n, &cpu.blocks[row]);
  };
  int64_t differ = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t *x = &hopper.blocks[row * n], *right = &cpu.blocks[row * n];
    if (std::equal(x, x + n, right)) continue;
    ++differ;
    const int64_t head_kv = row % c.heads_kv, i = row / c.heads_kv % c.seqlen_q;
    CHECK_MESSAGE(
        near_tie(importance(c, q, k[0], row / c.heads_kv / c.seqlen_q, i, head_kv), x, right, n),
        "selection " + std::to_string(row));
  }
  CHECK_MESSAGE(differ * 10 <= rows, std::to_string(differ) + " selections differ");
  for (int b = 0; b <= kNumBranches; ++b) {
    const Tensor& x = b < kNumBranches ? hopper.branch[b] : hopper.out;
    const Tensor& right = b < kNumBranches ? cpu.branch[b] : cpu.out;
    const double error = difference(c, x, right, same_blocks);
    CHECK_MESSAGE(error < 0.005,
                  "output " + std::to_string(b) + ": error " + std::to_string(error));
  }
  for (int b = 0; b < kNumBranches; ++b)
    for (int64_t batch = 0; batch < c.batch; ++batch)
      for (int64_t i = 0; i < c.seqlen_q; ++i)
        for (int64_t h = 0; h < c.heads_q; ++h) {
          const double x = hopper.lse[b].at(batch, i, h, 0), right = cpu.lse[b].at(batch, i, h, 0);
          if (!same_blocks(batch, i, h)) continue;
          CHECK_MESSAGE(x == right || std::fabs(x - right) < 1e-4 * c.spread,
                        "lse " + std::to_string(x) + ", expected " + std::to_string(right));
        }
}

/// Sets the rows from `first` on to others.
void change(Tensor& x, std::mt19937& random, int64_t first) {
  std::normal_distribution<double> value(0, 3);
  for (int64_t i = 0; i < x.size(); ++i)
    if (x.position(i) >= first) x.set_flat(i, value(random));
}

/// What a token gets depends, to the last bit, on nothing after it, not even on the later tokens
/// whose rows its warp holds.
void check_causality(const Case& c, int64_t cut) {
  const Inputs inputs(c);
  Inputs changed(c);
  std::mt19937 random(8);
  const int64_t keys = c.seqlen_k - c.seqlen_q + cut;
  change(changed.q, random, cut);
  for (int raw = 0; raw < 2; ++raw) {
    const int64_t first = raw ? keys : Inputs::compressed(c, keys);
    change(changed.k[raw], random, first);
    change(changed.v[raw], random, first);
  }
  Results x, y;
  run_hopper(c, inputs, x, {});
  run_hopper(c, changed, y, {});
  int64_t differ = 0, later = 0;
  const auto compare = [&](const Tensor& a, const Tensor& b) {
    for (int64_t i = 0; i < a.size(); ++i)
      (a.position(i) < cut ? differ : later) += a.flat(i) != b.flat(i);
  };
  compare(x.out, y.out);
  for (int b = 0; b < kNumBranches; ++b) {
    compare(x.branch[b], y.branch[b]);
    compare(x.lse[b], y.lse[b]);
  }
  const int64_t row = c.heads_kv * c.config.num_selected;
  for (int64_t i = 0; i < static_cast<int64_t>(x.blocks.size()); ++i)
    differ += i / row % c.seqlen_q < cut && x.blocks[i] != y.blocks[i];
  CHECK_MESSAGE(differ == 0, std::to_string(differ) + " values changed before the cut");
  CHECK_MESSAGE(later > 0, "nothing changed behind the cut");
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    check::context() = c.name;
    run(c);
  }
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int64_t cut : {1, 26, 39, 66}) {
      check::context() = "nothing after " + std::to_string(cut);
      check_causality({"",
                       2,
                       70,
                       700,
                       8,
                       2,
                       64,
                       64,
                       {32, 16, 64, 6, 1, 2, 130},
                       Layout::kContiguous,
                       dtype,
                       3.0},
                      cut);
    }
  }
  return check::report();
}
