// A barrier for threads that meet every few hundred nanoseconds: it spins, and yields when the wait grows long, so that
// a team larger than the free cores still advances.
#pragma once

#include <sched.h>
#include <stdint.h>

namespace interfuse {

class SpinBarrier {
 public:
  // Every member passes the same count: how many threads really came is known inside the region only.
  __attribute__((always_inline)) void wait(int members) {
    if (members == 1) return;
    const uint32_t round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++spins) {
      if (spins < 4000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  // Arrivals and the round on lines of their own: the waiters' polling must not slow the arrivals.
  alignas(64) int arrived_ = 0;
  alignas(64) uint32_t round_ = 0;
};

}  // namespace interfuse
