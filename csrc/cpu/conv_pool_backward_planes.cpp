// Gradients of convolutions with few input channels in a group (first layers, depthwise): channels would fill a
// fraction of a vector, so here the vectors lie along the width. A strip holds one plane per channel; along the width,
// columns are sorted by their remainder modulo the convolution's stride ("phase"), so that neighbours of a vector are
// neighbours in memory for every stride.
#include "cpu/conv_pool_backward.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int kMostChannels = 4;  // input channels that the input kernel takes at once
constexpr int kMostTaps = kRegisters == 32 ? 4 : 3;
constexpr int kMostRows = 4;      // output channels that the weight kernel takes at once


// A source is one kernel tap's share in a row of grad_x: a row of the gradient, shifted, for all output channels, and
// their weights. grad_x[c][q] += weight[k][c] * gradient[k][column + q] over all sources and output channels, for C
// channels and Q vectors.
template <int C, int Q>
void input_kernel(const PlaneSource* sources, int64_t count, int64_t column, int64_t channels, int64_t gradient_step,
                  int64_t weight_step, float* grad_x, int64_t grad_x_step) {
  Vec s[C][Q];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) s[c][q] = load(grad_x + c * grad_x_step + q * kLanes);
  for (int64_t i = 0; i < count; ++i) {
    const float *gradient = sources[i].gradient + column, *weight = sources[i].weight;
    for (int64_t k = 0; k < channels; ++k, gradient += gradient_step, weight += weight_step) {
      Vec g[Q];
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) g[q] = load(gradient + q * kLanes);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec w = splat(weight[c]);
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) s[c][q] = multiply_add(w, g[q], s[c][q]);
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) store(grad_x + c * grad_x_step + q * kLanes, s[c][q]);
}

typedef void (*InputKernel)(const PlaneSource*, int64_t, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
// Vectors that C channels take at once: 8 to 16 accumulators, and what they are made from, in the registers.
constexpr int kWide[kMostChannels] = {kRegisters == 32 ? 8 : 6, kRegisters == 32 ? 6 : 4, kRegisters == 32 ? 4 : 3,
                                      kRegisters == 32 ? 4 : 2};
constexpr InputKernel kInputKernels[kMostChannels][3] = {
    {input_kernel<1, kWide[0]>, input_kernel<1, 2>, input_kernel<1, 1>},
    {input_kernel<2, kWide[1]>, input_kernel<2, 2>, input_kernel<2, 1>},
    {input_kernel<3, kWide[2]>, input_kernel<3, 2>, input_kernel<3, 1>},
    {input_kernel<4, kWide[3]>, input_kernel<4, 2>, input_kernel<4, 1>}};

// Rows of the gradient and of x that belong together.
struct Rows {
  const float* gradient;
  int64_t channel_step, gradient_step;  // between output channels, between rows
  const float* x[kMostTaps];
  int64_t x_step, count, vectors;
};

// sums[k][tap][lane] += gradient[k] * x[tap], for K output channels and L taps side by side.
template <int K, int L>
void weight_kernel(const Rows& rows, float* sums, int64_t sums_step) {
  Vec s[K][L] = {};
  for (int64_t row = 0; row < rows.count; ++row) {
    const float* gradient = rows.gradient + row * rows.gradient_step;
    const float* x[L];
    for (int l = 0; l < L; ++l) x[l] = rows.x[l] + row * rows.x_step;
    for (int64_t q = 0; q < rows.vectors * kLanes; q += kLanes) {
      Vec g[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) g[k] = load(gradient + k * rows.channel_step + q);
#pragma GCC unroll 8
      for (int l = 0; l < L; ++l) {
        const Vec value = load(x[l] + q);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) s[k][l] = multiply_add(g[k], value, s[k][l]);
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k)
#pragma GCC unroll 8
    for (int l = 0; l < L; ++l) {
      float* to = sums + k * sums_step + l * kLanes;
      store(to, load(to) + s[k][l]);
    }
}

typedef void (*WeightKernel)(const Rows&, float*, int64_t);
template <int K>
constexpr WeightKernel weight_kernel_of(int taps) {
  return taps == 1   ? weight_kernel<K, 1>
         : taps == 2 ? weight_kernel<K, 2>
         : taps == 3 ? weight_kernel<K, 3>
                     : weight_kernel<K, kMostTaps>;
}
WeightKernel weight_kernel_of(int64_t rows, int taps) {
  return rows >= 4 ? weight_kernel_of<4>(taps) : rows >= 2 ? weight_kernel_of<2>(taps) : weight_kernel_of<1>(taps);
}
int64_t rows_at_once(int64_t rows) { return rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

}  // namespace

Planes planes_of(const BackwardPlan& plan, const Strip& strip, int64_t channels) {
  Planes s;
  const int64_t columns = divide_up(strip.size[2], plan.stride[2]);
  s.shift = divide_up((plan.kernel[2] - 1) * plan.dilation[2], plan.stride[2]);
  s.columns = divide_up(columns, kLanes) * kLanes;
  s.phase = divide_up(s.columns + s.shift, kLanes) * kLanes;
  s.row = s.phase * plan.stride[2];
  s.slice = strip.size[1] * s.row;
  s.image = strip.size[0] * s.slice;
  s.channel = strip.images * s.image;
  for (int i = 0; i < 3; ++i) {
    s.first[i] = i == plan.axis ? plan.first_pixel(strip.begin) : 0;
    s.pixels[i] = i == plan.axis ? least(strip.end * plan.window_stride[i], plan.conv[i]) - s.first[i] : plan.conv[i];
  }
  s.left = divide_up(s.shift, kLanes) * kLanes;
  s.gradient_channel = s.left + s.columns;
  s.gradient_row = channels * s.gradient_channel;
  return s;
}

void planes_input_gradient(const BackwardPlan& plan, const Strip& strip, const Planes& s, const float* gradient,
                           int64_t channels, const float* weight, float* grad_x, PlaneSource* sources) {
  const int64_t in_channels = plan.p->group_in;
  for (int64_t n = 0; n < strip.images; ++n)
    for (int64_t d = 0; d < strip.size[0]; ++d)
      for (int64_t h = 0; h < strip.size[1]; ++h)
        for (int64_t phase = 0; phase < plan.stride[2]; ++phase) {
          int64_t count = 0, tap = 0;
          for (int64_t i = 0; i < plan.kernel[0]; ++i)
            for (int64_t j = 0; j < plan.kernel[1]; ++j) {
              // Counted from the strip's first pixel, which lies at lo.
              const int64_t from_d = d - i * plan.dilation[0], from_h = h - j * plan.dilation[1];
              const bool meets = from_d >= 0 && from_h >= 0 && from_d % plan.stride[0] == 0 &&
                                 from_h % plan.stride[1] == 0 && from_d / plan.stride[0] < s.pixels[0] &&
                                 from_h / plan.stride[1] < s.pixels[1];
              for (int64_t l = 0; l < plan.kernel[2]; ++l, ++tap) {
                if (!meets || l * plan.dilation[2] % plan.stride[2] != phase) continue;
                const int64_t row = (n * s.pixels[0] + from_d / plan.stride[0]) * s.pixels[1] + from_h / plan.stride[1];
                sources[count++] = {gradient + row * s.gradient_row + s.left - l * plan.dilation[2] / plan.stride[2],
                                    weight + tap * channels * in_channels};
              }
            }
          if (count == 0) continue;
          float* to = grad_x + n * s.image + d * s.slice + h * s.row + phase * s.phase;
          for (int64_t c = 0; c < in_channels;) {
            const int taken = static_cast<int>(least(in_channels - c, kMostChannels));
            for (int64_t q = 0; q < s.columns;) {
              const int64_t left = (s.columns - q) / kLanes;
              const int size = left >= kWide[taken - 1] ? 0 : left >= 2 ? 1 : 2;
              kInputKernels[taken - 1][size](sources, count, q, channels, s.gradient_channel, in_channels,
                                             to + c * s.channel + q, s.channel);
              q += (size == 0 ? kWide[taken - 1] : 3 - size) * kLanes;
            }
            for (int64_t t = 0; t < count; ++t) sources[t].weight += taken;
            c += taken;
          }
        }
}

void planes_weight_gradient(const BackwardPlan& plan, const Strip& strip, const Planes& s, const float* gradient,
                            int64_t channels, const float* x, float* sums) {
  const int64_t in_channels = plan.p->group_in, sums_step = in_channels * plan.taps * kLanes;
  const int64_t vectors = divide_up(s.pixels[2], kLanes);
  // As many rows at a time as keep both sides in the first-level cache.
  const int64_t row_floats = kMostRows * s.gradient_channel + in_channels * plan.stride[1] * s.row;
  const int64_t block = row_floats * 4 < (24 << 10) / 4 ? (24 << 10) / 4 / row_floats : 4;
  for (int64_t n = 0; n < strip.images; ++n)
    for (int64_t d = 0; d < s.pixels[0]; ++d)
      for (int64_t h = 0; h < s.pixels[1]; h += block)
        for (int64_t k = 0; k < channels; k += rows_at_once(channels - k))
          for (int64_t c = 0; c < in_channels; ++c) {
            Rows rows;
            rows.gradient =
                gradient + ((n * s.pixels[0] + d) * s.pixels[1] + h) * s.gradient_row + k * s.gradient_channel + s.left;
            rows.channel_step = s.gradient_channel;
            rows.gradient_step = s.gradient_row;
            rows.x_step = plan.stride[1] * s.row;
            rows.count = least(block, s.pixels[1] - h);
            rows.vectors = vectors;
            float* to = sums + k * sums_step + c * plan.taps * kLanes;
            for (int64_t i = 0; i < plan.kernel[0]; ++i)
              for (int64_t j = 0; j < plan.kernel[1]; ++j)
                for (int64_t l = 0; l < plan.kernel[2];) {
                  const int taken = static_cast<int>(least(plan.kernel[2] - l, kMostTaps));
                  for (int t = 0; t < taken; ++t) {
                    const int64_t column = (l + t) * plan.dilation[2];
                    rows.x[t] = x + c * s.channel + n * s.image +
                                (d * plan.stride[0] + i * plan.dilation[0]) * s.slice +
                                (h * plan.stride[1] + j * plan.dilation[1]) * s.row +
                                column % plan.stride[2] * s.phase + column / plan.stride[2];
                  }
                  weight_kernel_of(channels - k, taken)(rows, to, sums_step);
                  to += taken * kLanes;
                  l += taken;
                }
          }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
