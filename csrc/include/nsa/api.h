// Entry points of the kernel library. No torch, no Python: what calls them owns the memory.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "nsa/params.h"

namespace nsa {

inline constexpr const char* kVersion = NSA_EXT_VERSION;

namespace cpu {

/// How the CPU backend runs in parallel: the caller's thread pool. `parallel_for(n, body)` calls
/// body(begin, end) over a partition of [0, n), from up to `num_threads` threads; body does not
/// throw.
struct Executor {
  int num_threads = 1;
  std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>& body)>
      parallel_for;
};

// Results do not depend on num_threads nor on the schedule: the same call gives the same bits.
// Invalid shapes throw std::invalid_argument before anything is written.
void compress_pool_fwd(const CompressPoolFwd& params, const Executor& executor);
void compress_pool_bwd(const CompressPoolBwd& params, const Executor& executor);
void compress_mlp_fwd(const CompressMlpFwd& params, const Executor& executor);
void compress_mlp_bwd(const CompressMlpBwd& params, const Executor& executor);
void attn_fwd(const AttnFwd& params, const Executor& executor);
void attn_bwd(const AttnBwd& params, const Executor& executor);

/// Why an attention call would be refused; empty where it would run.
std::vector<std::string> supports(const AttnShape& shape, const BlockConfig& config);

/// The instruction set that this machine's kernels run on: "avx512", "avx2" or "baseline".
const char* isa();

}  // namespace cpu

// Declared always, defined where the CUDA kernels are built (NSA_EXT_WITH_CUDA).
namespace cuda {

using Stream = void*;  // cudaStream_t

enum class Backend : int32_t { kAuto, kSm80, kSm90 };

/// Why a call would be refused on a GPU of compute capability `major`.`minor`; empty where it would
/// run.
std::vector<std::string> supports(const AttnShape& shape, const BlockConfig& config, int major,
                                  int minor);

// Every call runs on `stream` of the current device, allocates nothing and never synchronises.
// `workspace` is device memory of at least *_workspace bytes, 256-byte aligned, its contents
// arbitrary. CUDA errors throw std::runtime_error.
int64_t compress_pool_bwd_workspace(const CompressPoolBwd& params);
int64_t compress_mlp_fwd_workspace(const CompressMlpFwd& params);
int64_t compress_mlp_bwd_workspace(const CompressMlpBwd& params);
int64_t attn_fwd_workspace(const AttnFwd& params, Backend backend);
int64_t attn_bwd_workspace(const AttnBwd& params, Backend backend);

void compress_pool_fwd(const CompressPoolFwd& params, Stream stream);
void compress_pool_bwd(const CompressPoolBwd& params, void* workspace, Stream stream);
void compress_mlp_fwd(const CompressMlpFwd& params, void* workspace, Stream stream);
void compress_mlp_bwd(const CompressMlpBwd& params, void* workspace, Stream stream);
void attn_fwd(const AttnFwd& params, void* workspace, Stream stream, Backend backend);
void attn_bwd(const AttnBwd& params, void* workspace, Stream stream, Backend backend);

}  // namespace cuda

}  // namespace nsa
