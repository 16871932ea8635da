// The command line of the microbenchmarks, and the cases that it spans. No CUDA here: the parser is
// tested on any machine.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "nsa/params.h"

namespace nsa::bench {

/// A mistake on the command line; the message names the option.
struct UsageError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// How the blocks of neighbouring queries relate: drawn anew for every query; mostly kept from one
/// query to the next; the same for 64 queries in a row.
enum class Pattern { kRandom, kCoherent, kGroups };

struct HeadDims {
  int64_t qk, v;
};

/// Lists are axes: every combination is measured.
struct Options {
  std::vector<std::string> kernels;  // empty: all of them
  std::vector<int64_t> lengths{65536}, batches{1}, heads{64}, kv_heads{4};
  std::vector<HeadDims> dims{{128, 128}};
  std::vector<std::string> dtypes{"bf16"}, patterns{"random"}, backends{"auto"}, l2{"warm"};
  std::vector<std::string> compress{"mean"};
  BlockConfig config;
  int64_t repeats = 20, warmup = 3, seed = 0;
  double max_seconds = 2;  // per case; ends the repeats early
  bool breakdown = true, ceilings = true;
  std::string csv, json;
  bool list = false, help = false;
};

/// `arguments` without the program's name. Throws UsageError.
Options parse_options(const std::vector<std::string>& arguments);
std::string usage();

/// One combination of the axes, but for the state of L2.
struct Case {
  std::string kernel;
  int64_t batch, length, heads, kv_heads;
  HeadDims dims;
  std::string dtype, pattern, backend, compress;

  DType type() const { return dtype == "fp16" ? DType::kFloat16 : DType::kBFloat16; }
  Pattern selection() const {
    return pattern == "random"     ? Pattern::kRandom
           : pattern == "coherent" ? Pattern::kCoherent
                                   : Pattern::kGroups;
  }
};

/// What a benchmark of this name times.
struct KernelInfo {
  std::string name, what;
  bool compresses;  // the compression axis applies; else dtype, backend and pattern do
};
const std::vector<KernelInfo>& kernel_list();

/// All cases, axes that a kernel does not depend on at their first value. Combinations whose head
/// counts do not divide are left out. Throws UsageError where none is left.
std::vector<Case> expand(const Options& options);

}  // namespace nsa::bench
