// What a benchmark has to do at least: arithmetic of the tensor cores, memory traffic, block loads.
#pragma once

#include "options.h"

namespace nsa::bench {

/// Counted over the (query, key) pairs that the definition lets through (docs/semantics.md), never
/// over the padding or the second passes of an implementation.
struct Cost {
  double flops = 0;  // 2 per multiply-add of the matrix products
  double bytes = 0;  // every input once, every result once
  // Of the selected branch by itself: K and V of its blocks for each query and kv head, shared with
  // no other query; in the backward also Q and dO of its queries for each block.
  double gather = 0;
};

/// (query, key) pairs of one query head of one sequence.
double compressed_pairs(int64_t length, const BlockConfig& config);
double window_pairs(int64_t length, const BlockConfig& config);
/// For queries whose own block is among the selected: all full but that one.
double selected_pairs(int64_t length, const BlockConfig& config);
/// (query, block) pairs of one kv head of one sequence.
double block_pairs(int64_t length, const BlockConfig& config);

Cost cost_of(const Case& c, const BlockConfig& config);

/// Of one kernel inside a backward of one branch: what a name with "dq" or "dkv" in it computes; 0
/// for others. Both recompute the probabilities, so that they add up to more than the whole.
double part_flops(const Case& c, const BlockConfig& config, const std::string& part);

}  // namespace nsa::bench
