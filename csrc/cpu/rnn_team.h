// Who works on what in the recurrent kernels: with two directions and more than one thread, each direction has threads
// and a barrier of its own, and the two meet between layers only. Per-ISA (see common/simd.h).
#pragma once

#include "common/barrier.h"
#include "common/parallel.h"
#include "cpu/rnn_shapes.h"

namespace interfuse {
namespace INTERFUSE_ISA {

struct RnnBarriers {
  SpinBarrier all, direction[2];
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
  INTERFUSE_INLINE RnnTeam(const Rnn& p, RnnBarriers& barriers, int thread, int threads)
      : barriers_(barriers), thread_(thread), threads_(threads), apart_(p.directions == 2 && threads > 1) {}

  INTERFUSE_INLINE bool takes(int d) const { return !apart_ || thread_ % 2 == d; }
  INTERFUSE_INLINE int members(int d) const { return apart_ ? (threads_ + 1 - d) / 2 : threads_; }
  INTERFUSE_INLINE int member() const { return apart_ ? thread_ / 2 : thread_; }
  INTERFUSE_INLINE bool first_of(int) const { return member() == 0; }
  INTERFUSE_INLINE Range share(int d, int64_t count) const { return interfuse::share(count, member(), members(d)); }
  INTERFUSE_INLINE void meet(int d) const { barriers_.direction[d].wait(members(d)); }
  INTERFUSE_INLINE void meet_all() const { barriers_.all.wait(threads_); }

 private:
  RnnBarriers& barriers_;
  const int thread_, threads_;
  const bool apart_;
};

// A thread that comes costs a barrier a step, about a fifth of a microsecond: below so many products a step for each,
// fewer threads are faster.
template <class Cell>
INTERFUSE_INLINE int rnn_threads(const Rnn& p, const RnnOrder& order, int most) {
  constexpr int64_t kProducts = 8 << 10;
  const int64_t rows = order.steps ? order.tokens / order.steps : 0;
  const int64_t step = rows * p.hidden * p.output() * Cell::kGates * p.directions;
  const int64_t useful = step / kProducts;
  return useful < 1 ? 1 : useful < most ? static_cast<int>(useful) : most;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
