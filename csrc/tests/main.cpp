// interfuse_tests [WORD...]: runs the tests of the files WORD.cpp and those whose name holds WORD; all
// without one. Exit status: 0 passed, 1 failed, 2 nothing matched, 77 skipped because this CPU lacks the
// INTERFUSE_ISA asked for.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "interfuse.h"
#include "tests/test.h"

namespace interfuse_test {
namespace {

struct Case {
  std::string file, name;
  void (*run)();
};

struct Skipped {
  std::string reason;
};

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

std::vector<std::string>& contexts() {
  static std::vector<std::string> stack;
  return stack;
}

int failures = 0;
constexpr int kMostPrinted = 20;

}  // namespace

Registration::Registration(const char* file, const char* name, void (*run)()) {
  const char* slash = std::strrchr(file, '/');
  cases().push_back({slash ? slash + 1 : file, name, run});
}

void fail(const char* file, int line, const std::string& message) {
  if (++failures > kMostPrinted) return;
  std::string context;
  for (const std::string& text : contexts()) context += (context.empty() ? " [" : "; ") + text;
  if (!context.empty()) context += "]";
  std::fprintf(stderr, "%s:%d: %s%s\n", file, line, message.c_str(), context.c_str());
}

Context::Context(std::string text) { contexts().push_back(std::move(text)); }
Context::~Context() { contexts().pop_back(); }

void skip(const std::string& reason) { throw Skipped{reason}; }

bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::fabs(a - b) <= tolerance;
}

}  // namespace interfuse_test

int main(int argc, char** argv) {
  using namespace interfuse_test;
  const char* asked = std::getenv("INTERFUSE_ISA");
  if (asked && std::strcmp(asked, interfuse_isa()) != 0) {
    std::printf("skipped: INTERFUSE_ISA asks for %s, but this CPU runs %s\n", asked, interfuse_isa());
    return 77;
  }
  int ran = 0;
  for (const Case& test : cases()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i)
      wanted = wanted || test.file == std::string(argv[i]) + ".cpp" ||
               test.name.find(argv[i]) != std::string::npos;
    if (!wanted) continue;
    ++ran;
    const int before = failures;
    std::string outcome = "ok";
    try {
      test.run();
    } catch (const Skipped& skipped) {
      outcome = "skipped: " + skipped.reason;
    } catch (const std::exception& error) {
      fail(test.file.c_str(), 0, std::string("threw ") + error.what());
    }
    if (failures > before) outcome = "FAILED";
    std::printf("%-10s %s %s: %s\n", interfuse_isa(), test.file.c_str(), test.name.c_str(), outcome.c_str());
    std::fflush(stdout);
  }
  if (failures > kMostPrinted) std::fprintf(stderr, "... %d failed checks in all\n", failures);
  if (ran == 0) std::fprintf(stderr, "no test matches what was asked for\n");
  return failures ? 1 : ran ? 0 : 2;
}
