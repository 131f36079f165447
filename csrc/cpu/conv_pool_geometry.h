// Boxes of outputs, what of the convolution and of x lies under them, and how to cut a problem into them.
// Per-ISA (see common/simd.h).
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"
#include "cpu/conv_pool_windows.h"

namespace interfuse {
namespace INTERFUSE_ISA {


struct Box {
  Triple from, to;  // half-open
  Triple size() const { return {to.d - from.d, to.h - from.h, to.w - from.w}; }
};

// Strides in elements, of a part of x as one group of channels sees it.
struct Strides {
  int64_t c, d, h, w;
};

INTERFUSE_INLINE bool padded(const ConvPool& p) {
  return p.pad_lo.d || p.pad_lo.h || p.pad_lo.w || p.pad_hi.d || p.pad_hi.h || p.pad_hi.w;
}

// The convolution's pixels under outputs [from, to) of one axis.
INTERFUSE_INLINE int64_t conv_begin(int64_t from, int64_t stride, int64_t pad) { return greatest(0, from * stride - pad); }
INTERFUSE_INLINE int64_t conv_end(int64_t to, int64_t stride, int64_t pad, int64_t window, int64_t size) {
  return least(size, (to - 1) * stride - pad + window);
}
INTERFUSE_INLINE Box conv_box(const ConvPool& p, const Box& out) {
  Box box;
  box.from = {conv_begin(out.from.d, p.window_stride.d, p.window_pad.d),
              conv_begin(out.from.h, p.window_stride.h, p.window_pad.h),
              conv_begin(out.from.w, p.window_stride.w, p.window_pad.w)};
  box.to = {conv_end(out.to.d, p.window_stride.d, p.window_pad.d, p.window.d, p.conv.d),
            conv_end(out.to.h, p.window_stride.h, p.window_pad.h, p.window.h, p.conv.h),
            conv_end(out.to.w, p.window_stride.w, p.window_pad.w, p.window.w, p.conv.w)};
  return box;
}
// The first pixel of the convolution that belongs to no earlier box: windows of neighbours may overlap.
INTERFUSE_INLINE Triple first_owned(const ConvPool& p, const Box& out) {
  auto owned = [](int64_t from, int64_t stride, int64_t pad, int64_t window, int64_t size) {
    return from == 0 ? int64_t(0) : conv_end(from, stride, pad, window, size);
  };
  return {owned(out.from.d, p.window_stride.d, p.window_pad.d, p.window.d, p.conv.d),
          owned(out.from.h, p.window_stride.h, p.window_pad.h, p.window.h, p.conv.h),
          owned(out.from.w, p.window_stride.w, p.window_pad.w, p.window.w, p.conv.w)};
}

// At most so many pixels of the convolution lie under so many outputs, and so many inputs under those.
INTERFUSE_INLINE int64_t conv_extent(int64_t count, int64_t stride, int64_t window, int64_t size) {
  return least(size, (count - 1) * stride + window);
}
INTERFUSE_INLINE Triple conv_extents(const ConvPool& p, const Triple& outs) {
  return {conv_extent(outs.d, p.window_stride.d, p.window.d, p.conv.d),
          conv_extent(outs.h, p.window_stride.h, p.window.h, p.conv.h),
          conv_extent(outs.w, p.window_stride.w, p.window.w, p.conv.w)};
}
INTERFUSE_INLINE Triple input_extents(const ConvPool& p, const Triple& conv) {
  return {(conv.d - 1) * p.stride.d + (p.kernel.d - 1) * p.dilation.d + 1,
          (conv.h - 1) * p.stride.h + (p.kernel.h - 1) * p.dilation.h + 1,
          (conv.w - 1) * p.stride.w + (p.kernel.w - 1) * p.dilation.w + 1};
}
INTERFUSE_INLINE Triple input_begin(const ConvPool& p, const Triple& conv) {
  return {conv.d * p.stride.d - p.pad_lo.d, conv.h * p.stride.h - p.pad_lo.h, conv.w * p.stride.w - p.pad_lo.w};
}

// How the outputs of an image are cut into boxes, and the panels of output channels into shares.
struct Cut {
  Triple box;     // outputs of a box at most
  Triple boxes;   // how many along each axis
  int64_t shares;
  int64_t jobs(const ConvPool& p) const { return shares * p.batch * p.groups * boxes.volume(); }
};

// One box of one image and group, for one share of the panels.
struct Job {
  int64_t image, group, share;
  Box out;
};

INTERFUSE_INLINE Job job_at(const ConvPool& p, const Cut& cut, int64_t job) {
  auto next = [&](int64_t count) {
    const int64_t digit = job % count;
    job /= count;
    return digit;
  };
  const int64_t w = next(cut.boxes.w), h = next(cut.boxes.h), d = next(cut.boxes.d);
  Job at;
  at.group = next(p.groups);
  at.image = next(p.batch);
  at.share = job;
  at.out.from = {d * cut.box.d, h * cut.box.h, w * cut.box.w};
  at.out.to = {least(p.out.d, (d + 1) * cut.box.d), least(p.out.h, (h + 1) * cut.box.h),
               least(p.out.w, (w + 1) * cut.box.w)};
  return at;
}

// The largest boxes for which fits(box) holds: whole rows where they fit, then more rows, then more planes. Then
// smaller ones, or shares of `panels`, until every thread has as much to do.
template <class Fits>
Cut cut_outputs(const ConvPool& p, int threads, int64_t panels, bool prefer_shares, Fits&& fits) {
  Triple box = {1, 1, p.out.w};
  while (box.w > 64 && !fits(box)) box.w = divide_up(box.w, 2);
  auto grow = [&](int64_t& axis, int64_t end) {
    while (axis < end) {
      const int64_t before = axis;
      axis = least(end, axis * 2);
      if (fits(box)) continue;
      axis = before;
      break;
    }
  };
  grow(box.h, p.out.h);
  if (box.h == p.out.h) grow(box.d, p.out.d);
  Cut cut;
  cut.boxes = {divide_up(p.out.d, box.d), divide_up(p.out.h, box.h), divide_up(p.out.w, box.w)};
  cut.shares = 1;
  auto uneven = [&] {
    const int64_t jobs = p.batch * p.groups * cut.boxes.volume();
    return jobs < 8 * threads && jobs % threads != 0;
  };
  if (threads > 1 && uneven()) {
    if (prefer_shares && panels >= 2 * threads) {
      cut.shares = threads;
    } else {
      int64_t* count = &cut.boxes.h;
      int64_t size = p.out.h;
      if (p.out.h < 2 * threads && p.out.d > 1) count = &cut.boxes.d, size = p.out.d;
      if (p.out.h < 2 * threads && p.out.d < 2 * threads && p.out.w > 64) count = &cut.boxes.w, size = p.out.w;
      while (uneven() && *count < size) ++*count;
      if (uneven() && panels >= threads) cut.shares = threads;
    }
  }
  cut.box = {divide_up(p.out.d, cut.boxes.d), divide_up(p.out.h, cut.boxes.h), divide_up(p.out.w, cut.boxes.w)};
  cut.boxes = {divide_up(p.out.d, cut.box.d), divide_up(p.out.h, cut.box.h), divide_up(p.out.w, cut.box.w)};
  return cut;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
