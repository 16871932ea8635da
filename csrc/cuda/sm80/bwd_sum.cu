// dK and dV of keys that several tasks worked on: their partial results, added in the tasks' order.
#include "cuda/sm80/bwd_kernels.h"
#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm80/bwd_sequence.cuh"

namespace nsa::cuda::bwd {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerTile = 4;

template <class T>
__global__ void __launch_bounds__(kThreads) sum_partials(const __grid_constant__ DkvArgs args) {
  const AttnBwd& p = args.common.p;
  const SplitTile tile = args.plan.tiles[blockIdx.x];
  if (tile.slots == 0) return;
  const Sequence sequence = load_sequence(p.shape, tile.batch);
  const BranchBwd& branch = p.branch[args.plan.branch];
  const int dim_k = static_cast<int>(p.shape.dim_qk), dim_v = static_cast<int>(p.shape.dim_v);
  const int64_t slot_size = static_cast<int64_t>(args.plan.task_keys) * (dim_k + dim_v);
  const float* partial = args.plan.partial + tile.slot * slot_size;

  const auto add_up = [&](const float* first, const OutView& target, int dim) {
    T* dst = branch_keys(typed<T>(target), sequence, args.plan.branch, p.config) +
             tile.head * target.head;
    for (int i = (blockIdx.y * kThreads + threadIdx.x) * 4; i < tile.keys * dim;
         i += kBlocksPerTile * kThreads * 4) {
      float4 sum = *reinterpret_cast<const float4*>(first + i);
#pragma unroll 4
      for (int slot = 1; slot < tile.slots; ++slot) {
        const float4 x = *reinterpret_cast<const float4*>(first + slot * slot_size + i);
        sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
      }
      *reinterpret_cast<uint2*>(dst + (tile.key + i / dim) * target.seq + i % dim) =
          uint2{pack2<T>(sum.x, sum.y), pack2<T>(sum.z, sum.w)};
    }
  };
  add_up(partial, branch.dk, dim_k);
  add_up(partial + args.plan.task_keys * dim_k, branch.dv, dim_v);
}

}  // namespace

template <class T>
void launch_bwd_sum(const DkvArgs& args, cudaStream_t stream) {
  const int64_t tiles = args.common.p.shape.heads_kv * args.plan.groups.count * args.plan.parts;
  if (tiles == 0) return;
  launch_kernel(sum_partials<T>, "sum_partials", dim3(grid_size(tiles), kBlocksPerTile), kThreads,
                0, stream, args);
}

template void launch_bwd_sum<__nv_bfloat16>(const DkvArgs&, cudaStream_t);
template void launch_bwd_sum<__half>(const DkvArgs&, cudaStream_t);

}  // namespace nsa::cuda::bwd
