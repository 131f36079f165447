// The pointwise part of each recurrent cell, forward and backward, on one vector of units. A new cell is one struct.
// Per-ISA (see common/simd.h).
//
// A unit block is kLanes hidden units; its gates lie side by side as vectors. `x` is the input's share of the gates,
// bias included, kSlots vectors of which the first kGates are filled; `sum` starts as start() says and has the product
// of the previous h with the recurrent weights added. `saved` is what backward reads (it may be x itself).
#pragma once

#include "common/activation.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

INTERFUSE_INLINE Vec vector_of(const float* p, int gate) { return load(p + gate * kLanes); }

template <int Kind>
struct PlainCell {
  static constexpr int kGates = 1, kSlots = 1;
  static constexpr bool kCell = false;      // has a cell state c beside h
  static constexpr bool kCarry = false;     // backward passes a gradient to the step before beside the product
  static constexpr bool kTwoSums = false;   // the gradients of the two products differ

  static INTERFUSE_INLINE Vec start(int, const float* x, const float*) { return load(x); }
  static INTERFUSE_INLINE Vec forward(const Vec (&sum)[1], const float*, Vec, Vec&, float* saved) {
    const Vec h = activate(Activation{Kind, 0}, sum[0]);
    if (saved) store(saved, h);
    return h;
  }
  static INTERFUSE_INLINE void backward(Vec dh, Vec&, Vec, Vec, Vec, const float* saved, Vec (&dx)[1], Vec (&)[1]) {
    const Vec h = load(saved);
    dx[0] = Kind == INTERFUSE_TANH ? dh * (1.f - h * h) : select(h <= zero(), zero(), dh);
  }
};

struct LstmCell {
  static constexpr int kGates = 4, kSlots = 4;
  static constexpr bool kCell = true, kCarry = true, kTwoSums = false;

  static INTERFUSE_INLINE Vec start(int gate, const float* x, const float*) { return vector_of(x, gate); }
  static INTERFUSE_INLINE Vec forward(const Vec (&sum)[4], const float*, Vec, Vec& c, float* saved) {
    const Vec i = logistic(sum[0]), f = logistic(sum[1]), g = tanh(sum[2]), o = logistic(sum[3]);
    c = f * c + i * g;
    if (saved) {
      store(saved, i), store(saved + kLanes, f), store(saved + 2 * kLanes, g), store(saved + 3 * kLanes, o);
    }
    return o * tanh(c);
  }
  // carry: the gradient of c, in from the step after, out to the step before.
  static INTERFUSE_INLINE void backward(Vec dh, Vec& carry, Vec c, Vec c_before, Vec, const float* saved, Vec (&dx)[4],
                                        Vec (&)[4]) {
    const Vec i = vector_of(saved, 0), f = vector_of(saved, 1), g = vector_of(saved, 2), o = vector_of(saved, 3);
    const Vec t = tanh(c);
    const Vec dc = carry + dh * o * (1.f - t * t);
    dx[0] = dc * g * i * (1.f - i);
    dx[1] = dc * c_before * f * (1.f - f);
    dx[2] = dc * i * (1.f - g * g);
    dx[3] = dh * t * o * (1.f - o);
    carry = dc * f;
  }
};

struct GruCell {
  static constexpr int kGates = 3, kSlots = 4;  // the fourth saves the new gate's recurrent sum
  static constexpr bool kCell = false, kCarry = true, kTwoSums = true;

  // The reset gate multiplies the recurrent sum of the new gate, its bias included, so that sum starts alone.
  static INTERFUSE_INLINE Vec start(int gate, const float* x, const float* bias) {
    return gate < 2 ? vector_of(x, gate) : load(bias);
  }
  static INTERFUSE_INLINE Vec forward(const Vec (&sum)[3], const float* x, Vec h_before, Vec&, float* saved) {
    const Vec r = logistic(sum[0]), z = logistic(sum[1]), n = tanh(vector_of(x, 2) + r * sum[2]);
    if (saved) {
      store(saved, r), store(saved + kLanes, z), store(saved + 2 * kLanes, n), store(saved + 3 * kLanes, sum[2]);
    }
    return n + z * (h_before - n);
  }
  // carry: the gradient that reaches the h before without passing a product.
  static INTERFUSE_INLINE void backward(Vec dh, Vec& carry, Vec, Vec, Vec h_before, const float* saved, Vec (&dx)[3],
                                        Vec (&dsum)[3]) {
    const Vec r = vector_of(saved, 0), z = vector_of(saved, 1), n = vector_of(saved, 2), hn = vector_of(saved, 3);
    const Vec dn = dh * (1.f - z) * (1.f - n * n);
    dx[0] = dsum[0] = dn * hn * r * (1.f - r);
    dx[1] = dsum[1] = dh * (h_before - n) * z * (1.f - z);
    dx[2] = dn;
    dsum[2] = dn * r;
    carry = dh * z;
  }
};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
