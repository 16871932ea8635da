// geometry.h against brute force: the definitions of docs/semantics.md, counted key by key.
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "nsa/geometry.h"

namespace {

using nsa::BlockConfig;

BlockConfig blocks(int32_t block_size, int32_t block_stride, int32_t select_size) {
  BlockConfig config;
  config.block_size = block_size;
  config.block_stride = block_stride;
  config.select_size = select_size;
  return config;
}

const BlockConfig kConfigs[] = {blocks(32, 16, 64), blocks(32, 32, 64), blocks(64, 16, 64),
                                blocks(32, 8, 32),  blocks(1, 1, 1),    blocks(6, 3, 15)};

std::string name(const BlockConfig& c) {
  return std::to_string(c.block_size) + "/" + std::to_string(c.block_stride) + "/" +
         std::to_string(c.select_size);
}

void test_num_compressed() {
  for (const BlockConfig& config : kConfigs) {
    check::context() = name(config);
    const int32_t l = config.block_size, d = config.block_stride;
    for (int64_t seqlen = 0; seqlen < 300; ++seqlen) {
      int64_t complete = 0;
      for (int64_t c = 0; c * d + l <= seqlen; ++c) ++complete;
      CHECK_EQ(nsa::num_compressed(seqlen, l, d), complete);
      CHECK(complete <= seqlen / d);
    }
  }
}

void test_visible_compressed() {
  for (const BlockConfig& config : kConfigs) {
    check::context() = name(config);
    const int32_t l = config.block_size, d = config.block_stride;
    for (int64_t t = -70; t < 300; ++t) {
      int64_t visible = 0;
      for (int64_t c = 0; c < 400; ++c)
        if (c * d + l - 1 <= t) ++visible;
      CHECK_EQ(nsa::visible_compressed(t, l, d), visible);
    }
  }
}

void test_overlap_weight() {
  check::context() = "paper";
  const BlockConfig paper = blocks(32, 16, 64);
  const int64_t weights[] = {1, 2, 2, 2, 1};
  for (int64_t j = 1; j < 20; ++j) {
    for (int i = 0; i < 5; ++i) CHECK_EQ(nsa::overlap_weight(4 * j - 1 + i, j, paper), weights[i]);
    CHECK_EQ(nsa::overlap_weight(4 * j - 2, j, paper), 0);
    CHECK_EQ(nsa::overlap_weight(4 * j + 4, j, paper), 0);
  }
  for (const BlockConfig& config : kConfigs) {
    check::context() = name(config);
    for (int64_t c = 0; c < 120; ++c) {
      int64_t sum = 0;
      for (int64_t j = 0; j < 140; ++j) {
        int64_t keys = 0;
        for (int64_t s = c * config.block_stride; s < c * config.block_stride + config.block_size;
             ++s)
          if (s / config.select_size == j) ++keys;
        CHECK_EQ(keys % config.block_stride, 0);
        CHECK_EQ(nsa::overlap_weight(c, j, config), keys / config.block_stride);
        sum += nsa::overlap_weight(c, j, config);
      }
      CHECK_EQ(sum, config.block_size / config.block_stride);
    }
  }
}

void test_packed_rows() {
  std::mt19937 random(7);
  for (const BlockConfig& config : kConfigs) {
    check::context() = name(config);
    const int32_t l = config.block_size, d = config.block_stride;
    for (int trial = 0; trial < 200; ++trial) {
      int64_t start = 0, used = 0;
      for (int b = 0; b < 12; ++b) {
        const int64_t seqlen = random() % (b % 3 ? 100 : 4);
        const int64_t row = nsa::packed_row(start, d);
        CHECK(row >= used);
        used = row + nsa::num_compressed(seqlen, l, d);
        start += seqlen;
      }
      CHECK(used <= start / d);
    }
  }
}

void test_select_blocks() {
  check::context() = "select";
  CHECK_EQ(nsa::num_select_blocks(0, 64), 0);
  CHECK_EQ(nsa::num_select_blocks(1, 64), 1);
  CHECK_EQ(nsa::num_select_blocks(64, 64), 1);
  CHECK_EQ(nsa::num_select_blocks(65, 64), 2);

  BlockConfig config = blocks(32, 16, 64);
  config.num_init = 2;
  config.num_local = 3;
  for (int64_t t : {0, 63, 64, 200, 1023, 1024}) {
    const int64_t candidates = nsa::num_select_blocks(t + 1, 64);
    for (int64_t j = 0; j < candidates; ++j)
      CHECK_EQ(nsa::is_forced(j, t, config), j < 2 || j + 3 >= candidates);
  }
}

bool refused(void (*change)(BlockConfig&)) {
  BlockConfig config;
  change(config);
  return nsa::config_error(config) != nullptr;
}

void test_config_error() {
  check::context() = "config_error";
  for (const BlockConfig& config : kConfigs) CHECK(nsa::config_error(config) == nullptr);
  CHECK(refused([](BlockConfig& c) { c.block_size = 0; }));
  CHECK(refused([](BlockConfig& c) { c.block_stride = 0; }));
  CHECK(refused([](BlockConfig& c) { c.select_size = -64; }));
  CHECK(refused([](BlockConfig& c) { c.window = 0; }));
  CHECK(refused([](BlockConfig& c) { c.num_selected = 0; }));
  CHECK(refused([](BlockConfig& c) { c.num_init = -1; }));
  CHECK(refused([](BlockConfig& c) { c.num_local = -1; }));
  CHECK(refused([](BlockConfig& c) { c.block_stride = 24; }));
  CHECK(refused([](BlockConfig& c) { c.select_size = 72; }));
  CHECK(refused([](BlockConfig& c) { c.select_size = 16; }));
  CHECK(refused([](BlockConfig& c) { c.num_selected = 2; }));
  CHECK(!refused([](BlockConfig& c) { c.num_selected = 3; }));
}

}  // namespace

int main() {
  test_num_compressed();
  test_visible_compressed();
  test_overlap_weight();
  test_packed_rows();
  test_select_blocks();
  test_config_error();
  return check::report();
}
