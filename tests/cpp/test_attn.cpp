// Attention of the CPU backend against the naive oracle (attn_oracle.h).
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "attn_oracle.h"
#include "executors.h"

namespace {

using nsa::AttnBwd;
using nsa::AttnFwd;
using nsa::BlockConfig;
using nsa::DType;
using testing::Data;
using testing::Layout;
using testing::Lengths;
using testing::Problem;
using testing::Tensor;

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
