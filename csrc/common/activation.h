// The activations and their derivatives on vectors. Per-ISA (see simd.h).
#pragma once

#include "common/simd.h"
#include "common/vector_math.h"
#include "interfuse.h"

namespace interfuse {
namespace INTERFUSE_ISA {

struct Activation {
  int kind;     // interfuse_activation
  float slope;  // of leaky_relu
};

constexpr float kRootHalf = 0.70710678f;       // 1 / sqrt(2)
constexpr float kRootTwoOverPi = 0.79788456f;  // sqrt(2 / pi), of gelu's tanh form
constexpr float kGeluCubic = 0.044715f;

INTERFUSE_INLINE Vec activate(Activation f, Vec x) {
  switch (f.kind) {
    case INTERFUSE_RELU: return select(x <= zero(), zero(), x);  // a NaN fails the comparison and stays
    case INTERFUSE_LEAKY_RELU: return select(x > zero(), x, x * f.slope);
    case INTERFUSE_GELU: return 0.5f * x * (1.f + erf(x * kRootHalf));
    case INTERFUSE_GELU_TANH: return 0.5f * x * (1.f + tanh(kRootTwoOverPi * (x + kGeluCubic * x * x * x)));
    case INTERFUSE_SILU: return x / (1.f + exp(-x));
    case INTERFUSE_TANH: return tanh(x);
    case INTERFUSE_SIGMOID: return logistic(x);
    default: return x;
  }
}

// The derivative, from what forward saved: the value after the activation where that suffices (relu, leaky_relu, tanh,
// sigmoid), else the value before it.
INTERFUSE_INLINE Vec activation_slope(Activation f, Vec saved) {
  switch (f.kind) {
    case INTERFUSE_RELU: return select(saved <= zero(), zero(), splat(1.f));
    case INTERFUSE_LEAKY_RELU: return select(saved > zero(), splat(1.f), splat(f.slope));
    case INTERFUSE_GELU: {
      constexpr float kDensity = 0.39894228f;  // 1 / sqrt(2 pi)
      return 0.5f * (1.f + erf(saved * kRootHalf)) + saved * kDensity * exp(-0.5f * saved * saved);
    }
    case INTERFUSE_GELU_TANH: {
      const Vec square = saved * saved;
      const Vec t = tanh(kRootTwoOverPi * saved * (1.f + kGeluCubic * square));
      return 0.5f * (1.f + t) + 0.5f * saved * (1.f - t * t) * kRootTwoOverPi * (1.f + 3.f * kGeluCubic * square);
    }
    case INTERFUSE_SILU: {
      const Vec s = logistic(saved);
      return s * (1.f + saved * (1.f - s));
    }
    case INTERFUSE_TANH: return 1.f - saved * saved;
    case INTERFUSE_SIGMOID: return saved * (1.f - saved);
    default: return splat(1.f);
  }
}

// One value; for places where vectors do not pay.
INTERFUSE_INLINE float activate(Activation f, float x) { return activate(f, splat(x))[0]; }
INTERFUSE_INLINE float activation_slope(Activation f, float saved) { return activation_slope(f, splat(saved))[0]; }

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
