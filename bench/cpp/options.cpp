#include "options.h"

#include <algorithm>
#include <functional>
#include <sstream>

#include "nsa/geometry.h"

namespace nsa::bench {

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

/// A whole number, also written as 64k.
int64_t to_number(const std::string& option, const std::string& text) {
  size_t used = 0;
  int64_t value = 0;
  try {
    value = std::stoll(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used > 0 && used + 1 == text.size() && text[used] == 'k') {
    value *= 1024;
    ++used;
  }
  if (used == 0 || used != text.size())
    throw UsageError(option + ": expected a whole number, got '" + text + "'");
  return value;
}

int64_t to_positive(const std::string& option, const std::string& text) {
  const int64_t value = to_number(option, text);
  if (value < 1) throw UsageError(option + ": expected at least 1, got " + text);
  return value;
}

using Setter = std::function<void(Options&, const std::string& option, const std::string& value)>;

Setter numbers(std::vector<int64_t> Options::* field) {
  return [field](Options& o, const std::string& option, const std::string& value) {
    (o.*field).clear();
    for (const std::string& part : split(value)) (o.*field).push_back(to_positive(option, part));
    if ((o.*field).empty()) throw UsageError(option + ": expected a list, got nothing");
  };
}

Setter number(int64_t Options::* field, int64_t least) {
  return [field, least](Options& o, const std::string& option, const std::string& value) {
    o.*field = to_number(option, value);
    if (o.*field < least)
      throw UsageError(option + ": expected at least " + std::to_string(least) + ", got " + value);
  };
}

Setter block_length(int32_t BlockConfig::* field) {
  return [field](Options& o, const std::string& option, const std::string& value) {
    const int64_t number = to_number(option, value);
    if (number < 0 || number > INT32_MAX) throw UsageError(option + ": out of range: " + value);
    o.config.*field = static_cast<int32_t>(number);
  };
}

Setter words(std::vector<std::string> Options::* field, std::vector<std::string> allowed) {
  return [field, allowed](Options& o, const std::string& option, const std::string& value) {
    o.*field = split(value);
    std::string list;
    for (const std::string& word : allowed) list += (list.empty() ? "" : ", ") + word;
    for (const std::string& word : o.*field)
      if (std::find(allowed.begin(), allowed.end(), word) == allowed.end())
        throw UsageError(option + ": expected of " + list + ", got '" + word + "'");
    if ((o.*field).empty()) throw UsageError(option + ": expected of " + list + ", got nothing");
  };
}

Setter text(std::string Options::* field) {
  return [field](Options& o, const std::string&, const std::string& value) { o.*field = value; };
}

void set_dims(Options& o, const std::string& option, const std::string& value) {
  o.dims.clear();
  for (const std::string& part : split(value)) {
    const size_t colon = part.find(':');
    const int64_t qk = to_positive(option, part.substr(0, colon));
    const int64_t v = colon == std::string::npos ? qk : to_positive(option, part.substr(colon + 1));
    o.dims.push_back({qk, v});
  }
  if (o.dims.empty()) throw UsageError(option + ": expected a list, got nothing");
}

void set_max_seconds(Options& o, const std::string& option, const std::string& value) {
  std::istringstream stream(value);
  if (!(stream >> o.max_seconds) || !stream.eof() || o.max_seconds <= 0)
    throw UsageError(option + ": expected seconds above 0, got '" + value + "'");
}

struct Option {
  std::string name, value, help;  // value empty: a switch
  Setter set;
};

const std::vector<Option>& option_list() {
  static const std::vector<Option> list = {
      {"--lengths", "N,..", "queries and keys, or the cache, e.g. 4096,64k (default 65536)",
       numbers(&Options::lengths)},
      {"--batches", "N,..", "sequences (1)", numbers(&Options::batches)},
      {"--heads", "N,..", "query heads (64)", numbers(&Options::heads)},
      {"--kv-heads", "N,..", "key-value heads (4)", numbers(&Options::kv_heads)},
      {"--dims", "D,..", "head dims, 128 or Dk:Dv as in 192:128 (128)", set_dims},
      {"--dtypes", "T,..", "bf16, fp16 (bf16)", words(&Options::dtypes, {"bf16", "fp16"})},
      {"--patterns", "P,..", "selection: random, coherent, groups (random)",
       words(&Options::patterns, {"random", "coherent", "groups"})},
      {"--backends", "B,..", "auto, sm80, sm90 (auto)",
       words(&Options::backends, {"auto", "sm80", "sm90"})},
      {"--compress", "C,..", "mean, weighted, linear, mlp (mean)",
       words(&Options::compress, {"mean", "weighted", "linear", "mlp"})},
      {"--l2", "L,..",
       "warm: launched again and again; cold: L2 refilled before each launch (warm)",
       words(&Options::l2, {"warm", "cold"})},
      {"--block-size", "l", "compression block (32)", block_length(&BlockConfig::block_size)},
      {"--block-stride", "d", "compression stride (16)", block_length(&BlockConfig::block_stride)},
      {"--select-size", "l'", "selection block (64)", block_length(&BlockConfig::select_size)},
      {"--num-selected", "n", "selected blocks (16)", block_length(&BlockConfig::num_selected)},
      {"--num-init", "N", "first blocks always selected (1)", block_length(&BlockConfig::num_init)},
      {"--num-local", "N", "last blocks always selected (2)",
       block_length(&BlockConfig::num_local)},
      {"--window", "w", "window (512)", block_length(&BlockConfig::window)},
      {"--repeats", "N", "timed launches of a case (20)", number(&Options::repeats, 1)},
      {"--warmup", "N", "launches before them (3)", number(&Options::warmup, 0)},
      {"--max-seconds", "S", "ends the repeats of a case (2)", set_max_seconds},
      {"--seed", "N", "of the inputs (0)", number(&Options::seed, 0)},
      {"--csv", "FILE", "write the rows as CSV", text(&Options::csv)},
      {"--json", "FILE", "write environment and rows as JSON", text(&Options::json)},
      {"--no-breakdown", "", "do not time the single kernels of an operator",
       [](Options& o, const std::string&, const std::string&) { o.breakdown = false; }},
      {"--no-ceilings", "", "do not measure copy, gather and matrix product",
       [](Options& o, const std::string&, const std::string&) { o.ceilings = false; }},
      {"--list", "", "name the benchmarks and stop",
       [](Options& o, const std::string&, const std::string&) { o.list = true; }},
      {"--help", "", "show this and stop",
       [](Options& o, const std::string&, const std::string&) { o.help = true; }},
  };
  return list;
}

const Option& find_option(const std::string& name) {
  for (const Option& option : option_list())
    if (option.name == name) return option;
  throw UsageError("unknown option " + name + " (see --help)");
}

}  // namespace

const std::vector<KernelInfo>& kernel_list() {
  static const std::vector<KernelInfo> list = {
      {"compress", "compression of K and of V (eq. 7)", true},
      {"compress_bwd", "its gradients", true},
      {"compressed", "compressed branch without a ranking", false},
      {"compressed_select", "compressed branch, importance and top-n (eq. 8-11)", false},
      {"select", "importance and top-n alone", false},
      {"selected", "selected branch on given blocks (eq. 12)", false},
      {"window", "window branch", false},
      {"forward", "the three branches and their gated sum (eq. 5), blocks by their ranking", false},
      {"compressed_bwd", "gradients of the compressed branch", false},
      {"selected_bwd", "gradients of the selected branch on given blocks", false},
      {"window_bwd", "gradients of the window branch", false},
      {"backward", "gradients of the gated sum, selected and window sharing K and V", false},
      {"decode", "one token of every sequence over a cache, gated sum of the branches", false},
  };
  return list;
}

Options parse_options(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    std::string name = arguments[i], value;
    if (name.rfind("--", 0) != 0) {
      const auto& known = kernel_list();
      if (std::none_of(known.begin(), known.end(),
                       [&](const KernelInfo& kernel) { return kernel.name == name; }))
        throw UsageError("unknown benchmark '" + name + "' (see --list)");
      options.kernels.push_back(name);
      continue;
    }
    const size_t equals = name.find('=');
    const bool joined = equals != std::string::npos;
    if (joined) {
      value = name.substr(equals + 1);
      name.resize(equals);
    }
    const Option& option = find_option(name);
    if (option.value.empty()) {
      if (joined) throw UsageError(name + " takes no value");
    } else if (!joined) {
      if (++i == arguments.size()) throw UsageError(name + ": expected " + option.value);
      value = arguments[i];
    }
    option.set(options, name, value);
  }
  if (const char* error = config_error(options.config)) throw UsageError(error);
  return options;
}

std::string usage() {
  std::string text =
      "usage: nsa_bench [BENCHMARK ...] [OPTION ...]\n"
      "Times the CUDA kernels of nsa_ext, all benchmarks where none is named. Lists are axes.\n\n";
  for (const Option& option : option_list()) {
    std::string line = "  " + option.name + (option.value.empty() ? "" : " " + option.value);
    line.resize(std::max<size_t>(line.size() + 2, 24), ' ');
    text += line + option.help + "\n";
  }
  return text;
}

std::vector<Case> expand(const Options& o) {
  std::vector<Case> cases;
  for (const KernelInfo& kernel : kernel_list()) {
    if (!o.kernels.empty() &&
        std::find(o.kernels.begin(), o.kernels.end(), kernel.name) == o.kernels.end())
      continue;
    const auto first = [](const std::vector<std::string>& axis) {
      return std::vector<std::string>{axis.front()};
    };
    // Whether the picks of neighbours agree is no matter where none are made nor read.
    const bool dense = kernel.compresses || kernel.name == "compressed" ||
                       kernel.name == "window" || kernel.name == "compressed_bwd" ||
                       kernel.name == "window_bwd" || kernel.name == "decode";
    const auto patterns = dense ? first(o.patterns) : o.patterns;
    const bool one_backend = kernel.compresses || kernel.name == "decode";
    const auto backends = one_backend ? first(o.backends) : o.backends;
    const auto compress = kernel.compresses ? o.compress : first(o.compress);
    for (const int64_t batch : o.batches)
      for (const int64_t length : o.lengths)
        for (const int64_t heads : o.heads)
          for (const int64_t kv_heads : o.kv_heads)
            for (const HeadDims dims : o.dims)
              for (const std::string& dtype : o.dtypes)
                for (const std::string& pattern : patterns)
                  for (const std::string& backend : backends)
                    for (const std::string& kind : compress)
                      if (heads % kv_heads == 0)
                        cases.push_back({kernel.name, batch, length, heads, kv_heads, dims, dtype,
                                         pattern, backend, kind});
  }
  if (cases.empty()) throw UsageError("--kv-heads: no value divides a value of --heads");
  return cases;
}

}  // namespace nsa::bench
