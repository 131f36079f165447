#include "common/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <mutex>

#include "common/kept.h"

namespace interfuse {
namespace {

std::atomic<bool> forked{false};

// The handler is installed when the library loads: a fork before our first region may still follow someone else's.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int usable_threads(int asked) {
  (void)fork_handler;
  age_kept();  // every call of a kernel asks here; one that trains no more gives back what training kept
  if (forked || omp_in_parallel()) return 1;
  int most = asked > 0 ? asked : omp_get_max_threads();
  return most < 1 ? 1 : most;
}

void run_team(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) {
    body(context, 0, 1);
    return;
  }
  // An exception must not leave an OpenMP region: the first is carried out by hand.
  std::exception_ptr failure;
  std::mutex guard;
#pragma omp parallel num_threads(threads)
  {
    try {
      body(context, omp_get_thread_num(), omp_get_num_threads());
    } catch (...) {
      std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace interfuse
