// The kernels of the portable backward as the host sees them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/sm80/bwd_params.h"

namespace nsa::cuda::bwd {

/// RowStats of every row, and dgates.
template <class T>
void launch_bwd_preprocess(const BwdArgs& args, cudaStream_t stream);

/// dQ, the sum over the branches.
template <class T, int kDimQk, int kDimV>
void launch_bwd_dq(const DqArgs& args, cudaStream_t stream);

/// dK and dV of a plan's tasks, in place or as partial results.
template <class T, int kDimQk, int kDimV>
void launch_bwd_dkv(const DkvArgs& args, cudaStream_t stream);

/// Adds up the partial results of a plan, in the order of its tasks.
template <class T>
void launch_bwd_sum(const DkvArgs& args, cudaStream_t stream);

/// Zeroes the rows of dk_cmp and dv_cmp that hold no token of a packed batch.
template <class T>
void launch_zero_unused_rows(const BwdArgs& args, cudaStream_t stream);

/// Counts, per chunk of query rows, how often each block was chosen; then turns the counts into
/// offsets within the block's list.
void launch_count_selection(const AttnBwd& p, const InvertedIndex& index, cudaStream_t stream);
/// Writes the lists; index.begin is known by then.
void launch_fill_selection(const AttnBwd& p, const InvertedIndex& index, cudaStream_t stream);
/// The union of the lists of each query tile's tokens, blocks ascending.
void launch_union_selection(const DqArgs& args, UnionBlock* blocks, int32_t* counts,
                            cudaStream_t stream);
/// Lists the tasks of a plan; with lists also sets index.begin.
void launch_plan_key_tasks(const AttnBwd& p, const KeyPlan& plan, const InvertedIndex& index,
                           cudaStream_t stream);

}  // namespace nsa::cuda::bwd
