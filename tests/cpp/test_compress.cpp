// Compression on the CPU against the oracle of compress_oracle.h.
#include <cstdint>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "compress_oracle.h"
#include "executors.h"
#include "nsa/api.h"
#include "tensor.h"

namespace {

using namespace testing;
using nsa::cpu::Executor;
using Results = std::map<std::string, Tensor>;

const Kind kKinds[] = {Kind::kMean, Kind::kWeighted, Kind::kLinear, Kind::kMlp};
const DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
const std::vector<int32_t> kLengths = {0, 1, 31, 32, 33, 63, 64, 65, 113, 1023};
const std::vector<int32_t> kRaggedLengths = {0, 33, 0, 64, 31, 113, 1, 65, 0, 32, 63, 48, 1023, 0};

const void* pointer(const Problem& p, const char* name) {
  return p.has(name) ? p.weights.at(name).data() : nullptr;
}

nsa::CompressShape shape(const Problem& p) {
  nsa::CompressShape shape;
  shape.dtype = p.dtype;
  shape.batch = p.seqlens.size();
  shape.seqlen = 0;
  for (int32_t seqlen : p.seqlens) shape.seqlen = std::max<int64_t>(shape.seqlen, seqlen);
  shape.total = p.total();
  shape.heads = p.heads;
  shape.dim = p.dim;
  shape.weight_heads = p.weight_heads;
  shape.block_size = p.block_size;
  shape.block_stride = p.block_stride;
  shape.cu_seqlens = p.packed ? p.cu_seqlens.data() : nullptr;
  return shape;
}

nsa::CompressPoolFwd pool_fwd_params(const Problem& p, Tensor& out) {
  return {shape(p), p.x.in(), pointer(p, "weight"), pointer(p, "pos"), out.out()};
}

nsa::CompressMlpFwd mlp_fwd_params(const Problem& p, Tensor& out) {
  return {shape(p),         p.hidden,         p.dim_out,        p.x.in(),         pointer(p, "pos"),
          pointer(p, "w1"), pointer(p, "b1"), pointer(p, "w2"), pointer(p, "b2"), out.out()};
}

Tensor forward(const Problem& p, const Executor& executor) {
  const Layout layout = p.layout == Layout::kExpanded ? Layout::kPadded : p.layout;
  Tensor out(p.dtype, p.out_batch(), p.out_rows(), p.heads, p.out_dim(), layout);
  if (p.mlp())
    compress_mlp_fwd(mlp_fwd_params(p, out), executor);
  else
    compress_pool_fwd(pool_fwd_params(p, out), executor);
  CHECK_EQ(out.written(), out.size());
  return out;
}

/// The gradients that `wanted` names, or all that exist.
Results backward(const Problem& p, const Executor& executor, const std::string& wanted = "") {
  const Layout layout = p.layout == Layout::kExpanded ? Layout::kPadded : p.layout;
  Results grads;
  grads["dx"] = Tensor(p.dtype, p.x.batch(), p.x.seq(), p.heads, p.dim, layout);
  for (const auto& [name, w] : p.weights)
    grads["d" + name] = Tensor(p.dtype, w.batch(), w.seq(), w.heads(), w.dim());
  if (!wanted.empty())
    for (auto it = grads.begin(); it != grads.end();)
      it = it->first == wanted ? std::next(it) : grads.erase(it);
  auto grad = [&](const char* name) -> void* {
    return grads.count(name) ? grads[name].data() : nullptr;
  };
  const nsa::OutView dx = grads.count("dx") ? grads["dx"].out() : nsa::OutView{};
  if (p.mlp()) {
    compress_mlp_bwd({shape(p), p.hidden, p.dim_out, p.dout.in(), p.x.in(), pointer(p, "pos"),
                      pointer(p, "w1"), pointer(p, "b1"), pointer(p, "w2"), dx, grad("dpos"),
                      grad("dw1"), grad("db1"), grad("dw2"), grad("db2")},
                     executor);
  } else {
    compress_pool_bwd({shape(p), p.dout.in(), p.x.in(), pointer(p, "weight"), pointer(p, "pos"), dx,
                       grad("dweight"), grad("dpos")},
                      executor);
  }
  for (const auto& [name, tensor] : grads) {
    CHECK_MESSAGE(tensor.written() == tensor.size(), name + " is not written exactly once");
  }
  return grads;
}

std::string describe(const Problem& p) {
  static const char* kinds[] = {"mean", "weighted", "linear", "mlp"};
  std::string text = std::string(kinds[static_cast<int>(p.kind)]) + " " + name(p.dtype) +
                     (p.packed ? " packed S=" : " S=");
  for (int32_t seqlen : p.seqlens) text += std::to_string(seqlen) + ",";
  auto field = [&](const char* name, int64_t value) {
    text += std::string(" ") + name + "=" + std::to_string(value);
  };
  field("H", p.heads);
  field("Hw", p.weight_heads);
  field("D", p.dim);
  field("l", p.block_size);
  field("d", p.block_stride);
  field("hidden", p.hidden);
  field("D_out", p.dim_out);
  field("layout", static_cast<int>(p.layout));
  return text;
}

void check_problem(Problem p, unsigned seed = 1) {
  p.fill(seed);
  check::context() = describe(p);
  const auto expected = oracle(p);
  const Executor serial = executors::serial();
  const Tensor out = forward(p, serial);
  check_close(out, expected.at("out").value, expected.at("out").scale(), "out");
  const Results grads = backward(p, serial);
  for (const auto& [name, grad] : grads)
    check_close(grad, expected.at(name).value, expected.at(name).scale(), name);
}

void test_lengths() {
  for (Kind kind : kKinds)
    for (DType dtype : kDTypes)
      for (int32_t seqlen : kLengths) {
        Problem p;
        p.kind = kind;
        p.dtype = dtype;
        p.seqlens = {seqlen, seqlen};
        p.heads = 2;
        p.dim = 8;
        p.hidden = p.dim_out = 12;
        check_problem(p);
      }
}

void test_packed() {
  for (Kind kind : kKinds)
    for (DType dtype : kDTypes)
      for (int64_t weight_heads : {1, 3}) {
        Problem p;
        p.kind = kind;
        p.dtype = dtype;
        p.seqlens = kRaggedLengths;
        p.packed = true;
        p.heads = 3;
        p.weight_heads = weight_heads;
        p.dim = 5;
        p.hidden = p.dim_out = 9;
        p.layout = weight_heads == 1 ? Layout::kPadded : Layout::kHeadsFirst;
        check_problem(p);
        p.rows_after = 40;
        check_problem(p);
      }
}

void test_layouts() {
  for (Kind kind : kKinds)
    for (DType dtype : kDTypes)
      for (Layout layout : {Layout::kPadded, Layout::kHeadsFirst, Layout::kExpanded}) {
        Problem p;
        p.kind = kind;
        p.dtype = dtype;
        p.seqlens = {113, 113};
        p.heads = 3;
        p.weight_heads = 3;
        p.dim = 7;
        p.hidden = p.dim_out = 10;
        p.layout = layout;
        check_problem(p);
      }
}

/// Widths around the tiles of the GEMMs, blocks that overlap not at all, twice or more often.
void test_widths() {
  struct Width {
    int64_t dim, hidden, dim_out;
    int32_t block_size, block_stride;
  };
  const Width widths[] = {{64, 64, 64, 32, 16}, {128, 128, 128, 32, 16}, {192, 17, 70, 32, 32},
                          {33, 65, 1, 64, 16},  {1, 1, 3, 1, 1},         {16, 100, 31, 32, 8},
                          {6, 3, 130, 15, 3},   {40, 33, 48, 4, 4}};
  for (Kind kind : kKinds)
    for (DType dtype : kDTypes)
      for (const Width& width : widths) {
        Problem p;
        p.kind = kind;
        p.dtype = dtype;
        p.seqlens = {static_cast<int32_t>(width.block_size * 3 + width.block_stride * 5 + 2)};
        p.dim = width.dim;
        p.dim_out = width.dim_out;
        p.hidden = kind == Kind::kLinear ? width.dim_out : width.hidden;
        p.block_size = width.block_size;
        p.block_stride = width.block_stride;
        check_problem(p);
      }
}

/// So many tokens that the weight gradients are summed in chunks.
void test_many_tokens() {
  for (Kind kind : kKinds)
    for (DType dtype : kDTypes) {
      Problem p;
      p.kind = kind;
      p.dtype = dtype;
      p.seqlens = {9000, 9000};
      p.dim = 2;
      p.hidden = p.dim_out = 3;
      p.block_size = 3;
      p.block_stride = 1;
      check_problem(p);
    }
}

void test_without_optional_weights() {
  for (Kind kind : kKinds)
    for (bool has_pos : {false, true})
      for (bool has_bias : {false, true}) {
        Problem p;
        p.kind = kind;
        p.dtype = DType::kFloat64;
        p.seqlens = {100};
        p.has_pos = has_pos;
        p.has_bias = has_bias;
        check_problem(p);
      }
}

/// Large pre-activations: both tails of the gelu, and no overflow in its exponentials.
void test_gelu_tails() {
  for (DType dtype : {DType::kFloat64, DType::kFloat32}) {
    Problem p;
    p.dtype = dtype;
    p.seqlens = {2000};
    p.fill(3);
    Tensor& x = p.x;
    for (int64_t i = 0; i < x.size(); ++i) x.set_flat(i, x.flat(i) * (i < x.size() / 2 ? 5 : 100));
    check::context() = describe(p) + " tails";
    const auto expected = oracle(p);
    const Tensor out = forward(p, executors::serial());
    check_close(out, expected.at("out").value, expected.at("out").scale(), "out");
    for (const auto& [name, grad] : backward(p, executors::serial()))
      check_close(grad, expected.at(name).value, expected.at(name).scale(), name);
  }
}

/// Each gradient alone: the others null.
void test_wanted_gradients() {
  for (Kind kind : kKinds) {
    Problem p;
    p.kind = kind;
    p.seqlens = {113, 113};
    p.heads = 2;
    p.fill(5);
    check::context() = describe(p) + " one gradient";
    for (const auto& [name, grad] : backward(p, executors::serial())) {
      const Results alone = backward(p, executors::serial(), name);
      CHECK_MESSAGE(alone.at(name).bytes() == grad.bytes(), name + " depends on the others");
    }
  }
}

double loss(const Problem& p) {
  const Tensor out = forward(p, executors::serial());
  double sum = 0;
  for (int64_t i = 0; i < out.size(); ++i) sum += out.flat(i) * p.dout.flat(i);
  return sum;
}

/// The kernels' gradients against their own forward, in float64.
void test_finite_differences() {
  for (Kind kind : kKinds)
    for (bool packed : {false, true}) {
      Problem p;
      p.kind = kind;
      p.dtype = DType::kFloat64;
      p.packed = packed;
      p.seqlens = packed ? std::vector<int32_t>{40, 0, 50, 33} : std::vector<int32_t>{50, 50};
      p.heads = 2;
      p.weight_heads = packed ? 2 : 1;
      p.dim = 3;
      p.fill(11);
      check::context() = describe(p) + " finite differences";
      const Results grads = backward(p, executors::serial());
      std::mt19937 random(13);
      for (const auto& [name, grad] : grads) {
        Tensor& input = name == "dx" ? p.x : p.weights.at(name.substr(1));
        for (int trial = 0; trial < 25; ++trial) {
          const int64_t i = random() % input.size();
          const double value = input.flat(i), step = 1e-5;
          input.set_flat(i, value + step);
          const double above = loss(p);
          input.set_flat(i, value - step);
          const double below = loss(p);
          input.set_flat(i, value);
          const double numeric = (above - below) / (2 * step);
          CHECK_MESSAGE(
              std::fabs(numeric - grad.flat(i)) <= 1e-7 * (1 + std::fabs(numeric)),
              name + ": " + std::to_string(grad.flat(i)) + " vs " + std::to_string(numeric));
        }
      }
    }
}

void test_thread_independence() {
  const Executor pools[] = {executors::threads(2), executors::threads(3), executors::threads(16),
                            executors::shuffled(4)};
  for (Kind kind : kKinds)
    for (DType dtype : kDTypes)
      for (bool packed : {false, true}) {
        Problem p;
        p.kind = kind;
        p.dtype = dtype;
        p.packed = packed;
        p.seqlens = packed ? kRaggedLengths : std::vector<int32_t>{5000, 5000};
        p.heads = 2;
        p.weight_heads = packed ? 2 : 1;
        p.dim = 16;
        p.hidden = p.dim_out = 20;
        if (!packed) {
          p.block_size = 4;
          p.block_stride = 1;
        }
        p.fill(17);
        check::context() = describe(p) + " threads";
        const Tensor out = forward(p, executors::serial());
        const Results grads = backward(p, executors::serial());
        for (const Executor& pool : pools) {
          CHECK(forward(p, pool).bytes() == out.bytes());
          for (const auto& [name, grad] : backward(p, pool))
            CHECK_MESSAGE(grads.at(name).bytes() == grad.bytes(), name);
        }
      }
}

void test_empty() {
  for (Kind kind : kKinds) {
    Problem p;
    p.kind = kind;
    p.seqlens = {};
    check_problem(p);  // no batch: weight gradients are zero
    p.packed = true;
    p.seqlens = {0, 0};
    check_problem(p);
    p.packed = false;
    p.seqlens = {64};
    p.heads = 0;
    check_problem(p);
  }
}

void test_errors() {
  check::context() = "errors";
  const Executor serial = executors::serial();
  auto refused = [&](Kind kind, auto change) {
    Problem p;
    p.kind = kind;
    p.heads = 2;
    p.fill(1);
    Tensor out(p.dtype, p.out_batch(), p.out_rows(), p.heads, p.out_dim());
    if (p.mlp()) {
      nsa::CompressMlpFwd params = mlp_fwd_params(p, out);
      change(params.shape);
      CHECK_THROWS(compress_mlp_fwd(params, serial), std::invalid_argument);
    } else {
      nsa::CompressPoolFwd params = pool_fwd_params(p, out);
      change(params.shape);
      CHECK_THROWS(compress_pool_fwd(params, serial), std::invalid_argument);
    }
    CHECK_EQ(out.written(), 0);
  };
  for (Kind kind : kKinds) {
    refused(kind, [](nsa::CompressShape& s) { s.block_stride = 7; });
    refused(kind, [](nsa::CompressShape& s) { s.block_stride = 0; });
    refused(kind, [](nsa::CompressShape& s) { s.block_size = -32; });
    refused(kind, [](nsa::CompressShape& s) { s.dim = 0; });
    refused(kind, [](nsa::CompressShape& s) { s.seqlen = -1; });
    refused(kind, [](nsa::CompressShape& s) { s.weight_heads = 3; });
    refused(kind, [](nsa::CompressShape& s) { s.dtype = static_cast<DType>(9); });
  }
  Problem p;
  p.fill(1);
  Tensor out(p.dtype, 1, p.out_rows(), 1, p.dim_out);
  nsa::CompressMlpFwd params = mlp_fwd_params(p, out);
  params.w2 = nullptr;
  params.hidden = 5;  // linear: must be D_out
  CHECK_THROWS(compress_mlp_fwd(params, serial), std::invalid_argument);
  params = mlp_fwd_params(p, out);
  params.w1 = nullptr;
  CHECK_THROWS(compress_mlp_fwd(params, serial), std::invalid_argument);
}

}  // namespace

int main() {
  test_lengths();
  test_packed();
  test_layouts();
  test_widths();
  test_many_tokens();
  test_without_optional_weights();
  test_gelu_tails();
  test_wanted_gradients();
  test_finite_differences();
  test_thread_independence();
  test_empty();
  test_errors();
  return check::report();
}
