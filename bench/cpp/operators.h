// The calls of the kernel library that are timed, each on inputs of its own.
#pragma once

#include <memory>

#include "device.h"
#include "options.h"

namespace nsa::bench {

class Operator {
 public:
  virtual ~Operator() = default;
  virtual void launch(cudaStream_t stream) = 0;
  /// Share of its unforced blocks that a query has in common with the one before; NaN where the
  /// operator neither chooses nor reads blocks.
  virtual double neighbours_share() const;
};

/// Throws what the kernel library throws where it does not support the case.
std::unique_ptr<Operator> make_compression(const Case& c, const Options& options);
std::unique_ptr<Operator> make_attention(const Case& c, const Options& options);
std::unique_ptr<Operator> make_attention_bwd(const Case& c, const Options& options);
std::unique_ptr<Operator> make_decode(const Case& c, const Options& options);

inline std::unique_ptr<Operator> make_operator(const Case& c, const Options& options) {
  if (c.kernel == "compress" || c.kernel == "compress_bwd") return make_compression(c, options);
  if (c.kernel == "decode") return make_decode(c, options);
  const bool backward = c.kernel == "backward" || c.kernel.find("_bwd") != std::string::npos;
  return backward ? make_attention_bwd(c, options) : make_attention(c, options);
}

}  // namespace nsa::bench
