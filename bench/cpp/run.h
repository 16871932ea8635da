// From a command line to rows: what the program and the Python module share.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "options.h"
#include "result.h"

namespace nsa::bench {

/// Measures every case of `options`; `progress` gets each row when it is complete. A case that the
/// kernels do not support becomes a row with `error`.
Results run(const Options& options, const std::string& command,
            const std::function<void(const Row&)>& progress);

}  // namespace nsa::bench
