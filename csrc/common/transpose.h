// Transposing a square block of floats in registers. Per-ISA (see simd.h).
#pragma once

#include <utility>

#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace transposing {

// Lanes of a (0..L-1) and b (L..2L-1), chosen by constants.
template <int... From>
INTERFUSE_INLINE Vec pick(Vec a, Vec b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From...);
#else
  return __builtin_shuffle(a, b, IVec{From...});
#endif
}

// One stage: blocks of `Size` columns change places between rows `Size` apart.
template <int Size, int... J>
INTERFUSE_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, J...>) {
  const Vec first = pick<(J & Size ? J - Size + kLanes : J)...>(a, b);
  b = pick<(J & Size ? J + kLanes : J + Size)...>(a, b);
  a = first;
}

template <int Size>
INTERFUSE_INLINE void stage(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Size)) exchange<Size>(rows[i], rows[i + Size], std::make_integer_sequence<int, kLanes>{});
}

}  // namespace transposing

// rows[i][j] becomes rows[j][i].
INTERFUSE_INLINE void transpose(Vec (&rows)[kLanes]) {
  if constexpr (kLanes > 8) transposing::stage<8>(rows);
  if constexpr (kLanes > 4) transposing::stage<4>(rows);
  transposing::stage<2>(rows);
  transposing::stage<1>(rows);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
