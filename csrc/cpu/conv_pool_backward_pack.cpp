// conv_pool's gradients: between the tensors, as their strides and dtype say, and the packed float32 buffers.
#include "common/parallel.h"
#include "common/transpose.h"
#include "cpu/conv_pool_backward_source.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// to[pixel][lane] = from[channel][pixel], lanes beyond the channels zero.
template <class T>
void pixels_from_planes(const T* from, int64_t channel_step, int64_t channels, int64_t pixels, int64_t lanes,
                        float* to) {
  for (int64_t c = 0; c < lanes; c += kLanes)
    for (int64_t w = 0; w < pixels; w += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = c + i < channels ? load_some(from + (c + i) * channel_step + w, pixels - w) : zero();
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (w + i < pixels) store(to + (w + i) * lanes + c, block[i]);
    }
}

template <class T>
void pixels_from_pixels(const T* from, int64_t pixel_step, int64_t channels, int64_t pixels, int64_t lanes, float* to) {
  for (int64_t w = 0; w < pixels; ++w, from += pixel_step, to += lanes)
    for (int64_t c = 0; c < lanes; c += kLanes)
      store(to + c, c < channels ? load_some(from + c, channels - c) : zero());
}

template <class T>
void pixels_to_planes(const float* from, int64_t channel_step, int64_t channels, int64_t pixels, int64_t lanes, T* to) {
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int64_t w = 0; w < pixels; w += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = w + i < pixels ? load(from + (w + i) * lanes + c) : zero();
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (c + i < channels) store_some(to + (c + i) * channel_step + w, block[i], pixels - w);
    }
}

template <class T>
void pixels_to_pixels(const float* from, int64_t pixel_step, int64_t channels, int64_t pixels, int64_t lanes, T* to) {
  for (int64_t w = 0; w < pixels; ++w, from += lanes, to += pixel_step)
    for (int64_t c = 0; c < channels; c += kLanes) store_some(to + c, load(from + c), channels - c);
}


template <class T>
void pack_input_as(const BackwardPlan& plan, const Strip& strip, int64_t channel, int64_t channels, float* to) {
  const ConvPool& p = *plan.p;
  const int64_t lanes = plan.lanes, width = strip.size[2];
  const int64_t w0 = least(greatest(plan.pad[2] - strip.lo[2], 0), width);
  const int64_t w1 = greatest(least(plan.in[2] + plan.pad[2] - strip.lo[2], width), w0);
  for (int64_t n = strip.image; n < strip.image + strip.images; ++n)
    for (int64_t d = strip.lo[0] - plan.pad[0]; d < strip.lo[0] - plan.pad[0] + strip.size[0]; ++d)
      for (int64_t h = strip.lo[1] - plan.pad[1]; h < strip.lo[1] - plan.pad[1] + strip.size[1];
           ++h, to += width * lanes) {
        const bool inside = d >= 0 && d < plan.in[0] && h >= 0 && h < plan.in[1] && w1 > w0;
        const int64_t left = inside ? w0 : width, right = inside ? width - w1 : 0;
        memset(to, 0, static_cast<size_t>(left * lanes) * sizeof(float));
        memset(to + (width - right) * lanes, 0, static_cast<size_t>(right * lanes) * sizeof(float));
        if (!inside) continue;
        const T* from = static_cast<const T*>(plan.a->x) + n * p.xs.n + channel * p.xs.c + d * p.xs.d + h * p.xs.h +
                        (strip.lo[2] + w0 - plan.pad[2]) * p.xs.w;
        p.channels_last ? pixels_from_pixels(from, p.xs.w, channels, w1 - w0, lanes, to + w0 * lanes)
                        : pixels_from_planes(from, p.xs.c, channels, w1 - w0, lanes, to + w0 * lanes);
      }
}

template <class T>
void store_input_gradient_as(const BackwardPlan& plan, const Strip& strip, int64_t channel, int64_t channels,
                             int64_t begin, int64_t end, const float* from) {
  const ConvPool& p = *plan.p;
  int64_t lo[3], hi[3];
  for (int i = 0; i < 3; ++i) {
    lo[i] = i == plan.axis ? greatest(begin - plan.pad[i], 0) : 0;
    hi[i] = i == plan.axis ? least(end - plan.pad[i], plan.in[i]) : plan.in[i];
  }
  if (hi[2] <= lo[2]) return;
  // x may reach beyond the last window: no gradient there.
  const int64_t w = lo[2] + plan.pad[2] - strip.lo[2], run = greatest(least(strip.size[2] - w, hi[2] - lo[2]), 0);
  const int64_t rest = hi[2] - lo[2] - run;
  for (int64_t n = 0; n < strip.images; ++n)
    for (int64_t d = lo[0]; d < hi[0]; ++d)
      for (int64_t h = lo[1]; h < hi[1]; ++h) {
        const int64_t sd = d + plan.pad[0] - strip.lo[0], sh = h + plan.pad[1] - strip.lo[1];
        const int64_t pixel = (d * plan.in[1] + h) * plan.in[2] + lo[2], volume = plan.in[0] * plan.in[1] * plan.in[2];
        const int64_t plane = (strip.image + n) * p.in_channels + channel;
        const bool inside = sd < strip.size[0] && sh < strip.size[1];
        const float* row = from + n * strip.image_step + sd * strip.step[0] + sh * strip.step[1] + w * strip.step[2];
        const int64_t valid = inside ? run : 0, empty = inside ? rest : run + rest;
        T* grad_x = static_cast<T*>(plan.a->grad_x);
        if (p.channels_last) {
          T* to = grad_x + ((strip.image + n) * volume + pixel) * p.in_channels + channel;
          pixels_to_pixels(row, p.in_channels, channels, valid, plan.lanes, to);
          for (int64_t i = 0; i < empty; ++i)
            memset(to + (valid + i) * p.in_channels, 0, static_cast<size_t>(channels) * sizeof(T));
        } else {
          T* to = grad_x + plane * volume + pixel;
          pixels_to_planes(row, volume, channels, valid, plan.lanes, to);
          for (int64_t c = 0; empty && c < channels; ++c)
            memset(to + c * volume + valid, 0, static_cast<size_t>(empty) * sizeof(T));
        }
      }
}

// [group][tap][k][c]
template <class T>
void pack_planes_weight(const BackwardPlan& plan, int thread, int threads) {
  const ConvPool& p = *plan.p;
  const Range mine = share(p.out_channels, thread, threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t group = i / p.group_out, k = i % p.group_out;
    const T* from = static_cast<const T*>(plan.a->weight) + i * p.group_in * plan.taps;
    for (int64_t tap = 0; tap < plan.taps; ++tap)
      for (int64_t c = 0; c < p.group_in; ++c)
        plan.packed_weight[((group * plan.taps + tap) * p.group_out + k) * p.group_in + c] =
            to_float(from[c * p.ws.c + tap * p.ws.tap]);
  }
}

// [k][c][tap], and zeros to whole vectors
template <class T>
void pack_patches_weight(const BackwardPlan& plan, int thread, int threads) {
  const ConvPool& p = *plan.p;
  const int64_t depth = p.group_in * plan.taps;
  const Range mine = share(p.out_channels, thread, threads);
  for (int64_t k = mine.begin; k < mine.end; ++k) {
    const T* from = static_cast<const T*>(plan.a->weight) + k * depth;
    float* to = plan.packed_weight + k * plan.patch;
    for (int64_t i = 0; i < plan.patch; ++i)
      to[i] = i < depth ? to_float(from[i / plan.taps * p.ws.c + i % plan.taps * p.ws.tap]) : 0.f;
  }
}

template <class T>
void pack_weight_as(const BackwardPlan& plan, int thread, int threads) {
  if (plan.method == Method::planes) return pack_planes_weight<T>(plan, thread, threads);
  if (plan.method == Method::patches) return pack_patches_weight<T>(plan, thread, threads);
  const ConvPool& p = *plan.p;
  const Range mine = share(p.groups * plan.chunks * plan.k_padded, thread, threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t k = i % plan.k_padded, chunk = i / plan.k_padded % plan.chunks,
                  group = i / plan.k_padded / plan.chunks;
    const int64_t channels = least(plan.lanes, p.group_in - chunk * plan.lanes);
    const T* from = static_cast<const T*>(plan.a->weight) + (group * p.group_out + k) * p.group_in * plan.taps +
                    chunk * plan.lanes * p.ws.c;
    float* base = plan.packed_weight + (group * plan.chunks + chunk) * plan.k_padded * plan.taps * plan.lanes;
    for (int64_t tap = 0; tap < plan.taps; ++tap) {
      float* to = base + (plan.method == Method::sparse ? k * plan.taps + tap : tap * plan.k_padded + k) * plan.lanes;
      for (int64_t c = 0; c < plan.lanes; ++c)
        to[c] = k < p.group_out && c < channels ? to_float(from[c * p.ws.c + tap * p.ws.tap]) : 0.f;
    }
  }
}

// Sums the parts and the lanes of each.
template <class T>
void store_planes_weight_gradient(const BackwardPlan& plan, int parts, int thread, int threads) {
  const ConvPool& p = *plan.p;
  const int64_t filter = p.group_in * plan.taps, count = p.out_channels * filter;
  const Range mine = share(count, thread, threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    Vec sum = zero();
    for (int part = 0; part < parts; ++part) sum += load(plan.grad_weight + (part * count + i) * kLanes);
    const int64_t c = i % filter / plan.taps, tap = i % plan.taps;
    put(static_cast<T*>(plan.a->grad_weight) + i / filter * filter + c * p.ws.c + tap * p.ws.tap, sum_lanes(sum));
  }
}

template <class T>
void store_patches_weight_gradient(const BackwardPlan& plan, int parts, int thread, int threads) {
  const ConvPool& p = *plan.p;
  const int64_t depth = p.group_in * plan.taps, size = plan.weight_floats();
  const Range mine = share(p.out_channels, thread, threads);
  for (int64_t k = mine.begin; k < mine.end; ++k)
    for (int64_t i = 0; i < depth; ++i) {
      float sum = plan.grad_weight[k * plan.patch + i];
      for (int part = 1; part < parts; ++part) sum += plan.grad_weight[part * size + k * plan.patch + i];
      put(static_cast<T*>(plan.a->grad_weight) + k * depth + i / plan.taps * p.ws.c + i % plan.taps * p.ws.tap, sum);
    }
}

template <class T>
void store_weight_gradient_as(const BackwardPlan& plan, int parts, int thread, int threads) {
  if (plan.method == Method::planes) return store_planes_weight_gradient<T>(plan, parts, thread, threads);
  if (plan.method == Method::patches) return store_patches_weight_gradient<T>(plan, parts, thread, threads);
  const ConvPool& p = *plan.p;
  const int64_t size = plan.weight_floats();
  const Range mine = share(p.out_channels, thread, threads);
  for (int64_t k = mine.begin; k < mine.end; ++k)
    for (int64_t c = 0; c < p.group_in; ++c) {
      const int64_t row = (k / p.group_out * plan.chunks + c / plan.lanes) * plan.k_padded + k % p.group_out;
      const float* from = plan.grad_weight + row * plan.taps * plan.lanes + c % plan.lanes;
      T* to = static_cast<T*>(plan.a->grad_weight) + k * p.group_in * plan.taps + c * p.ws.c;
      for (int64_t tap = 0; tap < plan.taps; ++tap) {
        float sum = from[tap * plan.lanes];
        for (int part = 1; part < parts; ++part) sum += from[part * size + tap * plan.lanes];
        put(to + tap * p.ws.tap, sum);
      }
    }
}

}  // namespace

void pack_input(const BackwardPlan& plan, const Strip& strip, int64_t channel, int64_t channels, float* to) {
  plan.p->dtype == INTERFUSE_FLOAT32 ? pack_input_as<float>(plan, strip, channel, channels, to)
                                     : pack_input_as<uint16_t>(plan, strip, channel, channels, to);
}

void store_input_gradient(const BackwardPlan& plan, const Strip& strip, int64_t channel, int64_t channels,
                          int64_t begin, int64_t end, const float* from) {
  plan.p->dtype == INTERFUSE_FLOAT32
      ? store_input_gradient_as<float>(plan, strip, channel, channels, begin, end, from)
      : store_input_gradient_as<uint16_t>(plan, strip, channel, channels, begin, end, from);
}

void pack_weight(const BackwardPlan& plan, int thread, int threads) {
  if (plan.method == Method::winograd) return tile_kernel(plan).pack_weight(plan, thread, threads);
  plan.p->dtype == INTERFUSE_FLOAT32 ? pack_weight_as<float>(plan, thread, threads)
                                     : pack_weight_as<uint16_t>(plan, thread, threads);
}

void store_weight_gradient(const BackwardPlan& plan, int parts, int thread, int threads) {
  if (plan.method == Method::winograd) {
    if (!tile_kernel(plan).store_weight_gradient(plan, parts, thread, threads)) plan.mark_broken();
    return;
  }
  plan.p->dtype == INTERFUSE_FLOAT32 ? store_weight_gradient_as<float>(plan, parts, thread, threads)
                                     : store_weight_gradient_as<uint16_t>(plan, parts, thread, threads);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
