#include "emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace emulator {

Thread current;

namespace {

constexpr int kStackBytes = 256 * 1024, kAlign = 1024;
constexpr long kPatience = 20'000'000;  // turns without an end of the block

/// Participants arrive until `wanted` of them have, then all go on.
struct Meeting {
  int arrived = 0;
  long generation = 0;
  void join(int wanted, const char* what, int detail) {
    const long mine = generation;
    if (++arrived == wanted) {
      arrived = 0;
      ++generation;
    }
    while (generation == mine) wait_in(what, detail);
  }
};

struct Coroutine {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool ended;
  const char* what;
  int detail;
};

alignas(kAlign) char memory[kAlign + kSharedBytes];
std::mt19937 random_order(1);
std::vector<Coroutine> threads;
ucontext_t scheduler;
const std::function<void()>* body;
std::vector<std::function<void()>> copies;
Meeting block_meeting, warp_meetings[kWarps], partial_meetings[kWarps], named_meetings[16];
uint32_t warp_words[kWarps][32][8];
long turns;

void enter() {
  (*body)();
  threads[current.number()].ended = true;
  swapcontext(&threads[current.number()].context, &scheduler);
}

void land_copies() {
  for (int i = static_cast<int>(random_order() % 3); i > 0 && !copies.empty(); --i) {
    const size_t at = random_order() % copies.size();
    const auto copy = std::move(copies[at]);
    copies.erase(copies.begin() + static_cast<int64_t>(at));
    copy();
  }
}

[[noreturn]] void give_up() {
  std::fprintf(stderr, "block %u hangs, %zu copies underway\n", current.block.x, copies.size());
  for (size_t i = 0; i < threads.size(); ++i)
    if (!threads[i].ended && i % 32 == 0)
      std::fprintf(stderr, "  warp %zu waits in %s %d\n", i / 32, threads[i].what,
                   threads[i].detail);
  std::abort();
}

void run_block(int count) {
  std::memset(memory, 0xff, sizeof memory);
  block_meeting = Meeting();
  for (int i = 0; i < kWarps; ++i) warp_meetings[i] = partial_meetings[i] = Meeting();
  for (Meeting& meeting : named_meetings) meeting = Meeting();
  threads.resize(count);
  for (Coroutine& thread : threads) {
    thread.ended = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  std::vector<int> warps(count / 32);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  turns = 0;
  for (bool alive = true; alive;) {
    alive = false;
    std::shuffle(warps.begin(), warps.end(), random_order);
    land_copies();
    for (const int warp : warps) {
      for (unsigned turn = random_order() % 4 + 1; turn > 0; --turn) {
        for (int number = warp * 32; number < warp * 32 + 32; ++number) {
          if (threads[number].ended) continue;
          alive = true;
          current.index.x = static_cast<unsigned>(number);
          swapcontext(&scheduler, &threads[number].context);
        }
      }
    }
  }
  if (!copies.empty()) {
    std::fprintf(stderr, "%zu copies underway at the end of a block\n", copies.size());
    std::abort();
  }
}

}  // namespace

char* shared_memory() { return memory + 16; }

uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - memory;
  if (offset < 0 || offset > static_cast<int64_t>(sizeof memory)) std::abort();
  return static_cast<uint32_t>(offset);
}

char* shared_pointer(uint32_t address) {
  if (address >= sizeof memory) std::abort();
  return memory + address;
}

void wait_in(const char* what, int detail) {
  Coroutine& thread = threads[current.number()];
  thread.what = what;
  thread.detail = detail;
  if (++turns > kPatience) give_up();
  swapcontext(&thread.context, &scheduler);
}

void sync_block() { block_meeting.join(static_cast<int>(threads.size()), "__syncthreads", 0); }

void sync_warp(unsigned mask) {
  Meeting& meeting = (mask == ~0u ? warp_meetings : partial_meetings)[current.warp()];
  meeting.join(__popc(mask), "a warp's exchange", static_cast<int>(mask));
}

void sync_named(int barrier, int count) {
  named_meetings[barrier].join(count, "named barrier", barrier);
}

void later(std::function<void()> copy) { copies.push_back(std::move(copy)); }

uint32_t* words(int lane) { return warp_words[current.warp()][lane]; }

bool run(dim3 blocks, int count, int64_t shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes > kSharedBytes) return false;
  body = &kernel;
  current.grid = blocks;
  current.block_size = dim3(static_cast<unsigned>(count));
  for (current.block.y = 0; current.block.y < blocks.y; ++current.block.y)
    for (current.block.x = 0; current.block.x < blocks.x; ++current.block.x) run_block(count);
  return true;
}

}  // namespace emulator

// What the launchers ask of the runtime: a small Hopper GPU.
extern "C" {
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "of the emulation"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? 3
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 9
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulator::kSharedBytes
                                                                  : 0;
  return cudaSuccess;
}
}
