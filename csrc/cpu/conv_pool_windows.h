// Where things lie: dense offsets and pooling windows. Per-ISA (see common/simd.h).
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {


// Offset of element (n, channel, d, h, w) in a dense tensor of `size` with `channels` channels.
INTERFUSE_INLINE int64_t dense_offset(bool channels_last, int64_t channels, const Triple& size, int64_t n,
                                      int64_t channel, int64_t d, int64_t h, int64_t w) {
  int64_t pixel = (d * size.h + h) * size.w + w;
  return channels_last ? (n * size.volume() + pixel) * channels + channel
                       : (n * channels + channel) * size.volume() + pixel;
}

struct Window {
  int64_t d0, d1, h0, h1, w0, w1;  // the valid part
  int64_t od, oh, ow;              // where the whole window starts, padding included
  float divisor;
};

INTERFUSE_INLINE Window window_at(const ConvPool& p, int64_t d, int64_t h, int64_t w) {
  auto low = [](int64_t v) { return v < 0 ? int64_t(0) : v; };
  Window r;
  r.od = d * p.window_stride.d - p.window_pad.d;
  r.oh = h * p.window_stride.h - p.window_pad.h;
  r.ow = w * p.window_stride.w - p.window_pad.w;
  int64_t ed = least(r.od + p.window.d, p.conv.d + p.window_pad.d);
  int64_t eh = least(r.oh + p.window.h, p.conv.h + p.window_pad.h);
  int64_t ew = least(r.ow + p.window.w, p.conv.w + p.window_pad.w);
  int64_t padded = (ed - r.od) * (eh - r.oh) * (ew - r.ow);
  r.d0 = low(r.od), r.d1 = least(ed, p.conv.d);
  r.h0 = low(r.oh), r.h1 = least(eh, p.conv.h);
  r.w0 = low(r.ow), r.w1 = least(ew, p.conv.w);
  int64_t valid = (r.d1 - r.d0) * (r.h1 - r.h0) * (r.w1 - r.w0);
  r.divisor = static_cast<float>(p.count_include_pad ? padded : valid);
  return r;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
