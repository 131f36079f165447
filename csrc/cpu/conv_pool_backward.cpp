// conv_pool's gradients: through pool and activation to the convolution's result, and from there to x, weight and bias.
// Compiled once per ISA.
#include "common/activation.h"
#include "common/conv_pool.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/conv_pool_windows.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// The gradient of one (n, k) plane of the convolution's result, always (d, h, w) in float32.
template <class T>
void plane_gradient(const ConvPool& p, const ConvPoolBackward& a, int64_t n, int64_t k, float* plane) {
  const Activation f{p.activation, p.slope};
  const T* grad_y = static_cast<const T*>(a.grad_y);
  const T* y = static_cast<const T*>(a.y);
  const T* pre = static_cast<const T*>(a.pre);
  memset(plane, 0, static_cast<size_t>(p.conv.volume()) * sizeof(float));
  for (int64_t d = 0; d < p.out.d; ++d)
    for (int64_t h = 0; h < p.out.h; ++h)
      for (int64_t w = 0; w < p.out.w; ++w) {
        const int64_t at = dense_offset(p.channels_last, p.out_channels, p.out, n, k, d, h, w);
        const float g = to_float(grad_y[at]);
        if (p.pool == INTERFUSE_POOL_NONE) {
          float slope = p.activation == INTERFUSE_NONE ? 1.f : activation_slope(f, to_float(p.needs_preactivation() ? pre[at] : y[at]));
          plane[(d * p.conv.h + h) * p.conv.w + w] = g * slope;
          continue;
        }
        const Window r = window_at(p, d, h, w);
        if (p.pool == INTERFUSE_POOL_MAX) {
          const int winner = a.index[at];
          if (winner == kNoGradient && p.activation == INTERFUSE_RELU) continue;
          float slope = 1;
          if (p.needs_preactivation()) slope = activation_slope(f, to_float(pre[at]));
          else if (p.backward_reads_y()) slope = activation_slope(f, to_float(y[at]));
          int64_t l = r.ow + winner % p.window.w, j = r.oh + winner / p.window.w % p.window.h;
          int64_t i = r.od + winner / (p.window.w * p.window.h);
          plane[(i * p.conv.h + j) * p.conv.w + l] += g * slope;
          continue;
        }
        for (int64_t i = r.d0; i < r.d1; ++i)
          for (int64_t j = r.h0; j < r.h1; ++j)
            for (int64_t l = r.w0; l < r.w1; ++l) {
              float slope = 1;
              if (p.pre_count())
                slope = activation_slope(f, to_float(pre[dense_offset(p.channels_last, p.out_channels, p.conv, n, k, i, j, l)]));
              plane[(i * p.conv.h + j) * p.conv.w + l] += g / r.divisor * slope;
            }
      }
}

// Calls body(conv pixel, x offset from the channel's start) for every pair that kernel position (i, j, l) joins.
template <class Body>
INTERFUSE_INLINE void for_each_pair(const ConvPool& p, const Triple& at, int64_t sd, int64_t sh, int64_t sw, Body&& body) {
  for (int64_t d = 0; d < p.conv.d; ++d) {
    int64_t xd = d * p.stride.d - p.pad_lo.d + at.d * p.dilation.d;
    if (xd < 0 || xd >= p.in.d) continue;
    for (int64_t h = 0; h < p.conv.h; ++h) {
      int64_t xh = h * p.stride.h - p.pad_lo.h + at.h * p.dilation.h;
      if (xh < 0 || xh >= p.in.h) continue;
      for (int64_t w = 0; w < p.conv.w; ++w) {
        int64_t xw = w * p.stride.w - p.pad_lo.w + at.w * p.dilation.w;
        if (xw >= 0 && xw < p.in.w) body((d * p.conv.h + h) * p.conv.w + w, xd * sd + xh * sh + xw * sw);
      }
    }
  }
}

template <class Body>
INTERFUSE_INLINE void for_each_tap(const ConvPool& p, Body&& body) {
  int64_t tap = 0;
  for (int64_t i = 0; i < p.kernel.d; ++i)
    for (int64_t j = 0; j < p.kernel.h; ++j)
      for (int64_t l = 0; l < p.kernel.w; ++l) body(tap++, Triple{i, j, l});
}

template <class T>
void weight_gradient(const ConvPool& p, const ConvPoolBackward& a, const float* dz, int64_t k) {
  const int64_t taps = p.kernel.volume(), plane = p.conv.volume();
  const T* x = static_cast<const T*>(a.x);
  for (int64_t c = 0; c < p.group_in; ++c)
    for_each_tap(p, [&](int64_t tap, const Triple& at) {
      float sum = 0;
      for (int64_t n = 0; n < p.batch; ++n) {
        const T* xc = x + n * p.xs.n + ((k / p.group_out) * p.group_in + c) * p.xs.c;
        const float* g = dz + (n * p.out_channels + k) * plane;
        for_each_pair(p, at, p.xs.d, p.xs.h, p.xs.w, [&](int64_t pixel, int64_t offset) { sum += g[pixel] * to_float(xc[offset]); });
      }
      put(static_cast<T*>(a.grad_weight) + (k * p.group_in + c) * taps + tap, sum);
    });
}

template <class T>
void bias_gradient(const ConvPool& p, const ConvPoolBackward& a, const float* dz, int64_t k) {
  const int64_t plane = p.conv.volume();
  float sum = 0;
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t i = 0; i < plane; ++i) sum += dz[(n * p.out_channels + k) * plane + i];
  put(static_cast<T*>(a.grad_bias) + k, sum);
}

template <class T>
void input_gradient(const ConvPool& p, const ConvPoolBackward& a, const float* dz, int64_t n, int64_t channel) {
  const int64_t taps = p.kernel.volume(), plane = p.conv.volume(), pixels = p.in.volume();
  const int64_t group = channel / p.group_in, c = channel % p.group_in;
  float* sums = scratch_floats(Slot::rows, pixels);
  memset(sums, 0, static_cast<size_t>(pixels) * sizeof(float));
  for (int64_t k = group * p.group_out; k < (group + 1) * p.group_out; ++k) {
    const T* weight = static_cast<const T*>(a.weight) + (k * p.group_in + c) * taps;
    const float* g = dz + (n * p.out_channels + k) * plane;
    for_each_tap(p, [&](int64_t tap, const Triple& at) {
      const float scale = to_float(weight[tap]);
      for_each_pair(p, at, p.in.h * p.in.w, p.in.w, 1, [&](int64_t pixel, int64_t offset) { sums[offset] += g[pixel] * scale; });
    });
  }
  T* grad_x = static_cast<T*>(a.grad_x);
  for (int64_t i = 0; i < pixels; ++i)
    put(grad_x + (p.channels_last ? (n * pixels + i) * p.in_channels + channel : (n * p.in_channels + channel) * pixels + i), sums[i]);
}

template <class T>
void backward(const ConvPool& p, const ConvPoolBackward& a) {
  const int64_t planes = p.batch * p.out_channels, plane = p.conv.volume();
  float* dz = scratch_floats(Slot::gradient, planes * plane);
  parallel(a.threads, [&](int thread, int threads) {
    Range mine = share(planes, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) plane_gradient<T>(p, a, i / p.out_channels, i % p.out_channels, dz + i * plane);
  });
  parallel(a.threads, [&](int thread, int threads) {
    Range mine = share(p.out_channels, thread, threads);
    for (int64_t k = mine.begin; k < mine.end; ++k) {
      if (a.grad_weight) weight_gradient<T>(p, a, dz, k);
      if (a.grad_bias) bias_gradient<T>(p, a, dz, k);
    }
    if (!a.grad_x) return;
    mine = share(p.batch * p.in_channels, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) input_gradient<T>(p, a, dz, i / p.in_channels, i % p.in_channels);
  });
}

}  // namespace

void conv_pool_backward(const ConvPool& p, const ConvPoolBackward& a) {
  p.dtype == INTERFUSE_FLOAT32 ? backward<float>(p, a) : backward<uint16_t>(p, a);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
