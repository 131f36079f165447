// A small test harness: TEST(name) { CHECK(...); }. A failed check prints its place and values and the test
// goes on, so that one run shows every failing shape.
#pragma once

#include <cmath>
#include <sstream>
#include <string>

namespace interfuse_test {

struct Registration {
  Registration(const char* file, const char* name, void (*run)());
};

void fail(const char* file, int line, const std::string& message);

// What the checks below are about, printed with a failure: the shape, the instruction set, the number of
// threads.
class Context {
 public:
  explicit Context(std::string text);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
};

// Leaves the rest of the running test out and says why; for what this machine cannot do.
void skip(const std::string& reason);

template <class A, class B>
void check_equal(const char* file, int line, const char* what, const A& a, const B& b) {
  if (a == b) return;
  std::ostringstream text;
  text << what << ": " << a << " is not " << b;
  fail(file, line, text.str());
}

// |a - b| <= tolerance; NaN equals NaN, an infinity itself.
bool close(double a, double b, double tolerance);

}  // namespace interfuse_test

#define TEST(name)                                                                         \
  static void test_##name();                                                               \
  static const interfuse_test::Registration register_##name(__FILE__, #name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) interfuse_test::fail(__FILE__, __LINE__, #condition " is false"); \
  } while (false)

#define CHECK_EQUAL(a, b) interfuse_test::check_equal(__FILE__, __LINE__, #a, a, b)
