// Copies keys and values into the layout of the micro-kernel (KeyPack in attn_plan.h). Include a
// target_*.h first.
#pragma once

#include "cpu/attn_plan.h"
#include "cpu/dtype.h"
#include "cpu/gemm.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// Rows [0, rows) of `src` as panels of a (dim, padded) matrix, zero past `rows`.
template <class T>
void pack_transposed(DType dtype, const void* src, const RowWalk& walk, int64_t rows,
                     int64_t padded, int64_t dim, T* dst, T* row) {
  for (int64_t first = 0; first < padded; first += kPanel<T>) {
    const int64_t width = padded - first < kPanel<T> ? padded - first : kPanel<T>;
    T* panel = dst + first * dim;
    for (int64_t r = 0; r < width; ++r) {
      if (first + r < rows) {
        load_row(dtype, src, walk.at(first + r), dim, T(1), row);
        for (int64_t k = 0; k < dim; ++k) panel[k * width + r] = row[k];
      } else {
        for (int64_t k = 0; k < dim; ++k) panel[k * width + r] = 0;
      }
    }
  }
}

/// Rows [0, rows) of `src` as rows of `ld` elements, zero past `rows` and past `dim`.
template <class T>
void pack_rows(DType dtype, const void* src, const RowWalk& walk, int64_t rows, int64_t padded,
               int64_t dim, int64_t ld, T scale, T* dst) {
  for (int64_t r = 0; r < padded; ++r, dst += ld) {
    const int64_t valid = r < rows ? dim : 0;
    if (valid) load_row(dtype, src, walk.at(r), dim, scale, dst);
    for (int64_t k = valid; k < ld; ++k) dst[k] = 0;
  }
}

/// The parts of one block of a branch's keys; a null destination is not wanted. `row` is scratch of
/// max(Dk, Dv) elements.
template <class T>
struct BlockParts {
  T *keys_t, *values, *values_t, *keys;
};

template <class T>
void pack_block(const AttnPlan& plan, int branch, int64_t sequence, int64_t head, int64_t begin,
                int64_t padded, int64_t keys, const BlockParts<T>& to, T* row) {
  const Sequence& s = plan.sequences[sequence];
  const DType dtype = plan.shape.dtype;
  const InView &k = plan.k[branch], &v = plan.v[branch];
  const RowWalk k_at = plan.rows(k, branch, s, head, begin);
  const RowWalk v_at = plan.rows(v, branch, s, head, begin);
  const int64_t dim_qk = plan.shape.dim_qk, dim_v = plan.shape.dim_v;
  if (to.keys_t) pack_transposed(dtype, k.ptr, k_at, keys, padded, dim_qk, to.keys_t, row);
  if (to.values_t) pack_transposed(dtype, v.ptr, v_at, keys, padded, dim_v, to.values_t, row);
  if (to.values) pack_rows(dtype, v.ptr, v_at, keys, padded, dim_v, plan.ld_v, T(1), to.values);
  if (to.keys) pack_rows(dtype, k.ptr, k_at, keys, padded, dim_qk, plan.ld_qk, T(1), to.keys);
}

/// Where the parts of key `offset` of a block lie.
template <class T>
BlockParts<T> parts_at(const AttnPlan& plan, const KeyPack& pack, int64_t slot, int64_t offset) {
  const int64_t key = slot * pack.padded + offset;
  const int64_t row_size[4] = {plan.shape.dim_qk, plan.ld_v, plan.shape.dim_v, plan.ld_qk};
  T* at[4];
  for (int i = 0; i < 4; ++i) {
    at[i] = pack.part[i] ? static_cast<T*>(pack.part[i]) + key * row_size[i] : nullptr;
  }
  return {at[0], at[1], at[2], at[3]};
}

/// Keys of a branch in a sequence.
inline int64_t branch_length(const Sequence& s, int branch) {
  return branch == kCompressed ? s.len_cmp : s.len_k;
}

template <class T>
void pack_item(const AttnPlan& plan, const PackItem& item, char* scratch) {
  const KeyPack& pack = plan.pack[item.branch];
  const int64_t length = branch_length(plan.sequences[item.sequence], item.branch);
  for (int64_t block = item.begin; block < item.end; ++block) {
    const int64_t begin = block * pack.block;
    const int64_t keys = length - begin < pack.block ? length - begin : pack.block;
    const BlockParts<T> to = parts_at<T>(plan, pack, pack.slot(item.sequence, item.head, block), 0);
    pack_block(plan, item.branch, item.sequence, item.head, begin, pack.padded, keys, to,
               reinterpret_cast<T*>(scratch));
  }
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
