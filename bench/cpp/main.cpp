// nsa_bench: times the CUDA kernels of nsa_ext on the command line.
#include <cstdio>
#include <exception>
#include <fstream>

#include "run.h"

namespace {

using nsa::bench::Row;
using nsa::bench::Value;

std::string cell(const Row& row, const char* name) {
  const Value* value = row.find(name);
  if (value == nullptr) return "-";
  if (const auto* text = std::get_if<std::string>(value)) return text->empty() ? "-" : *text;
  if (const auto* integer = std::get_if<int64_t>(value)) return std::to_string(*integer);
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", std::get<double>(*value));
  return text;
}

void print(const Row& row) {
  const std::string kernel = cell(row, "kernel"),
                    part = cell(row, row.find("variant") ? "variant" : "part");
  const std::string name = part == "-" ? kernel : "  " + kernel + "/" + part;
  if (const Value* error = row.find("error")) {
    std::printf("%-44s %s\n", name.c_str(), std::get<std::string>(*error).c_str());
    return;
  }
  std::printf("%-44s", name.c_str());
  for (const auto& [column, width] :
       {std::pair{"seqlen", 7}, std::pair{"head_dim", 4}, std::pair{"inputs", 9},
        std::pair{"backend", 5}, std::pair{"l2", 5}, std::pair{"median_ms", 9},
        std::pair{"q1_ms", 9}, std::pair{"q3_ms", 9}, std::pair{"tflops", 7}, std::pair{"tbps", 7},
        std::pair{"gather_tbps", 7}, std::pair{"of_matmul", 7}, std::pair{"of_copy", 7},
        std::pair{"of_gather", 8}})
    std::printf(" %*s", width, cell(row, column).c_str());
  std::printf("\n");
  std::fflush(stdout);
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

/// The command line without folders of this machine.
std::string join(const std::vector<std::string>& words) {
  std::string text = "nsa_bench";
  for (const std::string& word : words)
    text += " " + (word.rfind("/", 0) == 0 ? word.substr(word.find_last_of('/') + 1) : word);
  return text;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  nsa::bench::Options options;
  try {
    options = nsa::bench::parse_options(arguments);
  } catch (const nsa::bench::UsageError& error) {
    std::fprintf(stderr, "nsa_bench: %s\n", error.what());
    return 2;
  }
  if (options.help) {
    std::fputs(nsa::bench::usage().c_str(), stdout);
    return 0;
  }
  if (options.list) {
    for (const auto& kernel : nsa::bench::kernel_list())
      std::printf("%-18s %s\n", kernel.name.c_str(), kernel.what.c_str());
    return 0;
  }
  try {
    std::printf("%-44s %7s %4s %9s %5s %5s %9s %9s %9s %7s %7s %7s %7s %7s %8s\n", "benchmark",
                "length", "Dk", "inputs", "back", "L2", "ms", "q1", "q3", "TFLOP/s", "TB/s",
                "gather", "/matmul", "/copy", "/gather");
    const auto results = nsa::bench::run(options, join(arguments), print);
    if (!options.json.empty()) write_file(options.json, nsa::bench::to_json(results));
    if (!options.csv.empty()) write_file(options.csv, nsa::bench::to_csv(results.rows));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "nsa_bench: %s\n", error.what());
    return 1;
  }
  return 0;
}
