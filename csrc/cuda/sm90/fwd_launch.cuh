// Launch of the Hopper forward: tensor maps, tile counts, one block per multiprocessor.
#pragma once

#include <algorithm>

#include "cuda/common.h"
#include "cuda/device/pdl.cuh"
#include "cuda/sm90/fwd.h"
#include "cuda/sm90/fwd_kernel.cuh"
#include "cuda/sm90/tensor_map.h"

namespace nsa::cuda::sm90 {

template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    fwd_kernel(const __grid_constant__ FwdArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // other targets get an empty body that is never launched
  run_block<Shape>(args, dynamic_shared_memory());
#endif
}

/// Chooses the tokens of a tile and what is kept of the ring beside the walk's own memory; returns
/// the kernel's shared memory.
template <class Shape>
int64_t plan_shared_memory(FwdArgs& args) {
  constexpr int64_t kLimit = 227 * 1024;
  // A K, a V, and one more underway; lists take pairs of them.
  constexpr int kLeast = Shape::kWalk == Walk::kList ? 4 : 3;
  FwdParams& p = args.p;
  p.tile_tokens = Shape::kRows >> p.log2_group;
  // Token membership of a list's block is a 32-bit mask.
  if (Shape::kWalk == Walk::kList) p.tile_tokens = std::min(p.tile_tokens, 32);
  for (;; p.tile_tokens /= 2) {
    p.sort_size = 1;
    while (p.sort_size < p.tile_tokens * p.index_count) p.sort_size *= 2;
    int64_t extra = 0;
    if (Shape::kWalk == Walk::kList) extra = kListBuffers * BlockList::buffer_bytes(p.sort_size);
    if (Shape::kWalk == Walk::kRank) extra = Ranker<Shape>::kSharedBytes;
    const int64_t stages = (kLimit - FwdBlock<Shape>::smem_bytes(0, extra)) / Shape::kTileBytes;
    if (stages < kLeast && p.tile_tokens > 1) continue;
    args.stages = static_cast<int>(std::min<int64_t>(stages, kMaxStages));
    if (Shape::kWalk == Walk::kList) args.stages &= ~1;  // V in the slot after its K
    return FwdBlock<Shape>::smem_bytes(args.stages, extra);
  }
}

template <class Shape>
void launch_shape(const AttnShape& shape, const FwdParams& params, void* workspace,
                  cudaStream_t stream) {
  FwdArgs args{};
  args.p = params;
  args.scores = static_cast<char*>(workspace);
  const int64_t bytes = plan_shared_memory<Shape>(args);
  FwdParams& p = args.p;
  p.tiles = ceil_div(p.seqlen_q, p.tile_tokens);
  args.jobs = int64_t{p.tiles} * p.batch * p.heads_kv;
  const bool packed = shape.cu_seqlens_q != nullptr;
  const int64_t batch = packed ? 1 : shape.batch;
  int64_t keys = packed ? shape.total_k : shape.seqlen_k;
  if (p.branch == kCompressed)
    keys = packed ? packed_row(shape.total_k, p.config.block_stride)
                  : num_compressed(shape.seqlen_k, p.config.block_size, p.config.block_stride);
  if (args.jobs == 0 || shape.total_q == 0) return;
  const DType dtype = shape.dtype;
  args.q = make_tensor_map(p.q.ptr, dtype, shape.dim_qk,
                           {{p.group, p.q.head, 1 << p.log2_group},
                            {shape.heads_kv, p.group * p.q.head, 1},
                            {packed ? shape.total_q : shape.seqlen_q, p.q.seq, 64 >> p.log2_group},
                            {batch, p.q.batch, 1}});
  // No keys at all: no tile is loaded, and a map of nothing cannot be made.
  const auto map = [&](const InView& view, int64_t dim) {
    if (keys == 0 || view.ptr == nullptr) return CUtensorMap{};
    return make_tensor_map(view.ptr, dtype, dim,
                           {{shape.heads_kv, view.head, 1},
                            {keys, view.seq, Shape::kTileKeys / Shape::kQuarters, Shape::kQuarters},
                            {batch, view.batch, 1}});
  };
  args.k = map(p.k, shape.dim_qk);
  args.v = map(p.v, shape.dim_v);

  args.score_tiles = BlockScores::tiles(p);
  args.reach = p.config.block_size > p.config.block_stride ? 2.0f : 1.0f;
  const unsigned blocks = grid_size(std::min<int64_t>(args.jobs, multiprocessor_count()));
  // With an output of this call before it, a range runs beside that branch's end.
  if (Shape::kWalk == Walk::kList || (Shape::kWalk == Walk::kRange && p.earlier[0].ptr))
    launch_overlapping(fwd_kernel<Shape>, "sm90::fwd_kernel", blocks, Shape::kThreads, bytes,
                       stream, args);
  else
    launch_kernel(fwd_kernel<Shape>, "sm90::fwd_kernel", blocks, Shape::kThreads, bytes, stream,
                  args);
}

template <class T, int kDk, int kDv>
void launch_fwd(const AttnShape& shape, FwdParams p, void* workspace, cudaStream_t stream) {
  if (p.branch == kSelected) {
    launch_shape<FwdShape<T, kDk, kDv, Walk::kList>>(shape, p, workspace, stream);
  } else if (p.branch == kCompressed && p.block_indices.ptr != nullptr) {
    launch_shape<FwdShape<T, kDk, kDv, Walk::kRank>>(shape, p, workspace, stream);
  } else {
    launch_shape<FwdShape<T, kDk, kDv, Walk::kRange>>(shape, p, workspace, stream);
  }
}

}  // namespace nsa::cuda::sm90
