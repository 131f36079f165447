// conv_pool's gradients: from grad_y through the activation, and behind pooling which pixels they reach. Per-ISA.
#pragma once

#include "common/activation.h"
#include "cpu/conv_pool_backward.h"

namespace interfuse {
namespace INTERFUSE_ISA {

template <class T>
INTERFUSE_INLINE void store_some(T* p, Vec v, int64_t n) {
  n >= kLanes ? store(p, v) : store_first(p, v, static_cast<int>(n));
}

// n bytes of the saved index.
INTERFUSE_INLINE IVec load_index(const uint8_t* p, int n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (IVec)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1u), p));
#else
  int32_t lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  IVec v;
  memcpy(&v, lanes, sizeof v);
  return v;
#endif
}

// The gradient times the slope. A slope of zero stops even Inf and NaN in relu, as in torch.
INTERFUSE_INLINE Vec through_activation(Activation f, Vec gradient, Vec saved) {
  return f.kind == INTERFUSE_RELU ? select(saved <= zero(), zero(), gradient) : gradient * activation_slope(f, saved);
}

// y's gradient times the activation's slope, where that is known at y's resolution: behind max pooling relu's is in the
// index, and behind average pooling the slope belongs to the pixels.
template <class T>
struct OutputGradient {
  const T* gradient;
  const T* saved;
  Activation f;

  explicit OutputGradient(const BackwardPlan& plan)
      : gradient(static_cast<const T*>(plan.a->grad_y)), saved(nullptr), f{plan.p->activation, plan.p->slope} {
    if (plan.p->pool == INTERFUSE_POOL_AVG || f.kind == INTERFUSE_NONE) return;
    if (plan.p->needs_preactivation()) saved = static_cast<const T*>(plan.a->pre);
    else if (plan.p->backward_reads_y()) saved = static_cast<const T*>(plan.a->y);
  }
  // The first n of the vector's lanes, from element `at` on.
  INTERFUSE_INLINE Vec operator()(int64_t at, int64_t n) const {
    const Vec g = load_some(gradient + at, n);
    return saved ? through_activation(f, g, load_some(saved + at, n)) : g;
  }
};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
