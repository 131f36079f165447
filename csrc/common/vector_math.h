// exp, tanh, the logistic function and erf on vectors, within three units in the last place, NaN and infinities as libm
// has them. Per-ISA (see simd.h). The polynomials are Chebyshev fits in double precision, rounded to float.
#pragma once

#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

template <int N>
INTERFUSE_INLINE Vec polynomial(Vec x, const float (&coefficients)[N]) {
  Vec sum = splat(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = multiply_add(sum, x, splat(coefficients[i]));
  return sum;
}

INTERFUSE_INLINE Vec magnitude(Vec x) { return (Vec)((IVec)x & 0x7fffffff); }
INTERFUSE_INLINE Vec with_sign_of(Vec size, Vec sign) { return (Vec)((IVec)size | ((IVec)sign & (int32_t)0x80000000)); }
// 2^n for -126 <= n <= 127.
INTERFUSE_INLINE Vec power_of_two(IVec n) { return (Vec)((n + 127) << 23); }

// 1 / d for a finite d whose inverse is a normal number, within an ulp. AVX-512's estimate and one Newton step take a
// third of a division's time.
INTERFUSE_INLINE Vec reciprocal(Vec d) {
#if defined(__AVX512F__)
  const Vec guess = (Vec)_mm512_maskz_rcp14_ps((__mmask16)-1, (__m512)d);
  return multiply_add(guess, multiply_add(-guess, d, splat(1.f)), guess);
#else
  return 1.f / d;
#endif
}

INTERFUSE_INLINE Vec exp(Vec x) {
  // Beyond these the result is infinite or zero; the comparisons let a NaN pass.
  x = select(x > splat(89.f), splat(89.f), x);
  x = select(x < splat(-104.f), splat(-104.f), x);
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Vec shifted = multiply_add(x, splat(1.44269504f), splat(12582912.f));
  const Vec n = shifted - 12582912.f;
  // ln 2 in two parts, the first with few bits, so that n times it is exact.
  Vec r = multiply_add(n, splat(-0.693359375f), x);
  r = multiply_add(n, splat(2.12194440e-4f), r);
  // Taylor's series: |r| <= ln(2) / 2, so the first term left out is below 6e-9.
  static constexpr float kSeries[] = {1.f, 1.f, 0.5f, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
  const Vec p = polynomial(r, kSeries);
  // Two factors, since 2^n itself may be out of range where the result is not. A NaN's n is meaningless but harmless.
  const IVec whole = (IVec)shifted - 0x4b400000, half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

INTERFUSE_INLINE Vec logistic(Vec x) {
  // Below -87 the result is below the smallest normal float: it stays at that, and a NaN stays NaN.
  return reciprocal(1.f + exp(select(x < splat(-87.f), splat(87.f), -x)));
}

INTERFUSE_INLINE Vec tanh(Vec x) {
  const Vec size = magnitude(x), square = x * x;
  // From 10 on tanh rounds to 1.
  const Vec twice = select(size > splat(10.f), splat(20.f), size + size);
  const Vec far = with_sign_of(1.f - 2.f * reciprocal(exp(twice) + 1.f), x);
  static constexpr float kNear[] = {-0.33333334f, 0.13333313f, -0.05396165f, 0.021789117f, -0.008412579f, 0.0023735408f};
  // Near zero the other form would lose digits to its difference.
  const Vec near = multiply_add(x * square, polynomial(square, kNear), x);
  return select(size < splat(0.6f), near, far);
}

INTERFUSE_INLINE Vec erf(Vec x) {
  Vec size = magnitude(x);
  size = select(size > splat(4.f), splat(4.f), size);  // erf(4) rounds to 1
  static constexpr float kNear[] = {1.1283791f, -0.37612626f, 0.11283597f, -0.026854329f, 0.0051893122f, -8.0188555e-4f,
                                    7.8824974e-5f};
  // -log(1 - erf), which is smooth where erf itself is flat.
  static constexpr float kFar[] = {-3.0321296e-4f, 1.1301666f,    0.63193709f,    0.10997824f,   -0.026364718f,
                                   0.0047402224f,  -5.9276953e-4f, 4.5590623e-5f, -1.6140616e-6f};
  const Vec near = size * polynomial(size * size, kNear);
  const Vec far = 1.f - exp(-polynomial(size, kFar));
  return with_sign_of(select(size < splat(1.f), near, far), x);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
