#include "run.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "ceilings.h"
#include "cost.h"
#include "device.h"
#include "operators.h"

namespace nsa::bench {

namespace {

Row row_of(const Case& c, const KernelInfo& kernel, const std::string& l2) {
  Row row;
  row.set("kernel", c.kernel).set("part", "").set("batch", c.batch).set("seqlen", c.length);
  row.set("heads", c.heads).set("kv_heads", c.kv_heads);
  row.set("head_dim", c.dims.qk).set("head_dim_v", c.dims.v).set("dtype", c.dtype);
  row.set("inputs", c.pattern).set("backend", kernel.compresses ? "" : c.backend);
  row.set("compress", kernel.compresses ? c.compress : "").set("l2", l2);
  return row;
}

/// Achieved rates, and what part they are of the ceilings that were measured.
void set_rates(Row& row, const Case& c, const Cost& cost, const Ceilings& ceilings, double ms) {
  const auto set = [&](const char* rate, double amount, double unit, const char* fraction,
                       double ceiling) {
    if (amount <= 0) return;
    row.set(rate, amount / unit / ms / 1e9);
    if (ceiling > 0) row.set(fraction, amount / unit / ms / 1e9 / ceiling);
  };
  const double resident = double(c.length) * (c.dims.qk + c.dims.v) * 2;  // K and V of a head
  row.set("gflop", cost.flops / 1e9).set("gbytes", cost.bytes / 1e9);
  set("tflops", cost.flops, 1, "of_matmul", ceilings.matmul_tflops);
  set("tbps", cost.bytes, 1, "of_copy", ceilings.copy_tbps);
  if (cost.gather > 0) row.set("gather_gbytes", cost.gather / 1e9);
  set("gather_tbps", cost.gather, 1, "of_gather", ceilings.gather_tbps(resident));
}

}  // namespace

Results run(const Options& options, const std::string& command,
            const std::function<void(const Row&)>& progress) {
  Results results;
  results.environment = describe_environment(command);
  const auto add = [&](Row row) {
    for (const std::string& name : provenance()) row.set(name, *results.environment.find(name));
    results.rows.push_back(row);
    progress(results.rows.back());
  };
  const std::vector<Case> cases = expand(options);
  const Effort effort{options.repeats, options.warmup, options.max_seconds};
  Timer timer;
  std::vector<Row> measured;
  if (options.ceilings) measured = measure_ceilings(timer, effort);
  for (const Row& row : measured) add(row);
  const Ceilings ceilings(measured);

  for (const Case& c : cases) {
    const auto& kernels = kernel_list();
    const KernelInfo& kernel =
        *std::find_if(kernels.begin(), kernels.end(),
                      [&](const KernelInfo& info) { return info.name == c.kernel; });
    const Cost cost = cost_of(c, options.config);
    try {
      const std::unique_ptr<Operator> call = make_operator(c, options);
      const Launch launch = [&](cudaStream_t stream) { call->launch(stream); };
      for (const std::string& l2 : options.l2) {
        Row row = row_of(c, kernel, l2);
        const Spread spread = timer.time(launch, effort, l2 == "cold");
        set_spread(row, spread);
        set_rates(row, c, cost, ceilings, spread.median);
        const double share = call->neighbours_share();
        if (!std::isnan(share)) row.set("neighbours_share", share);
        add(row);
      }
      if (!options.breakdown) continue;
      for (const Timer::Part& part : timer.time_parts(launch, effort)) {
        Row row = row_of(c, kernel, "warm").set("part", part.name);
        set_spread(row, part.spread);
        const Cost part_cost{part_flops(c, options.config, part.name), 0, 0};
        if (part_cost.flops > 0) set_rates(row, c, part_cost, ceilings, part.spread.median);
        add(row);
      }
    } catch (const std::exception& error) {
      // An error of the device stays: nothing after it could be measured.
      if (cudaGetLastError() != cudaSuccess || cudaDeviceSynchronize() != cudaSuccess) throw;
      add(row_of(c, kernel, "").set("error", std::string(error.what())));
    }
  }
  return results;
}

}  // namespace nsa::bench
