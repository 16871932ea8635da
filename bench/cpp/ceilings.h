// What the GPU at hand can do at best, measured by kernels that do nothing else.
#pragma once

#include <vector>

#include "device.h"

namespace nsa::bench {

/// Rows with `kernel` "ceiling_*", `median_ms`, and `tflops` or `tbps`:
/// - ceiling_copy: device to device, bytes read and written;
/// - ceiling_gather: random 32 KB blocks into shared memory, one block of threads on each
///   multiprocessor, from `resident_mb` of memory; by bulk copies on sm_90, else by cp.async;
/// - ceiling_matmul: tensor core products of operands in shared memory or registers, wgmma where
///   it exists, and mma.sync.
std::vector<Row> measure_ceilings(Timer& timer, const Effort& effort);

/// The highest of each kind; gather: of the first size that holds `resident_bytes`, else the last.
struct Ceilings {
  double copy_tbps = 0, matmul_tflops = 0;
  std::vector<std::pair<double, double>> gather;  // MB, TB/s
  explicit Ceilings(const std::vector<Row>& rows);
  double gather_tbps(double resident_bytes) const;
};

}  // namespace nsa::bench
