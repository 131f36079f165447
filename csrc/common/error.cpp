#include "common/error.h"

#include <cstdarg>
#include <cstdio>
#include <new>

namespace interfuse {
namespace {
thread_local std::string last_error;
}

void invalid(const char* format, ...) {
  char text[1024];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  throw Invalid(text);
}

void check_range(const char* op, const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    invalid("%s: %s is %lld; allowed is %lld to %lld.", op, name, (long long)value, (long long)least, (long long)most);
}

interfuse_status guarded_call(void (*body)(void*), void* context) {
  try {
    body(context);
    return INTERFUSE_OK;
  } catch (const Invalid& error) {
    last_error = error.what();
    return INTERFUSE_INVALID;
  } catch (const std::bad_alloc&) {
    last_error = "There is not enough memory for the kernel's working space; use a smaller batch.";
    return INTERFUSE_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error = error.what();
    return INTERFUSE_INTERNAL;
  }
}

}  // namespace interfuse

extern "C" const char* interfuse_last_error(void) { return interfuse::last_error.c_str(); }
