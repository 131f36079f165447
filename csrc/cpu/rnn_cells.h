// The pointwise part of each recurrent cell, forward and backward, on one vector of units. A new cell is one struct.
// Per-ISA (see common/simd.h).
//
// A unit block is kLanes hidden units; its gates lie side by side as kSlots vectors, which forward finds summed up and
// where it leaves what backward reads.
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
  static constexpr bool kTwoSums = false;   // the last gate's two products are not simply added

  static INTERFUSE_INLINE Vec forward(float* gates, bool save, Vec, Vec&) {
    const Vec h = activate(Activation{Kind, 0}, load(gates));
    if (save) store(gates, h);
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

  static INTERFUSE_INLINE Vec forward(float* gates, bool save, Vec, Vec& c) {
    const Vec i = logistic(vector_of(gates, 0)), f = logistic(vector_of(gates, 1));
    const Vec g = tanh(vector_of(gates, 2)), o = logistic(vector_of(gates, 3));
    c = f * c + i * g;
    if (save) {
      store(gates, i), store(gates + kLanes, f), store(gates + 2 * kLanes, g), store(gates + 3 * kLanes, o);
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
  static constexpr int kGates = 3, kSlots = 4;  // reset, update, and the new gate's recurrent and input sums
  static constexpr bool kCell = false, kCarry = true, kTwoSums = true;

  static INTERFUSE_INLINE Vec forward(float* gates, bool save, Vec h_before, Vec&) {
    const Vec r = logistic(vector_of(gates, 0)), z = logistic(vector_of(gates, 1));
    const Vec n = tanh(vector_of(gates, 3) + r * vector_of(gates, 2));
    if (save) {
      store(gates, r), store(gates + kLanes, z), store(gates + 3 * kLanes, n);
    }
    return n + z * (h_before - n);
  }
  // carry: the gradient that reaches the h before without passing a product.
  static INTERFUSE_INLINE void backward(Vec dh, Vec& carry, Vec, Vec, Vec h_before, const float* saved, Vec (&dx)[3],
                                        Vec (&dsum)[3]) {
    const Vec r = vector_of(saved, 0), z = vector_of(saved, 1), hn = vector_of(saved, 2), n = vector_of(saved, 3);
    const Vec dn = dh * (1.f - z) * (1.f - n * n);
    dx[0] = dsum[0] = dn * hn * r * (1.f - r);
    dx[1] = dsum[1] = dh * (h_before - n) * z * (1.f - z);
    dx[2] = dn;
    dsum[2] = dn * r;
    carry = dh * z;
  }
};

// Calls body.template run<Cell>() for the problem's cell.
template <class Body>
INTERFUSE_INLINE void for_cell(int cell, Body&& body) {
  switch (cell) {
    case INTERFUSE_LSTM: return body.template run<LstmCell>();
    case INTERFUSE_GRU: return body.template run<GruCell>();
    case INTERFUSE_RNN_RELU: return body.template run<PlainCell<INTERFUSE_RELU>>();
    default: return body.template run<PlainCell<INTERFUSE_TANH>>();
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
