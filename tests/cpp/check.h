// Assertions of the C++ tests: a failure prints where it is and the values, the process goes on and
// `report` makes it return nonzero. No external library, so that the tests build wherever the
// kernels do.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

namespace check {

struct Counts {
  long long passed = 0, failed = 0;
};
inline Counts& counts() {
  static Counts counts;
  return counts;
}

/// What the checks that follow are about; printed with a failure.
inline std::string& context() {
  static std::string context;
  return context;
}

inline void record(bool ok, const char* file, int line, const std::string& message) {
  if (ok) {
    ++counts().passed;
    return;
  }
  // A broken kernel fails everywhere: the first failures tell the story.
  if (++counts().failed <= 40)
    std::fprintf(stderr, "%s:%d: FAILED [%s] %s\n", file, line, context().c_str(), message.c_str());
}

template <class A, class B>
void equal(const A& a, const B& b, const char* text, const char* file, int line) {
  const bool ok = a == b;
  std::ostringstream message;
  if (!ok) message << text << ": " << a << " vs " << b;
  record(ok, file, line, message.str());
}

/// The process's exit code. A test that checked nothing fails.
inline int report() {
  std::printf("%lld checks passed, %lld failed\n", counts().passed, counts().failed);
  return counts().failed == 0 && counts().passed > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) ::check::record((condition), __FILE__, __LINE__, #condition)
#define CHECK_MESSAGE(condition, message) \
  ::check::record((condition), __FILE__, __LINE__, (message))
#define CHECK_EQ(a, b) ::check::equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_THROWS(expression, exception)                                         \
  do {                                                                              \
    bool thrown = false;                                                            \
    try {                                                                           \
      expression;                                                                   \
    } catch (const exception&) {                                                    \
      thrown = true;                                                                \
    }                                                                               \
    ::check::record(thrown, __FILE__, __LINE__, #expression " throws " #exception); \
  } while (0)
