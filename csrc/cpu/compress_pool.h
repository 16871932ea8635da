// phi by pooling (kinds `mean` and `weighted`) and its gradients. Include a target_*.h first.
//
// Bound by memory: each row of x is read and converted once, and meets the l/d blocks that hold it.
// pos adds a constant: sum_r weight[r] * pos[r] to every token.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/compress_gemm.h"
#include "cpu/compress_rows.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// (Hw, l) in the compute type; 1/l where there is none.
template <class T>
Buffer pool_weights(const CompressShape& shape, const void* weight) {
  const int64_t count = shape.weight_heads * shape.block_size;
  Buffer weights(count * sizeof(T));
  std::fill_n(weights.as<T>(), count, T(1) / shape.block_size);
  if (weight) load_row(shape.dtype, weight, 0, count, T(1), weights.as<T>());
  return weights;
}

/// acc[i] += scale * row[i] for n whole vectors of elements.
template <class T>
NSA_CPU_INLINE void add_scaled(int64_t n, T scale, const T* row, T* acc) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(acc + i, load(acc + i) + scale * load(row + i));
}

template <class T>
void pool_fwd(const CompressPoolFwd& params, const Executor& executor) {
  const CompressShape& shape = params.shape;
  const CompressPlan plan(shape);
  const int64_t l = shape.block_size, d = shape.block_stride, dim = shape.dim;
  const int64_t pitch = padded(round_up_lanes<T>(dim));
  zero_unused_rows(shape, plan, params.out, dim, executor);

  const Buffer weights = pool_weights<T>(shape, params.weight);
  const Buffer bias(shape.weight_heads * pitch * sizeof(T));
  const Buffer row_buffer(pitch * sizeof(T));
  std::fill_n(bias.as<T>(), shape.weight_heads * pitch, T(0));
  for (int64_t i = 0; params.pos && i < shape.weight_heads * l; ++i) {
    T* sum = bias.as<T>() + i / l * pitch;
    load_row(shape.dtype, params.pos, i * dim, dim, weights.as<T>()[i], row_buffer.as<T>());
    for (int64_t e = 0; e < dim; ++e) sum[e] += row_buffer.as<T>()[e];
  }

  const int64_t items = static_cast<int64_t>(plan.token_tiles.size()) * shape.heads;
  for_each_item(executor, items, (CompressTile::kRows + 1) * pitch * sizeof(T),
                [&](int64_t item, char* scratch) {
                  const CompressTile& tile = plan.token_tiles[item / shape.heads];
                  const CompressSequence& sequence = plan.sequences[tile.sequence];
                  const int64_t head = item % shape.heads, hw = shape.weight_heads == 1 ? 0 : head;
                  const T* weight = weights.as<T>() + hw * l;
                  const T* start = bias.as<T>() + hw * pitch;
                  T* row = reinterpret_cast<T*>(scratch);
                  T* acc = row + pitch;
                  std::fill(row, row + pitch, T(0));
                  for (int64_t i = 0; i < tile.count; ++i)
                    std::copy(start, start + pitch, acc + i * pitch);
                  // Keys ascend, so a token's sum runs over r = 0, 1, ... wherever the tiles are
                  // cut.
                  for (int64_t i = 0; i < (tile.count - 1) * d + l; ++i) {
                    const int64_t segment = i / d;
                    load_row(shape.dtype, params.x.ptr,
                             key_offset(params.x, sequence, tile.begin * d + i, head), dim, T(1),
                             row);
                    for (int64_t c = std::max<int64_t>(0, segment - plan.overlap + 1);
                         c <= std::min<int64_t>(segment, tile.count - 1); ++c)
                      add_scaled(pitch, weight[i - c * d], row, acc + c * pitch);
                  }
                  for (int64_t i = 0; i < tile.count; ++i)
                    store_row(shape.dtype, params.out.ptr,
                              token_offset(params.out, sequence, tile.begin + i, head), dim, T(1),
                              acc + i * pitch);
                });
}

/// A task owns a tile of keys: it writes their dx, and adds up dweight over the pairs (key, token)
/// of its keys and dout over the tokens that start in it. The tiles' sums are then added in order.
template <class T>
void pool_bwd(const CompressPoolBwd& params, const Executor& executor) {
  const CompressShape& shape = params.shape;
  const CompressPlan plan(shape);
  const int64_t l = shape.block_size, d = shape.block_stride, dim = shape.dim;
  const int64_t pitch = padded(round_up_lanes<T>(dim));
  const int64_t halo = plan.overlap - 1;
  const Buffer weights = pool_weights<T>(shape, params.weight);

  const int64_t items = static_cast<int64_t>(plan.segment_tiles.size()) * shape.heads;
  const int64_t sums_pitch = pitch + padded(l);  // dout, dweight
  const Buffer sums(items * sums_pitch * sizeof(T));
  const int64_t lanes = l * kLanes<T>;
  const int64_t scratch_size = (CompressTile::kRows + halo + 2) * pitch + lanes;
  for_each_item(executor, items, scratch_size * sizeof(T), [&](int64_t item, char* scratch) {
    const CompressTile& tile = plan.segment_tiles[item / shape.heads];
    const CompressSequence& sequence = plan.sequences[tile.sequence];
    const int64_t head = item % shape.heads, hw = shape.weight_heads == 1 ? 0 : head;
    const T* weight = weights.as<T>() + hw * l;
    T* key = reinterpret_cast<T*>(scratch);
    T* grad = key + pitch;
    T* dout = grad + pitch;  // rows of tokens first, first + 1, ...
    T* dots = dout + (CompressTile::kRows + halo) * pitch;
    T* dout_sum = sums.as<T>() + item * sums_pitch;
    T* dweight = dout_sum + pitch;
    const int64_t first = std::max<int64_t>(0, tile.begin - halo);
    const int64_t last = std::min<int64_t>(tile.begin + tile.count, sequence.tokens);
    std::fill(scratch, scratch + scratch_size * sizeof(T), 0);
    std::fill(dout_sum, dout_sum + pitch, T(0));
    for (int64_t c = first; c < last; ++c) {
      T* row = dout + (c - first) * pitch;
      load_row(shape.dtype, params.dout.ptr, token_offset(params.dout, sequence, c, head), dim,
               T(1), row);
      if (c >= tile.begin) add_scaled(pitch, T(1), row, dout_sum);
    }

    const int64_t keys_end = std::min((tile.begin + tile.count) * d, sequence.rows);
    for (int64_t s = tile.begin * d; s < keys_end; ++s) {
      const int64_t c_begin = std::max<int64_t>(0, s / d - halo);
      const int64_t c_end = std::min<int64_t>(s / d + 1, sequence.tokens);
      std::fill(grad, grad + pitch, T(0));
      if (params.dweight && c_begin < c_end)
        load_row(shape.dtype, params.x.ptr, key_offset(params.x, sequence, s, head), dim, T(1),
                 key);
      for (int64_t c = c_begin; c < c_end; ++c) {
        const T* row = dout + (c - first) * pitch;
        const int64_t r = s - c * d;
        add_scaled(pitch, weight[r], row, grad);
        if (params.dweight) {
          Vec<T> dot = load(dots + r * kLanes<T>);
          for (int64_t e = 0; e < pitch; e += kLanes<T>) dot += load(row + e) * load(key + e);
          store(dots + r * kLanes<T>, dot);
        }
      }
      if (params.dx.ptr)
        store_row(shape.dtype, params.dx.ptr, key_offset(params.dx, sequence, s, head), dim, T(1),
                  grad);
    }
    for (int64_t r = 0; r < l; ++r) dweight[r] = hsum<T>(load(dots + r * kLanes<T>));
  });

  if (!params.dweight && !params.dpos) return;
  for_each_item(executor, shape.weight_heads, (sums_pitch + pitch) * sizeof(T),
                [&](int64_t hw, char* scratch) {
                  T* total = reinterpret_cast<T*>(scratch);  // dout, dweight
                  T* dweight = total + pitch;
                  T* row = total + sums_pitch;
                  std::fill(total, total + sums_pitch, T(0));
                  for (int64_t item = 0; item < items; ++item) {
                    if (shape.weight_heads != 1 && item % shape.heads != hw) continue;
                    const T* part = sums.as<T>() + item * sums_pitch;
                    for (int64_t i = 0; i < pitch + l; ++i) total[i] += part[i];
                  }
                  if (params.dweight) {
                    for (int64_t r = 0; params.pos && r < l; ++r) {
                      load_row(shape.dtype, params.pos, (hw * l + r) * dim, dim, T(1), row);
                      for (int64_t e = 0; e < dim; ++e) dweight[r] += row[e] * total[e];
                    }
                    store_row(shape.dtype, params.dweight, hw * l, l, T(1), dweight);
                  }
                  for (int64_t r = 0; params.dpos && r < l; ++r)
                    store_row(shape.dtype, params.dpos, (hw * l + r) * dim, dim,
                              weights.as<T>()[hw * l + r], total);
                });
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
