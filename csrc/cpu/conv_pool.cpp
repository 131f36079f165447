// conv_pool on the CPU: the kernel that takes every problem, written for clearness. Compiled once per ISA.
#include <math.h>

#include "common/activation.h"
#include "common/conv_pool.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/conv_pool_windows.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

template <class T>
float convolve(const ConvPool& p, const ConvPoolForward& a, int64_t n, int64_t k, int64_t d, int64_t h, int64_t w) {
  const T* x = static_cast<const T*>(a.x) + n * p.xs.n + (k / p.group_out) * p.group_in * p.xs.c;
  const T* weight = static_cast<const T*>(a.weight) + k * p.group_in * p.kernel.volume();
  float sum = 0;
  for (int64_t c = 0; c < p.group_in; ++c)
    for (int64_t i = 0; i < p.kernel.d; ++i)
      for (int64_t j = 0; j < p.kernel.h; ++j)
        for (int64_t l = 0; l < p.kernel.w; ++l, ++weight) {
          int64_t xd = d * p.stride.d - p.pad_lo.d + i * p.dilation.d;
          int64_t xh = h * p.stride.h - p.pad_lo.h + j * p.dilation.h;
          int64_t xw = w * p.stride.w - p.pad_lo.w + l * p.dilation.w;
          if (xd < 0 || xd >= p.in.d || xh < 0 || xh >= p.in.h || xw < 0 || xw >= p.in.w) continue;
          sum += to_float(x[c * p.xs.c + xd * p.xs.d + xh * p.xs.h + xw * p.xs.w]) * to_float(*weight);
        }
  return a.bias ? sum + to_float(static_cast<const T*>(a.bias)[k]) : sum;
}

template <class T>
void forward_one(const ConvPool& p, const ConvPoolForward& a, int64_t n, int64_t k, int64_t d, int64_t h, int64_t w) {
  const Activation f{p.activation, p.slope};
  T* y = static_cast<T*>(a.y);
  T* pre = static_cast<T*>(a.pre);
  const int64_t at = dense_offset(p.channels_last, p.out_channels, p.out, n, k, d, h, w);
  if (p.pool == INTERFUSE_POOL_NONE) {
    float z = convolve<T>(p, a, n, k, d, h, w);
    put(y + at, activate(f, z));
    if (p.pre_count()) put(pre + at, z);
    return;
  }
  const Window r = window_at(p, d, h, w);
  float best = -INFINITY, best_z = 0, sum = 0;
  int64_t winner = 0;
  bool first = true;
  for (int64_t i = r.d0; i < r.d1; ++i)
    for (int64_t j = r.h0; j < r.h1; ++j)
      for (int64_t l = r.w0; l < r.w1; ++l) {
        float z = convolve<T>(p, a, n, k, i, j, l), v = activate(f, z);
        sum += v;
        if (first || v > best || v != v) {
          best = v, best_z = z, first = false;
          winner = ((i - r.od) * p.window.h + (j - r.oh)) * p.window.w + (l - r.ow);
        }
        if (p.pool == INTERFUSE_POOL_AVG && p.pre_count())
          put(pre + dense_offset(p.channels_last, p.out_channels, p.conv, n, k, i, j, l), p.needs_preactivation() ? z : v);
      }
  if (p.pool == INTERFUSE_POOL_AVG) {
    put(y + at, sum / r.divisor);
    return;
  }
  put(y + at, best);
  if (p.index_count()) a.index[at] = p.activation == INTERFUSE_RELU && best <= 0 ? kNoGradient : static_cast<uint8_t>(winner);
  if (p.pre_count()) put(pre + at, best_z);
}

template <class T>
void forward(const ConvPool& p, const ConvPoolForward& a) {
  parallel(a.threads, [&](int thread, int threads) {
    Range mine = share(p.batch * p.out_channels, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      for (int64_t d = 0; d < p.out.d; ++d)
        for (int64_t h = 0; h < p.out.h; ++h)
          for (int64_t w = 0; w < p.out.w; ++w) forward_one<T>(p, a, i / p.out_channels, i % p.out_channels, d, h, w);
  });
}

void direct(const ConvPool& p, const ConvPoolForward& a) {
  p.dtype == INTERFUSE_FLOAT32 ? forward<float>(p, a) : forward<uint16_t>(p, a);
}

}  // namespace

void conv_pool_backward(const ConvPool&, const ConvPoolBackward&);

extern const ConvPoolKernels conv_pool_kernels;
const ConvPoolKernels conv_pool_kernels = {direct, conv_pool_backward};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
