// Thread pools for the tests: serial, and std::thread with a choice of how the range is cut.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "nsa/api.h"

namespace executors {

using Body = std::function<void(int64_t begin, int64_t end)>;

inline nsa::cpu::Executor serial() {
  return {1, [](int64_t n, const Body& body) {
            if (n > 0) body(0, n);
          }};
}

/// One contiguous range a thread, as at::parallel_for does.
inline nsa::cpu::Executor threads(int num_threads) {
  return {
      num_threads, [num_threads](int64_t n, const Body& body) {
        const int64_t step = (n + num_threads - 1) / num_threads;
        std::vector<std::thread> pool;
        for (int64_t begin = 0; begin < n; begin += step)
          pool.emplace_back([&body, begin, end = std::min(n, begin + step)] { body(begin, end); });
        for (std::thread& thread : pool) thread.join();
      }};
}

/// Threads that take single items from a shared counter, last item first: an order that no kernel
/// may depend on.
inline nsa::cpu::Executor shuffled(int num_threads) {
  return {num_threads, [num_threads](int64_t n, const Body& body) {
            std::atomic<int64_t> left{n};
            std::vector<std::thread> pool;
            for (int i = 0; i < num_threads; ++i)
              pool.emplace_back([&] {
                for (int64_t item = --left; item >= 0; item = --left) body(item, item + 1);
              });
            for (std::thread& thread : pool) thread.join();
          }};
}

}  // namespace executors
