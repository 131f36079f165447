// What linear does to single rows: bfloat16 to float and back, the end of a row of sums, softmax. Per-ISA (see simd.h).
#pragma once

#include "common/activation.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// step(load or load_first, store or store_first, at) for every vector of a row.
template <class Step>
INTERFUSE_INLINE void along_row(int64_t count, Step&& step) {
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes)
    step([&](const auto* p) __attribute__((always_inline)) { return load(p + at); },
         [&](auto* p, Vec v) __attribute__((always_inline)) { store(p + at, v); });
  if (const int left = static_cast<int>(count - at); left > 0)
    step([&](const auto* p) __attribute__((always_inline)) { return load_first(p + at, left); },
         [&](auto* p, Vec v) __attribute__((always_inline)) { store_first(p + at, v, left); });
}

template <class From, class To>
INTERFUSE_INLINE void convert_row(const From* from, To* to, int64_t count) {
  along_row(count, [&](auto&& read, auto&& write) __attribute__((always_inline)) { write(to, read(from)); });
}

// sums, in place: times scale, plus bias (each may be null), what goes to pre (or null), and through the activation.
inline void finish_row(Activation f, const float* scale, const float* bias, float* sums, float* pre, int64_t count) {
  along_row(count, [&](auto&& read, auto&& write) __attribute__((always_inline)) {
    Vec v = read(sums);
    if (scale) v = v * read(scale);
    if (bias) v = v + read(bias);
    if (pre) write(pre, v);
    write(sums, activate(f, v));
  });
}

inline void softmax_row(float* row, int64_t count) {
  float most = row[0];
  for (int64_t i = 1; i < count; ++i) most = maximum(row[i], most);
  float total = 0;
  along_row(count, [&](auto&& read, auto&& write) __attribute__((always_inline)) { write(row, exp(read(row) - most)); });
  Vec sums = zero();
  along_row(count, [&](auto&& read, auto&&) __attribute__((always_inline)) { sums = sums + read(row); });
  total = sum_lanes(sums);
  along_row(count, [&](auto&& read, auto&& write) __attribute__((always_inline)) { write(row, read(row) / total); });
}

// The gradient before the activation, from grad (of y) and what forward saved.
inline void grad_row(Activation f, const float* grad, const float* saved, float* to, int64_t count) {
  if (f.kind == INTERFUSE_SOFTMAX) {
    Vec sums = zero();
    along_row(count, [&](auto&& read, auto&&) __attribute__((always_inline)) { sums = multiply_add(read(grad), read(saved), sums); });
    const float mean = sum_lanes(sums);
    along_row(count, [&](auto&& read, auto&& write) __attribute__((always_inline)) { write(to, read(saved) * (read(grad) - mean)); });
    return;
  }
  along_row(count, [&](auto&& read, auto&& write) __attribute__((always_inline)) {
    write(to, f.kind == INTERFUSE_NONE ? read(grad) : read(grad) * activation_slope(f, read(saved)));
  });
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
