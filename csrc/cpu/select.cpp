#include "cpu/select.h"

#include <algorithm>

namespace nsa::cpu {

namespace {

/// Orders a heap with the first block to give up on top: the least important one and, of equals,
/// the one of the highest index.
template <class T>
struct Better {
  bool operator()(const Ranked<T>& a, const Ranked<T>& b) const {
    return a.importance > b.importance || (a.importance == b.importance && a.block < b.block);
  }
};

template <class T>
struct ByBlock {
  bool operator()(const Ranked<T>& a, const Ranked<T>& b) const { return a.block < b.block; }
};

}  // namespace

template <class T>
void select_blocks(const T* importance, int64_t t, const BlockConfig& config, int32_t count,
                   Ranked<T>* heap, int32_t* row) {
  const int64_t candidates = t < 0 ? 0 : t / config.select_size + 1;
  if (candidates <= count) {
    for (int64_t j = 0; j < count; ++j) row[j] = static_cast<int32_t>(j < candidates ? j : -1);
    return;
  }
  // More candidates than count >= num_init + num_local: the forced blocks are a head and a tail
  // that do not meet, and the others compete for what they leave.
  const int32_t begin = config.num_init;
  const int32_t end = static_cast<int32_t>(candidates - config.num_local);
  const int32_t places = count - config.num_init - config.num_local;
  for (int32_t j = 0; j < begin; ++j) *row++ = j;
  if (places > 0) {
    for (int32_t j = 0; j < places; ++j) heap[j] = {importance[begin + j], begin + j};
    std::make_heap(heap, heap + places, Better<T>());
    for (int32_t j = begin + places; j < end; ++j) {
      if (!(importance[j] > heap->importance)) continue;  // an equal one of higher index loses
      std::pop_heap(heap, heap + places, Better<T>());
      heap[places - 1] = {importance[j], j};
      std::push_heap(heap, heap + places, Better<T>());
    }
    std::sort(heap, heap + places, ByBlock<T>());
    for (int32_t j = 0; j < places; ++j) *row++ = heap[j].block;
  }
  for (int32_t j = end; j < candidates; ++j) *row++ = j;
}

template void select_blocks(const float*, int64_t, const BlockConfig&, int32_t, Ranked<float>*,
                            int32_t*);
template void select_blocks(const double*, int64_t, const BlockConfig&, int32_t, Ranked<double>*,
                            int32_t*);

}  // namespace nsa::cpu
