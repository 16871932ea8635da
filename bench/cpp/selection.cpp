#include "selection.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "nsa/geometry.h"

namespace nsa::bench {

std::vector<int32_t> make_selection(int64_t batch, int64_t length, int64_t kv_heads,
                                    const BlockConfig& config, Pattern pattern, uint64_t seed) {
  const int64_t n = config.num_selected;
  std::vector<int32_t> indices(batch * length * kv_heads * n, -1);
  std::mt19937 random(static_cast<uint32_t>(seed));
  std::vector<int32_t> row, kept;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      kept.clear();
      for (int64_t t = 0; t < length; ++t) {
        const int64_t candidates = t / config.select_size + 1;
        const auto wanted = static_cast<size_t>(std::min<int64_t>(n, candidates));
        const auto take = [&](int64_t block) {
          if (row.size() < wanted && block < candidates &&
              std::find(row.begin(), row.end(), block) == row.end())
            row.push_back(static_cast<int32_t>(block));
        };
        row.clear();
        for (int64_t i = 0; i < config.num_init; ++i) take(i);
        for (int64_t i = std::max<int64_t>(0, candidates - config.num_local); i < candidates; ++i)
          take(i);
        const size_t forced = row.size();
        const bool keep_all = pattern == Pattern::kGroups && t % 64 != 0;
        for (const int32_t block : kept)
          if (keep_all || (pattern == Pattern::kCoherent && random() % 4 != 0)) take(block);
        while (row.size() < wanted) take(random() % candidates);
        kept.assign(row.begin() + forced, row.end());
        std::sort(row.begin(), row.end());
        std::copy(row.begin(), row.end(),
                  indices.begin() + ((b * length + t) * kv_heads + head) * n);
      }
    }
  }
  return indices;
}

double shared_fraction(const std::vector<int32_t>& indices, int64_t batch, int64_t length,
                       int64_t kv_heads, const BlockConfig& config) {
  const int64_t n = config.num_selected;
  double sum = 0;
  int64_t rows = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 3 * length / 4 + 1; t < length; ++t) {
      if (t % config.select_size == 0) continue;
      for (int64_t head = 0; head < kv_heads; ++head) {
        const int32_t* here = indices.data() + ((b * length + t) * kv_heads + head) * n;
        const int32_t* before = here - kv_heads * n;
        int64_t unforced = 0, shared = 0;
        for (int64_t i = 0; i < n && here[i] >= 0; ++i) {
          if (is_forced(here[i], t, config)) continue;
          ++unforced;
          shared += std::find(before, before + n, here[i]) != before + n;
        }
        if (unforced == 0) continue;
        sum += double(shared) / unforced;
        ++rows;
      }
    }
  }
  return rows ? sum / rows : std::nan("");
}

}  // namespace nsa::bench
