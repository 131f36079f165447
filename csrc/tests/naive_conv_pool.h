// conv_pool in double precision, by definition: one loop per index and nothing clever. Three dimensions
// always.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "interfuse.h"
#include "tests/values.h"

namespace interfuse_test {

// Indices of a dense (n, c, d, h, w) tensor in one of the two layouts.
struct Shape5 {
  int64_t n, c, d, h, w;
  bool channels_last;
  int64_t count() const { return n * c * d * h * w; }
  int64_t at(int64_t in, int64_t ic, int64_t id, int64_t ih, int64_t iw) const {
    if (channels_last) return (((in * d + id) * h + ih) * w + iw) * c + ic;
    return (((in * c + ic) * d + id) * h + ih) * w + iw;
  }
};

inline double activate(const interfuse_conv_pool_spec& s, double v) {
  switch (s.activation) {
    case INTERFUSE_RELU:
      return v > 0 ? v : 0;
    case INTERFUSE_LEAKY_RELU:
      return v > 0 ? v : v * s.negative_slope;
    case INTERFUSE_GELU:
      return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case INTERFUSE_GELU_TANH:
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    case INTERFUSE_SILU:
      return v / (1 + std::exp(-v));
    case INTERFUSE_TANH:
      return std::tanh(v);
    case INTERFUSE_SIGMOID:
      return 1 / (1 + std::exp(-v));
    default:
      return v;
  }
}

// The slope, from what the plan saves: the pre-activation for gelu and silu, the activated value for the
// others.
inline double slope_from_saved(const interfuse_conv_pool_spec& s, double v) {
  switch (s.activation) {
    case INTERFUSE_RELU:
      return v > 0 ? 1 : 0;
    case INTERFUSE_LEAKY_RELU:
      return v > 0 ? 1 : s.negative_slope;
    case INTERFUSE_GELU:
      return 0.5 * (1 + std::erf(v / std::sqrt(2.0))) + v * std::exp(-0.5 * v * v) / std::sqrt(2 * M_PI);
    case INTERFUSE_GELU_TANH: {
      const double k = std::sqrt(2 / M_PI), t = std::tanh(k * (v + 0.044715 * v * v * v));
      return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * k * (1 + 3 * 0.044715 * v * v);
    }
    case INTERFUSE_SILU: {
      const double g = 1 / (1 + std::exp(-v));
      return g * (1 + v * (1 - g));
    }
    case INTERFUSE_TANH:
      return 1 - v * v;
    case INTERFUSE_SIGMOID:
      return v * (1 - v);
    default:
      return 1;
  }
}

struct NaiveConvPool {
  interfuse_conv_pool_spec s;
  Shape5 x, conv, y;
  int64_t group_in, group_out;

  NaiveConvPool(const interfuse_conv_pool_spec& spec, const int64_t conv_size[3], const int64_t out_size[3])
      : s(spec),
        x{s.batch, s.in_channels, s.input[0], s.input[1], s.input[2], s.channels_last != 0},
        conv{s.batch, s.out_channels, conv_size[0], conv_size[1], conv_size[2], s.channels_last != 0},
        y{s.batch, s.out_channels, out_size[0], out_size[1], out_size[2], s.channels_last != 0},
        group_in(s.in_channels / s.groups),
        group_out(s.out_channels / s.groups) {}

  int64_t weight_count() const { return s.out_channels * group_in * s.kernel[0] * s.kernel[1] * s.kernel[2]; }
  bool pools() const { return s.pool != INTERFUSE_POOL_NONE; }

  // Calls visit(conv index, x index, weight index) for every product of the convolution.
  template <class Visit>
  void products(Visit visit) const {
    const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], next_channel = x.at(0, 1, 0, 0, 0);
    int64_t o[3], k[3], i[3];
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t oc = 0; oc < s.out_channels; ++oc)
        for (o[0] = 0; o[0] < conv.d; ++o[0])
          for (o[1] = 0; o[1] < conv.h; ++o[1])
            for (o[2] = 0; o[2] < conv.w; ++o[2])
              for (k[0] = 0; k[0] < s.kernel[0]; ++k[0])
                for (k[1] = 0; k[1] < s.kernel[1]; ++k[1])
                  for (k[2] = 0; k[2] < s.kernel[2]; ++k[2]) {
                    bool inside = true;
                    for (int axis = 0; axis < 3; ++axis) {
                      i[axis] = o[axis] * s.stride[axis] - s.padding_lo[axis] + k[axis] * s.dilation[axis];
                      inside = inside && i[axis] >= 0 && i[axis] < s.input[axis];
                    }
                    if (!inside) continue;
                    const int64_t to = conv.at(n, oc, o[0], o[1], o[2]),
                                  from = x.at(n, oc / group_out * group_in, i[0], i[1], i[2]),
                                  tap = (k[0] * s.kernel[1] + k[1]) * s.kernel[2] + k[2];
                    for (int64_t ic = 0; ic < group_in; ++ic)
                      visit(to, from + ic * next_channel, (oc * group_in + ic) * taps + tap);
                  }
  }

  // Calls visit(y index, conv index, place in the window) for every element of every pooling window.
  template <class Visit>
  void windows(Visit visit) const {
    int64_t o[3], k[3], i[3];
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t c = 0; c < s.out_channels; ++c)
        for (o[0] = 0; o[0] < y.d; ++o[0])
          for (o[1] = 0; o[1] < y.h; ++o[1])
            for (o[2] = 0; o[2] < y.w; ++o[2])
              for (k[0] = 0; k[0] < s.pool_size[0]; ++k[0])
                for (k[1] = 0; k[1] < s.pool_size[1]; ++k[1])
                  for (k[2] = 0; k[2] < s.pool_size[2]; ++k[2]) {
                    for (int axis = 0; axis < 3; ++axis)
                      i[axis] = o[axis] * s.pool_stride[axis] - s.pool_padding[axis] + k[axis];
                    if (i[0] < 0 || i[1] < 0 || i[2] < 0 || i[0] >= conv.d || i[1] >= conv.h ||
                        i[2] >= conv.w)
                      continue;
                    visit(y.at(n, c, o[0], o[1], o[2]), conv.at(n, c, i[0], i[1], i[2]),
                          (k[0] * s.pool_size[1] + k[1]) * s.pool_size[2] + k[2]);
                  }
  }

  // torch's divisor along one axis: the window's extent in the padded input, or in the input alone.
  double divisor(int64_t o0, int64_t o1, int64_t o2) const {
    const int64_t o[3] = {o0, o1, o2}, size[3] = {conv.d, conv.h, conv.w};
    double product = 1;
    for (int axis = 0; axis < 3; ++axis) {
      int64_t begin = o[axis] * s.pool_stride[axis] - s.pool_padding[axis];
      int64_t end = std::min(begin + s.pool_size[axis], size[axis] + s.pool_padding[axis]);
      if (!s.count_include_pad) begin = std::max<int64_t>(begin, 0), end = std::min(end, size[axis]);
      product *= static_cast<double>(end - begin);
    }
    return product;
  }

  // 1 / divisor for every element of y.
  Doubles window_weights() const {
    Doubles weights(static_cast<size_t>(y.count()));
    for (int64_t n = 0; n < y.n; ++n)
      for (int64_t c = 0; c < y.c; ++c)
        for (int64_t d = 0; d < y.d; ++d)
          for (int64_t h = 0; h < y.h; ++h)
            for (int64_t w = 0; w < y.w; ++w) weights[y.at(n, c, d, h, w)] = 1 / divisor(d, h, w);
    return weights;
  }

  Doubles preactivation(const Doubles& in, const Doubles& weight, const Doubles& bias) const {
    Doubles out(static_cast<size_t>(conv.count()), 0.0);
    products([&](int64_t o, int64_t i, int64_t k) { out[o] += in[i] * weight[k]; });
    if (!bias.empty()) each_channel(conv, [&](int64_t at, int64_t c) { out[at] += bias[c]; });
    return out;
  }

  Doubles pooled(const Doubles& activated) const {
    if (!pools()) return activated;
    const bool max = s.pool == INTERFUSE_POOL_MAX;
    Doubles out(static_cast<size_t>(y.count()), max ? -std::numeric_limits<double>::infinity() : 0.0);
    const Doubles weights = max ? Doubles() : window_weights();
    windows([&](int64_t o, int64_t i, int64_t) {
      if (max)
        out[o] = std::max(out[o], activated[i]);
      else
        out[o] += activated[i] * weights[o];
    });
    return out;
  }

  // The gradient at the convolution's result, from what forward saved.
  Doubles grad_conv(const Doubles& grad_y, const Doubles& y_value, const std::vector<uint8_t>& index,
                    const Doubles& pre) const {
    Doubles out(static_cast<size_t>(conv.count()), 0.0);
    if (!pools()) {
      for (size_t i = 0; i < out.size(); ++i)
        out[i] = grad_y[i] * slope_from_saved(s, pre.empty() ? y_value[i] : pre[i]);
      return out;
    }
    if (s.pool == INTERFUSE_POOL_MAX) {
      windows([&](int64_t o, int64_t i, int64_t place) {
        if (index[o] != place) return;
        const bool counted = s.activation == INTERFUSE_RELU || s.activation == INTERFUSE_NONE;
        out[i] += grad_y[o] * (counted ? 1 : slope_from_saved(s, pre.empty() ? y_value[o] : pre[o]));
      });
      return out;
    }
    const Doubles weights = window_weights();
    windows([&](int64_t o, int64_t i, int64_t) { out[i] += grad_y[o] * weights[o]; });
    for (size_t i = 0; i < out.size(); ++i) out[i] *= pre.empty() ? 1 : slope_from_saved(s, pre[i]);
    return out;
  }

  Doubles grad_x(const Doubles& grad, const Doubles& weight) const {
    Doubles out(static_cast<size_t>(x.count()), 0.0);
    products([&](int64_t o, int64_t i, int64_t k) { out[i] += grad[o] * weight[k]; });
    return out;
  }

  Doubles grad_weight(const Doubles& grad, const Doubles& in) const {
    Doubles out(static_cast<size_t>(weight_count()), 0.0);
    products([&](int64_t o, int64_t i, int64_t k) { out[k] += grad[o] * in[i]; });
    return out;
  }

  Doubles grad_bias(const Doubles& grad) const {
    Doubles out(static_cast<size_t>(s.out_channels), 0.0);
    each_channel(conv, [&](int64_t at, int64_t c) { out[c] += grad[at]; });
    return out;
  }

 private:
  template <class Visit>
  static void each_channel(const Shape5& t, Visit visit) {
    for (int64_t n = 0; n < t.n; ++n)
      for (int64_t c = 0; c < t.c; ++c)
        for (int64_t d = 0; d < t.d; ++d)
          for (int64_t h = 0; h < t.h; ++h)
            for (int64_t w = 0; w < t.w; ++w) visit(t.at(n, c, d, h, w), c);
  }
};

}  // namespace interfuse_test
