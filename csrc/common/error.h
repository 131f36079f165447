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

// Runs body and maps what it throws; no exception crosses the C API.
interfuse_status guarded_call(void (*body)(void*), void* context);

template <class Body>
interfuse_status guarded(Body&& body) {
  return guarded_call([](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

}  // namespace interfuse
