// Compression (docs/semantics.md, eq. 7) and its gradients straight from the definition: loops
// over every element in double, nothing shared, nothing blocked.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "tensor.h"

namespace testing {

enum class Kind { kMean, kWeighted, kLinear, kMlp };

struct Problem {
  Kind kind = Kind::kMlp;
  DType dtype = DType::kFloat32;
  std::vector<int32_t> seqlens = {64};  // all equal unless packed
  bool packed = false;
  int64_t heads = 1, weight_heads = 1, dim = 4;
  int32_t block_size = 32, block_stride = 16;
  int64_t hidden = 4, dim_out = 4;  // linear: hidden == dim_out
  bool has_pos = true, has_bias = true;
  Layout layout = Layout::kContiguous;
  int32_t rows_after = 0;  // rows of packed x that belong to no sequence

  Tensor x, dout;
  std::map<std::string, Tensor> weights;  // pos, weight, w1, b1, w2, b2: (1, Hw, rows, columns)
  std::vector<int32_t> cu_seqlens;

  bool mlp() const { return kind == Kind::kMlp || kind == Kind::kLinear; }
  bool has(const std::string& name) const { return weights.count(name) > 0; }
  int64_t tokens(int64_t seqlen) const {
    return seqlen < block_size ? 0 : (seqlen - block_size) / block_stride + 1;
  }
  int64_t total() const { return packed ? cu_seqlens.back() + rows_after : x.batch() * x.seq(); }
  int64_t out_batch() const { return packed ? 1 : static_cast<int64_t>(seqlens.size()); }
  int64_t out_rows() const {
    if (packed) return total() / block_stride;
    return seqlens.empty() ? 0 : tokens(seqlens[0]);
  }
  int64_t out_dim() const { return mlp() ? dim_out : dim; }

  void fill(unsigned seed) {
    std::mt19937 random(seed);
    cu_seqlens = {0};
    for (int32_t seqlen : seqlens) cu_seqlens.push_back(cu_seqlens.back() + seqlen);
    const int64_t rows =
        packed ? cu_seqlens.back() + rows_after : (seqlens.empty() ? 0 : seqlens[0]);
    x = Tensor(dtype, out_batch(), rows, heads, dim, layout);
    x.fill_random(random, 1);
    dout = Tensor(dtype, out_batch(), out_rows(), heads, out_dim(), layout);
    dout.fill_random(random, 1);
    const int64_t columns = block_size * dim;
    auto add = [&](const char* name, int64_t rows, int64_t columns, double scale) {
      weights[name] = Tensor(dtype, 1, weight_heads, rows, columns);
      weights[name].fill_random(random, scale);
    };
    weights.clear();
    if (has_pos && kind != Kind::kMean) add("pos", block_size, dim, 0.5);
    if (kind == Kind::kWeighted) add("weight", 1, block_size, 1);
    if (mlp()) add("w1", hidden, columns, 1.5 / std::sqrt(columns));
    if (mlp() && has_bias) add("b1", 1, hidden, 0.5);
    if (kind == Kind::kMlp) add("w2", dim_out, hidden, 1 / std::sqrt(hidden));
    if (kind == Kind::kMlp && has_bias) add("b2", 1, dim_out, 0.5);
  }
};

/// A result with the size of the terms that were summed into it, which bounds its rounding error.
struct Expected {
  std::vector<double> value, squares;
  explicit Expected(int64_t size = 0) : value(size), squares(size) {}
  void add(int64_t i, double term) {
    value[i] += term;
    squares[i] += term * term;
  }
  double scale() const {
    double largest = 0;
    for (size_t i = 0; i < value.size(); ++i)
      largest = std::max({largest, std::fabs(value[i]), std::sqrt(squares[i])});
    return largest;
  }
};

inline double gelu(double x) { return 0.5 * x * std::erfc(-x * std::sqrt(0.5)); }
inline double gelu_derivative(double x) {
  return 0.5 * std::erfc(-x * std::sqrt(0.5)) +
         x * std::exp(-0.5 * x * x) / std::sqrt(2 * 3.14159265358979323846);
}

/// out, and the gradients of sum(out * dout): "out", "dx", "dpos", "dweight", "dw1", ...
inline std::map<std::string, Expected> oracle(const Problem& p) {
  const int64_t l = p.block_size, d = p.block_stride, D = p.dim, H = p.heads;
  const int64_t hidden = p.hidden, dim_out = p.out_dim();
  std::map<std::string, Expected> result;
  result["out"] = Expected(p.dout.size());
  result["dx"] = Expected(p.x.size());
  for (const auto& [name, tensor] : p.weights) result["d" + name] = Expected(tensor.size());
  Expected &out = result["out"], &dx = result["dx"];
  auto values = [&](const char* name) {
    std::vector<double> all(p.has(name) ? p.weights.at(name).size() : 0);
    for (size_t i = 0; i < all.size(); ++i) all[i] = p.weights.at(name).flat(i);
    return all;
  };
  const std::vector<double> weight = values("weight"), pos = values("pos");
  const std::vector<double> w1 = values("w1"), b1 = values("b1");
  const std::vector<double> w2 = values("w2"), b2 = values("b2");
  auto grad = [&](const char* name) {
    return p.has(name) ? &result["d" + std::string(name)] : nullptr;
  };
  Expected *dpos = grad("pos"), *dweight = grad("weight"), *dw1 = grad("w1"), *db1 = grad("b1");
  Expected *dw2 = grad("w2"), *db2 = grad("b2");

  std::vector<double> input(l * D), dinput(l * D), pre(hidden), act(hidden), dpre(hidden);
  for (size_t sequence = 0; sequence < p.seqlens.size(); ++sequence) {
    const int64_t b = p.packed ? 0 : sequence, start = p.packed ? p.cu_seqlens[sequence] : 0;
    for (int64_t c = 0; c < p.tokens(p.seqlens[sequence]); ++c) {
      for (int64_t h = 0; h < H; ++h) {
        const int64_t hw = p.weight_heads == 1 ? 0 : h;
        const int64_t row = start / d + c;
        auto out_index = [&](int64_t o) {
          return ((b * p.dout.seq() + row) * H + h) * dim_out + o;
        };
        auto dout = [&](int64_t o) { return p.dout.at(b, row, h, o); };
        for (int64_t k = 0; k < l * D; ++k)
          input[k] =
              p.x.at(b, start + c * d + k / D, h, k % D) + (pos.empty() ? 0 : pos[hw * l * D + k]);
        std::fill(dinput.begin(), dinput.end(), 0);

        if (!p.mlp()) {
          for (int64_t k = 0; k < l * D; ++k) {
            const double w = weight.empty() ? 1.0 / l : weight[hw * l + k / D];
            out.add(out_index(k % D), w * input[k]);
            dinput[k] = w * dout(k % D);
            if (dweight) dweight->add(hw * l + k / D, dout(k % D) * input[k]);
          }
        } else {
          for (int64_t n = 0; n < hidden; ++n) {
            double sum = b1.empty() ? 0 : b1[hw * hidden + n];
            for (int64_t k = 0; k < l * D; ++k) sum += w1[(hw * hidden + n) * l * D + k] * input[k];
            pre[n] = sum;
            act[n] = gelu(sum);
            dpre[n] = 0;
          }
          for (int64_t o = 0; o < dim_out; ++o) {
            if (w2.empty()) {
              out.add(out_index(o), pre[o]);
              dpre[o] = dout(o);
              continue;
            }
            if (!b2.empty()) out.add(out_index(o), b2[hw * dim_out + o]);
            if (db2) db2->add(hw * dim_out + o, dout(o));
            for (int64_t n = 0; n < hidden; ++n) {
              const int64_t i = (hw * dim_out + o) * hidden + n;
              out.add(out_index(o), w2[i] * act[n]);
              dpre[n] += w2[i] * dout(o) * gelu_derivative(pre[n]);
              dw2->add(i, dout(o) * act[n]);
            }
          }
          for (int64_t n = 0; n < hidden; ++n) {
            if (db1) db1->add(hw * hidden + n, dpre[n]);
            for (int64_t k = 0; k < l * D; ++k) {
              const int64_t i = (hw * hidden + n) * l * D + k;
              dinput[k] += w1[i] * dpre[n];
              dw1->add(i, dpre[n] * input[k]);
            }
          }
        }
        for (int64_t k = 0; k < l * D; ++k) {
          const int64_t s = start + c * d + k / D;
          dx.add(((b * p.x.seq() + s) * H + h) * D + k % D, dinput[k]);
          if (dpos) dpos->add(hw * l * D + k, dinput[k]);
        }
      }
    }
  }
  return result;
}

}  // namespace testing
