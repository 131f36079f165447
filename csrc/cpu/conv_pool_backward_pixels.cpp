// conv_pool's gradients, pixel by pixel of the convolution's result: every pooling window's gradient goes to the pixels
// it came from, times the activation's slope there.
#include "common/shuffle.h"
#include "common/transpose.h"
#include "cpu/conv_pool_backward_source.h"
#include "cpu/conv_pool_windows.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {


template <class T>
const float* output_gradient(const BackwardPlan& plan, int64_t at, int64_t count, float* row) {
  const OutputGradient<T> gradient(plan);
  for (int64_t i = 0; i < count; i += kLanes) store_some(row + i, gradient(at + i, count - i), count - i);
  return row;
}

// The pooling windows that cover pixel `at` of an axis: begin..end.
struct Cover {
  int64_t begin, end;
};
Cover covering(int64_t at, int64_t window, int64_t step, int64_t pad, int64_t count) {
  const int64_t past = at + pad - window + 1;  // the first window that starts early enough ends here or later
  return {past > 0 ? divide_up(past, step) : 0, least((at + pad) / step + 1, count)};
}

// The activation's slope at each pixel, behind average pooling. What lies under no window has no gradient, and forward
// need not have saved a value for it.
template <class T>
void through_saved_pixels(const BackwardPlan& plan, int64_t at, int64_t count, float* row) {
  if (plan.p->pool != INTERFUSE_POOL_AVG || !plan.p->pre_count()) return;
  const Activation f{plan.p->activation, plan.p->slope};
  const T* saved = static_cast<const T*>(plan.a->pre) + at;
  for (int64_t i = 0; i < count; i += kLanes)
    store_some(row + i, through_activation(f, load_some(row + i, count - i), load_some(saved + i, count - i)),
               count - i);
}

// One row of windows adds to the row of pixels that it covers.
struct WindowRow {
  const float* gradient;
  const uint8_t* index;  // behind max pooling
  int64_t d, h;          // the windows'
  int64_t first;         // position in the window of the row's first pixel
};

void add_window(const BackwardPlan& plan, const WindowRow& from, int64_t i, int64_t window, int64_t w, int64_t run,
                float* row) {
  const ConvPool& p = *plan.p;
  const int64_t start = window * p.window_stride.w - p.window_pad.w - w;
  if (p.pool == INTERFUSE_POOL_MAX) {
    const int64_t column = from.index[i] - from.first, at = start + column;
    if (from.index[i] != kNoGradient && column >= 0 && column < p.window.w && at >= 0 && at < run)
      row[at] += from.gradient[i];
    return;
  }
  const float share = from.gradient[i] / window_at(p, from.d, from.h, window).divisor;
  for (int64_t at = greatest(start, 0); at < least(start + p.window.w, run); ++at) row[at] += share;
}

// Whole windows, two wide and side by side: one pass without branches.
void add_pairs(const BackwardPlan& plan, const WindowRow& from, int64_t begin, int64_t end, float divisor, float* row) {
  const float* gradient = from.gradient;
  if (plan.p->pool == INTERFUSE_POOL_MAX) {
    const int32_t left = static_cast<int32_t>(from.first), right = left + 1;
    for (int64_t i = begin; i < end; i += kLanes, row += 2 * kLanes) {
      const int64_t n = end - i;
      const Vec value = load_some(gradient + i, n);
      const IVec index = load_index(from.index + i, static_cast<int>(least(n, kLanes)));
      Vec v[2] = {select(index == left, value, zero()), select(index == right, value, zero())};
      interleave(v, 2);
      store_some(row, load_some(row, 2 * n) + v[0], 2 * n);
      if (2 * n > kLanes) store_some(row + kLanes, load_some(row + kLanes, 2 * n - kLanes) + v[1], 2 * n - kLanes);
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i, row += 2) {
    const float share = gradient[i] / divisor;
    row[0] += share;
    row[1] += share;
  }
}

void add_windows(const BackwardPlan& plan, const WindowRow& from, int64_t begin, int64_t end, int64_t w, int64_t run,
                 float* row) {
  const ConvPool& p = *plan.p;
  const bool pairs = p.window.w == 2 && p.window_stride.w == 2 && p.window_pad.w == 0;
  // The first and the last window may be cut by the strip or the end of the row.
  const int64_t whole_begin = pairs ? begin + (2 * begin < w) : end,
                whole_end = pairs ? end - (2 * end > w + run) : end;
  for (int64_t o = begin; o < least(whole_begin, end); ++o) add_window(plan, from, o - begin, o, w, run, row);
  if (whole_begin < whole_end) {
    const float divisor = p.pool == INTERFUSE_POOL_AVG ? window_at(p, from.d, from.h, whole_begin).divisor : 1.f;
    add_pairs(plan, from, whole_begin - begin, whole_end - begin, divisor, row + 2 * whole_begin - w);
  }
  for (int64_t o = greatest(whole_end, whole_begin); o < end; ++o) add_window(plan, from, o - begin, o, w, run, row);
}

// `run` pixels from w on of row (n, d, h), and the windows that cover any of them: the same for all channels.
struct PixelRow {
  int64_t n, d, h, w, run;
  Cover ds, hs, ws;
};
PixelRow pixel_row_at(const ConvPool& p, int64_t n, int64_t d, int64_t h, int64_t w, int64_t run) {
  return {n, d, h, w, run,
          covering(d, p.window.d, p.window_stride.d, p.window_pad.d, p.out.d),
          covering(h, p.window.h, p.window_stride.h, p.window_pad.h, p.out.h),
          {covering(w, p.window.w, p.window_stride.w, p.window_pad.w, p.out.w).begin,
           covering(w + run - 1, p.window.w, p.window_stride.w, p.window_pad.w, p.out.w).end}};
}

// The gradient of one channel's row of pixels, in planes. `values` is working space.
template <class T>
void pixel_row(const BackwardPlan& plan, const PixelRow& r, int64_t k, float* row, float* values) {
  const ConvPool& p = *plan.p;
  const int64_t conv_at = p.at(p.conv, r.n, k, r.d, r.h, r.w);
  if (p.pool == INTERFUSE_POOL_NONE) {
    output_gradient<T>(plan, conv_at, r.run, row);
    return;
  }
  memset(row, 0, static_cast<size_t>(r.run) * sizeof(float));
  if (r.ds.begin >= r.ds.end || r.hs.begin >= r.hs.end || r.ws.begin >= r.ws.end) return;
  for (int64_t od = r.ds.begin; od < r.ds.end; ++od)
    for (int64_t oh = r.hs.begin; oh < r.hs.end; ++oh) {
      const int64_t at = p.at(p.out, r.n, k, od, oh, r.ws.begin);
      const int64_t in_d = r.d - od * p.window_stride.d + p.window_pad.d,
                    in_h = r.h - oh * p.window_stride.h + p.window_pad.h;
      const WindowRow from{output_gradient<T>(plan, at, r.ws.end - r.ws.begin, values),
                           plan.a->index + (p.index_count() ? at : 0), od, oh, (in_d * p.window.h + in_h) * p.window.w};
      add_windows(plan, from, r.ws.begin, r.ws.end, r.w, r.run, row);
    }
  through_saved_pixels<T>(plan, conv_at, r.run, row);
  if (!plan.uncovered_columns || p.pool != INTERFUSE_POOL_AVG) return;
  for (int64_t i = 0; i < r.run; ++i) {
    const Cover ws = covering(r.w + i, p.window.w, p.window_stride.w, p.window_pad.w, p.out.w);
    if (ws.begin >= ws.end) row[i] = 0;
  }
}

// The gradient of one pixel's channels k..k + run, in channels_last tensors.
template <class T>
const float* channel_row(const BackwardPlan& plan, int64_t n, int64_t k, int64_t d, int64_t h, int64_t w, int64_t run,
                         float* row) {
  const ConvPool& p = *plan.p;
  const int64_t conv_at = (((n * p.conv.d + d) * p.conv.h + h) * p.conv.w + w) * p.out_channels + k;
  if (p.pool == INTERFUSE_POOL_NONE) return output_gradient<T>(plan, conv_at, run, row);
  memset(row, 0, static_cast<size_t>(run) * sizeof(float));
  float* values = row + run;
  const Cover ds = covering(d, p.window.d, p.window_stride.d, p.window_pad.d, p.out.d);
  const Cover hs = covering(h, p.window.h, p.window_stride.h, p.window_pad.h, p.out.h);
  const Cover ws = covering(w, p.window.w, p.window_stride.w, p.window_pad.w, p.out.w);
  for (int64_t od = ds.begin; od < ds.end; ++od)
    for (int64_t oh = hs.begin; oh < hs.end; ++oh)
      for (int64_t ow = ws.begin; ow < ws.end; ++ow) {
        const int64_t at = (((n * p.out.d + od) * p.out.h + oh) * p.out.w + ow) * p.out_channels + k;
        const float* gradient = output_gradient<T>(plan, at, run, values);
        const Window r = window_at(p, od, oh, ow);
        if (p.pool == INTERFUSE_POOL_AVG) {
          for (int64_t i = 0; i < run; ++i) row[i] += gradient[i] / r.divisor;
          continue;
        }
        const uint8_t* index = plan.a->index + at;
        const int64_t position = ((d - r.od) * p.window.h + (h - r.oh)) * p.window.w + (w - r.ow);
        for (int64_t i = 0; i < run; ++i) row[i] += index[i] == position ? gradient[i] : 0.f;
      }
  if (ds.begin < ds.end && hs.begin < hs.end && ws.begin < ws.end) through_saved_pixels<T>(plan, conv_at, run, row);
  return row;
}

template <class T>
void dense_as(const BackwardPlan& plan, const Strip& strip, int64_t first_channel, int64_t channels, float* gradient,
              float* row) {
  const ConvPool& p = *plan.p;
  int64_t begin[3], end[3];
  for (int i = 0; i < 3; ++i) {
    begin[i] = i == plan.axis ? strip.begin : 0;
    end[i] = i == plan.axis ? strip.end : plan.count[i];
  }
  const int64_t run = end[2] - begin[2], pixels = strip.images * (end[0] - begin[0]) * (end[1] - begin[1]) * run;
  float* to = gradient;
  for (int64_t n = strip.image; n < strip.image + strip.images; ++n)
    for (int64_t d = begin[0]; d < end[0]; ++d)
      for (int64_t h = begin[1]; h < end[1]; ++h, to += run * kBlock) {
        if (p.channels_last) {
          for (int64_t w = 0; w < run; ++w) {
            const float* from = channel_row<T>(plan, n, first_channel, d, h, begin[2] + w, channels, row);
            for (int64_t k = 0; k < channels; ++k) to[(k / kBlock * pixels + w) * kBlock + k % kBlock] = from[k];
          }
        } else {
          const PixelRow at = pixel_row_at(p, n, d, h, begin[2], run);
          for (int64_t k = 0; k < channels; ++k) {
            pixel_row<T>(plan, at, first_channel + k, row, row + run);
            float* lane = to + k / kBlock * pixels * kBlock + k % kBlock;
            for (int64_t w = 0; w < run; ++w) lane[w * kBlock] = row[w];
          }
        }
      }
  if (channels % kBlock == 0) return;
  float* last = gradient + channels / kBlock * pixels * kBlock;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t k = channels % kBlock; k < kBlock; ++k) last[i * kBlock + k] = 0;
}

template <class T>
void planes_as(const BackwardPlan& plan, const Strip& strip, const Planes& s, int64_t first_channel, int64_t channels,
               float* gradient, float* row) {
  const int64_t run = s.pixels[2], rest = s.columns - run;
  for (int64_t n = strip.image; n < strip.image + strip.images; ++n)
    for (int64_t d = s.first[0]; d < s.first[0] + s.pixels[0]; ++d)
      for (int64_t h = s.first[1]; h < s.first[1] + s.pixels[1]; ++h, gradient += s.gradient_row) {
        const PixelRow pixels = pixel_row_at(*plan.p, n, d, h, s.first[2], run);
        for (int64_t k = 0; k < channels; ++k) {
          float* to = gradient + k * s.gradient_channel;
          memset(to, 0, static_cast<size_t>(s.left) * sizeof(float));
          memset(to + s.left + run, 0, static_cast<size_t>(rest) * sizeof(float));
          if (!plan.p->channels_last) pixel_row<T>(plan, pixels, first_channel + k, to + s.left, row);
        }
        if (!plan.p->channels_last) continue;
        for (int64_t k = 0; k < channels; k += kLanes)
          for (int64_t w = 0; w < run; w += kLanes) {
            const int64_t some = least(channels - k, kLanes);
            Vec block[kLanes];
            for (int i = 0; i < kLanes; ++i)
              block[i] =
                  w + i < run
                      ? load_some(channel_row<T>(plan, n, first_channel + k, d, h, s.first[2] + w + i, some, row), some)
                      : zero();
            transpose(block);
            for (int i = 0; i < some; ++i)
              store_some(gradient + (k + i) * s.gradient_channel + s.left + w, block[i], run - w);
          }
      }
}

}  // namespace

void dense_gradients(const BackwardPlan& plan, const Strip& strip, int64_t first_channel, int64_t channels,
                     float* gradient, float* row) {
  plan.p->dtype == INTERFUSE_FLOAT32 ? dense_as<float>(plan, strip, first_channel, channels, gradient, row)
                                     : dense_as<uint16_t>(plan, strip, first_channel, channels, gradient, row);
}

void planes_gradients(const BackwardPlan& plan, const Strip& strip, const Planes& s, int64_t first_channel,
                      int64_t channels, float* gradient, float* row) {
  plan.p->dtype == INTERFUSE_FLOAT32 ? planes_as<float>(plan, strip, s, first_channel, channels, gradient, row)
                                     : planes_as<uint16_t>(plan, strip, s, first_channel, channels, gradient, row);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
