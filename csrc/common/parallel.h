// Threads: one OpenMP runtime, shared with whatever else in the process uses it.
#pragma once

#include <cstdint>

namespace interfuse {

// How many threads a region may use when `asked` were asked for (0: OpenMP's default): one inside another parallel
// region, and one in a forked child, where GNU OpenMP's pool is gone and a region would wait for ever.
int usable_threads(int asked);

// Calls body(context, thread, threads) on every member of a team. The team may be smaller than asked for.
void run_team(int threads, void (*body)(void*, int, int), void* context);

// body(thread, threads) on every member of a team of at most `threads`.
template <class Body>
void parallel(int threads, Body&& body) {
  run_team(
      threads, [](void* context, int thread, int count) { (*static_cast<Body*>(context))(thread, count); }, &body);
}

struct Range {
  int64_t begin, end;
};

// The part of 0..count that falls to `thread` of `threads`: contiguous, sizes differ by at most one. Static, so
// that the same inputs and thread count give the same bits.
inline Range share(int64_t count, int thread, int threads) {
  int64_t base = count / threads, rest = count % threads;
  int64_t begin = thread * base + (thread < rest ? thread : rest);
  return {begin, begin + base + (thread < rest ? 1 : 0)};
}

}  // namespace interfuse
