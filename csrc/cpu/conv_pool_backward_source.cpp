// conv_pool's gradients: from grad_y through pooling and activation to the gradient of the convolution's own result,
// as lists of the nonzero ones (sparse plans) or pixel by pixel (dense plans).
#include "common/activation.h"
#include "cpu/conv_pool_backward.h"
#include "cpu/conv_pool_windows.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// to[i] = gradient[i] * slope(saved[i]); `to` may be the gradient. A slope of zero stops even Inf and NaN, as relu's
// gradient does in torch.
template <class G, class T>
void through_activation(const ConvPool& p, const G* gradient, const T* saved, int64_t count, float* to) {
  const Activation f{p.activation, p.slope};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    const Vec g = n == kLanes ? load(gradient + i) : load_first(gradient + i, n);
    const Vec value = n == kLanes ? load(saved + i) : load_first(saved + i, n);
    const Vec result = f.kind == INTERFUSE_RELU ? select(value <= zero(), zero(), g) : g * activation_slope(f, value);
    n == kLanes ? store(to + i, result) : store_first(to + i, result, n);
  }
}

// The values as float: `values` itself where they are float already.
const float* as_floats(const float* values, int64_t, float*) { return values; }
const float* as_floats(const uint16_t* values, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_bf16(values[i]);
  return to;
}

// What the gradient at y's resolution is multiplied with, or NULL: behind max pooling relu's slope is in the index.
template <class T>
const T* saved_at_output(const BackwardPlan& plan) {
  const ConvPool& p = *plan.p;
  if (p.pool == INTERFUSE_POOL_AVG || p.activation == INTERFUSE_NONE) return nullptr;
  if (p.needs_preactivation()) return static_cast<const T*>(plan.a->pre);
  return p.backward_reads_y() ? static_cast<const T*>(plan.a->y) : nullptr;
}

// `count` neighbours of y's gradient from element `at` on, times the activation's slope where that is known there.
template <class T>
const float* output_gradient(const BackwardPlan& plan, int64_t at, int64_t count, float* row) {
  const T* gradient = static_cast<const T*>(plan.a->grad_y) + at;
  const T* saved = saved_at_output<T>(plan);
  if (!saved) return as_floats(gradient, count, row);
  through_activation(*plan.p, gradient, saved + at, count, row);
  return row;
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Lists {
  const BackwardPlan& plan;
  const Strip& strip;
  const Tiles& tiles;
  int64_t begin[3], end[3];  // the strip's windows
  int32_t winner[256] = {};  // offset of each position of a window, in floats

  Lists(const BackwardPlan& pl, const Strip& s, const Tiles& t) : plan(pl), strip(s), tiles(t) {
    for (int i = 0; i < 3; ++i) {
      begin[i] = i == plan.axis ? strip.begin : 0;
      end[i] = i == plan.axis ? strip.end : plan.count[i];
    }
    int position = 0;
    for (int64_t d = 0; d < plan.window[0]; ++d)
      for (int64_t h = 0; h < plan.window[1]; ++h)
        for (int64_t w = 0; w < plan.window[2]; ++w, ++position)
          winner[position] = static_cast<int32_t>(d * plan.stride[0] * strip.step[0] + h * plan.stride[1] * strip.step[1] +
                                                  w * plan.stride[2] * strip.step[2]);
  }
  // Where window (d, h, 0) of image n (of the strip) starts: may lie before the buffer, its winners do not.
  int64_t origin(int64_t n, int64_t d, int64_t h) const {
    return n * strip.image_step + place(0, d) + place(1, h) + place(2, 0);
  }
  int64_t place(int i, int64_t window) const {
    return ((window * plan.window_stride[i] - plan.window_pad[i]) * plan.stride[i] - strip.lo[i]) * strip.step[i];
  }
  int64_t window_step() const { return plan.window_stride[2] * plan.stride[2] * strip.step[2]; }
  int64_t tile_row(int64_t d, int64_t h) const {
    return ((d - begin[0]) / plan.tile[0] * tiles.count[1] + (h - begin[1]) / plan.tile[1]) * tiles.count[2];
  }
};

// Branch-free: every window is written, the next one overwrites it unless it had a gradient.
INTERFUSE_INLINE int32_t append(SparseGradient* list, int32_t count, int64_t origin, const int32_t* winner, uint8_t index, float value) {
  list[count].offset = static_cast<int32_t>(origin + winner[index]);
  list[count].value = value;
  return count + (index != kNoGradient);
}

template <class T>
void list_planes(const Lists& l, int64_t group, int64_t k_begin, int64_t k_end, SparseGradient* entries, int32_t* counts, float* row) {
  const BackwardPlan& plan = l.plan;
  const ConvPool& p = *plan.p;
  const int64_t channels = k_end - k_begin, run = l.end[2] - l.begin[2];
  for (int64_t k = 0; k < channels; ++k)
    for (int64_t n = 0; n < l.strip.images; ++n)
      for (int64_t d = l.begin[0]; d < l.end[0]; ++d)
        for (int64_t h = l.begin[1]; h < l.end[1]; ++h) {
          const int64_t plane = (l.strip.image + n) * p.out_channels + group * p.group_out + k_begin + k;
          const int64_t at = ((plane * p.out.d + d) * p.out.h + h) * p.out.w + l.begin[2];
          const float* gradient = output_gradient<T>(plan, at, run, row);
          const uint8_t* index = plan.a->index + at;
          const int64_t tile_row = l.tile_row(d, h);
          int64_t origin = l.origin(n, d, h) + l.begin[2] * l.window_step();
          for (int64_t t = 0, w = 0; w < run; ++t) {
            const int64_t list = (tile_row + t) * channels + k, stop = least(w + plan.tile[2], run);
            SparseGradient* to = entries + list * l.tiles.windows;
            int32_t count = counts[list];
            for (; w < stop; ++w, origin += l.window_step()) count = append(to, count, origin, l.winner, index[w], gradient[w]);
            counts[list] = count;
          }
        }
}

template <class T>
void list_pixels(const Lists& l, int64_t group, int64_t k_begin, int64_t k_end, SparseGradient* entries, int32_t* counts, float* row) {
  const BackwardPlan& plan = l.plan;
  const ConvPool& p = *plan.p;
  const int64_t channels = k_end - k_begin;
  for (int64_t n = 0; n < l.strip.images; ++n)
    for (int64_t d = l.begin[0]; d < l.end[0]; ++d)
      for (int64_t h = l.begin[1]; h < l.end[1]; ++h)
        for (int64_t w = l.begin[2]; w < l.end[2]; ++w) {
          const int64_t pixel = (((l.strip.image + n) * p.out.d + d) * p.out.h + h) * p.out.w + w;
          const int64_t at = pixel * p.out_channels + group * p.group_out + k_begin;
          const float* gradient = output_gradient<T>(plan, at, channels, row);
          const uint8_t* index = plan.a->index + at;
          const int64_t tile = l.tile_row(d, h) + (w - l.begin[2]) / plan.tile[2];
          const int64_t origin = l.origin(n, d, h) + w * l.window_step();
          SparseGradient* to = entries + tile * channels * l.tiles.windows;
          int32_t* count = counts + tile * channels;
          for (int64_t k = 0; k < channels; ++k, to += l.tiles.windows)
            count[k] = append(to, count[k], origin, l.winner, index[k], gradient[k]);
        }
}

// ---- dense --------------------------------------------------------------------------------------------------------

// The pooling windows that cover pixel `at` of an axis: begin..end.
struct Cover {
  int64_t begin, end;
};
Cover covering(int64_t at, int64_t window, int64_t step, int64_t pad, int64_t count) {
  const int64_t past = at + pad - window + 1;  // the first window that starts early enough ends here or later
  return {past > 0 ? (past + step - 1) / step : 0, least((at + pad) / step + 1, count)};
}

// The activation's slope at each pixel, behind average pooling. What lies under no window has no gradient, and forward
// need not have saved a value for it.
template <class T>
void through_saved_pixels(const BackwardPlan& plan, int64_t at, int64_t count, float* row) {
  if (plan.p->pool != INTERFUSE_POOL_AVG || !plan.p->pre_count()) return;
  through_activation(*plan.p, row, static_cast<const T*>(plan.a->pre) + at, count, row);
}

// The gradient of `run` pixels of one channel's row (n, d, h) from w on, in planes.
template <class T>
const float* pixel_row(const BackwardPlan& plan, int64_t n, int64_t k, int64_t d, int64_t h, int64_t w, int64_t run, float* row) {
  const ConvPool& p = *plan.p;
  const int64_t plane = n * p.out_channels + k, conv_at = ((plane * p.conv.d + d) * p.conv.h + h) * p.conv.w + w;
  if (p.pool == INTERFUSE_POOL_NONE) return output_gradient<T>(plan, conv_at, run, row);
  memset(row, 0, static_cast<size_t>(run) * sizeof(float));
  float* values = row + run;
  const Cover ds = covering(d, p.window.d, p.window_stride.d, p.window_pad.d, p.out.d);
  const Cover hs = covering(h, p.window.h, p.window_stride.h, p.window_pad.h, p.out.h);
  const int64_t w_begin = covering(w, p.window.w, p.window_stride.w, p.window_pad.w, p.out.w).begin;
  const int64_t w_end = covering(w + run - 1, p.window.w, p.window_stride.w, p.window_pad.w, p.out.w).end;
  for (int64_t od = ds.begin; od < ds.end; ++od)
    for (int64_t oh = hs.begin; oh < hs.end; ++oh) {
      if (w_end <= w_begin) continue;
      const int64_t at = ((plane * p.out.d + od) * p.out.h + oh) * p.out.w + w_begin;
      const float* gradient = output_gradient<T>(plan, at, w_end - w_begin, values);
      for (int64_t ow = w_begin; ow < w_end; ++ow) {
        const Window r = window_at(p, od, oh, ow);
        if (p.pool == INTERFUSE_POOL_AVG) {
          const float share = gradient[ow - w_begin] / r.divisor;
          for (int64_t i = most(r.w0, w); i < least(r.w1, w + run); ++i) row[i - w] += share;
          continue;
        }
        const uint8_t winner = plan.a->index[at + ow - w_begin];
        const int64_t first = ((d - r.od) * p.window.h + (h - r.oh)) * p.window.w, i = r.ow + winner - first;
        if (winner != kNoGradient && winner >= first && winner < first + p.window.w && i >= w && i < w + run)
          row[i - w] += gradient[ow - w_begin];
      }
    }
  if (ds.begin >= ds.end || hs.begin >= hs.end) return row;
  through_saved_pixels<T>(plan, conv_at, run, row);
  if (plan.uncovered_columns)
    for (int64_t i = 0; i < run; ++i) {
      const Cover ws = covering(w + i, p.window.w, p.window_stride.w, p.window_pad.w, p.out.w);
      if (ws.begin >= ws.end) row[i] = 0;
    }
  return row;
}

// The gradient of one pixel's channels k..k + run, in channels_last tensors.
template <class T>
const float* channel_row(const BackwardPlan& plan, int64_t n, int64_t k, int64_t d, int64_t h, int64_t w, int64_t run, float* row) {
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
void dense_as(const BackwardPlan& plan, const Strip& strip, int64_t group, int64_t k_begin, int64_t k_end, float* gradient, float* row) {
  const ConvPool& p = *plan.p;
  int64_t begin[3], end[3];
  for (int i = 0; i < 3; ++i) {
    begin[i] = i == plan.axis ? strip.begin : 0;
    end[i] = i == plan.axis ? strip.end : plan.count[i];
  }
  const int64_t run = end[2] - begin[2], pixels = strip.images * (end[0] - begin[0]) * (end[1] - begin[1]) * run;
  const int64_t channels = k_end - k_begin, first = group * p.group_out + k_begin;
  float* to = gradient;
  for (int64_t n = strip.image; n < strip.image + strip.images; ++n)
    for (int64_t d = begin[0]; d < end[0]; ++d)
      for (int64_t h = begin[1]; h < end[1]; ++h, to += run * kBlock) {
        if (p.channels_last) {
          for (int64_t w = 0; w < run; ++w) {
            const float* from = channel_row<T>(plan, n, first, d, h, begin[2] + w, channels, row);
            for (int64_t k = 0; k < channels; ++k) to[(k / kBlock * pixels + w) * kBlock + k % kBlock] = from[k];
          }
        } else {
          for (int64_t k = 0; k < channels; ++k) {
            const float* from = pixel_row<T>(plan, n, first + k, d, h, begin[2], run, row);
            float* lane = to + k / kBlock * pixels * kBlock + k % kBlock;
            for (int64_t w = 0; w < run; ++w) lane[w * kBlock] = from[w];
          }
        }
      }
  if (channels % kBlock == 0) return;
  float* last = gradient + channels / kBlock * pixels * kBlock;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t k = channels % kBlock; k < kBlock; ++k) last[i * kBlock + k] = 0;
}

}  // namespace

Tiles tiles_of(const BackwardPlan& plan, const Strip& strip) {
  Tiles tiles;
  tiles.total = 1;
  tiles.windows = strip.images;
  for (int i = 0; i < 3; ++i) {
    const int64_t windows = i == plan.axis ? strip.end - strip.begin : plan.count[i];
    tiles.count[i] = (windows + plan.tile[i] - 1) / plan.tile[i];
    tiles.total *= tiles.count[i];
    tiles.windows *= plan.tile[i];
  }
  return tiles;
}

void list_gradients(const BackwardPlan& plan, const Strip& strip, const Tiles& tiles, int64_t group, int64_t k_begin, int64_t k_end,
                    SparseGradient* entries, int32_t* counts, float* row) {
  const Lists lists(plan, strip, tiles);
  memset(counts, 0, static_cast<size_t>(tiles.total * (k_end - k_begin)) * sizeof(int32_t));
  if (plan.p->dtype == INTERFUSE_FLOAT32)
    plan.p->channels_last ? list_pixels<float>(lists, group, k_begin, k_end, entries, counts, row)
                          : list_planes<float>(lists, group, k_begin, k_end, entries, counts, row);
  else
    plan.p->channels_last ? list_pixels<uint16_t>(lists, group, k_begin, k_end, entries, counts, row)
                          : list_planes<uint16_t>(lists, group, k_begin, k_end, entries, counts, row);
}

void dense_gradients(const BackwardPlan& plan, const Strip& strip, int64_t group, int64_t k_begin, int64_t k_end, float* gradient, float* row) {
  plan.p->dtype == INTERFUSE_FLOAT32 ? dense_as<float>(plan, strip, group, k_begin, k_end, gradient, row)
                                     : dense_as<uint16_t>(plan, strip, group, k_begin, k_end, gradient, row);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
