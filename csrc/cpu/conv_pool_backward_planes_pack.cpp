// The planes of conv_pool_backward_planes.cpp: filled from x and written to grad_x, as strides and dtype say.
#include "common/transpose.h"
#include "cpu/conv_pool_backward_source.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {


// to[channel][i] = from[i][channel].
template <class T>
void planes_of_pixels(const T* from, int64_t pixel_step, int64_t channels, int64_t count, float* to, int64_t to_step) {
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int64_t w = 0; w < count; w += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = w + i < count ? load_some(from + (w + i) * pixel_step + c, channels - c) : zero();
      transpose(block);
      for (int i = 0; i < kLanes; ++i)
        if (c + i < channels) store_some(to + (c + i) * to_step + w, block[i], count - w);
    }
}

template <class T>
void pixels_of_planes(const float* from, int64_t from_step, int64_t channels, int64_t count, T* to,
                      int64_t pixel_step) {
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int64_t w = 0; w < count; w += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i)
        block[i] = c + i < channels ? load_some(from + (c + i) * from_step + w, count - w) : zero();
      transpose(block);
      for (int i = 0; i < kLanes; ++i)
        if (w + i < count) store_some(to + (w + i) * pixel_step + c, block[i], channels - c);
    }
}

template <class From, class To>
void copy(const From* from, int64_t count, To* to) {
  for (int64_t i = 0; i < count; i += kLanes) store_some(to + i, load_some(from + i, count - i), count - i);
}

template <class T>
void pack_as(const BackwardPlan& plan, const Strip& strip, const Planes& s, int64_t channel, int64_t channels,
             float* to, float* row) {
  const ConvPool& p = *plan.p;
  const int64_t phases = plan.stride[2], w0 = least(greatest(plan.pad[2] - strip.lo[2], 0), strip.size[2]);
  const int64_t w1 = least(plan.in[2] + plan.pad[2] - strip.lo[2], strip.size[2]), run = w1 - w0;
  memset(to, 0, static_cast<size_t>(channels * s.channel) * sizeof(float));
  if (run <= 0) return;
  for (int64_t n = 0; n < strip.images; ++n)
    for (int64_t sd = 0; sd < strip.size[0]; ++sd)
      for (int64_t sh = 0; sh < strip.size[1]; ++sh) {
        const int64_t d = strip.lo[0] + sd - plan.pad[0], h = strip.lo[1] + sh - plan.pad[1];
        if (d < 0 || d >= plan.in[0] || h < 0 || h >= plan.in[1]) continue;
        const T* from = static_cast<const T*>(plan.a->x) + (strip.image + n) * p.xs.n + channel * p.xs.c + d * p.xs.d +
                        h * p.xs.h + (strip.lo[2] + w0 - plan.pad[2]) * p.xs.w;
        float* plane = to + n * s.image + sd * s.slice + sh * s.row;
        float* start = phases == 1 ? plane + w0 : row;
        const int64_t step = phases == 1 ? s.channel : run;
        if (p.channels_last) planes_of_pixels(from, p.xs.w, channels, run, start, step);
        else
          for (int64_t c = 0; c < channels; ++c) copy(from + c * p.xs.c, run, start + c * step);
        if (phases == 1) continue;
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t i = 0; i < run; ++i)
            plane[c * s.channel + (w0 + i) % phases * s.phase + (w0 + i) / phases] = row[c * run + i];
      }
}

template <class T>
void store_as(const BackwardPlan& plan, const Strip& strip, const Planes& s, int64_t channel, int64_t channels,
              int64_t begin, int64_t end, const float* from, float* row) {
  const ConvPool& p = *plan.p;
  const int64_t phases = plan.stride[2];
  int64_t lo[3], hi[3];
  for (int i = 0; i < 3; ++i) {
    lo[i] = i == plan.axis ? greatest(begin - plan.pad[i], 0) : 0;
    hi[i] = i == plan.axis ? least(end - plan.pad[i], plan.in[i]) : plan.in[i];
  }
  const int64_t run = hi[2] - lo[2], volume = plan.in[0] * plan.in[1] * plan.in[2];
  if (run <= 0) return;
  // x may reach beyond the last pixel's kernel: no gradient there.
  const int64_t w = lo[2] + plan.pad[2] - strip.lo[2], valid = greatest(least(strip.size[2] - w, run), 0);
  for (int64_t n = 0; n < strip.images; ++n)
    for (int64_t d = lo[0]; d < hi[0]; ++d)
      for (int64_t h = lo[1]; h < hi[1]; ++h) {
        const int64_t sd = d + plan.pad[0] - strip.lo[0], sh = h + plan.pad[1] - strip.lo[1];
        const bool inside = sd < strip.size[0] && sh < strip.size[1];
        for (int64_t c = 0; c < channels; ++c) {
          const float* plane = from + c * s.channel + n * s.image + sd * s.slice + sh * s.row;
          float* to = row + c * run;
          const int64_t known = inside ? valid : 0;
          if (phases == 1) memcpy(to, plane + (inside ? w : 0), static_cast<size_t>(known) * sizeof(float));
          else
            for (int64_t i = 0; i < known; ++i) to[i] = plane[(w + i) % phases * s.phase + (w + i) / phases];
          memset(to + known, 0, static_cast<size_t>(run - known) * sizeof(float));
        }
        const int64_t pixel = (d * plan.in[1] + h) * plan.in[2] + lo[2];
        T* grad_x = static_cast<T*>(plan.a->grad_x);
        if (p.channels_last)
          pixels_of_planes(row, run, channels, run,
                           grad_x + ((strip.image + n) * volume + pixel) * p.in_channels + channel, p.in_channels);
        else
          for (int64_t c = 0; c < channels; ++c)
            copy(row + c * run, run, grad_x + ((strip.image + n) * p.in_channels + channel + c) * volume + pixel);
      }
}

}  // namespace

void pack_planes(const BackwardPlan& plan, const Strip& strip, const Planes& s, int64_t channel, int64_t channels,
                 float* to, float* row) {
  plan.p->dtype == INTERFUSE_FLOAT32 ? pack_as<float>(plan, strip, s, channel, channels, to, row)
                                     : pack_as<uint16_t>(plan, strip, s, channel, channels, to, row);
}

void store_planes(const BackwardPlan& plan, const Strip& strip, const Planes& s, int64_t channel, int64_t channels,
                  int64_t begin, int64_t end, const float* from, float* row) {
  plan.p->dtype == INTERFUSE_FLOAT32 ? store_as<float>(plan, strip, s, channel, channels, begin, end, from, row)
                                     : store_as<uint16_t>(plan, strip, s, channel, channels, begin, end, from, row);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
