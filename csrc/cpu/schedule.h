// Dynamic scheduling of numbered work items over the caller's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

#include "nsa/api.h"

namespace nsa::cpu {

/// Uninitialised memory, aligned to a cache line.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes)
      : data_(static_cast<char*>(
            ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64)))) {}

  char* data() const { return data_.get(); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<char, Free> data_;
};

/// Runs body(item, scratch) for every item in [0, count): each thread takes the next item when it
/// has done one, so put the long ones first. `scratch` is `scratch_bytes` of the thread's own,
/// allocated when it gets its first item. The first exception of a body is rethrown when all have
/// stopped.
inline void for_each_item(const Executor& executor, int64_t count, int64_t scratch_bytes,
                          const std::function<void(int64_t item, char* scratch)>& body) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto worker = [&] {
    try {
      Buffer scratch;
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        if (scratch_bytes > 0 && !scratch.data()) scratch = Buffer(scratch_bytes);
        body(item, scratch.data());
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
      next.store(count, std::memory_order_relaxed);
    }
  };
  const int64_t workers = std::min<int64_t>(std::max(executor.num_threads, 1), count);
  if (workers == 1 || !executor.parallel_for) {
    worker();
  } else {
    executor.parallel_for(workers, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) worker();
    });
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace nsa::cpu
