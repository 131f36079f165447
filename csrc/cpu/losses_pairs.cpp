// Losses of two tensors that are read once: element by element (binary cross-entropy, squared error), and of pairs of
// rows (contrastive). A loss that is one number comes with its gradient in one pass over memory; torch's own take one for
// each step of the formula. Compiled once per ISA (see common/simd.h).
#include "common/losses.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/vector_math.h"
#include "cpu/linear.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// Elements that are summed in float before they join a sum in double.
constexpr int64_t kBlock = 2048;
// What an element costs in multiply-adds, for `worth_threads`.
constexpr int64_t kElementCost = 16;

struct Point {
  Vec loss, grad;
};

// log(1 + u) for 0 <= u <= 1: twice the area tangent of u / (2 + u), whose series ends below float's rounding there.
INTERFUSE_INLINE Vec log_of_one_plus(Vec u) {
  static constexpr float kSeries[] = {1.f, 1.f / 3, 1.f / 5, 1.f / 7, 1.f / 9, 1.f / 11, 1.f / 13};
  const Vec z = u / (u + 2.f);
  return 2.f * z * polynomial(z * z, kSeries);
}

INTERFUSE_INLINE Point binary_cross_entropy(Vec x, Vec t, Vec positive) {
  const Vec e = exp(-magnitude(x)), inverse = 1.f / (1.f + e);
  const Vec of_zero = select(x < zero(), inverse, e * inverse);  // the probability of zero
  const Vec weight = multiply_add(positive - 1.f, t, splat(1.f));
  // Parts that do not cancel: far from 0 the logarithm is all that is left.
  const Vec linear = x * select(x < zero(), -positive * t, 1.f - t);
  return {multiply_add(weight, log_of_one_plus(e), linear), (1.f - t) - weight * of_zero};
}

INTERFUSE_INLINE Point squared_error(Vec x, Vec t) {
  const Vec apart = x - t;
  return {apart * apart, 2.f * apart};
}

// Part of one row: its losses' sum; losses and gradients where they are wanted.
template <class T>
double part_of_row(const Elementwise& call, int64_t row, int64_t begin, int64_t count) {
  const interfuse_elementwise_loss_spec& s = call.spec;
  const int64_t first = row * s.columns + begin;
  const T* const x = static_cast<const T*>(call.input) + first;
  const T* const t = static_cast<const T*>(call.target) + first;
  T* const grad = call.grad ? static_cast<T*>(call.grad) + first : nullptr;
  const bool each = s.reduction == INTERFUSE_REDUCE_NONE;
  float* const loss = call.loss && each ? call.loss + first : nullptr;
  const float* const grads = call.grad_loss && each ? call.grad_loss + first : nullptr;
  const Vec scale = splat(call.scale * (call.grad_loss && !each ? call.grad_loss[0] : 1.f));
  const float* const weight = call.weight ? call.weight + row * s.weight_strides[0] + begin * s.weight_strides[1] : nullptr;
  const float* const positive =
      call.pos_weight ? call.pos_weight + row * s.pos_weight_strides[0] + begin * s.pos_weight_strides[1] : nullptr;
  Vec total = zero();
  const auto step = [&](int64_t at, auto&& read, auto&& write, auto&& keep) __attribute__((always_inline)) {
    const auto factor = [&](const float* from, int64_t stride) __attribute__((always_inline)) {
      return !from ? splat(1.f) : stride ? read(from + at) : splat(from[0]);
    };
    Point p = s.loss == INTERFUSE_LOSS_MSE
                  ? squared_error(read(x + at), read(t + at))
                  : binary_cross_entropy(read(x + at), read(t + at), factor(positive, s.pos_weight_strides[1]));
    if (weight) {
      const Vec w = factor(weight, s.weight_strides[1]);
      p.loss = p.loss * w, p.grad = p.grad * w;
    }
    if (loss) write(loss + at, p.loss);
    if (grad) write(grad + at, p.grad * (grads ? read(grads + at) : scale));
    total = total + keep(p.loss);
  };
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes)
    step(at, [](const auto* p) __attribute__((always_inline)) { return load(p); },
         [](auto* p, Vec v) __attribute__((always_inline)) { store(p, v); },
         [](Vec v) __attribute__((always_inline)) { return v; });
  if (const int left = static_cast<int>(count - at); left > 0)
    step(at, [&](const auto* p) __attribute__((always_inline)) { return load_first(p, left); },
         [&](auto* p, Vec v) __attribute__((always_inline)) { store_first(p, v, left); },
         [&](Vec v) __attribute__((always_inline)) {
           float lanes[kLanes] = {};
           store_first(lanes, v, left);
           return load(lanes);
         });
  return sum_lanes(total);
}

template <class T>
void elementwise_of(const Elementwise& call) {
  const interfuse_elementwise_loss_spec& s = call.spec;
  const int64_t parts = divide_up(s.columns, kBlock);
  const int threads = worth_threads(s.rows * s.columns * kElementCost, call.threads);
  double* const sums = static_cast<double*>(scratch(Slot::rows, static_cast<size_t>(threads) * sizeof(double)));
  for (int i = 0; i < threads; ++i) sums[i] = 0;
  parallel(threads, [&](int thread, int team) {
    const Range mine = share(s.rows * parts, thread, team);
    double sum = 0;
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t begin = i % parts * kBlock;
      sum += part_of_row<T>(call, i / parts, begin, s.columns - begin < kBlock ? s.columns - begin : kBlock);
    }
    sums[thread] = sum;
  });
  if (!call.loss || s.reduction == INTERFUSE_REDUCE_NONE) return;
  double total = 0;
  for (int i = 0; i < threads; ++i) total += sums[i];
  if (s.reduction == INTERFUSE_REDUCE_MEAN) total /= static_cast<double>(s.rows * s.columns);
  *call.loss = static_cast<float>(total);
}

// Pairs of rows: the distance, the loss, and what the rows' difference is multiplied by in the gradient.
template <class T>
void contrastive_of(const Contrastive& call) {
  const interfuse_contrastive_spec& s = call.spec;
  parallel(worth_threads(s.rows * s.columns * 2, call.threads), [&](int thread, int team) {
    const Range mine = share(s.rows, thread, team);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const T* const a = static_cast<const T*>(call.a) + r * s.columns;
      const T* const b = static_cast<const T*>(call.b) + r * s.columns;
      double square = 0;
      for (int64_t begin = 0; begin < s.columns; begin += kBlock) {
        Vec sum = zero();
        along_row(s.columns - begin < kBlock ? s.columns - begin : kBlock,
                  [&](auto&& read, auto&&) __attribute__((always_inline)) {
                    const Vec apart = read(a + begin) - read(b + begin);
                    sum = multiply_add(apart, apart, sum);
                  });
        square += sum_lanes(sum);
      }
      const double distance = __builtin_sqrt(square), label = call.target[r], short_of = s.margin - distance;
      // A NaN is neither beyond the margin nor short of it, and must stay.
      const double gap = short_of < 0 ? 0 : short_of;
      call.loss[r] = static_cast<float>(0.5 * (label * square + (1 - label) * gap * gap));
      // At distance 0 there is no direction to push in: the gradient there is 0.
      if (call.slope) call.slope[r] = static_cast<float>(label - (distance == 0 ? 0 : (1 - label) * gap / distance));
    }
  });
}

template <class T>
void contrastive_backward_of(const ContrastiveBackward& call) {
  const interfuse_contrastive_spec& s = call.spec;
  parallel(worth_threads(s.rows * s.columns * 2, call.threads), [&](int thread, int team) {
    const Range mine = share(s.rows, thread, team);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const T* const a = static_cast<const T*>(call.a) + r * s.columns;
      const T* const b = static_cast<const T*>(call.b) + r * s.columns;
      T* const grad_a = call.grad_a ? static_cast<T*>(call.grad_a) + r * s.columns : nullptr;
      T* const grad_b = call.grad_b ? static_cast<T*>(call.grad_b) + r * s.columns : nullptr;
      const float scale = call.slope[r] * call.grad_loss[r];
      along_row(s.columns, [&](auto&& read, auto&& write) __attribute__((always_inline)) {
        const Vec grad = (read(a) - read(b)) * scale;
        if (grad_a) write(grad_a, grad);
        if (grad_b) write(grad_b, -grad);
      });
    }
  });
}

void elementwise(const Elementwise& call) {
  call.spec.dtype == INTERFUSE_BFLOAT16 ? elementwise_of<uint16_t>(call) : elementwise_of<float>(call);
}
void contrastive(const Contrastive& call) {
  call.spec.dtype == INTERFUSE_BFLOAT16 ? contrastive_of<uint16_t>(call) : contrastive_of<float>(call);
}
void contrastive_backward(const ContrastiveBackward& call) {
  call.spec.dtype == INTERFUSE_BFLOAT16 ? contrastive_backward_of<uint16_t>(call) : contrastive_backward_of<float>(call);
}

}  // namespace

extern const PairLossKernels pair_loss_kernels = {elementwise, contrastive, contrastive_backward};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
