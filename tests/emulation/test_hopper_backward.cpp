// The Hopper backward, its threads run on the CPU, against the CPU kernels: all gradients; and that
// no barrier of it hangs or is passed too early.
#include <cmath>
#include <random>

#include "../cpp/executors.h"
#include "../cpp/tensor.h"
#include "cuda/instances/attn_instances.h"
#include "cuda/sm80/bwd_kernels.h"
#include "nsa/api.h"

using nsa::AttnBwd;
using nsa::AttnFwd;
using nsa::BlockConfig;
using nsa::DType;
using nsa::kCompressed;
using nsa::kNumBranches;
using nsa::kSelected;
using nsa::kWindow;
using testing::Layout;
using testing::Tensor;

// The portable kernels are not emulated, nor called.
namespace nsa::cuda::bwd {
template <class T, int kDimQk, int kDimV>
void launch_bwd_dq(const DqArgs&, cudaStream_t) {
  std::abort();
}
template <class T, int kDimQk, int kDimV>
void launch_bwd_dkv(const DkvArgs&, cudaStream_t) {
  std::abort();
}
#define NSA_ABSENT(T, DIM_QK, DIM_V)                                          \
  template void launch_bwd_dq<T, DIM_QK, DIM_V>(const DqArgs&, cudaStream_t); \
  template void launch_bwd_dkv<T, DIM_QK, DIM_V>(const DkvArgs&, cudaStream_t);
NSA_ATTN_INSTANCES(NSA_ABSENT)
}  // namespace nsa::cuda::bwd

namespace {

struct Sequence {
  int64_t q, k;
};

struct Case {
  const char* name;
  std::vector<Sequence> sequences;  // of one length, or packed
  bool packed;
  int64_t heads_q, heads_kv, dim_qk, dim_v;
  BlockConfig config;  // l, d, l', n, initial, local, w
  bool share_window = false;
  int given_indices = 0;  // any blocks, in any order, this many a row
  DType dtype = DType::kBFloat16;
};

const Case kCases[] = {
    {"groups of 16", {{24, 700}}, false, 16, 1, 128, 128, {32, 16, 64, 6, 1, 2, 100}},
    {"long lists", {{260, 260}}, false, 4, 1, 64, 64, {32, 16, 64, 3, 1, 1, 70}},
    {"causal, two heads", {{90, 90}, {90, 90}}, false, 8, 2, 64, 64, {32, 16, 64, 3, 1, 1, 70}},
    {"groups of 1", {{90, 300}}, false, 1, 1, 64, 64, {32, 16, 64, 3, 1, 1, 40}},
    {"groups of 2", {{130, 300}}, false, 4, 2, 64, 64, {32, 16, 64, 3, 1, 1, 40}},
    {"groups of 6", {{20, 300}}, false, 12, 2, 64, 64, {32, 16, 64, 3, 0, 1, 64}},
    {"groups of 64", {{7, 400}}, false, 64, 1, 64, 64, {32, 16, 64, 5, 1, 2, 64}},
    {"blocks of 128", {{20, 900}}, false, 16, 1, 64, 64, {32, 32, 128, 4, 1, 1, 64}},
    {"blocks of 32", {{20, 400}}, false, 16, 1, 64, 64, {16, 16, 32, 8, 1, 1, 64}},
    {"no keys for the first", {{60, 50}}, false, 16, 1, 64, 64, {16, 16, 32, 2, 1, 1, 9}},
    {"values of 128", {{12, 400}}, false, 16, 1, 192, 128, {32, 16, 64, 5, 1, 2, 100}},
    {"a shared window", {{60, 250}}, false, 8, 1, 64, 64, {32, 16, 64, 3, 1, 2, 100}, true},
    {"packed",
     {{0, 70}, {60, 60}, {1, 90}, {0, 0}, {40, 150}},
     true,
     8,
     2,
     64,
     64,
     {32, 16, 64, 3, 1, 2, 60}},
    // Lists of more than 32 blocks that few tokens share.
    {"scattered blocks", {{10, 2400}}, false, 16, 1, 128, 128, {32, 32, 32, 8, 1, 1, 64}},
    {"scattered, wide", {{9, 3000}}, false, 16, 1, 192, 128, {32, 32, 64, 4, 1, 1, 64}, false, 6},
    {"scattered, of 4", {{33, 2000}}, false, 4, 1, 64, 64, {32, 32, 32, 2, 0, 1, 64}, false, 2},
    {"scattered, of 6", {{17, 2000}}, false, 6, 1, 64, 64, {32, 32, 128, 3, 0, 1, 64}, false, 4},
    {"any indices", {{30, 900}}, false, 16, 1, 64, 64, {32, 16, 64, 3, 1, 1, 70}, false, 40},
    {"float16",
     {{24, 400}},
     false,
     16,
     2,
     128,
     128,
     {64, 16, 64, 5, 1, 2, 100},
     true,
     0,
     DType::kFloat16},
};

struct Results {
  Tensor dq, dgates, dk[kNumBranches], dv[kNumBranches];
};

class Problem {
 public:
  explicit Problem(const Case& c) : c_(c) {
    std::mt19937 random(7);
    shape_.dtype = c.dtype;
    shape_.batch = static_cast<int64_t>(c.sequences.size());
    for (const Sequence& s : c.sequences) {
      cu_q_.push_back(cu_q_.back() + static_cast<int32_t>(s.q));
      cu_k_.push_back(cu_k_.back() + static_cast<int32_t>(s.k));
      shape_.seqlen_q = std::max(shape_.seqlen_q, s.q);
      shape_.seqlen_k = std::max(shape_.seqlen_k, s.k);
    }
    shape_.total_q = cu_q_.back();
    shape_.total_k = cu_k_.back();
    shape_.heads_q = c.heads_q;
    shape_.heads_kv = c.heads_kv;
    shape_.dim_qk = c.dim_qk;
    shape_.dim_v = c.dim_v;
    shape_.softmax_scale = 1.0 / std::sqrt(static_cast<double>(c.dim_qk));
    if (c.packed) {
      shape_.cu_seqlens_q = cu_q_.data();
      shape_.cu_seqlens_k = cu_k_.data();
    }
    outer_ = c.packed ? 1 : shape_.batch;
    rows_q_ = c.packed ? shape_.total_q : shape_.seqlen_q;
    rows_[kSelected] = rows_[kWindow] = c.packed ? shape_.total_k : shape_.seqlen_k;
    rows_[kCompressed] =
        c.packed ? shape_.total_k / c.config.block_stride
                 : nsa::num_compressed(shape_.seqlen_k, c.config.block_size, c.config.block_stride);
    const auto normal = [&](int64_t rows, int64_t heads, int64_t dim) {
      Tensor tensor(c.dtype, outer_, rows, heads, dim);
      tensor.fill_random(random, 1.0);
      return tensor;
    };
    q_ = normal(rows_q_, c.heads_q, c.dim_qk);
    dout_ = normal(rows_q_, c.heads_q, c.dim_v);
    gates_ = normal(rows_q_, c.heads_q, 3);  // of both signs, and some closed
    for (int64_t b = 0; b < outer_; ++b)
      for (int64_t i = 0; i < rows_q_; i += 3) gates_.set(b, i, i % c.heads_q, i / 3 % 3, 0.0);
    out_ = Tensor(c.dtype, outer_, rows_q_, c.heads_q, c.dim_v);
    for (int b = 0; b < kNumBranches; ++b) {
      const bool shared = b == kWindow && c.share_window;
      k_[b] = shared ? k_[kSelected] : normal(rows_[b], c.heads_kv, c.dim_qk);
      v_[b] = shared ? v_[kSelected] : normal(rows_[b], c.heads_kv, c.dim_v);
      branch_out_[b] = Tensor(c.dtype, outer_, rows_q_, c.heads_q, c.dim_v);
      lse_[b] = Tensor(DType::kFloat32, outer_, rows_q_, c.heads_q, 1, Layout::kHeadsFirst);
    }
    count_ = c.given_indices ? c.given_indices : c.config.num_selected;
    blocks_.assign(outer_ * rows_q_ * c.heads_kv * count_, -7);
    std::uniform_int_distribution<int32_t> draw(
        -2, static_cast<int32_t>(shape_.seqlen_k / c.config.select_size) + 1);
    if (c.given_indices)
      for (int32_t& block : blocks_) block = draw(random);

    // The compressed branch selects; given indices stay.
    const std::vector<int32_t> given = blocks_;
    const int32_t count = count_;
    count_ = c.config.num_selected;
    forward(kCompressed);
    count_ = count;
    if (c.given_indices) blocks_ = given;
    forward(kSelected);
    forward(kWindow);
  }

  AttnBwd backward(Results& results) {
    AttnBwd call{};
    call.shape = shape_;
    call.config = c_.config;
    call.q = q_.in();
    call.dout = dout_.in();
    call.gates = gates_.in();
    results.dq = Tensor(c_.dtype, outer_, rows_q_, c_.heads_q, c_.dim_qk);
    results.dgates = Tensor(c_.dtype, outer_, rows_q_, c_.heads_q, 3);
    call.dq = results.dq.out();
    call.dgates = results.dgates.out();
    for (int b = 0; b < kNumBranches; ++b) {
      results.dk[b] = Tensor(c_.dtype, outer_, rows_[b], c_.heads_kv, c_.dim_qk);
      results.dv[b] = Tensor(c_.dtype, outer_, rows_[b], c_.heads_kv, c_.dim_v);
      call.branch[b] = {true,         k_[b].in(),          v_[b].in(),         branch_out_[b].in(),
                        lse_[b].in(), results.dk[b].out(), results.dv[b].out()};
    }
    if (c_.share_window) call.branch[kWindow].dk = call.branch[kWindow].dv = {};
    call.block_indices = index_view<const int32_t>();
    call.index_count = count_;
    return call;
  }

 private:
  template <class T>
  nsa::View<T> index_view() {
    const int64_t row = c_.heads_kv * count_;
    return {blocks_.data(), rows_q_ * row, row, count_};
  }
  void forward(int branch) {
    AttnFwd call{};
    call.shape = shape_;
    call.config = c_.config;
    call.q = q_.in();
    call.branch[branch] = {true, k_[branch].in(), v_[branch].in(), branch_out_[branch].out(),
                           lse_[branch].out()};
    if (branch != kWindow) call.block_indices = index_view<int32_t>();
    call.index_count = count_;
    nsa::cpu::attn_fwd(call, executors::serial());
  }

  const Case& c_;
  nsa::AttnShape shape_{};
  std::vector<int32_t> cu_q_{0}, cu_k_{0};
  int64_t outer_, rows_q_, rows_[kNumBranches];
  int32_t count_;
  Tensor q_, dout_, gates_, out_, k_[kNumBranches], v_[kNumBranches], branch_out_[kNumBranches],
      lse_[kNumBranches];
  std::vector<int32_t> blocks_;
};

/// Root mean square of the difference over that of `right`; what both leave alone counts for
/// nothing.
double difference(const Tensor& x, const Tensor& right) {
  double error = 0, size = 1e-30;
  for (int64_t b = 0; b < x.batch(); ++b)
    for (int64_t i = 0; i < x.seq(); ++i)
      for (int64_t h = 0; h < x.heads(); ++h)
        for (int64_t d = 0; d < x.dim(); ++d) {
          const double value = x.at(b, i, h, d), expected = right.at(b, i, h, d);
          if (std::isnan(value) && std::isnan(expected)) continue;
          error += (value - expected) * (value - expected);
          size += expected * expected;
        }
  return std::sqrt(error / size);
}

void run_hopper(Problem& problem, Results& results) {
  const AttnBwd call = problem.backward(results);
  constexpr int64_t kAlign = 256;
  std::vector<char> workspace(
      nsa::cuda::attn_bwd_workspace(call, nsa::cuda::Backend::kSm90) + kAlign,
      static_cast<char>(0xff));
  const auto address = reinterpret_cast<uintptr_t>(workspace.data());
  nsa::cuda::attn_bwd(call, workspace.data() + (kAlign - address % kAlign), nullptr,
                      nsa::cuda::Backend::kSm90);
}

void run(const Case& c) {
  Problem problem(c);
  Results hopper, cpu;
  run_hopper(problem, hopper);
  nsa::cpu::attn_bwd(problem.backward(cpu), executors::serial());
  const auto compare = [](const Tensor& x, const Tensor& right, const std::string& name) {
    const double error = difference(x, right);
    // What rounding dS and the results makes: with P rounded before dS, dK would not pass.
    CHECK_MESSAGE(error < 0.0032, name + ": error " + std::to_string(error));
  };
  compare(hopper.dq, cpu.dq, "dq");
  compare(hopper.dgates, cpu.dgates, "dgates");
  for (int b = 0; b < kNumBranches; ++b) {
    compare(hopper.dk[b], cpu.dk[b], "dk " + std::to_string(b));
    compare(hopper.dv[b], cpu.dv[b], "dv " + std::to_string(b));
  }
}

/// Warps and copies take turns in another order the second time.
void run_twice(const Case& c) {
  Problem problem(c);
  Results first, second;
  run_hopper(problem, first);
  run_hopper(problem, second);
  CHECK_MESSAGE(first.dq.bytes() == second.dq.bytes(), "dq differs from call to call");
  for (int b = 0; b < kNumBranches; ++b) {
    CHECK_MESSAGE(first.dk[b].bytes() == second.dk[b].bytes(), "dk differs from call to call");
    CHECK_MESSAGE(first.dv[b].bytes() == second.dv[b].bytes(), "dv differs from call to call");
  }
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    check::context() = c.name;
    run(c);
  }
  run_twice(kCases[1]);
  return check::report();
}
