// The activations and their derivatives, on scalars and vectors. Per-ISA (see simd.h).
#pragma once

#include <math.h>

#include "common/simd.h"
#include "interfuse.h"

namespace interfuse {
namespace INTERFUSE_ISA {

struct Activation {
  int kind;     // interfuse_activation
  float slope;  // of leaky_relu
};

INTERFUSE_INLINE float activate(Activation f, float x) {
  switch (f.kind) {
    case INTERFUSE_RELU: return x <= 0 ? 0 : x;  // a NaN fails the comparison and stays
    case INTERFUSE_LEAKY_RELU: return x > 0 ? x : x * f.slope;
    case INTERFUSE_GELU: return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
    case INTERFUSE_GELU_TANH: return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case INTERFUSE_SILU: return x / (1 + expf(-x));
    case INTERFUSE_TANH: return tanhf(x);
    case INTERFUSE_SIGMOID: return 1 / (1 + expf(-x));
    default: return x;
  }
}

// The derivative, from what forward saved: the activated value where it suffices (see gradient_from_value), else the
// value before the activation.
INTERFUSE_INLINE float activation_slope(Activation f, float saved) {
  switch (f.kind) {
    case INTERFUSE_RELU: return saved <= 0 ? 0.f : 1.f;
    case INTERFUSE_LEAKY_RELU: return saved > 0 ? 1.f : f.slope;
    case INTERFUSE_GELU: {
      float cdf = 0.5f * (1 + erff(saved * 0.70710678118654752f));
      return cdf + saved * 0.3989422804014327f * expf(-0.5f * saved * saved);
    }
    case INTERFUSE_GELU_TANH: {
      float cubic = 0.044715f * saved * saved * saved;
      float t = tanhf(0.7978845608028654f * (saved + cubic));
      return 0.5f * (1 + t) + 0.5f * saved * (1 - t * t) * 0.7978845608028654f * (1 + 0.134145f * saved * saved);
    }
    case INTERFUSE_SILU: {
      float s = 1 / (1 + expf(-saved));
      return s * (1 + saved * (1 - s));
    }
    case INTERFUSE_TANH: return 1 - saved * saved;
    case INTERFUSE_SIGMOID: return saved * (1 - saved);
    default: return 1;
  }
}

INTERFUSE_INLINE Vec activate(Activation f, Vec x) {
  if (f.kind == INTERFUSE_NONE) return x;
  if (f.kind == INTERFUSE_RELU) return select(x <= zero(), zero(), x);
  if (f.kind == INTERFUSE_LEAKY_RELU) return select(x > zero(), x, x * splat(f.slope));
  for (int i = 0; i < kLanes; ++i) x[i] = activate(f, static_cast<float>(x[i]));
  return x;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
