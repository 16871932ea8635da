// One pass over dout and the outputs of the branches: what later kernels need of every row, and the
// gradient of the gates. Also zeroes what no later kernel writes.
#include "cuda/sm80/bwd_kernels.h"
#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm80/bwd_sequence.cuh"

namespace nsa::cuda::bwd {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ __forceinline__ float dot8(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack2<T>(x[i]), v = unpack2<T>(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

/// A block of threads takes one token, kDimV / 8 lanes one of its heads.
template <class T, int kDimV>
__global__ void __launch_bounds__(kThreads) preprocess_rows(const __grid_constant__ BwdArgs args) {
  constexpr int kLanes = kDimV / 8;
  const AttnBwd& p = args.p;
  const int64_t token = blockIdx.x;  // among those of all sequences
  const bool packed = p.shape.cu_seqlens_q != nullptr;
  const int64_t batch = packed ? 0 : token / p.shape.seqlen_q;
  const int64_t row = packed ? token : token % p.shape.seqlen_q;
  const int lane = threadIdx.x % kLanes;
  const int heads = static_cast<int>(p.shape.heads_q);

  for (int base = 0; base < heads; base += kThreads / kLanes) {
    const int head = base + threadIdx.x / kLanes;
    const bool valid = head < heads;
    const auto load = [&](const InView& view) {
      const T* src = typed<T>(view).ptr + batch * view.batch + row * view.seq + head * view.head;
      return *reinterpret_cast<const uint4*>(src + lane * 8);
    };
    float delta[kNumBranches] = {};
    if (valid) {
      const uint4 dout = load(p.dout);
#pragma unroll
      for (int c = 0; c < kNumBranches; ++c)
        if (p.branch[c].enabled) delta[c] = dot8<T>(dout, load(p.branch[c].out));
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2)
#pragma unroll
      for (int c = 0; c < kNumBranches; ++c) delta[c] += __shfl_xor_sync(kFullWarp, delta[c], step);
    if (!valid || lane >= kNumBranches) continue;

    const int c = lane;  // one lane writes one branch
    const float own = c == 0 ? delta[0] : c == 1 ? delta[1] : delta[2];
    if (p.dgates.ptr) {
      const View<T> dgates = typed<T>(p.dgates);
      const T value = static_cast<T>(own);
      dgates.ptr[batch * dgates.batch + row * dgates.seq + head * dgates.head + c] = value;
    }
    if (!p.branch[c].enabled) continue;
    const View<const float> lse = typed<float>(p.branch[c].lse);
    const float value = lse.ptr[batch * lse.batch + head * lse.head + row * lse.seq];
    float gate = 1.0f;
    if (p.gates.ptr) {
      const View<const T> gates = typed<T>(p.gates);
      gate = static_cast<float>(
          gates.ptr[batch * gates.batch + row * gates.seq + head * gates.head + c]);
    }
    const bool unseen = value == -INFINITY;
    const int64_t head_kv = head / args.group, g = head % args.group;
    const float lse_log2 = unseen ? INFINITY : value * 1.4426950408889634f;
    args.stats[((c * p.shape.heads_kv + head_kv) * p.shape.total_q + token) * args.group + g] =
        RowStats{lse_log2, unseen ? 0.0f : -own, gate, lse_log2 - log2_approx(fabsf(gate))};
  }
}

/// A warp takes one row of a packed compressed tensor.
template <class T>
__global__ void zero_unused_rows(const __grid_constant__ BwdArgs args) {
  const AttnBwd& p = args.p;
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= p.shape.total_k / p.config.block_stride) return;
  // Sequences may start at the same row, all but the last of them without a token.
  int low = 0, high = static_cast<int>(p.shape.batch) - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (packed_row(p.shape.cu_seqlens_k[middle], p.config.block_stride) <= row)
      low = middle;
    else
      high = middle - 1;
  }
  const Sequence sequence = load_sequence(p.shape, low);
  const int64_t token = row - packed_row(sequence.k_first, p.config.block_stride);
  if (token < branch_length(sequence, kCompressed, p.config)) return;
  const auto zero = [&](const OutView& view, int64_t dim) {
    T* dst = static_cast<T*>(view.ptr) + row * view.seq;
    for (int64_t head = 0; head < p.shape.heads_kv; ++head)
      for (int64_t i = threadIdx.x % 32; i < dim; i += 32) dst[head * view.head + i] = T(0.0f);
  };
  zero(p.branch[kCompressed].dk, p.shape.dim_qk);
  zero(p.branch[kCompressed].dv, p.shape.dim_v);
}

}  // namespace

template <class T>
void launch_bwd_preprocess(const BwdArgs& args, cudaStream_t stream) {
  const unsigned grid = grid_size(args.p.shape.total_q);
  launch_kernel(args.p.shape.dim_v == 64 ? preprocess_rows<T, 64> : preprocess_rows<T, 128>,
                "preprocess_rows", grid, kThreads, 0, stream, args);
}

template <class T>
void launch_zero_unused_rows(const BwdArgs& args, cudaStream_t stream) {
  const int64_t rows = args.p.shape.total_k / args.p.config.block_stride;
  if (rows == 0 || args.p.shape.batch == 0) return;
  launch_kernel(zero_unused_rows<T>, "zero_unused_rows", grid_size(ceil_div<int64_t>(rows, 4)), 128,
                0, stream, args);
}

template void launch_bwd_preprocess<__nv_bfloat16>(const BwdArgs&, cudaStream_t);
template void launch_bwd_preprocess<__half>(const BwdArgs&, cudaStream_t);
template void launch_zero_unused_rows<__nv_bfloat16>(const BwdArgs&, cudaStream_t);
template void launch_zero_unused_rows<__half>(const BwdArgs&, cudaStream_t);

}  // namespace nsa::cuda::bwd
