// Attention pooling: one pass over a sequence for its scores, one for the weighted sum. Bound by memory; a sequence is
// the unit of work.
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/vector_math.h"
#include "cpu/attention_kernels.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

INTERFUSE_INLINE int lanes_at(int64_t column, int64_t count) {
  return static_cast<int>(count - column < kLanes ? count - column : kLanes);
}

template <class T>
INTERFUSE_INLINE Vec load_lanes(const T* p, int lanes) {
  return lanes == kLanes ? load(p) : load_first(p, lanes);
}

template <class T>
INTERFUSE_INLINE void store_lanes(T* p, Vec v, int lanes) {
  lanes == kLanes ? store(p, v) : store_first(p, v, lanes);
}

template <class T>
class Pool {
 public:
  Pool(const AttentionPool& p, const AttentionPoolForward& a)
      : p_(p), a_(a), weights_(scratch_floats(Slot::rows, 2 * p.steps)), slopes_(weights_ + p.steps) {}

  void forward(int64_t b) {
    const int64_t length = soften(b);
    T* weights = static_cast<T*>(a_.weights) + b * p_.steps;
    for (int64_t t = 0; t < p_.steps; ++t) put(weights + t, t < length ? weights_[t] : 0.f);
    T* y = static_cast<T*>(a_.y) + b * p_.width;
    for (int64_t column = 0; column < p_.width; column += kLanes) {
      const int lanes = lanes_at(column, p_.width);
      Vec sum = zero();
      for (int64_t t = 0; t < length; ++t) sum = multiply_add(splat(weights_[t]), load_lanes(x(b, t) + column, lanes), sum);
      store_lanes(y + column, sum, lanes);
    }
  }

  void backward(int64_t b, const AttentionPoolBackward& g) {
    const int64_t length = soften(b);
    const T* grad_y = g.grad_y ? static_cast<const T*>(g.grad_y) + b * p_.width : nullptr;
    const T* grad_weights = g.grad_weights ? static_cast<const T*>(g.grad_weights) + b * p_.steps : nullptr;
    for (int64_t t = 0; t < length; ++t) {
      Vec sum = zero();
      for (int64_t column = 0; grad_y && column < p_.width; column += kLanes) {
        const int lanes = lanes_at(column, p_.width);
        sum = multiply_add(load_lanes(grad_y + column, lanes), load_lanes(x(b, t) + column, lanes), sum);
      }
      slopes_[t] = sum_lanes(sum) + (grad_weights ? to_float(grad_weights[t]) : 0.f);
    }
    // Measured from the heaviest step: where one step has nearly all the weight, its slope and the mean would cancel.
    const float origin = length ? slopes_[heaviest_] : 0.f;
    float mean = 0;
    for (int64_t t = 0; t < length; ++t) mean += weights_[t] * (slopes_[t] - origin);
    for (int64_t t = 0; t < length; ++t) slopes_[t] = weights_[t] * (slopes_[t] - origin - mean);
    if (g.grad_x) store_x(length, grad_y, static_cast<T*>(g.grad_x) + b * p_.steps * p_.width);
    if (g.grad_hidden || g.grad_context) store_hidden(b, length, g);
  }

 private:
  const T* x(int64_t b, int64_t t) const { return static_cast<const T*>(a_.x) + b * p_.x_batch + t * p_.x_step; }
  const T* hidden(int64_t b, int64_t t) const {
    return static_cast<const T*>(a_.hidden) + b * p_.hidden_batch + t * p_.hidden_step;
  }

  // weights_ of the sequence's steps, and the heaviest of them; returns the sequence's length.
  int64_t soften(int64_t b) {
    const int64_t length = a_.lengths ? a_.lengths[b] : p_.steps;
    const T* context = static_cast<const T*>(a_.context);
    float most = -__builtin_inff();
    heaviest_ = 0;
    for (int64_t t = 0; t < length; ++t) {
      Vec sum = zero();
      for (int64_t column = 0; column < p_.hidden; column += kLanes) {
        const int lanes = lanes_at(column, p_.hidden);
        sum = multiply_add(load_lanes(context + column, lanes), tanh(load_lanes(hidden(b, t) + column, lanes)), sum);
      }
      weights_[t] = sum_lanes(sum);
      if (weights_[t] > most) heaviest_ = t;
      most = maximum(weights_[t], most);
    }
    Vec sums = zero();
    for (int64_t t = 0; t < length; t += kLanes) {
      const int lanes = lanes_at(t, length);
      store_lanes(weights_ + t, exp(load_lanes(weights_ + t, lanes) - most), lanes);
      sums += load_lanes(weights_ + t, lanes);  // without what the lanes beyond the end came to
    }
    const float inverse = 1.f / sum_lanes(sums);
    for (int64_t t = 0; t < length; ++t) weights_[t] *= inverse;
    return length;
  }

  void store_x(int64_t length, const T* grad_y, T* to) const {
    for (int64_t t = 0; t < p_.steps; ++t)
      for (int64_t column = 0; column < p_.width; column += kLanes) {
        const int lanes = lanes_at(column, p_.width);
        const bool there = grad_y && t < length;
        store_lanes(to + t * p_.width + column, there ? load_lanes(grad_y + column, lanes) * weights_[t] : zero(), lanes);
      }
  }

  void store_hidden(int64_t b, int64_t length, const AttentionPoolBackward& g) const {
    const T* context = static_cast<const T*>(a_.context);
    T* to = g.grad_hidden ? static_cast<T*>(g.grad_hidden) + b * p_.steps * p_.hidden : nullptr;
    for (int64_t column = 0; column < p_.hidden; column += kLanes) {
      const int lanes = lanes_at(column, p_.hidden);
      const Vec u = load_lanes(context + column, lanes);
      Vec sum = zero();
      for (int64_t t = 0; t < length; ++t) {
        const Vec value = tanh(load_lanes(hidden(b, t) + column, lanes));
        sum = multiply_add(splat(slopes_[t]), value, sum);
        if (to) store_lanes(to + t * p_.hidden + column, slopes_[t] * u * (1.f - value * value), lanes);
      }
      for (int64_t t = length; to && t < p_.steps; ++t) store_lanes(to + t * p_.hidden + column, zero(), lanes);
      if (g.grad_context) store_lanes(g.grad_context + b * p_.hidden + column, sum, lanes);
    }
  }

  const AttentionPool& p_;
  const AttentionPoolForward& a_;
  float *weights_, *slopes_;
  int64_t heaviest_ = 0;
};

template <class T>
void forward_of(const AttentionPool& p, const AttentionPoolForward& a) {
  parallel(a.threads, [&](int thread, int threads) {
    Pool<T> pool(p, a);
    const Range mine = share(p.batch, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) pool.forward(b);
  });
}

template <class T>
void backward_of(const AttentionPool& p, const AttentionPoolBackward& a) {
  parallel(a.in.threads, [&](int thread, int threads) {
    Pool<T> pool(p, a.in);
    const Range mine = share(p.batch, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) pool.backward(b, a);
  });
}

}  // namespace

void attention_pool_forward(const AttentionPool& p, const AttentionPoolForward& a) {
  p.half ? forward_of<uint16_t>(p, a) : forward_of<float>(p, a);
}

void attention_pool_backward(const AttentionPool& p, const AttentionPoolBackward& a) {
  p.half ? backward_of<uint16_t>(p, a) : backward_of<float>(p, a);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
