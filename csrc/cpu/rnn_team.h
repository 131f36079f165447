// Who works on what in the recurrent kernels: with two directions and more than one thread, each direction has threads
// of its own that meet at every step, and the two meet between layers only. Per-ISA (see common/simd.h).
#pragma once

#include <sched.h>

#include "common/parallel.h"
#include "cpu/rnn_shapes.h"

namespace interfuse {
namespace INTERFUSE_ISA {

template <class Ready>
INTERFUSE_INLINE void wait_until(Ready&& ready) {
  for (int spins = 0; !ready(); ++spins) {
    if (spins < 64) continue;  // a pause may take longer than the wait
    if (spins > 4000) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
  }
}

// How often each thread has arrived, by meeting place: one for each direction and one for all. Each is written by its
// thread alone, so that an arrival is a plain store, and what others see late is the store and nothing more.
struct RnnFlags {
  INTERFUSE_INLINE explicit RnnFlags(int threads) {
    for (auto& place : line)
      for (int i = 0; i < threads; ++i) place[i].arrivals = 0;
  }
  struct alignas(128) Line {
    uint32_t arrivals;
  };
  Line line[3][kMostRnnThreads];
};

struct RnnMemory {
  float* at;
  INTERFUSE_INLINE float* take(int64_t count) {
    float* taken = at;
    at += (count + 15) / 16 * 16;
    return taken;
  }
};

class RnnTeam {
 public:
  INTERFUSE_INLINE RnnTeam(const Rnn& p, RnnFlags& flags, int thread, int threads)
      : flags_(flags), thread_(thread), threads_(threads), apart_(p.directions == 2 && threads > 1) {}

  INTERFUSE_INLINE bool takes(int d) const { return !apart_ || thread_ % 2 == d; }
  INTERFUSE_INLINE int members(int d) const { return apart_ ? (threads_ + 1 - d) / 2 : threads_; }
  INTERFUSE_INLINE int member() const { return apart_ ? thread_ / 2 : thread_; }
  INTERFUSE_INLINE Range share(int d, int64_t count) const { return interfuse::share(count, member(), members(d)); }

  INTERFUSE_INLINE Range share_of_all(int64_t count) const { return interfuse::share(count, thread_, threads_); }

  INTERFUSE_INLINE void arrive(int d) { arrive_at(d, member(), members(d)); }
  // Returns when all members have arrived as often as this one.
  INTERFUSE_INLINE void wait(int d) const { wait_at(d, member(), members(d)); }
  INTERFUSE_INLINE void meet(int d) { arrive(d), wait(d); }
  INTERFUSE_INLINE void meet_all() { arrive_at(2, thread_, threads_), wait_at(2, thread_, threads_); }

 private:
  INTERFUSE_INLINE void arrive_at(int place, int me, int members) {
    if (members > 1) __atomic_store_n(&flags_.line[place][me].arrivals, ++rounds_[place], __ATOMIC_RELEASE);
  }
  INTERFUSE_INLINE void wait_at(int place, int me, int members) const {
    for (int other = 0; other < members; ++other) {
      if (other == me) continue;
      const uint32_t* arrivals = &flags_.line[place][other].arrivals;
      const uint32_t round = rounds_[place];
      wait_until([&]() __attribute__((always_inline)) {
        return static_cast<int32_t>(__atomic_load_n(arrivals, __ATOMIC_ACQUIRE) - round) >= 0;
      });
    }
  }

  RnnFlags& flags_;
  const int thread_, threads_;
  const bool apart_;
  uint32_t rounds_[3] = {};
};

// A thread that comes costs a meeting a step, about a fifth of a microsecond: below so many products a step for each,
// fewer threads are faster.
template <class Cell>
INTERFUSE_INLINE int rnn_threads(const Rnn& p, const RnnOrder& order, int most) {
  constexpr int64_t kProducts = 8 << 10;
  const int64_t rows = order.steps ? order.tokens / order.steps : 0;
  const int64_t step = rows * p.hidden * p.output() * Cell::kGates * p.directions;
  const int64_t useful = step / kProducts, allowed = most < kMostRnnThreads ? most : kMostRnnThreads;
  return useful < 1 ? 1 : useful < allowed ? static_cast<int>(useful) : static_cast<int>(allowed);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
