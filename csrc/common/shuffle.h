// Lanes in another order: what turns rows of pixels into vectors of every second (fourth) pixel and back. Per-ISA.
#pragma once

#include "common/simd.h"

// The compilers spell a shuffle of two vectors differently, and the indices must be literals.
#if defined(__clang__)
#define INTERFUSE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERFUSE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IVec{__VA_ARGS__})
#endif

namespace interfuse {
namespace INTERFUSE_ISA {

// V is Vec or IVec.
template <class V>
INTERFUSE_INLINE V even_lanes(V a, V b) {  // a0 a2 a4 ... b0 b2 b4 ...
#if defined(__AVX512F__)
  return INTERFUSE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  return INTERFUSE_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return INTERFUSE_SHUFFLE(a, b, 0, 2, 4, 6);
#endif
}
template <class V>
INTERFUSE_INLINE V odd_lanes(V a, V b) {
#if defined(__AVX512F__)
  return INTERFUSE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return INTERFUSE_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return INTERFUSE_SHUFFLE(a, b, 1, 3, 5, 7);
#endif
}
template <class V>
INTERFUSE_INLINE V zip_low(V a, V b) {  // a0 b0 a1 b1 ... of the lower halves
#if defined(__AVX512F__)
  return INTERFUSE_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return INTERFUSE_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return INTERFUSE_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
template <class V>
INTERFUSE_INLINE V zip_high(V a, V b) {
#if defined(__AVX512F__)
  return INTERFUSE_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return INTERFUSE_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return INTERFUSE_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// a1 a2 ... a(last) b(Lane): a moved down by one lane, with lane 0 or 1 of b coming in at the top.
template <int Lane, class V>
INTERFUSE_INLINE V shift_in(V a, V b) {
  static_assert(Lane == 0 || Lane == 1, "only what is used");
#if defined(__AVX512F__)
  if constexpr (Lane == 0) return INTERFUSE_SHUFFLE(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
  else return INTERFUSE_SHUFFLE(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17);
#elif defined(__AVX2__)
  if constexpr (Lane == 0) return INTERFUSE_SHUFFLE(a, b, 1, 2, 3, 4, 5, 6, 7, 8);
  else return INTERFUSE_SHUFFLE(a, b, 1, 2, 3, 4, 5, 6, 7, 9);
#else
  if constexpr (Lane == 0) return INTERFUSE_SHUFFLE(a, b, 1, 2, 3, 4);
  else return INTERFUSE_SHUFFLE(a, b, 1, 2, 3, 5);
#endif
}

// rows[0..3] hold 4 * kLanes consecutive elements; columns[j] takes every fourth of them, from the j-th on.
template <class V>
INTERFUSE_INLINE void deinterleave4(const V* rows, V* columns) {
  const V even_low = even_lanes(rows[0], rows[1]), odd_low = odd_lanes(rows[0], rows[1]);
  const V even_high = even_lanes(rows[2], rows[3]), odd_high = odd_lanes(rows[2], rows[3]);
  columns[0] = even_lanes(even_low, even_high), columns[2] = odd_lanes(even_low, even_high);
  columns[1] = even_lanes(odd_low, odd_high), columns[3] = odd_lanes(odd_low, odd_high);
}

// The way back from `count` (1, 2 or 4) columns, in place.
template <class V>
INTERFUSE_INLINE void interleave(V* v, int count) {
  if (count == 2) {
    const V low = zip_low(v[0], v[1]), high = zip_high(v[0], v[1]);
    v[0] = low, v[1] = high;
  } else if (count == 4) {
    const V even_low = zip_low(v[0], v[2]), even_high = zip_high(v[0], v[2]);
    const V odd_low = zip_low(v[1], v[3]), odd_high = zip_high(v[1], v[3]);
    v[0] = zip_low(even_low, odd_low), v[1] = zip_high(even_low, odd_low);
    v[2] = zip_low(even_high, odd_high), v[3] = zip_high(even_high, odd_high);
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
