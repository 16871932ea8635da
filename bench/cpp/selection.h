// Block lists for the selected branch, and how much neighbouring queries share in given ones.
#pragma once

#include <cstdint>
#include <vector>

#include "options.h"

namespace nsa::bench {

/// (B, S, Hkv, n) int32 as the ranking would write them: forced blocks included, ascending, -1
/// padded. The unforced ones are drawn by `pattern`, uniformly among the candidates; coherent keeps
/// each from the query before with a probability of 3/4.
std::vector<int32_t> make_selection(int64_t batch, int64_t length, int64_t kv_heads,
                                    const BlockConfig& config, Pattern pattern, uint64_t seed);

/// Share of its unforced blocks that a query has in common with the one before, over the last
/// quarter of each sequence; pairs across a block border have other forced blocks and are left out.
/// NaN where no query has a full list.
double shared_fraction(const std::vector<int32_t>& indices, int64_t batch, int64_t length,
                       int64_t kv_heads, const BlockConfig& config);

}  // namespace nsa::bench
