// Failures inside the core are exceptions; the C API turns them into a status and a sentence.
#pragma once

#include <stdexcept>
#include <string>

#include "interfuse.h"

namespace interfuse {

struct Invalid : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] void invalid(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Of a tensor, or a stride; an address in bytes then stays far from overflow.
constexpr int64_t kMostElements = int64_t(1) << 40;

// Throws unless least <= value <= most.
void check_range(const char* op, const char* name, int64_t value, int64_t least, int64_t most);

// Runs body and maps what it throws; no exception crosses the C API.
interfuse_status guarded_call(void (*body)(void*), void* context);

template <class Body>
interfuse_status guarded(Body&& body) {
  return guarded_call([](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

}  // namespace interfuse
