// The query rows that a key-stationary task walks: Q and dO rows gathered into a ring of tiles in
// shared memory, with what the score derivative needs of each.
#pragma once

#include "cuda/device/tile.cuh"
#include "cuda/sm80/bwd_ptx.cuh"
#include "cuda/sm80/bwd_sequence.cuh"

namespace nsa::cuda::bwd {

inline constexpr int kRowTile = 32;  // one lane of a warp knows one row

/// Beside a tile of rows. Key ranges are relative to the task's first key.
struct RowTileInfo {
  float lse_log2[kRowTile], minus_delta[kRowTile], gate[kRowTile];
  int key_begin[kRowTile], key_end[kRowTile];
  int masked;  // whether some row does not see all of the task's 64 keys
  int unused[3];
};

/// BlockSource of the dK/dV kernel. It walks the queries of a task, first those of its list, then
/// those of its token range, G rows each, in tiles of 32 rows. A row's branch decides which keys it
/// sees and which statistics it has; all branches share the loop.
template <class T, int kDimQk, int kDimV, int kThreads>
class RowSource {
 public:
  __device__ __forceinline__ RowSource(const DkvArgs& args, const KeyTask& task,
                                       const Sequence& sequence)
      : args_(args), task_(task), sequence_(sequence), list_(args.list + task.list_begin) {
    const AttnBwd& p = args.common.p;
    const int lane = threadIdx.x % 32, group = args.common.group;
    const View<const T> q = typed<T>(p.q), dout = typed<T>(p.dout);
    const int64_t head = static_cast<int64_t>(task.head) * group;
    q_ = sequence.queries(q) + head * q.head;
    dout_ = sequence.queries(dout) + head * dout.head;
    query_ = lane / group;
    head_ = lane % group;
    query_step_ = kRowTile / group;
    head_step_ = kRowTile % group;
    token_ = token_at(query_);
  }

  __device__ __forceinline__ int tiles() const {
    return static_cast<int>(ceil_div<int64_t>(
        static_cast<int64_t>(task_.list_count + task_.token_count) * args_.common.group, kRowTile));
  }

  /// Starts the copies of the next tile. All threads call it; the caller commits.
  __device__ __forceinline__ void load(uint32_t q_tile, uint32_t dout_tile, RowTileInfo* info) {
    const AttnBwd& p = args_.common.p;
    const int token = token_, head = head_;
    const int branch = query_ < task_.list_count ? kSelected : args_.plan.range_branch;
    // The list entry of the tile after this one is asked for now, and has arrived by the next call.
    query_ += query_step_;
    head_ += head_step_;
    if (head_ >= args_.common.group) {
      head_ -= args_.common.group;
      ++query_;
    }
    token_ = token_at(query_);

    const auto row_of = [&](const T* base, const InView& view, int row) -> const T* {
      const int row_token = __shfl_sync(kFullWarp, token, row);
      const int row_head = __shfl_sync(kFullWarp, head, row);
      return row_token < 0 ? nullptr : base + row_token * view.seq + row_head * view.head;
    };
    load_tile<kDimQk, kRowTile, kThreads>(q_tile, threadIdx.x,
                                          [&](int row) { return row_of(q_, p.q, row); });
    load_tile<kDimV, kRowTile, kThreads>(dout_tile, threadIdx.x,
                                         [&](int row) { return row_of(dout_, p.dout, row); });
    // The last warp has no exponentials to take, and so the time for this.
    if (threadIdx.x < kThreads - 32) return;

    // A row that is not there has gate 0 and adds nothing, whatever it sees.
    const bool valid = token >= 0;
    KeyRange keys{0, kTaskKeys};
    if (valid) {
      keys = visible_keys(branch, sequence_.position(token), p.config);
      keys = {keys.begin - task_.key, keys.end - task_.key};
    }
    const bool whole = __all_sync(kFullWarp, keys.begin <= 0 && keys.end >= kTaskKeys);
    const int lane = threadIdx.x % 32;
    info->key_begin[lane] = keys.begin;
    info->key_end[lane] = keys.end;
    if (lane == 0) info->masked = !whole;
    const RowStats* stats = args_.common.stats +
                            ((branch * p.shape.heads_kv + task_.head) * p.shape.total_q +
                             sequence_.q_row + max(token, 0)) *
                                args_.common.group +
                            head;
    cp_async_4(smem_addr(&info->lse_log2[lane]), &stats->lse_log2, valid);
    cp_async_4(smem_addr(&info->minus_delta[lane]), &stats->minus_delta, valid);
    cp_async_4(smem_addr(&info->gate[lane]), &stats->gate, valid);
  }

 private:
  /// The query at a place of the walk, -1 past the end.
  __device__ __forceinline__ int token_at(int query) const {
    if (query < task_.list_count) return list_[query];
    query -= task_.list_count;
    return query < task_.token_count ? task_.token_begin + query : -1;
  }

  const DkvArgs& args_;
  const KeyTask& task_;
  const Sequence& sequence_;
  const int32_t* list_;
  const T *q_, *dout_;  // of the sequence's first query and the group's first head
  int query_, head_;    // of this lane's row in the next tile
  int token_;
  int query_step_, head_step_;
};

}  // namespace nsa::cuda::bwd
