// Where results come from: GPU, driver, machine, commit.
#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <thread>

#include "device.h"
#include "nsa/api.h"
#include "nsa_bench_commit.h"

namespace nsa::bench {

namespace {

/// What follows `key` and a colon in a file of /proc, or "unknown".
std::string proc_value(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key, 0) != 0) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t start = line.find_first_not_of(" \t", colon + 1);
    if (start != std::string::npos) return line.substr(start);
  }
  return "unknown";
}

/// "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build ..."
std::string driver_version() {
  const std::string text = proc_value("/proc/driver/nvidia/version", "NVRM version");
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    if (word.find('.') != std::string::npos &&
        word.find_first_not_of("0123456789.") == std::string::npos)
      return word;
    begin = end + 1;
  }
  return "unknown";
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string commit() {
  const char* given = std::getenv("NSA_EXT_COMMIT");
  return given ? given : NSA_BENCH_COMMIT;
}

}  // namespace

Row describe_environment(const std::string& command) {
  int device, runtime, driver_api;
  cudaDeviceProp properties;
  NSA_BENCH_CHECK(cudaGetDevice(&device));
  NSA_BENCH_CHECK(cudaGetDeviceProperties(&properties, device));
  NSA_BENCH_CHECK(cudaRuntimeGetVersion(&runtime));
  NSA_BENCH_CHECK(cudaDriverGetVersion(&driver_api));
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&now));

  Row row;
  row.set("date", date).set("command", command).set("commit", commit());
  row.set("machine", proc_value("/proc/cpuinfo", "model name") + ", " +
                         std::to_string(std::thread::hardware_concurrency()) + " cores");
  row.set("gpu", properties.name).set("driver", driver_version()).set("torch", "none");
  row.set("cuda", version_text(runtime)).set("cuda_of_driver", version_text(driver_api));
  row.set("version", kVersion);
  row.set("multiprocessors", int64_t{properties.multiProcessorCount});
  row.set("l2_mb", properties.l2CacheSize / 1048576.0);
  return row;
}

const std::vector<std::string>& provenance() {
  static const std::vector<std::string> names = {"machine", "gpu",    "driver",
                                                 "torch",   "commit", "command"};
  return names;
}

}  // namespace nsa::bench
