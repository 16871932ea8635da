#include "cost.h"

#include <algorithm>

#include "nsa/geometry.h"

namespace nsa::bench {

namespace {

constexpr double kElement = 2;  // bytes of bf16 and fp16

/// Sizes in bytes of one batch's tensors.
struct Sizes {
  double q, out, kv, kv_cmp, lse, gates, indices;
  Sizes(const Case& c, const BlockConfig& config) {
    const double rows = double(c.batch) * c.length;
    const double tokens =
        double(c.batch) * num_compressed(c.length, config.block_size, config.block_stride);
    const double kv_row = double(c.kv_heads) * (c.dims.qk + c.dims.v) * kElement;
    q = rows * c.heads * c.dims.qk * kElement;
    out = rows * c.heads * c.dims.v * kElement;
    kv = rows * kv_row;
    kv_cmp = tokens * kv_row;
    lse = rows * c.heads * 4;
    gates = rows * c.heads * 3 * kElement;
    indices = rows * c.kv_heads * config.num_selected * 4;
  }
};

/// phi on K and V: multiply-adds of a compressed row of K and V together.
double phi_products(const Case& c, const BlockConfig& config) {
  const double dims = c.dims.qk * c.dims.qk + c.dims.v * c.dims.v;
  if (c.compress == "linear") return config.block_size * dims;
  if (c.compress == "mlp") return config.block_size * dims + dims;
  return 0;  // pooling is no matrix product
}

double pairs_of(const Case& c, const BlockConfig& config) {
  const std::string& name = c.kernel;
  const auto is = [&](const char* start) { return name.rfind(start, 0) == 0; };
  double pairs = 0;
  const bool all = name == "forward" || name == "backward";
  if (all || is("compressed") || name == "select") pairs += compressed_pairs(c.length, config);
  if (all || is("selected")) pairs += selected_pairs(c.length, config);
  if (all || is("window")) pairs += window_pairs(c.length, config);
  return pairs * c.batch * c.heads;
}

}  // namespace

double compressed_pairs(int64_t length, const BlockConfig& config) {
  double pairs = 0;
  for (int64_t t = 0; t < length; ++t)
    pairs += visible_compressed(t, config.block_size, config.block_stride);
  return pairs;
}

double window_pairs(int64_t length, const BlockConfig& config) {
  const double full = std::min<int64_t>(length, config.window);
  return full * (full + 1) / 2 + (length - full) * config.window;
}

double block_pairs(int64_t length, const BlockConfig& config) {
  double pairs = 0;
  for (int64_t t = 0; t < length; ++t)
    pairs += std::min<int64_t>(config.num_selected, t / config.select_size + 1);
  return pairs;
}

double selected_pairs(int64_t length, const BlockConfig& config) {
  double pairs = 0;
  for (int64_t t = 0; t < length; ++t) {
    const int64_t own = t / config.select_size;
    const int64_t others = std::min<int64_t>(config.num_selected - 1, own);
    pairs += others * config.select_size + t % config.select_size + 1;
  }
  return pairs;
}

Cost cost_of(const Case& c, const BlockConfig& config) {
  const Sizes size(c, config);
  const std::string& name = c.kernel;
  const double pairs = pairs_of(c, config), dk = c.dims.qk, dv = c.dims.v;
  const double forward = 2 * pairs * (dk + dv);           // Q K, P V
  const double backward = 2 * pairs * (3 * dk + 2 * dv);  // Q K, dO V, P dO, dS K, dS Q
  const double blocks = block_pairs(c.length, config) * c.batch * c.kv_heads;
  const double gather = blocks * config.select_size * (dk + dv) * kElement;
  const double gather_bwd =
      gather + blocks * (c.heads / c.kv_heads) * (dk + dv) * kElement;  // dQ, and dK and dV
  // Gradients read q, dout, and the branches' out and lse, and write dq.
  const double saved = 2 * size.q + size.out, branch = size.out + size.lse;

  if (name == "decode") {
    const double tokens = num_compressed(c.length, config.block_size, config.block_stride);
    const double keys =
        std::min<int64_t>(c.length, config.window) +
        std::min<double>(c.length, double(config.num_selected) * config.select_size);
    const double row = c.batch * (dk + dv);  // of one head
    return {2 * (tokens + keys) * c.heads * row,
            ((tokens + keys) * c.kv_heads + c.heads) * row * kElement, 0};
  }
  if (name == "compress" || name == "compress_bwd") {
    const double rows = size.kv_cmp / ((dk + dv) * kElement);
    const double flops = 2 * rows * phi_products(c, config);
    if (name == "compress") return {flops, size.kv + size.kv_cmp, 0};
    // The gradient of a mean does not depend on what was averaged.
    return {2 * flops, (c.compress == "mean" ? 1 : 2) * size.kv + size.kv_cmp, 0};
  }
  if (name == "compressed") return {forward, size.q + size.kv_cmp + branch, 0};
  if (name == "compressed_select")
    return {forward, size.q + size.kv_cmp + branch + size.indices, 0};
  if (name == "select")
    return {2 * pairs * dk, size.q + size.kv_cmp * dk / (dk + dv) + size.indices, 0};
  if (name == "selected") return {forward, size.q + size.kv + branch + size.indices, gather};
  if (name == "window") return {forward, size.q + size.kv + branch, 0};
  if (name == "forward")
    return {forward, size.q + size.kv + size.kv_cmp + size.gates + size.out + size.indices, 0};
  if (name == "compressed_bwd") return {backward, saved + branch + 2 * size.kv_cmp, 0};
  if (name == "selected_bwd")
    return {backward, saved + branch + 2 * size.kv + size.indices, gather_bwd};
  if (name == "window_bwd") return {backward, saved + branch + 2 * size.kv, 0};
  return {backward, saved + 3 * branch + 2 * (size.kv + size.kv_cmp + size.gates) + size.indices,
          0};
}

double part_flops(const Case& c, const BlockConfig& config, const std::string& part) {
  const std::string& name = c.kernel;
  if (name != "compressed_bwd" && name != "selected_bwd" && name != "window_bwd") return 0;
  const double pairs = pairs_of(c, config), dk = c.dims.qk, dv = c.dims.v;
  if (part.find("dkv") != std::string::npos) return 2 * pairs * (2 * dk + 2 * dv);
  if (part.find("dq") != std::string::npos) return 2 * pairs * (2 * dk + dv);
  return 0;
}

}  // namespace nsa::bench
