// How the direct kernels read x: in place, or through a copy of the part that a box needs, with the padding filled in
// and bfloat16 widened. Per-ISA (see common/simd.h).
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Strides in elements, of a part of x as one group of channels sees it.
struct Strides {
  int64_t c, d, h, w;
};

// `count` elements from x, widened; never a byte beyond them.
template <class T>
INTERFUSE_INLINE void copy_run(float* to, const T* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}
INTERFUSE_INLINE void fill_zero(float* to, int64_t count) { memset(to, 0, static_cast<size_t>(count) * sizeof(float)); }

// The input positions [from, from + size) of one image and group, outside x's extent zero, into `to` with strides `s`
// (s.w or s.c is 1, as in x). `x` is the group's first element of the image.
template <class T>
void copy_part(const ConvPool& p, const T* x, const Triple& from, const Triple& size, float* to, const Strides& s) {
  const int64_t left = from.w < 0 ? (size.w < -from.w ? size.w : -from.w) : 0;
  int64_t inside = p.in.w - (from.w + left);
  if (inside > size.w - left) inside = size.w - left;
  if (inside < 0) inside = 0;
  const int64_t right = size.w - left - inside;
  const bool planar = s.w == 1;
  const int64_t channels = planar ? p.group_in : 1;  // interleaved: a row holds them all
  const int64_t run = planar ? 1 : p.group_in;       // elements of one pixel
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t d = 0; d < size.d; ++d)
      for (int64_t h = 0; h < size.h; ++h) {
        float* row = to + c * s.c + d * s.d + h * s.h;
        const int64_t xd = from.d + d, xh = from.h + h;
        if (xd < 0 || xd >= p.in.d || xh < 0 || xh >= p.in.h) {
          fill_zero(row, size.w * run);
          continue;
        }
        const T* source = x + c * p.xs.c + xd * p.xs.d + xh * p.xs.h + (from.w + left) * p.xs.w;
        if (left) fill_zero(row, left * run);
        row += left * run;
        if (run == 1 && p.xs.w != 1)
          for (int64_t i = 0; i < inside; ++i) row[i] = to_float(source[i * p.xs.w]);
        else if (run == 1 || p.xs.w == run)
          copy_run(row, source, inside * run);
        else
          for (int64_t i = 0; i < inside; ++i) copy_run(row + i * run, source + i * p.xs.w, run);
        if (right) fill_zero(row + inside * run, right * run);
      }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
