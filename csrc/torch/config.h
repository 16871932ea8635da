// NSAConfig's list of integers, as the operators' schemas carry it.
#pragma once

#include <vector>

#include "nsa/geometry.h"
#include "torch/tensors.h"

namespace nsa::binding {

/// [block_size, block_stride, select_size, num_selected, num_init, num_local, window]
inline BlockConfig to_config(const std::vector<int64_t>& list) {
  STD_TORCH_CHECK(list.size() == 7, "config must have 7 entries, got ", list.size());
  for (int64_t value : list) {
    STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, "config entries must fit in int32, got ",
                    value);
  }
  BlockConfig config;
  config.block_size = static_cast<int32_t>(list[0]);
  config.block_stride = static_cast<int32_t>(list[1]);
  config.select_size = static_cast<int32_t>(list[2]);
  config.num_selected = static_cast<int32_t>(list[3]);
  config.num_init = static_cast<int32_t>(list[4]);
  config.num_local = static_cast<int32_t>(list[5]);
  config.window = static_cast<int32_t>(list[6]);
  return config;
}

}  // namespace nsa::binding
