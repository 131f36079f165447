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

// x within limits; a NaN stays. (The machine's instructions give their second operand when one is a NaN.)
INTERFUSE_INLINE Vec at_most(Vec x, float most) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps((__mmask16)-1, (__m512)splat(most), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)splat(most), (__m256)x);
#else
  return select(x > splat(most), splat(most), x);
#endif
}
INTERFUSE_INLINE Vec at_least(Vec x, float least) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps((__mmask16)-1, (__m512)splat(least), (__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)splat(least), (__m256)x);
#else
  return select(x < splat(least), splat(least), x);
#endif
}

// x = n * ln 2 + r with |r| <= ln(2) / 2, for |x| below 150: exp(x) is 2^n * exp(r). A NaN's n is meaningless but
// harmless, its r is NaN.
struct Reduced {
  Vec n, r;
};
INTERFUSE_INLINE Reduced reduced(Vec x) {
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Vec n = multiply_add(x, splat(1.44269504f), splat(12582912.f)) - 12582912.f;
  // ln 2 in two parts, the first with few bits, so that n times it is exact.
  const Vec r = multiply_add(n, splat(-0.693359375f), x);
  return {n, multiply_add(n, splat(2.12194440e-4f), r)};
}
// value * 2^n, where the result is a normal number and -126 <= n <= 127.
INTERFUSE_INLINE Vec scaled(Vec value, Vec n) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)value, (__m512)n);
#else
  return value * power_of_two(__builtin_convertvector(n, IVec));
#endif
}
// (exp(r) - 1 - r) / r^2. Taylor's series of exp: |r| <= ln(2) / 2, so the first term left out is below 6e-9.
INTERFUSE_INLINE Vec exp_rest(Vec r) {
  static constexpr float kSeries[] = {0.5f, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040};
  return polynomial(r, kSeries);
}

INTERFUSE_INLINE Vec exp(Vec x) {
  // Beyond these the result is infinite or zero.
  const Reduced x2 = reduced(at_least(at_most(x, 89.f), -104.f));
  const Vec p = multiply_add(multiply_add(x2.r, exp_rest(x2.r), splat(1.f)), x2.r, splat(1.f));
  // Two factors, since 2^n itself may be out of range where the result is not.
  const IVec whole = __builtin_convertvector(x2.n, IVec), half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}

// 2^x for x <= 0, as softmax needs it: zero far below -126, a NaN stays one. Relative error under 2.2e-7, from a minimax
// polynomial.
INTERFUSE_INLINE Vec exp2_of_negative(Vec x) {
  static constexpr float kPowers[] = {1.00000007f, 0.693146967f, 0.240221197f, 0.0555071327f, 0.00967554133f, 0.00132764715f};
#if defined(__AVX512DQ__)
  const Vec r = (Vec)_mm512_maskz_reduce_ps((__mmask16)-1, (__m512)x, 0);  // minus the nearest integer
  return (Vec)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)polynomial(r, kPowers), (__m512)(x - r));
#else
  // 1.5 * 2^23 + 127: the low bits then hold the nearest integer, biased as an exponent is.
  const Vec shifted = x + 12583039.f;
  const Vec r = x - (shifted - 12583039.f);
  return select(x < splat(-126.f), zero(), polynomial(r, kPowers) * (Vec)((IVec)shifted << 23));
#endif
}

INTERFUSE_INLINE Vec logistic(Vec x) {
  // Below -87 the result is below the smallest normal float: it stays at that.
  const Reduced minus = reduced(at_least(at_most(-x, 87.f), -87.f));
  const Vec p = multiply_add(multiply_add(minus.r, exp_rest(minus.r), splat(1.f)), minus.r, splat(1.f));
  return reciprocal(1.f + scaled(p, minus.n));
}

INTERFUSE_INLINE Vec tanh(Vec x) {
  // With e = exp(-2 |x|): 1 - 2 e / (1 + e). From 10 on that rounds to 1. Near zero, where it would lose digits to its
  // difference, (1 - e) / (1 + e), whose e - 1 is formed before e is.
  const Vec size = magnitude(x);
  const Reduced minus = reduced(at_least(-2.f * size, -20.f));
  const Vec power = scaled(splat(1.f), minus.n);
  const Vec rest = multiply_add(minus.r * minus.r, exp_rest(minus.r), minus.r);
  const Vec e = multiply_add(power, rest, power), less = multiply_add(power, rest, power - 1.f);
  const Vec inverse = reciprocal(e + 1.f);
  return with_sign_of(select(size < splat(0.6f), magnitude(less * inverse), multiply_add(-2.f * e, inverse, splat(1.f))), x);
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
