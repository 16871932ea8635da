// Arguments, costs, selections and result files of the microbenchmarks.
#include <algorithm>
#include <cmath>
#include <set>

#include "check.h"
#include "cost.h"
#include "nsa/geometry.h"
#include "options.h"
#include "result.h"
#include "selection.h"

using namespace nsa;
using namespace nsa::bench;

namespace {

std::string usage_error(const std::vector<std::string>& arguments) {
  try {
    expand(parse_options(arguments));
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

void test_options() {
  const Options plain = parse_options({});
  CHECK(plain.kernels.empty() && plain.breakdown && plain.ceilings);
  CHECK_EQ(expand(plain).size(), kernel_list().size());

  const Options o = parse_options({"selected", "--lengths", "1000,64k", "window",
                                   "--dims=64,192:128", "--patterns", "random,groups", "--window",
                                   "256", "--max-seconds", "0.5", "--no-breakdown"});
  CHECK_EQ(o.kernels.size(), 2u);
  CHECK_EQ(o.lengths[0], 1000);
  CHECK_EQ(o.lengths[1], 65536);
  CHECK_EQ(o.dims[0].v, 64);
  CHECK_EQ(o.dims[1].qk, 192);
  CHECK_EQ(o.dims[1].v, 128);
  CHECK_EQ(o.config.window, 256);
  CHECK_EQ(o.max_seconds, 0.5);
  CHECK(!o.breakdown);
  // selected: 2 lengths x 2 dims x 2 patterns; the window does not depend on the pattern.
  CHECK_EQ(expand(o).size(), 12u);
  // Compression alone depends on its kind, and on neither pattern nor backend.
  CHECK_EQ(expand(parse_options({"compress", "--compress", "mean,mlp", "--patterns",
                                 "random,groups", "--backends", "sm80,sm90"}))
               .size(),
           2u);
  // 6 heads over 4 do not divide and are left out.
  CHECK_EQ(expand(parse_options({"select", "--heads", "6,8", "--kv-heads", "2,4"})).size(), 3u);
}

void test_mistakes() {
  for (const auto& [arguments, names] :
       std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"--lengths", "many"}, "--lengths"},
           {{"--lengths", "12x"}, "--lengths"},
           {{"--lengths", "0"}, "--lengths"},
           {{"--lengths", ""}, "--lengths"},
           {{"--lengths"}, "--lengths"},
           {{"--dims", "64:"}, "--dims"},
           {{"--patterns", "random,odd"}, "'odd'"},
           {{"--max-seconds", "-1"}, "--max-seconds"},
           {{"--max-seconds", "1s"}, "--max-seconds"},
           {{"--nothing"}, "--nothing"},
           {{"--list=1"}, "--list"},
           {{"attention"}, "'attention'"},
           {{"--block-stride", "24"}, "block_stride"},
           {{"--heads", "6", "--kv-heads", "4"}, "--kv-heads"}}) {
    check::context() = arguments[0];
    const std::string message = usage_error(arguments);
    CHECK_MESSAGE(message.find(names) != std::string::npos, "'" + message + "' names " + names);
  }
  check::context().clear();
}

/// The definitions, pair by pair.
void test_costs() {
  BlockConfig config;
  config.num_selected = 4;
  config.window = 100;
  for (const int64_t length : {1, 31, 32, 63, 64, 65, 300, 517}) {
    double compressed = 0, window = 0, selected = 0, blocks = 0;
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t c = 0; c * config.block_stride + config.block_size - 1 <= t; ++c) ++compressed;
      for (int64_t s = 0; s <= t; ++s) window += t - config.window < s;
      const int64_t own = t / config.select_size;
      // Which of the other blocks are chosen is no matter: all of them are full.
      for (int64_t j = 0; j <= own; ++j) {
        if (own - j >= config.num_selected) continue;
        ++blocks;
        for (int64_t s = j * config.select_size; s < (j + 1) * config.select_size; ++s)
          selected += s <= t;
      }
    }
    check::context() = "length " + std::to_string(length);
    CHECK_EQ(compressed_pairs(length, config), compressed);
    CHECK_EQ(window_pairs(length, config), window);
    CHECK_EQ(selected_pairs(length, config), selected);
    CHECK_EQ(block_pairs(length, config), blocks);
  }
  check::context().clear();

  Options o = parse_options({"--lengths", "4096", "--dims", "192:128"});
  for (const Case& c : expand(o)) {
    check::context() = c.kernel;
    const Cost cost = cost_of(c, o.config);
    CHECK(cost.bytes > 0);
    CHECK(cost.flops > 0 || c.kernel.rfind("compress", 0) == 0);
    CHECK_EQ(cost.gather > 0, c.kernel.rfind("selected", 0) == 0);
    if (c.kernel == "decode") {  // Tc = 255, 16 blocks of 64, 512 of the window; q and out
      CHECK_EQ(cost.flops, 2.0 * 64 * (255 + 1024 + 512) * 320);
      CHECK_EQ(cost.bytes, 2.0 * 320 * (4 * (255 + 1024 + 512) + 64));
    }
    // 64 heads; dQ: Q K, dO V, dS K; dK and dV: Q K, dO V, dS Q, P dO.
    const double window = 64 * window_pairs(4096, o.config);
    if (c.kernel != "window_bwd") continue;
    CHECK_EQ(cost.flops, 2 * window * (3 * 192 + 2 * 128));
    CHECK_EQ(part_flops(c, o.config, "bwd_dq_kernel"), 2 * window * (2 * 192 + 128));
    CHECK_EQ(part_flops(c, o.config, "bwd_dkv_kernel"), 2 * window * (2 * 192 + 2 * 128));
    CHECK_EQ(part_flops(c, o.config, "preprocess"), 0.0);
  }
  check::context().clear();
}

void test_selection() {
  const BlockConfig config;
  const int64_t batch = 2, length = 4096, heads = 2, n = config.num_selected;
  for (const Pattern pattern : {Pattern::kRandom, Pattern::kCoherent, Pattern::kGroups}) {
    const auto lists = make_selection(batch, length, heads, config, pattern, 7);
    CHECK_EQ(static_cast<int64_t>(lists.size()), batch * length * heads * n);
    bool sorted = true, complete = true, forced = true, causal = true;
    for (int64_t row = 0; row < batch * length * heads; ++row) {
      const int64_t t = row / heads % length, candidates = t / config.select_size + 1;
      const int32_t* list = lists.data() + row * n;
      const int64_t count = std::min<int64_t>(n, candidates);
      std::set<int32_t> blocks;
      for (int64_t i = 0; i < count; ++i) {
        sorted = sorted && (i == 0 || list[i - 1] < list[i]);
        causal = causal && list[i] >= 0 && list[i] < candidates;
        blocks.insert(list[i]);
      }
      for (int64_t i = count; i < n; ++i) complete = complete && list[i] == -1;
      for (int64_t j = 0; j < candidates; ++j)
        forced = forced && (!is_forced(j, t, config) || blocks.count(static_cast<int32_t>(j)));
    }
    CHECK(sorted);
    CHECK(causal);
    CHECK(complete);
    CHECK(forced);
    const double share = shared_fraction(lists, batch, length, heads, config);
    check::context() = "share " + std::to_string(share);
    // Of 45 to 61 unforced candidates 13 are picked.
    if (pattern == Pattern::kRandom) CHECK(share > 0.15 && share < 0.35);
    // 3/4 are kept, and some of the others are drawn again by chance.
    if (pattern == Pattern::kCoherent) CHECK(share > 0.74 && share < 0.85);
    if (pattern == Pattern::kGroups) CHECK_EQ(share, 1.0);
    check::context().clear();
  }
  // No query has anything to choose.
  const auto lists = make_selection(1, 64, 1, config, Pattern::kRandom, 0);
  CHECK(std::isnan(shared_fraction(lists, 1, 64, 1, config)));
}

void test_results() {
  const Spread spread = spread_of({4, 1, 3, 2, 5});
  CHECK_EQ(spread.median, 3.0);
  CHECK_EQ(spread.q1, 2.0);
  CHECK_EQ(spread.q3, 4.0);
  CHECK_EQ(spread.least, 1.0);
  CHECK_EQ(spread.most, 5.0);
  CHECK_EQ(spread_of({1, 2}).median, 1.5);

  Results results;
  results.environment.set("gpu", std::string("a \"b\"\n"));
  results.rows.push_back(Row().set("kernel", std::string("x,y")).set("ms", 0.5));
  results.rows.push_back(Row().set("seqlen", int64_t{64}).set("ms", std::nan("")).set("ms", 2.0));
  results.rows.push_back(Row().set("ms", INFINITY));
  CHECK_EQ(to_json(results),
           std::string("{\n  \"environment\": {\"gpu\": \"a \\\"b\\\"\\u000a\"},\n"
                       "  \"rows\": [\n    {\"kernel\": \"x,y\", \"ms\": 0.5},\n"
                       "    {\"seqlen\": 64, \"ms\": 2},\n    {\"ms\": null}\n"
                       "  ]\n}\n"));
  CHECK_EQ(to_csv(results.rows), std::string("kernel,ms,seqlen\n\"x,y\",0.5,\n,2,64\n,,\n"));
  CHECK_EQ(results.rows[1].number("seqlen"), 64.0);
  CHECK(std::isnan(results.rows[1].number("kernel")));
}

}  // namespace

int main() {
  test_options();
  test_mistakes();
  test_costs();
  test_selection();
  test_results();
  return check::report();
}
