// The KV cache on the CPU: attention over pages against the forward over plain tensors, bit by bit;
// storing tokens against a history that is kept in full.
#include <numeric>

#include "executors.h"
#include "nsa/cache.h"
#include "nsa/decode.h"
#include "tensor.h"

using nsa::BlockConfig;
using nsa::CacheStep;
using nsa::DType;
using testing::Layout;
using testing::Tensor;

namespace {

constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};

BlockConfig small_config() {
  BlockConfig config;
  config.block_size = 8;
  config.block_stride = 4;
  config.select_size = 8;
  config.num_selected = 4;
  config.window = 19;
  return config;
}

// A pool of pages is a tensor (pages, rows, heads, dim).
nsa::PagedView paged(const Tensor& pool) {
  const nsa::InView view = pool.in();
  return {view.ptr, view.batch, view.seq, view.head};
}
nsa::PagedOut paged_out(Tensor& pool) {
  const nsa::OutView view = pool.out();
  return {view.ptr, view.batch, view.seq, view.head};
}

/// Pages of all sequences in a random order, some of the pool unused.
struct Table {
  int64_t batch, max_pages, num_pages;
  std::vector<int32_t> entries;

  Table(std::mt19937& random, int64_t batch, int64_t max_pages)
      : batch(batch), max_pages(max_pages), num_pages(batch * max_pages + 3) {
    std::vector<int32_t> pages(num_pages);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), random);
    entries.assign(pages.begin(), pages.begin() + batch * max_pages);
  }
  int64_t page(int64_t b, int64_t j) const { return entries[b * max_pages + j]; }
};

struct Attention {
  DType dtype;
  int64_t heads_q, heads_kv, dim_qk, dim_v, tokens;
  std::vector<int32_t> lengths;
};

/// Decode over pages, and seqused_k over roomy tensors, against one forward for each sequence.
void check_attention(const Attention& p, Layout layout, bool with_table) {
  const BlockConfig c = small_config();
  const int64_t B = static_cast<int64_t>(p.lengths.size()), T = p.tokens, max_pages = 9;
  const int64_t rows[3] = {c.select_size / c.block_stride, c.select_size, c.select_size};
  const int64_t dims[2] = {p.dim_qk, p.dim_v};
  std::mt19937 random(static_cast<unsigned>(B * 100 + T));
  const Table table(random, B, max_pages);
  const int64_t pages = with_table ? table.num_pages : B * max_pages;
  const auto page_of = [&](int64_t b, int64_t j) {
    return with_table ? table.page(b, j) : b * max_pages + j;
  };

  nsa::AttnShape shape{};
  shape.dtype = p.dtype;
  shape.heads_q = p.heads_q;
  shape.heads_kv = p.heads_kv;
  shape.dim_qk = p.dim_qk;
  shape.dim_v = p.dim_v;
  shape.softmax_scale = 0.3;
  Tensor q(p.dtype, B, T, p.heads_q, p.dim_qk, layout), gates(p.dtype, B, T, p.heads_q, 3, layout);
  q.fill_random(random, 1);
  gates.fill_random(random, 1);
  const int64_t n = c.num_selected, heads = p.heads_kv;

  // Everything behind the end of a sequence stays NaN.
  Tensor pool[3][2], room[3][2];
  std::vector<Tensor> single[3][2];
  for (int branch = 0; branch < 3; ++branch) {
    for (int i = 0; i < 2; ++i) {
      pool[branch][i] = Tensor(p.dtype, pages, rows[branch], heads, dims[i], layout);
      room[branch][i] = Tensor(p.dtype, B, max_pages * rows[branch], heads, dims[i], layout);
      for (int64_t b = 0; b < B; ++b) {
        const int64_t length = branch == nsa::kCompressed
                                   ? nsa::num_compressed(p.lengths[b], c.block_size, c.block_stride)
                                   : p.lengths[b];
        Tensor one(p.dtype, 1, length, heads, dims[i], layout);
        one.fill_random(random, 1);
        for (int64_t s = 0; s < length; ++s) {
          for (int64_t h = 0; h < heads; ++h) {
            for (int64_t e = 0; e < dims[i]; ++e) {
              const double x = one.at(0, s, h, e);
              room[branch][i].set(b, s, h, e, x);
              pool[branch][i].set(page_of(b, s / rows[branch]), s % rows[branch], h, e, x);
            }
          }
        }
        single[branch][i].push_back(one);
      }
    }
  }

  std::vector<int32_t> indices(B * T * heads * n, -7), expected_indices = indices,
                                                       room_indices = indices;
  Tensor out(p.dtype, B, T, p.heads_q, p.dim_v), room_out = out;
  nsa::DecodeFwd decode{};
  decode.shape = shape;
  decode.shape.batch = B;
  decode.shape.seqlen_q = T;
  decode.config = c;
  decode.seqlens_k = p.lengths.data();
  decode.block_table = with_table ? table.entries.data() : nullptr;
  decode.max_pages = max_pages;
  decode.q = q.in();
  decode.gates = gates.in();
  decode.out = out.out();
  decode.block_indices = {indices.data(), T * heads * n, heads * n, n};
  nsa::AttnFwd roomy{};
  roomy.shape = decode.shape;
  roomy.shape.seqlen_k = max_pages * c.select_size;
  roomy.shape.total_q = B * T;
  roomy.shape.total_k = B * roomy.shape.seqlen_k;
  roomy.shape.seqused_k = p.lengths.data();
  roomy.config = c;
  roomy.q = q.in();
  roomy.gates = gates.in();
  roomy.out = room_out.out();
  roomy.block_indices = {room_indices.data(), T * heads * n, heads * n, n};
  roomy.index_count = c.num_selected;
  for (int branch = 0; branch < 3; ++branch) {
    decode.k[branch] = paged(pool[branch][0]);
    decode.v[branch] = paged(pool[branch][1]);
    roomy.branch[branch].enabled = true;
    roomy.branch[branch].k = room[branch][0].in();
    roomy.branch[branch].v = room[branch][1].in();
  }
  nsa::cpu::decode_fwd(decode, executors::shuffled(3));
  nsa::cpu::attn_fwd(roomy, executors::threads(2));

  Tensor expected = Tensor(p.dtype, B, T, p.heads_q, p.dim_v);
  for (int64_t b = 0; b < B; ++b) {
    nsa::AttnFwd call{};
    call.shape = shape;
    call.shape.batch = 1;
    call.shape.seqlen_q = call.shape.total_q = T;
    call.shape.seqlen_k = call.shape.total_k = p.lengths[b];
    call.config = c;
    const int64_t size = static_cast<int64_t>(testing::size_of(p.dtype));
    const auto row = [&](auto view) {
      view.ptr = const_cast<char*>(static_cast<const char*>(static_cast<const void*>(view.ptr)) +
                                   b * view.batch * size);
      return view;
    };
    call.q = row(q.in());
    call.gates = row(gates.in());
    call.out = row(expected.out());
    call.index_count = c.num_selected;
    call.block_indices = {expected_indices.data() + b * T * heads * n, 0, heads * n, n};
    for (int branch = 0; branch < 3; ++branch) {
      call.branch[branch].enabled = true;
      call.branch[branch].k = single[branch][0][b].in();
      call.branch[branch].v = single[branch][1][b].in();
    }
    nsa::cpu::attn_fwd(call, executors::serial());
  }
  CHECK(indices == expected_indices);
  CHECK(room_indices == expected_indices);
  CHECK(out.bytes() == expected.bytes());
  CHECK(room_out.bytes() == expected.bytes());
  CHECK_EQ(out.written(), out.size());

  decode.block_indices = {};
  Tensor again(p.dtype, B, T, p.heads_q, p.dim_v);
  decode.out = again.out();
  nsa::cpu::decode_fwd(decode, executors::serial());
  CHECK(again.bytes() == expected.bytes());
}

void test_attention() {
  for (DType dtype : kDTypes) {
    for (int64_t tokens : {1, 3, 40}) {
      for (bool with_table : {false, true}) {
        for (Layout layout : {Layout::kContiguous, Layout::kPadded, Layout::kHeadsFirst}) {
          check::context() = std::string(testing::name(dtype)) + " tokens " +
                             std::to_string(tokens) + (with_table ? " table" : "");
          check_attention({dtype, 6, 2, 10, 7, tokens, {72, 0, 1, 33, 7, 8, 65}}, layout,
                          with_table);
        }
      }
    }
  }
  check::context() = "refused";
  nsa::DecodeFwd decode{};
  CHECK_THROWS(nsa::cpu::decode_fwd(decode, executors::serial()), std::invalid_argument);
}

// Storing tokens.

/// Everything that a sequence of the oracle was given, as the marks of its tokens.
using History = std::vector<double>;

struct Store {
  BlockConfig c = small_config();
  DType dtype;
  int64_t B = 3, H = 2, Dk = 6, Dv = 4, R, max_pages = 6;
  Table table;
  Tensor pages[3][2], tail[2];
  std::vector<int32_t> seqlens, tail_start, dropped;

  Store(std::mt19937& random, DType dtype, int64_t rollback)
      : dtype(dtype), R(c.block_size + rollback), table(random, B, max_pages) {
    for (int branch = 0; branch < 3; ++branch) {
      const int64_t rows =
          branch == nsa::kCompressed ? c.select_size / c.block_stride : c.select_size;
      for (int i = 0; i < 2; ++i)
        pages[branch][i] = Tensor(dtype, table.num_pages, rows, H, dim(i), Layout::kPadded);
    }
    for (int i = 0; i < 2; ++i) tail[i] = Tensor(dtype, B, R, H, dim(i), Layout::kPadded);
    seqlens.assign(B, 0);
    tail_start = dropped = seqlens;
  }
  int64_t dim(int i) const { return i ? Dv : Dk; }

  nsa::CacheShape shape(int64_t tokens) const {
    return {dtype, B, tokens, H, Dk, Dv, R, max_pages, table.num_pages, table.entries.data(), c};
  }
};

/// What token `mark` holds: one number a head and element, exact in every dtype.
double value(double mark, int64_t head, int64_t e) { return mark + head * 64 + e * 8 - 100; }

void check_store(DType dtype, bool rotates, unsigned seed) {
  std::mt19937 random(seed);
  const auto draw = [&](int64_t most) { return static_cast<int64_t>(random() % (most + 1)); };
  Store store(random, dtype, 5);
  const BlockConfig& c = store.c;
  std::vector<History> histories(store.B);
  std::vector<double> inv_freq64(store.Dk / 2);
  std::vector<float> inv_freq32(store.Dk / 2);
  for (size_t i = 0; i < inv_freq64.size(); ++i) {
    inv_freq32[i] = static_cast<float>(0.5 / (i + 1));
    inv_freq64[i] = inv_freq32[i];
  }
  for (int turn = 0; turn < 40; ++turn) {
    if (turn % 5 == 4) {  // takes tokens back
      for (int64_t b = 0; b < store.B; ++b) {
        const int64_t length = std::max<int64_t>(0, store.seqlens[b] - draw(5));
        store.seqlens[b] = static_cast<int32_t>(length);
        if (length == 0) store.tail_start[b] = 0;
        histories[b].resize(length);
      }
    }
    const int64_t T = turn % 7 == 6 ? 20 + draw(10) : draw(5);
    if (T == 0) continue;
    std::vector<int32_t> counts(store.B);
    for (int32_t& count : counts) count = static_cast<int32_t>(draw(T));
    const bool with_counts = turn % 2;
    Tensor fresh[3][2];
    for (auto& branch : fresh) {
      for (int i = 0; i < 2; ++i)
        branch[i] = Tensor(dtype, store.B, T, store.H, store.dim(i), Layout::kHeadsFirst);
    }
    std::vector<CacheStep> steps(store.B);
    std::vector<History> before = histories;
    for (int64_t b = 0; b < store.B; ++b) {
      const int64_t wanted = with_counts ? counts[b] : T;
      const bool fits =
          static_cast<int64_t>(histories[b].size()) + wanted <= store.max_pages * c.select_size;
      for (int64_t r = 0; r < T; ++r) {
        const double mark = static_cast<double>(draw(7));
        for (int64_t h = 0; h < store.H; ++h) {
          for (int branch = 0; branch < 3; ++branch) {
            for (int i = 0; i < 2; ++i) {
              for (int64_t e = 0; e < store.dim(i); ++e)
                fresh[branch][i].set(b, r, h, e, value(mark, h, e) + (branch + i) * 40);
            }
          }
        }
        if (fits && r >= T - wanted) histories[b].push_back(mark);
      }
    }

    nsa::CacheGather gather{};
    gather.shape = store.shape(T);
    gather.k = fresh[0][0].in();
    gather.v = fresh[0][1].in();
    gather.tail_k = store.tail[0].in();
    gather.tail_v = store.tail[1].in();
    gather.counts = with_counts ? counts.data() : nullptr;
    gather.seqlens = store.seqlens.data();
    gather.tail_start = store.tail_start.data();
    const int64_t rows = nsa::gathered_rows(T, c);
    Tensor lined[2] = {Tensor(dtype, store.B, rows, store.H, store.Dk),
                       Tensor(dtype, store.B, rows, store.H, store.Dv)};
    gather.out_k = lined[0].out();
    gather.out_v = lined[1].out();
    gather.steps = steps.data();
    nsa::cpu::cache_gather(gather, executors::shuffled(2));
    for (int64_t b = 0; b < store.B; ++b) {
      const int64_t old = static_cast<int64_t>(before[b].size());
      const int64_t length = static_cast<int64_t>(histories[b].size());
      CHECK_EQ(steps[b].old, old);
      CHECK_EQ(steps[b].length(), length);
      CHECK_EQ(steps[b].wanted, with_counts ? counts[b] : T);
      const int64_t first = nsa::num_compressed(old, c.block_size, c.block_stride);
      const int64_t count = nsa::num_compressed(length, c.block_size, c.block_stride) - first;
      CHECK(count <= nsa::max_new_blocks(T, c));
      const int64_t needed = count > 0 ? (count - 1) * c.block_stride + c.block_size : 0;
      for (int i = 0; i < 2; ++i) {
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t position = first * c.block_stride + r;
          const double expected = r < needed ? value(histories[b][position], 1, 3) + i * 40 : 0;
          CHECK_EQ(lined[i].at(b, r, 1, 3), expected);
        }
      }
    }

    const int64_t blocks = nsa::max_new_blocks(T, c);
    Tensor compressed[2] = {Tensor(dtype, store.B, blocks, store.H, store.Dk),
                            Tensor(dtype, store.B, blocks, store.H, store.Dv)};
    for (Tensor& tensor : compressed) tensor.fill_random(random, 1);
    nsa::CacheAppend append{};
    append.shape = store.shape(T);
    append.steps = steps.data();
    for (int branch = 0; branch < 3; ++branch) {
      append.k[branch] = fresh[branch][0].in();
      append.v[branch] = fresh[branch][1].in();
      append.k_pages[branch] = paged_out(store.pages[branch][0]);
      append.v_pages[branch] = paged_out(store.pages[branch][1]);
    }
    append.k_cmp = compressed[0].in();
    append.v_cmp = compressed[1].in();
    if (rotates) {
      append.rope_inv_freq = dtype == DType::kFloat64 ? static_cast<const void*>(inv_freq64.data())
                                                      : inv_freq32.data();
    }
    append.tail_k = store.tail[0].out();
    append.tail_v = store.tail[1].out();
    append.seqlens = store.seqlens.data();
    append.tail_start = store.tail_start.data();
    append.dropped = store.dropped.data();
    const std::vector<int32_t> dropped = store.dropped;
    nsa::cpu::cache_append(append, executors::threads(3));

    for (int64_t b = 0; b < store.B; ++b) {
      const int64_t length = static_cast<int64_t>(histories[b].size());
      CHECK_EQ(store.seqlens[b], length);
      CHECK_EQ(store.dropped[b] - dropped[b], steps[b].wanted - steps[b].taken);
      for (int branch : {1, 2}) {
        for (int i = 0; i < 2; ++i) {
          for (int64_t s = 0; s < length; ++s) {
            const int64_t page = store.table.page(b, s / c.select_size);
            CHECK_EQ(store.pages[branch][i].at(page, s % c.select_size, 1, 3),
                     value(histories[b][s], 1, 3) + (branch + i) * 40);
          }
        }
      }
      const int64_t first = nsa::num_compressed(steps[b].old, c.block_size, c.block_stride);
      const int64_t end = nsa::num_compressed(length, c.block_size, c.block_stride);
      for (int64_t token = first; token < end; ++token) {
        const int64_t per_page = c.select_size / c.block_stride, half = store.Dk / 2;
        const int64_t page = store.table.page(b, token / per_page);
        for (int64_t e = 0; e < store.Dk; ++e) {
          double expected = compressed[0].at(b, token - first, 1, e), allowed = 0;
          if (rotates) {
            const int64_t pair = e % half;
            const double angle = token * c.block_stride * inv_freq64[pair];
            const double x = compressed[0].at(b, token - first, 1, pair);
            const double y = compressed[0].at(b, token - first, 1, pair + half);
            expected = e < half ? x * std::cos(angle) - y * std::sin(angle)
                                : y * std::cos(angle) + x * std::sin(angle);
            // The angle is rounded, then two products and their sum, then the result.
            const double unit = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
            const double stored = dtype == DType::kBFloat16  ? 0x1p-8
                                  : dtype == DType::kFloat16 ? 0x1p-11
                                                             : unit;
            allowed = (angle + 6) * unit * std::hypot(x, y) + stored * std::fabs(expected) +
                      (dtype == DType::kFloat16 ? 0x1p-25 : 0);
          }
          const double got = store.pages[0][0].at(page, token % per_page, 1, e);
          CHECK(std::fabs(got - expected) <= allowed);
        }
        CHECK_EQ(store.pages[0][1].at(page, token % per_page, 0, 2),
                 compressed[1].at(b, token - first, 0, 2));
      }
    }
  }
}

void test_store() {
  for (DType dtype : kDTypes) {
    for (unsigned seed = 0; seed < 6; ++seed) {
      check::context() = std::string("store ") + testing::name(dtype) + std::to_string(seed);
      check_store(dtype, seed % 2, seed);
    }
  }
}

/// A tail that lost what a block needs, and a table without the page.
void test_edges() {
  check::context() = "edges";
  std::mt19937 random(1);
  Store store(random, DType::kFloat32, 0);
  Tensor fresh[2] = {Tensor(store.dtype, store.B, 1, store.H, store.Dk),
                     Tensor(store.dtype, store.B, 1, store.H, store.Dv)};
  for (Tensor& tensor : fresh) tensor.fill_random(random, 1);
  for (Tensor& tensor : store.tail) tensor.fill_random(random, 1);
  store.seqlens = {15, 15, 15};
  store.tail_start = {8, 9, 8};
  store.table.entries[2 * store.max_pages + 1] = -1;
  std::vector<CacheStep> steps(store.B);
  Tensor lined[2] = {Tensor(store.dtype, store.B, 8, store.H, store.Dk),
                     Tensor(store.dtype, store.B, 8, store.H, store.Dv)};
  nsa::CacheGather gather{};
  gather.shape = store.shape(1);
  gather.k = fresh[0].in();
  gather.v = fresh[1].in();
  gather.tail_k = store.tail[0].in();
  gather.tail_v = store.tail[1].in();
  gather.seqlens = store.seqlens.data();
  gather.tail_start = store.tail_start.data();
  gather.out_k = lined[0].out();
  gather.out_v = lined[1].out();
  gather.steps = steps.data();
  nsa::cpu::cache_gather(gather, executors::serial());
  CHECK_EQ(steps[0].taken, 1);
  CHECK_EQ(steps[2].taken, 0);
  for (int64_t e = 0; e < store.Dv; ++e) {
    CHECK(!std::isnan(lined[1].at(0, 0, 0, e)));
    CHECK(std::isnan(lined[1].at(1, 0, 0, e)));
    CHECK(!std::isnan(lined[1].at(1, 1, 0, e)));
    CHECK_EQ(lined[1].at(2, 0, 0, e), 0);
  }
  store.seqlens[0] = 1000;
  CHECK_THROWS(nsa::cpu::cache_gather(gather, executors::serial()), std::invalid_argument);
  store.seqlens[0] = 15;
  gather.shape.tail = 7;
  CHECK_THROWS(nsa::cpu::cache_gather(gather, executors::serial()), std::invalid_argument);
  gather.shape.tail = store.R;
  gather.shape.config.block_stride = 3;
  CHECK_THROWS(nsa::cpu::cache_gather(gather, executors::serial()), std::invalid_argument);

  nsa::CacheAppend append{};
  append.shape = store.shape(1);
  steps = {{15, 2, 2}, {0, 0, 0}, {0, 0, 0}};  // more tokens than rows
  append.steps = steps.data();
  CHECK_THROWS(nsa::cpu::cache_append(append, executors::serial()), std::invalid_argument);
}

}  // namespace

int main() {
  test_attention();
  test_store();
  test_edges();
  return check::report();
}
