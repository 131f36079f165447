// Winograd's minimal filtering for kernels of three taps: the one-dimensional algorithms and how they nest. Per-ISA.
//
// A tile of m outputs y[i] = d[i] g[0] + d[i+1] g[1] + d[i+2] g[2] costs n = m + 2 products instead of 3 m:
//
//   y = A' [(G g) * (B' d)]       A': m x n, G: n x 3, B': n x n
//
// and the same matrices, transposed, give the gradients: of the weight, from data d and gradient e of y,
//   G' [(B' d) * (A e)];   of the data, B [(G g) * (A e)].
// In two and three dimensions every axis is transformed in turn, and the products of all channels are one matrix
// product per point of the transformed tile.
//
// The points decide the error. F(4,3) uses 0, +-5/8, +-3/2 and infinity: with the textbook's 0, +-1, +-2 the error is
// twice as large in two dimensions and three times in three (relative Frobenius error of 64 channels: 6.4e-7 against
// 1.4e-6 in 2-D; of 32 channels in 3-D, F(4x4x4): 1.1e-6 against 3.5e-6). The constants below are exact in float32.
#pragma once

#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// V is float or Vec. Every function reads all of its input before it writes, so that it may work in place.
struct Winograd1 {  // one tap, one output: an axis along which nothing is filtered
  static constexpr int outputs = 1, points = 1, taps = 1;
  template <class V> static INTERFUSE_INLINE void data(const V* d, V* t) { t[0] = d[0]; }
  template <class V> static INTERFUSE_INLINE void data_transposed(const V* t, V* d) { d[0] = t[0]; }
  template <class V> static INTERFUSE_INLINE void output(const V* t, V* y) { y[0] = t[0]; }
  template <class V> static INTERFUSE_INLINE void weight(const V* g, V* t) { t[0] = g[0]; }
  template <class V> static INTERFUSE_INLINE void output_transposed(const V* e, V* t) { t[0] = e[0]; }
  template <class V> static INTERFUSE_INLINE void weight_transposed(const V* t, V* g) { g[0] = t[0]; }
};

struct Winograd2 {  // F(2,3): 0, 1, -1, infinity
  static constexpr int outputs = 2, points = 4, taps = 3;
  template <class V> static INTERFUSE_INLINE void data(const V* d, V* t) {  // B' d
    const V d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
    t[0] = d2 - d0, t[1] = d2 + d1, t[2] = d2 - d1, t[3] = d3 - d1;
  }
  template <class V> static INTERFUSE_INLINE void data_transposed(const V* t, V* d) {  // B t
    const V t0 = t[0], sum = t[1] + t[2], difference = t[1] - t[2], t3 = t[3];
    d[0] = -t0, d[1] = difference - t3, d[2] = sum + t0, d[3] = t3;
  }
  template <class V> static INTERFUSE_INLINE void output(const V* t, V* y) {  // A' t
    const V sum = t[1] + t[2], difference = t[1] - t[2], t0 = t[0], t3 = t[3];
    y[0] = t0 + sum, y[1] = difference + t3;
  }
  template <class V> static INTERFUSE_INLINE void weight(const V* g, V* t) {  // G g
    const V g0 = g[0], even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1], g2 = g[2];
    t[0] = -g0, t[1] = even + odd, t[2] = even - odd, t[3] = g2;
  }
  template <class V> static INTERFUSE_INLINE void output_transposed(const V* e, V* t) {  // A e
    const V e0 = e[0], e1 = e[1];
    t[0] = e0, t[1] = e0 + e1, t[2] = e0 - e1, t[3] = e1;
  }
  template <class V> static INTERFUSE_INLINE void weight_transposed(const V* t, V* g) {  // G' t
    const V sum = 0.5f * (t[1] + t[2]), difference = 0.5f * (t[1] - t[2]), t0 = t[0], t3 = t[3];
    g[0] = sum - t0, g[1] = difference, g[2] = sum + t3;
  }
};

struct Winograd4 {  // F(4,3): 0, a, -a, b, -b, infinity
  static constexpr int outputs = 4, points = 6, taps = 3;
  static constexpr float a = 0.625f, b = 1.5f, aa = a * a, bb = b * b;
  // G's rows are [1 p pp] divided by the product of p's distances to the other points.
  static constexpr float at_zero = 1 / (aa * bb), at_a = 1 / (2 * aa * (aa - bb)), at_b = 1 / (2 * bb * (bb - aa));

  template <class V> static INTERFUSE_INLINE void data(const V* d, V* t) {
    const V d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3], d4 = d[4], d5 = d[5];
    const V even_a = d4 - bb * d2, odd_a = d3 - bb * d1, even_b = d4 - aa * d2, odd_b = d3 - aa * d1;
    t[0] = (d4 - (aa + bb) * d2) + (aa * bb) * d0;
    t[1] = even_a + a * odd_a;
    t[2] = even_a - a * odd_a;
    t[3] = even_b + b * odd_b;
    t[4] = even_b - b * odd_b;
    t[5] = (d5 - (aa + bb) * d3) + (aa * bb) * d1;
  }
  template <class V> static INTERFUSE_INLINE void data_transposed(const V* t, V* d) {
    const V t0 = t[0], t5 = t[5];
    const V sum_a = t[1] + t[2], difference_a = a * (t[1] - t[2]), sum_b = t[3] + t[4], difference_b = b * (t[3] - t[4]);
    d[0] = (aa * bb) * t0;
    d[1] = (aa * bb) * t5 - (bb * difference_a + aa * difference_b);
    d[2] = -(aa + bb) * t0 - (bb * sum_a + aa * sum_b);
    d[3] = (difference_a + difference_b) - (aa + bb) * t5;
    d[4] = (t0 + sum_a) + sum_b;
    d[5] = t5;
  }
  template <class V> static INTERFUSE_INLINE void output(const V* t, V* y) {
    const V t0 = t[0], t5 = t[5];
    const V sum_a = t[1] + t[2], difference_a = t[1] - t[2], sum_b = t[3] + t[4], difference_b = t[3] - t[4];
    y[0] = (t0 + sum_a) + sum_b;
    y[1] = a * difference_a + b * difference_b;
    y[2] = aa * sum_a + bb * sum_b;
    y[3] = (t5 + (aa * a) * difference_a) + (bb * b) * difference_b;
  }
  template <class V> static INTERFUSE_INLINE void weight(const V* g, V* t) {
    const V g0 = g[0], g1 = g[1], g2 = g[2];
    const V even_a = at_a * (g0 + aa * g2), odd_a = (at_a * a) * g1;
    const V even_b = at_b * (g0 + bb * g2), odd_b = (at_b * b) * g1;
    t[0] = at_zero * g0;
    t[1] = even_a + odd_a, t[2] = even_a - odd_a;
    t[3] = even_b + odd_b, t[4] = even_b - odd_b;
    t[5] = g2;
  }
  template <class V> static INTERFUSE_INLINE void output_transposed(const V* e, V* t) {
    const V e0 = e[0], e1 = e[1], e2 = e[2], e3 = e[3];
    const V even_a = e0 + aa * e2, odd_a = a * (e1 + aa * e3), even_b = e0 + bb * e2, odd_b = b * (e1 + bb * e3);
    t[0] = e0;
    t[1] = even_a + odd_a, t[2] = even_a - odd_a;
    t[3] = even_b + odd_b, t[4] = even_b - odd_b;
    t[5] = e3;
  }
  template <class V> static INTERFUSE_INLINE void weight_transposed(const V* t, V* g) {
    const V sum_a = at_a * (t[1] + t[2]), sum_b = at_b * (t[3] + t[4]), t0 = t[0], t5 = t[5];
    const V difference_a = t[1] - t[2], difference_b = t[3] - t[4];
    g[0] = (at_zero * t0 + sum_a) + sum_b;
    g[1] = (at_a * a) * difference_a + (at_b * b) * difference_b;
    g[2] = (t5 + aa * sum_a) + bb * sum_b;
  }
};

// The same transform along an axis of an array: in and out elements of that axis are `from` and `to` apart.
#define INTERFUSE_WINOGRAD_ALONG(name, in_count, out_count)                                          \
  template <class Axis, class V>                                                                     \
  INTERFUSE_INLINE void name##_along(const V* in, int from, V* out, int to) {                        \
    V taken[Axis::in_count], made[Axis::out_count];                                                  \
    for (int i = 0; i < Axis::in_count; ++i) taken[i] = in[i * from];                                \
    Axis::name(taken, made);                                                                         \
    for (int i = 0; i < Axis::out_count; ++i) out[i * to] = made[i];                                 \
  }
INTERFUSE_WINOGRAD_ALONG(data, points, points)
INTERFUSE_WINOGRAD_ALONG(data_transposed, points, points)
INTERFUSE_WINOGRAD_ALONG(output, points, outputs)
INTERFUSE_WINOGRAD_ALONG(weight, taps, points)
INTERFUSE_WINOGRAD_ALONG(output_transposed, outputs, points)
INTERFUSE_WINOGRAD_ALONG(weight_transposed, points, taps)
#undef INTERFUSE_WINOGRAD_ALONG

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
