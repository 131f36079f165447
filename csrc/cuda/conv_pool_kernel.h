// conv_pool on a GPU: an implicit GEMM whose columns are pooled outputs. The block computes its tile once per position
// of the pooling window, keeping the running maximum or sum in registers, so that the convolution's full-size result
// never exists. Takes every problem that the core's checks let through.
//
// Included after cuda/device.h (nvcc) or tests/emulate.h (host).
#pragma once

#include <math.h>

#include "common/conv_pool.h"

namespace interfuse {
namespace cuda {

// 64 channels x 64 outputs a block, 4 x 4 a thread: 16 accumulators need 8 shared-memory reads for 16 FMAs.
constexpr int kTile = 64, kDepth = 16, kSide = 16, kEach = kTile / kSide, kThreads = kSide * kSide;

INTERFUSE_DEVICE float activate(int kind, float slope, float x) {
  switch (kind) {
    case INTERFUSE_RELU: return x <= 0 ? 0 : x;  // a NaN fails the comparison and stays
    case INTERFUSE_LEAKY_RELU: return x > 0 ? x : x * slope;
    case INTERFUSE_GELU: return 0.5f * x * (1 + erff(x * 0.70710678118654752f));
    case INTERFUSE_GELU_TANH: return 0.5f * x * (1 + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case INTERFUSE_SILU: return x / (1 + expf(-x));
    case INTERFUSE_TANH: return tanhf(x);
    case INTERFUSE_SIGMOID: return 1 / (1 + expf(-x));
    default: return x;
  }
}

// One pooled output of the tile, or nothing beyond the last.
struct Column {
  bool inside;
  int64_t n, d, h, w;

  INTERFUSE_DEVICE Column(const ConvPool& p, int64_t at) {
    inside = at < p.batch * p.out.volume();
    w = at % p.out.w, at /= p.out.w;
    h = at % p.out.h, at /= p.out.h;
    d = at % p.out.d, n = at / p.out.d;
  }
};

// The convolution's pixel under window position (i, j, l) of a column; `valid` says whether there is one.
struct Pixel {
  int64_t d, h, w;
  bool valid;

  INTERFUSE_DEVICE Pixel(const ConvPool& p, const Column& c, int i, int j, int l) {
    d = c.d * p.window_stride.d - p.window_pad.d + i;
    h = c.h * p.window_stride.h - p.window_pad.h + j;
    w = c.w * p.window_stride.w - p.window_pad.w + l;
    valid = c.inside && d >= 0 && d < p.conv.d && h >= 0 && h < p.conv.h && w >= 0 && w < p.conv.w;
  }
};

// torch's divisor: the window cut at the padded size, or with count_include_pad off at the real one.
INTERFUSE_DEVICE float window_divisor(const ConvPool& p, const Column& c) {
  const int64_t starts[3] = {c.d * p.window_stride.d - p.window_pad.d, c.h * p.window_stride.h - p.window_pad.h,
                             c.w * p.window_stride.w - p.window_pad.w};
  const int64_t sizes[3] = {p.conv.d, p.conv.h, p.conv.w}, windows[3] = {p.window.d, p.window.h, p.window.w};
  const int64_t pads[3] = {p.window_pad.d, p.window_pad.h, p.window_pad.w};
  int64_t count = 1;
  for (int axis = 0; axis < 3; ++axis) {
    int64_t begin = starts[axis], end = begin + windows[axis];
    const int64_t most = sizes[axis] + (p.count_include_pad ? pads[axis] : 0);
    if (end > most) end = most;
    if (!p.count_include_pad && begin < 0) begin = 0;
    count *= end - begin;
  }
  return static_cast<float>(count);
}

struct Tiles {
  float weight[kDepth][kTile];
  float x[kDepth][kTile];
};

// acc += weight[channel 0..kTile, :] * x under this window position.
template <class T>
INTERFUSE_DEVICE void multiply(const ConvPool& p, const T* x, const T* weight, int64_t group, int64_t channel0,
                               const Column& loaded, int i, int j, int l, Tiles& tiles, float acc[kEach][kEach]) {
  const int thread = threadIdx.x, row = thread / kSide, side = thread % kSide;
  const int64_t taps = p.kernel.volume(), depth = p.group_in * taps;
  const Pixel pixel(p, loaded, i, j, l);
  const int64_t d0 = pixel.d * p.stride.d - p.pad_lo.d, h0 = pixel.h * p.stride.h - p.pad_lo.h,
                w0 = pixel.w * p.stride.w - p.pad_lo.w;
  const T* from = x + loaded.n * p.xs.n + group * p.group_in * p.xs.c;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
    INTERFUSE_ROLLED  // its divisions want many registers: one copy is enough
    for (int e = thread; e < kDepth * kTile; e += kThreads) {
      const int k = e / kTile, column = e % kTile;
      const int64_t at = k0 + k, c = at / taps, tap = at % taps;
      float value = 0;
      if (pixel.valid && at < depth) {
        const int64_t xd = d0 + tap / (p.kernel.h * p.kernel.w) * p.dilation.d;
        const int64_t xh = h0 + tap / p.kernel.w % p.kernel.h * p.dilation.h;
        const int64_t xw = w0 + tap % p.kernel.w * p.dilation.w;
        if (xd >= 0 && xd < p.in.d && xh >= 0 && xh < p.in.h && xw >= 0 && xw < p.in.w)
          value = to_float(from[c * p.xs.c + xd * p.xs.d + xh * p.xs.h + xw * p.xs.w]);
      }
      tiles.x[k][column] = value;
      // The weight's rows are contiguous along depth, so neighbouring threads take neighbouring depths of a channel.
      const int wk = e % kDepth, channel = e / kDepth;
      const bool real = channel0 + channel < p.group_out && k0 + wk < depth;
      const int64_t place = p.ws.tap == 1 ? k0 + wk : (k0 + wk) / taps * p.ws.c + (k0 + wk) % taps * p.ws.tap;
      tiles.weight[wk][channel] =
          real ? to_float(weight[(group * p.group_out + channel0 + channel) * depth + place]) : 0.f;
    }
    __syncthreads();
    INTERFUSE_ROLLED
    for (int k = 0; k < kDepth; ++k) {
      float a[kEach], b[kEach];
      INTERFUSE_UNROLL
      for (int e = 0; e < kEach; ++e) a[e] = tiles.weight[k][row + e * kSide], b[e] = tiles.x[k][side + e * kSide];
      INTERFUSE_UNROLL
      for (int r = 0; r < kEach; ++r)
        INTERFUSE_UNROLL
        for (int s = 0; s < kEach; ++s) acc[r][s] += a[r] * b[s];
    }
    __syncthreads();
  }
}

// Grid: x over tiles of pooled outputs, y over tiles of a group's channels, z over groups. kThreads threads.
template <class T>
INTERFUSE_KERNEL(kThreads)
conv_pool_forward(const ConvPool p, const T* x, const T* weight, const T* bias, T* y, uint8_t* index, T* pre) {
  INTERFUSE_SHARED(Tiles, tiles);
  const int thread = threadIdx.x, row = thread / kSide, side = thread % kSide;
  const int64_t tile0 = static_cast<int64_t>(blockIdx.x) * kTile, channel0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t group = blockIdx.z;
  // kThreads is a multiple of kTile, so a thread loads the same column of x at every step.
  const Column loaded(p, tile0 + thread % kTile);

  float best[kEach][kEach], best_z[kEach][kEach];
  int winner[kEach][kEach];
  INTERFUSE_UNROLL
  for (int r = 0; r < kEach; ++r)
    INTERFUSE_UNROLL
    for (int s = 0; s < kEach; ++s) best[r][s] = best_z[r][s] = 0, winner[r][s] = -1;

  int position = 0;
  for (int i = 0; i < p.window.d; ++i)
    for (int j = 0; j < p.window.h; ++j)
      for (int l = 0; l < p.window.w; ++l, ++position) {
        float acc[kEach][kEach] = {};
        multiply(p, x, weight, group, channel0, loaded, i, j, l, tiles, acc);
        INTERFUSE_UNROLL
        for (int s = 0; s < kEach; ++s) {
          const Column column(p, tile0 + side + s * kSide);
          const Pixel pixel(p, column, i, j, l);
          if (!pixel.valid) continue;
          INTERFUSE_UNROLL
          for (int r = 0; r < kEach; ++r) {
            const int64_t channel = channel0 + row + r * kSide;
            if (channel >= p.group_out) continue;
            const int64_t k = group * p.group_out + channel;
            const float z = bias ? acc[r][s] + to_float(bias[k]) : acc[r][s], v = activate(p.activation, p.slope, z);
            if (p.pool == INTERFUSE_POOL_AVG) {
              best[r][s] += v;
              if (pre) put(pre + p.at(p.conv, column.n, k, pixel.d, pixel.h, pixel.w), p.needs_preactivation() ? z : v);
            } else if (winner[r][s] < 0 || v > best[r][s] || v != v) {
              best[r][s] = v, best_z[r][s] = z, winner[r][s] = position;
            }
          }
        }
      }

  INTERFUSE_UNROLL
  for (int s = 0; s < kEach; ++s) {
    const Column column(p, tile0 + side + s * kSide);
    if (!column.inside) continue;
    INTERFUSE_UNROLL
    for (int r = 0; r < kEach; ++r) {
      const int64_t channel = channel0 + row + r * kSide;
      if (channel >= p.group_out) continue;
      const int64_t at = p.at(p.out, column.n, group * p.group_out + channel, column.d, column.h, column.w);
      const float value = best[r][s];
      put(y + at, p.pool == INTERFUSE_POOL_AVG ? value / window_divisor(p, column) : value);
      if (p.pool == INTERFUSE_POOL_AVG) continue;
      if (pre) put(pre + at, best_z[r][s]);
      if (index)
        index[at] = p.activation == INTERFUSE_RELU && value <= 0 ? kNoGradient : static_cast<uint8_t>(winner[r][s]);
    }
  }
}

}  // namespace cuda
}  // namespace interfuse
