// What linear's forward and backward share: threads, and tensors of bfloat16 as rows of floats. Per-ISA (see simd.h).
#pragma once

#include "common/linear.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "cpu/linear_rows.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Waking a team costs a few microseconds, in which one thread does about this many multiply-adds out of its cache.
constexpr int64_t kWorthAThread = int64_t(1) << 16;

// Bytes of a weight that no second-level cache holds: it comes from memory, and is read along its rows.
constexpr int64_t kFromMemory = int64_t(8) << 20;

INTERFUSE_INLINE int worth_threads(int64_t products, int threads) {
  const int64_t most = products / kWorthAThread;
  return most < 2 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

// A dense matrix converted to another type, by a team where that pays.
template <class From, class To>
INTERFUSE_INLINE void convert_rows(const From* from, int64_t from_row, To* to, int64_t rows, int64_t width, int threads) {
  parallel(worth_threads(rows * width, threads), [&](int thread, int team) {
    const Range mine = share(rows, thread, team);
    for (int64_t r = mine.begin; r < mine.end; ++r) convert_row(from + r * from_row, to + r * width, width);
  });
}

void linear_backward(const Linear& p, const LinearBackward& call);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
