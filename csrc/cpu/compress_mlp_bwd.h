// Gradients of phi as an MLP. Include a target_*.h first.
//
// With pre = w1 vec(x + pos) + b1, act = gelu(pre) and dpre the gradient at pre, of all tokens:
//   1. a tile of tokens: pre again, dpre = (w2^T dout) gelu'(pre), both kept in the compute type
//      (Tc x hidden: O(S)); their column sums, one partial sum a tile;
//   2. a tile of keys: dx[s*d + r] = sum_q w1[:, q*d + r]^T dpre[s - q], over the l/d blocks that
//      hold the key: gathered, never scattered, so no two tasks write one row;
//   3. dw1[:, r] = sum_c dpre[c] x[c*d + r]^T, and dw2 likewise: a task owns a position r of the
//      block and walks the tokens in order. Only a long batch is cut, into chunks that depend on
//      nothing but its lengths, so that the bits don't depend on the threads.
// pos needs no pass of its own: dpos = w1^T db1, and dw1 gains db1 pos^T.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/compress_mlp.h"

namespace nsa::cpu::NSA_CPU_TARGET {

template <class T>
class MlpBwd {
 public:
  MlpBwd(const CompressMlpBwd& params, const Executor& executor)
      : p_(params),
        shape_(params.shape),
        executor_(executor),
        plan_(params.shape),
        e_(params.shape, params.hidden, params.dim_out),
        tiles_(plan_.token_tiles.size()) {
    // A chunk of tokens for the weight gradients is at least 64 tiles of 64 tokens: enough work to
    // pay for one more partial gradient.
    num_chunks_ = std::clamp<int64_t>(tiles_ / 64, 1, 8);
    chunk_tiles_ = (tiles_ + num_chunks_ - 1) / num_chunks_;
  }

  void run() {
    token_pass();
    reduce_biases();
    if (p_.dx.ptr) input_gradient();
    if (p_.dpos) position_gradient();
    if (p_.dw1) first_weight_gradient();
    if (p_.dw2) second_weight_gradient();
  }

 private:
  int64_t weight_head(int64_t head) const { return shape_.weight_heads == 1 ? 0 : head; }

  /// First element of a token's row in dpre_ and act_.
  int64_t token_row(int64_t head, int64_t slot) const {
    return (head * plan_.tokens + slot) * e_.hidden_pitch;
  }

  // Pass 1.
  void token_pass() {
    const int64_t state = shape_.heads * plan_.tokens * e_.hidden_pitch * sizeof(T);
    dpre_ = Buffer(state);
    if (p_.dw2) act_ = Buffer(state);
    sum_pitch_ = e_.hidden_pitch + e_.out_pitch;
    sums_ = Buffer(tiles_ * shape_.heads * sum_pitch_ * sizeof(T));
    if (plan_.tokens == 0) return;

    if (!p_.w2) {
      for_each_item(executor_, tiles_ * shape_.heads, 0, [&](int64_t item, char*) {
        const CompressTile& tile = plan_.token_tiles[item / shape_.heads];
        const CompressSequence& sequence = plan_.sequences[tile.sequence];
        const int64_t head = item % shape_.heads;
        T* dpre = dpre_.as<T>() + token_row(head, sequence.slot + tile.begin);
        load_dout(sequence, tile, head, dpre, e_.hidden_pitch);
        column_sums(tile.count, e_.hidden_pitch, dpre, sums_.as<T>() + item * sum_pitch_);
      });
      return;
    }

    const FirstLayer<T> first(shape_, e_, p_.w1, p_.b1, p_.pos, executor_);
    const int64_t w2_size = packed_size<T>(e_.dim_out, e_.hidden);
    const Buffer w2(shape_.weight_heads * w2_size * sizeof(T));
    for_each_item(executor_, shape_.weight_heads * e_.dim_out, 0, [&](int64_t item, char*) {
      const int64_t o = item % e_.dim_out, hw = item / e_.dim_out;
      pack_row(shape_.dtype, p_.w2, item * e_.hidden, e_.dim_out, e_.hidden, o,
               w2.as<T>() + hw * w2_size);
    });
    const int64_t rows = CompressTile::kRows;
    const int64_t scratch_size =
        e_.segments * e_.segment_pitch + rows * (e_.hidden_pitch + e_.out_pitch);
    for_each_item(executor_, tiles_ * shape_.heads, scratch_size * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    const CompressTile& tile = plan_.token_tiles[item / shape_.heads];
                    const CompressSequence& sequence = plan_.sequences[tile.sequence];
                    const int64_t head = item % shape_.heads;
                    T* keys = reinterpret_cast<T*>(scratch);
                    T* pre = keys + e_.segments * e_.segment_pitch;
                    T* dout = pre + rows * e_.hidden_pitch;
                    const int64_t row = token_row(head, sequence.slot + tile.begin);
                    const int64_t size = tile.count * e_.hidden_pitch;
                    T* dpre = dpre_.as<T>() + row;
                    T* sums = sums_.as<T>() + item * sum_pitch_;

                    first_layer_tile(shape_, e_, p_.x, first, sequence, tile, head, keys, pre);
                    load_dout(sequence, tile, head, dout, e_.out_pitch);
                    std::fill(dpre, dpre + size, T(0));
                    multiply_add(tile.count, e_.dim_out, dout, e_.out_pitch, 1,
                                 w2.as<T>() + weight_head(head) * w2_size, e_.dim_out * kPanel<T>,
                                 e_.hidden, dpre, e_.hidden_pitch);
                    gelu_backward_row(size, pre, dpre);
                    if (p_.dw2) std::copy(pre, pre + size, act_.as<T>() + row);
                    column_sums(tile.count, e_.hidden_pitch, dpre, sums);
                    column_sums(tile.count, e_.out_pitch, dout, sums + e_.hidden_pitch);
                  });
  }

  /// dout of a tile, its padding zero.
  void load_dout(const CompressSequence& sequence, const CompressTile& tile, int64_t head, T* rows,
                 int64_t pitch) const {
    for (int64_t i = 0; i < tile.count; ++i) {
      T* row = rows + i * pitch;
      load_row(shape_.dtype, p_.dout.ptr, token_offset(p_.dout, sequence, tile.begin + i, head),
               e_.dim_out, T(1), row);
      std::fill(row + e_.dim_out, row + pitch, T(0));
    }
  }

  static void column_sums(int64_t count, int64_t pitch, const T* rows, T* sums) {
    std::fill(sums, sums + pitch, T(0));
    for (int64_t i = 0; i < count; ++i)
      for (int64_t n = 0; n < pitch; ++n) sums[n] += rows[i * pitch + n];
  }

  /// db1 and db2 in the compute type, from the tiles' partial sums. There may be very many of those
  /// (one for each short sequence): they are added in double.
  void reduce_biases() {
    bias_grads_ = Buffer(shape_.weight_heads * sum_pitch_ * sizeof(T));
    for_each_item(executor_, shape_.weight_heads, sum_pitch_ * sizeof(double),
                  [&](int64_t hw, char* scratch) {
                    double* wide = reinterpret_cast<double*>(scratch);
                    std::fill(wide, wide + sum_pitch_, 0.0);
                    const int64_t used = p_.w2 ? sum_pitch_ : e_.hidden_pitch;
                    for (int64_t item = 0; item < tiles_ * shape_.heads; ++item) {
                      if (weight_head(item % shape_.heads) != hw) continue;
                      const T* sums = sums_.as<T>() + item * sum_pitch_;
                      for (int64_t n = 0; n < used; ++n) wide[n] += sums[n];
                    }
                    T* total = bias_grads_.as<T>() + hw * sum_pitch_;
                    for (int64_t n = 0; n < sum_pitch_; ++n) total[n] = static_cast<T>(wide[n]);
                    if (p_.db1)
                      store_row(shape_.dtype, p_.db1, hw * e_.hidden, e_.hidden, T(1), total);
                    if (p_.db2)
                      store_row(shape_.dtype, p_.db2, hw * e_.dim_out, e_.dim_out, T(1),
                                total + e_.hidden_pitch);
                  });
  }

  const T* db1(int64_t hw) const { return bias_grads_.as<T>() + hw * sum_pitch_; }

  // Pass 2.
  void input_gradient() {
    // One packed operand, hidden x D, for each position of the block.
    const int64_t size = packed_size<T>(e_.hidden, e_.dim), l = shape_.block_size;
    const Buffer w1(shape_.weight_heads * l * size * sizeof(T));
    for_each_item(executor_, shape_.weight_heads * l, 0, [&](int64_t item, char*) {
      const int64_t r = item % l, hw = item / l;
      for (int64_t n = 0; n < e_.hidden; ++n)
        pack_row(shape_.dtype, p_.w1, (hw * e_.hidden + n) * e_.depth + r * e_.dim, e_.hidden,
                 e_.dim, n, w1.as<T>() + item * size);
    });

    const int64_t d = shape_.block_stride;
    const int64_t items = static_cast<int64_t>(plan_.segment_tiles.size()) * shape_.heads;
    for_each_item(
        executor_, items, CompressTile::kRows * e_.dim_pitch * sizeof(T),
        [&](int64_t item, char* scratch) {
          const CompressTile& tile = plan_.segment_tiles[item / shape_.heads];
          const CompressSequence& sequence = plan_.sequences[tile.sequence];
          const int64_t head = item % shape_.heads;
          T* dx = reinterpret_cast<T*>(scratch);
          for (int64_t r = 0; r < d; ++r) {
            std::fill(dx, dx + tile.count * e_.dim_pitch, T(0));
            for (int64_t q = 0; q < plan_.overlap; ++q) {
              // Segment s holds position q*d + r of token s - q, where there is such a token.
              const int64_t begin = std::max<int64_t>(0, q - tile.begin);
              const int64_t end = std::min<int64_t>(tile.count, sequence.tokens + q - tile.begin);
              if (begin >= end) continue;
              const int64_t token = sequence.slot + tile.begin + begin - q;
              multiply_add(end - begin, e_.hidden, dpre_.as<T>() + token_row(head, token),
                           e_.hidden_pitch, 1,
                           w1.as<T>() + (weight_head(head) * l + q * d + r) * size,
                           e_.hidden * kPanel<T>, e_.dim, dx + begin * e_.dim_pitch, e_.dim_pitch);
            }
            for (int64_t i = 0; i < tile.count; ++i) {
              const int64_t row = (tile.begin + i) * d + r;
              if (row < sequence.rows)
                store_row(shape_.dtype, p_.dx.ptr, key_offset(p_.dx, sequence, row, head), e_.dim,
                          T(1), dx + i * e_.dim_pitch);
            }
          }
        });
  }

  void position_gradient() {
    for_each_item(executor_, shape_.weight_heads * shape_.block_size, 2 * e_.dim_pitch * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    const int64_t r = item % shape_.block_size, hw = item / shape_.block_size;
                    T* sum = reinterpret_cast<T*>(scratch);
                    T* w = sum + e_.dim_pitch;
                    std::fill(sum, sum + e_.dim, T(0));
                    for (int64_t n = 0; n < e_.hidden; ++n) {
                      load_row(shape_.dtype, p_.w1, (hw * e_.hidden + n) * e_.depth + r * e_.dim,
                               e_.dim, db1(hw)[n], w);
                      for (int64_t i = 0; i < e_.dim; ++i) sum[i] += w[i];
                    }
                    store_row(shape_.dtype, p_.dpos, item * e_.dim, e_.dim, T(1), sum);
                  });
  }

  // Pass 3.

  /// result[n][:] = sum over the tokens of chunk `chunk` of left[token][n] * right row of the
  /// token, for n < hidden: `offset(sequence, c, head)` says where in `right` that row of `columns`
  /// lies.
  template <class Offset>
  void outer_product(int64_t chunk, int64_t hw, const T* left, const void* right, int64_t columns,
                     const Offset& offset, T* packed, T* result) const {
    const int64_t pitch = padded(round_up_lanes<T>(columns));
    std::fill(result, result + e_.hidden * pitch, T(0));
    const int64_t begin = chunk * chunk_tiles_, end = std::min(tiles_, begin + chunk_tiles_);
    for (int64_t t = begin; t < end; ++t) {
      const CompressTile& tile = plan_.token_tiles[t];
      const CompressSequence& sequence = plan_.sequences[tile.sequence];
      for (int64_t head = 0; head < shape_.heads; ++head) {
        if (weight_head(head) != hw) continue;
        for (int64_t i = 0; i < tile.count; ++i)
          pack_row(shape_.dtype, right, offset(sequence, tile.begin + i, head), tile.count, columns,
                   i, packed);
        multiply_add(e_.hidden, tile.count, left + token_row(head, sequence.slot + tile.begin), 1,
                     e_.hidden_pitch, packed, tile.count * kPanel<T>, columns, result, pitch);
      }
    }
  }

  void first_weight_gradient() {
    const int64_t l = shape_.block_size, parts = shape_.weight_heads * l;
    const int64_t size = e_.hidden * e_.dim_pitch;  // of the gradient of one position
    const Buffer partial(num_chunks_ * parts * size * sizeof(T));
    for_each_item(executor_, num_chunks_ * parts,
                  packed_size<T>(CompressTile::kRows, e_.dim) * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    const int64_t r = item % l, hw = item / l % shape_.weight_heads;
                    outer_product(
                        item / parts, hw, dpre_.as<T>(), p_.x.ptr, e_.dim,
                        [&](const CompressSequence& sequence, int64_t c, int64_t head) {
                          return key_offset(p_.x, sequence, c * shape_.block_stride + r, head);
                        },
                        reinterpret_cast<T*>(scratch), partial.as<T>() + item * size);
                  });

    for_each_item(executor_, shape_.weight_heads * e_.hidden, e_.depth * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    const int64_t n = item % e_.hidden, hw = item / e_.hidden;
                    T* row = reinterpret_cast<T*>(scratch);
                    std::fill(row, row + e_.depth, T(0));
                    if (p_.pos)
                      load_row(shape_.dtype, p_.pos, hw * e_.depth, e_.depth, db1(hw)[n], row);
                    for (int64_t r = 0; r < l; ++r)
                      for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
                        const T* part = partial.as<T>() + (chunk * parts + hw * l + r) * size +
                                        n * e_.dim_pitch;
                        for (int64_t i = 0; i < e_.dim; ++i) row[r * e_.dim + i] += part[i];
                      }
                    store_row(shape_.dtype, p_.dw1, item * e_.depth, e_.depth, T(1), row);
                  });
  }

  void second_weight_gradient() {
    const int64_t heads = shape_.weight_heads, size = e_.hidden * e_.out_pitch;
    const Buffer partial(num_chunks_ * heads * size * sizeof(T));
    for_each_item(executor_, num_chunks_ * heads,
                  packed_size<T>(CompressTile::kRows, e_.dim_out) * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    outer_product(
                        item / heads, item % heads, act_.as<T>(), p_.dout.ptr, e_.dim_out,
                        [&](const CompressSequence& sequence, int64_t c, int64_t head) {
                          return token_offset(p_.dout, sequence, c, head);
                        },
                        reinterpret_cast<T*>(scratch), partial.as<T>() + item * size);
                  });
    for_each_item(executor_, heads * e_.dim_out, e_.hidden * sizeof(T),
                  [&](int64_t item, char* scratch) {
                    const int64_t o = item % e_.dim_out, hw = item / e_.dim_out;
                    T* row = reinterpret_cast<T*>(scratch);
                    std::fill(row, row + e_.hidden, T(0));
                    for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
                      const T* part = partial.as<T>() + (chunk * heads + hw) * size + o;
                      for (int64_t n = 0; n < e_.hidden; ++n) row[n] += part[n * e_.out_pitch];
                    }
                    store_row(shape_.dtype, p_.dw2, item * e_.hidden, e_.hidden, T(1), row);
                  });
  }

  const CompressMlpBwd& p_;
  const CompressShape& shape_;
  const Executor& executor_;
  const CompressPlan plan_;
  const MlpExtents<T> e_;
  const int64_t tiles_;
  int64_t num_chunks_, chunk_tiles_, sum_pitch_;
  Buffer dpre_, act_;  // (Hkv, tokens, hidden_pitch)
  Buffer sums_;        // (tiles, Hkv, sum_pitch): column sums of dpre, then of dout
  Buffer bias_grads_;  // (Hw, sum_pitch): db1, db2
};

template <class T>
void mlp_bwd(const CompressMlpBwd& params, const Executor& executor) {
  MlpBwd<T>(params, executor).run();
}

}  // namespace nsa::cpu::NSA_CPU_TARGET
