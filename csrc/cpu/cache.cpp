// Storing new tokens in a KV cache.
#include "nsa/cache.h"

#include <cmath>
#include <cstring>

#include "cpu/attn_setup.h"
// Rows are copied; only rotated keys are converted.
#include "cpu/target_baseline.h"
// What it applies to.
#include "cpu/dtype.h"
// The end.
#include "cpu/target_end.h"

namespace nsa::cpu {

namespace {

using baseline::dtype_size;
using baseline::load_row;
using baseline::store_row;

int64_t page_of(const CacheShape& shape, int64_t b, int64_t j) {
  const int64_t index = b * shape.max_pages + j;
  return shape.block_table ? shape.block_table[index] : index;
}

/// Whether a sequence has pages for new tokens, and for the blocks that they complete.
bool has_room(const CacheShape& shape, int64_t b, int64_t old, int64_t length) {
  const BlockConfig& c = shape.config;
  if (length > shape.max_pages * c.select_size) return false;
  const int64_t first = num_compressed(old, c.block_size, c.block_stride) * c.block_stride;
  for (int64_t j = first / c.select_size; j * c.select_size < length; ++j) {
    const int64_t page = page_of(shape, b, j);
    if (page < 0 || page >= shape.num_pages) return false;
  }
  return true;
}

CacheStep make_step(const CacheGather& p, int64_t b) {
  const int32_t tokens = static_cast<int32_t>(p.shape.tokens);
  CacheStep step;
  step.old = p.seqlens[b];
  step.wanted = p.counts ? std::clamp<int32_t>(p.counts[b], 0, tokens) : tokens;
  step.taken = has_room(p.shape, b, step.old, int64_t{step.old} + step.wanted) ? step.wanted : 0;
  return step;
}

void fill_nan(DType dtype, char* row, int64_t dim) {
  const double nan64 = std::nan("");
  const float nan32 = std::nanf("");
  const uint16_t nan16 = dtype == DType::kBFloat16 ? 0x7fc0 : 0x7e00;
  const int64_t size = dtype_size(dtype);
  const void* nan = size == 8   ? static_cast<const void*>(&nan64)
                    : size == 4 ? static_cast<const void*>(&nan32)
                                : &nan16;
  for (int64_t i = 0; i < dim; ++i) std::memcpy(row + i * size, nan, size);
}

/// Row `row` of head `head` of sequence `b`.
template <class View>
char* row_of(const View& view, DType dtype, int64_t b, int64_t row, int64_t head) {
  return static_cast<char*>(const_cast<void*>(static_cast<const void*>(view.ptr))) +
         (b * view.batch + row * view.seq + head * view.head) * dtype_size(dtype);
}

void gather(const CacheGather& p, const InView& fresh, const InView& tail, const OutView& out,
            int64_t dim, int64_t b, int64_t head) {
  const CacheShape& s = p.shape;
  const BlockConfig& c = s.config;
  const CacheStep& step = p.steps[b];
  const int64_t first = num_compressed(step.old, c.block_size, c.block_stride);
  const int64_t end = num_compressed(step.length(), c.block_size, c.block_stride);
  const int64_t needed = end > first ? (end - first - 1) * c.block_stride + c.block_size : 0;
  const int64_t bytes = dim * dtype_size(s.dtype);
  for (int64_t r = 0; r < gathered_rows(s.tokens, c); ++r) {
    char* to = row_of(out, s.dtype, b, r, head);
    const int64_t position = first * c.block_stride + r;
    if (r >= needed) {
      std::memset(to, 0, bytes);
    } else if (position >= step.old) {
      std::memcpy(to, row_of(fresh, s.dtype, b, step.row(position, s.tokens), head), bytes);
    } else if (position >= p.tail_start[b]) {
      std::memcpy(to, row_of(tail, s.dtype, b, position % s.tail, head), bytes);
    } else {
      fill_nan(s.dtype, to, dim);
    }
  }
}

/// Where row `row` of the sequence's pages of `page_rows` lies.
char* paged_row(const CacheShape& s, const PagedOut& pages, int64_t page_rows, int64_t b,
                int64_t row, int64_t head) {
  return static_cast<char*>(pages.ptr) + (page_of(s, b, row / page_rows) * pages.page +
                                          row % page_rows * pages.seq + head * pages.head) *
                                             dtype_size(s.dtype);
}

template <class T>
void rotate(DType dtype, const char* from, int64_t dim, const T* inv_freq, T position, char* to) {
  std::vector<T> x(dim), y(dim);
  load_row(dtype, from, 0, dim, T(1), x.data());
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const T angle = position * inv_freq[i], cos = std::cos(angle), sin = std::sin(angle);
    y[i] = x[i] * cos - x[i + half] * sin;
    y[i + half] = x[i + half] * cos + x[i] * sin;
  }
  store_row(dtype, to, 0, dim, T(1), y.data());
}

void append(const CacheAppend& p, int64_t b, int64_t head, bool values) {
  const CacheShape& s = p.shape;
  const BlockConfig& c = s.config;
  const CacheStep& step = p.steps[b];
  const InView* fresh = values ? p.v : p.k;
  const PagedOut* pages = values ? p.v_pages : p.k_pages;
  const int64_t dim = values ? s.dim_v : s.dim_qk, bytes = dim * dtype_size(s.dtype);
  for (int64_t position = step.old; position < step.length(); ++position) {
    const int64_t row = step.row(position, s.tokens);
    for (int branch : {kSelected, kWindow}) {
      if (!fresh[branch].ptr) continue;
      std::memcpy(paged_row(s, pages[branch], c.select_size, b, position, head),
                  row_of(fresh[branch], s.dtype, b, row, head), bytes);
    }
    if (position < step.length() - s.tail) continue;
    std::memcpy(row_of(values ? p.tail_v : p.tail_k, s.dtype, b, position % s.tail, head),
                row_of(fresh[kCompressed], s.dtype, b, row, head), bytes);
  }
  const int64_t first = num_compressed(step.old, c.block_size, c.block_stride);
  const int64_t end = num_compressed(step.length(), c.block_size, c.block_stride);
  for (int64_t token = first; token < end; ++token) {
    const char* from = row_of(values ? p.v_cmp : p.k_cmp, s.dtype, b, token - first, head);
    char* to = paged_row(s, pages[kCompressed], c.select_size / c.block_stride, b, token, head);
    if (values || !p.rope_inv_freq) {
      std::memcpy(to, from, bytes);
    } else if (s.dtype == DType::kFloat64) {
      rotate(s.dtype, from, dim, static_cast<const double*>(p.rope_inv_freq),
             static_cast<double>(token * c.block_stride), to);
    } else {
      rotate(s.dtype, from, dim, static_cast<const float*>(p.rope_inv_freq),
             static_cast<float>(token * c.block_stride), to);
    }
  }
}

void check(const CacheShape& s) {
  const char* error = config_error(s.config);
  require(!error, error);
  require(s.dtype >= DType::kFloat64 && s.dtype <= DType::kFloat16, "unknown dtype");
  require(s.tail >= s.config.block_size, "the tail must hold a block");
  require(s.tokens <= INT32_MAX / 2 && s.max_pages >= 1 &&
              s.max_pages <= INT32_MAX / 2 / s.config.select_size,
          "sequences are too long");
}

}  // namespace

void cache_gather(const CacheGather& params, const Executor& executor) {
  const CacheShape& s = params.shape;
  check(s);
  for (int64_t b = 0; b < s.batch; ++b) {
    require(params.seqlens[b] >= 0 && params.seqlens[b] <= s.max_pages * s.config.select_size,
            "seqlens must lie between 0 and the capacity");
  }
  for (int64_t b = 0; b < s.batch; ++b) params.steps[b] = make_step(params, b);
  for_each_item(executor, s.batch * s.heads, 0, [&](int64_t item, char*) {
    const int64_t b = item / s.heads, head = item % s.heads;
    gather(params, params.k, params.tail_k, params.out_k, s.dim_qk, b, head);
    gather(params, params.v, params.tail_v, params.out_v, s.dim_v, b, head);
  });
}

void cache_append(const CacheAppend& params, const Executor& executor) {
  const CacheShape& s = params.shape;
  check(s);
  for (int64_t b = 0; b < s.batch; ++b) {
    const CacheStep& step = params.steps[b];
    require(step.old >= 0 && step.taken >= 0 && step.taken <= step.wanted &&
                step.wanted <= s.tokens && has_room(s, b, step.old, step.length()),
            "steps are not those that cache_gather made of these tokens");
  }
  for_each_item(executor, s.batch * s.heads, 0, [&](int64_t item, char*) {
    append(params, item / s.heads, item % s.heads, false);
    append(params, item / s.heads, item % s.heads, true);
  });
  for (int64_t b = 0; b < s.batch; ++b) {
    const CacheStep& step = params.steps[b];
    const int32_t length = static_cast<int32_t>(step.length());
    params.seqlens[b] = length;
    params.tail_start[b] = std::max(params.tail_start[b], length - static_cast<int32_t>(s.tail));
    params.dropped[b] += step.wanted - step.taken;
  }
}

}  // namespace nsa::cpu
