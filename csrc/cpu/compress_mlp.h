// phi as an MLP over the block (kinds `mlp` and `linear`), the forward and what the backward
// shares with it. Include a target_*.h first.
//
// The first layer is a product with the overlapping blocks of x: row c of its left operand is
// x[c*d .. c*d + l) flattened, l/d segments of d keys. The keys of a tile of 64 blocks are
// converted once, each segment a row of a buffer; the product is the sum over q of that buffer from
// row q on, times the q-th part of w1. So the (Tc, l*D) matrix never exists. pos is a constant row
// added to every block: w1 vec(x + pos) + b1 = w1 vec(x) + (w1 vec(pos) + b1).
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/compress_gelu.h"
#include "cpu/compress_gemm.h"
#include "cpu/compress_plan.h"
#include "cpu/compress_rows.h"
#include "cpu/schedule.h"

namespace nsa::cpu::NSA_CPU_TARGET {

/// The layers' extents and their row pitches in the compute type.
template <class T>
struct MlpExtents {
  int64_t depth, hidden, dim_out, dim;
  int64_t hidden_pitch, out_pitch, dim_pitch;
  int64_t segment;        // d * D
  int64_t segment_pitch;  // not a multiple of 4 KiB, where rows would share cache sets
  int64_t segments;       // of a tile of tokens

  MlpExtents(const CompressShape& shape, int64_t hidden, int64_t dim_out)
      : depth(shape.block_size * shape.dim),
        hidden(hidden),
        dim_out(dim_out),
        dim(shape.dim),
        hidden_pitch(padded(round_up_lanes<T>(hidden))),
        out_pitch(padded(round_up_lanes<T>(dim_out))),
        dim_pitch(padded(round_up_lanes<T>(shape.dim))),
        segment(shape.block_stride * shape.dim),
        segment_pitch(padded(segment) + 16),
        segments(CompressTile::kRows + shape.block_size / shape.block_stride - 1) {}
};

/// The first layer in the compute type.
template <class T>
struct FirstLayer {
  Buffer weight;  // (Hw): packed depth x hidden
  Buffer bias;    // (Hw, hidden_pitch): b1 + w1 vec(pos)

  FirstLayer(const CompressShape& shape, const MlpExtents<T>& e, const void* w1, const void* b1,
             const void* pos, const Executor& executor) {
    const int64_t size = packed_size<T>(e.depth, e.hidden), panels = num_panels<T>(e.hidden);
    weight = Buffer(shape.weight_heads * size * sizeof(T));
    bias = Buffer(shape.weight_heads * e.hidden_pitch * sizeof(T));
    const int64_t chunk = 256, chunks = (e.depth + chunk - 1) / chunk;
    for_each_item(executor, shape.weight_heads * panels * chunks, chunk * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    const int64_t begin = item % chunks * chunk, panel = item / chunks % panels;
                    const int64_t hw = item / chunks / panels;
                    pack_panel_transposed(
                        shape.dtype, w1, hw * e.hidden * e.depth, e.depth, e.depth, e.hidden, panel,
                        begin, std::min(chunk, e.depth - begin), reinterpret_cast<T*>(scratch),
                        weight.as<T>() + hw * size);
                  });
    const int64_t pitch = padded(e.depth);
    for_each_item(executor, shape.weight_heads * e.hidden_pitch, 2 * pitch * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    const int64_t n = item % e.hidden_pitch, hw = item / e.hidden_pitch;
                    T sum = 0;
                    if (n < e.hidden && b1)
                      load_row(shape.dtype, b1, hw * e.hidden + n, 1, T(1), &sum);
                    if (n < e.hidden && pos) {
                      T* w = reinterpret_cast<T*>(scratch);
                      T* p = w + pitch;
                      std::fill(w, w + 2 * pitch, T(0));
                      load_row(shape.dtype, w1, (hw * e.hidden + n) * e.depth, e.depth, T(1), w);
                      load_row(shape.dtype, pos, hw * e.depth, e.depth, T(1), p);
                      Vec<T> dot{};
                      for (int64_t k = 0; k < pitch; k += kLanes<T>)
                        dot += load(w + k) * load(p + k);
                      sum += hsum<T>(dot);
                    }
                    bias.as<T>()[item] = sum;
                  });
  }
};

/// The first layer's output for a tile of tokens of one head: rows of result, hidden_pitch wide.
/// `keys` is scratch for the tile's segments.
template <class T>
void first_layer_tile(const CompressShape& shape, const MlpExtents<T>& e, const InView& x,
                      const FirstLayer<T>& layer, const CompressSequence& sequence,
                      const CompressTile& tile, int64_t head, T* keys, T* result) {
  const int64_t hw = shape.weight_heads == 1 ? 0 : head;
  const T* weight = layer.weight.template as<T>() + hw * packed_size<T>(e.depth, e.hidden);
  const T* bias = layer.bias.template as<T>() + hw * e.hidden_pitch;
  for (int64_t i = 0; i < tile.count; ++i)
    std::copy(bias, bias + e.hidden_pitch, result + i * e.hidden_pitch);
  const int64_t d = shape.block_stride;
  for (int64_t i = 0; i < (tile.count - 1) * d + shape.block_size; ++i)
    load_row(shape.dtype, x.ptr, key_offset(x, sequence, tile.begin * d + i, head), e.dim, T(1),
             keys + i / d * e.segment_pitch + i % d * e.dim);
  for (int64_t q = 0; q < shape.block_size / d; ++q)
    multiply_add(tile.count, e.segment, keys + q * e.segment_pitch, e.segment_pitch, 1,
                 weight + q * e.segment * kPanel<T>, e.depth * kPanel<T>, e.hidden, result,
                 e.hidden_pitch);
}

template <class T>
void mlp_fwd(const CompressMlpFwd& params, const Executor& executor) {
  const CompressShape& shape = params.shape;
  const CompressPlan plan(shape);
  const MlpExtents<T> e(shape, params.hidden, params.dim_out);
  zero_unused_rows(shape, plan, params.out, e.dim_out, executor);
  if (plan.tokens == 0) return;

  const FirstLayer<T> first(shape, e, params.w1, params.b1, params.pos, executor);
  const int64_t w2_size = packed_size<T>(e.hidden, e.dim_out);
  Buffer w2, b2;
  if (params.w2) {
    const int64_t panels = num_panels<T>(e.dim_out);
    w2 = Buffer(shape.weight_heads * w2_size * sizeof(T));
    for_each_item(executor, shape.weight_heads * panels, e.hidden * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    const int64_t panel = item % panels, hw = item / panels;
                    pack_panel_transposed(shape.dtype, params.w2, hw * e.dim_out * e.hidden,
                                          e.hidden, e.hidden, e.dim_out, panel, 0, e.hidden,
                                          reinterpret_cast<T*>(scratch), w2.as<T>() + hw * w2_size);
                  });
    b2 = Buffer(shape.weight_heads * e.out_pitch * sizeof(T));
    std::fill_n(b2.as<T>(), shape.weight_heads * e.out_pitch, T(0));
    for (int64_t hw = 0; params.b2 && hw < shape.weight_heads; ++hw)
      load_row(shape.dtype, params.b2, hw * e.dim_out, e.dim_out, T(1),
               b2.as<T>() + hw * e.out_pitch);
  }

  const int64_t rows = CompressTile::kRows;
  const int64_t scratch_size = e.segments * e.segment_pitch + rows * (e.hidden_pitch + e.out_pitch);
  const int64_t items = static_cast<int64_t>(plan.token_tiles.size()) * shape.heads;
  for_each_item(executor, items, scratch_size * sizeof(T), [&](int64_t item, char* scratch) {
    const CompressTile& tile = plan.token_tiles[item / shape.heads];
    const CompressSequence& sequence = plan.sequences[tile.sequence];
    const int64_t head = item % shape.heads, hw = shape.weight_heads == 1 ? 0 : head;
    T* keys = reinterpret_cast<T*>(scratch);
    T* hidden = keys + e.segments * e.segment_pitch;
    T* result = hidden;
    int64_t pitch = e.hidden_pitch;
    first_layer_tile(shape, e, params.x, first, sequence, tile, head, keys, hidden);
    if (params.w2) {
      gelu_row(tile.count * e.hidden_pitch, hidden);
      result = hidden + rows * e.hidden_pitch;
      pitch = e.out_pitch;
      const T* bias = b2.as<T>() + hw * e.out_pitch;
      for (int64_t i = 0; i < tile.count; ++i) std::copy(bias, bias + pitch, result + i * pitch);
      multiply_add(tile.count, e.hidden, hidden, e.hidden_pitch, 1, w2.as<T>() + hw * w2_size,
                   e.hidden * kPanel<T>, e.dim_out, result, pitch);
    }
    for (int64_t i = 0; i < tile.count; ++i)
      store_row(shape.dtype, params.out.ptr,
                token_offset(params.out, sequence, tile.begin + i, head), e.dim_out, T(1),
                result + i * pitch);
  });
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
