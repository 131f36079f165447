// The direct kernels' copy of the part of x that a box needs: padding filled in, bfloat16 widened, rows side by side.
// Per-ISA (see common/simd.h).
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"
#include "common/shuffle.h"
#include "common/transpose.h"
#include "cpu/conv_pool_geometry.h"

namespace interfuse {
namespace INTERFUSE_ISA {

INTERFUSE_INLINE void fill_zero(float* to, int64_t count) {
  for (; count >= kLanes; count -= kLanes, to += kLanes) store(to, zero());
  for (; count > 0; --count) *to++ = 0;
}

// `count` elements of x, widened; no byte beyond them is read.
template <class T>
INTERFUSE_INLINE void copy_run(float* to, const T* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

// Elements `step` apart.
template <class T>
INTERFUSE_INLINE void copy_steps(float* to, const T* from, int64_t step, int64_t count) {
  if (step == 1) return copy_run(to, from, count);
  int64_t i = 0;
  if (step == 2)
    for (; i + kLanes < count; i += kLanes) store(to + i, even_lanes(load(from + 2 * i), load(from + 2 * i + kLanes)));
  for (; i < count; ++i) to[i] = to_float(from[i * step]);
}

// The extent of a part along w: zeros on the left, elements of x, zeros on the right.
struct Span {
  int64_t left, inside, right;
};
INTERFUSE_INLINE Span span_of(int64_t from, int64_t size, int64_t extent) {
  Span s;
  s.left = from < 0 ? least(size, -from) : 0;
  s.inside = greatest(0, least(size - s.left, extent - (from + s.left)));
  s.right = size - s.left - s.inside;
  return s;
}

// Positions [from, from + size) of one image and group (`x` is its first element) as [d][h][w][c]; x has unit stride
// along c.
template <class T>
void copy_interleaved(const ConvPool& p, const T* x, const Triple& from, const Triple& size, float* to,
                      const Strides& s) {
  const Span span = span_of(from.w, size.w, p.in.w);
  const int64_t run = p.group_in;
  for (int64_t d = 0; d < size.d; ++d)
    for (int64_t h = 0; h < size.h; ++h) {
      float* row = to + d * s.d + h * s.h;
      const int64_t xd = from.d + d, xh = from.h + h;
      if (xd < 0 || xd >= p.in.d || xh < 0 || xh >= p.in.h) {
        fill_zero(row, size.w * run);
        continue;
      }
      const T* source = x + xd * p.xs.d + xh * p.xs.h + (from.w + span.left) * p.xs.w;
      fill_zero(row, span.left * run);
      row += span.left * run;
      if (p.xs.w == run)
        copy_run(row, source, span.inside * run);
      else
        for (int64_t i = 0; i < span.inside; ++i) copy_run(row + i * run, source + i * p.xs.w, run);
      fill_zero(row + span.inside * run, span.right * run);
    }
}

// The same as [c][d][h][phase][pitch]: column w of the part goes to place w / phases of phase w % phases, so that the
// columns that one tap meets are neighbours. The rest of the pitch is zero. x may have any strides.
struct PlanarCopy {
  Strides s;
  int64_t phases, pitch;
};

// Rows of x with unit stride along c: a block of channels times pixels is transposed at a time.
template <class T>
void transpose_row(const T* source, int64_t pixel_step, int64_t pixels, int64_t channels, float* to,
                   int64_t channel_step) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int lanes = static_cast<int>(least(kLanes, channels - c));
    for (int64_t i = 0; i < pixels; i += kLanes) {
      const int count = static_cast<int>(least(kLanes, pixels - i));
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const T* at = source + (i + j) * pixel_step + c;
        block[j] = j >= count ? zero() : lanes == kLanes ? load(at) : load_first(at, lanes);
      }
      transpose(block);
      float* place = to + c * channel_step + i;
      if (lanes == kLanes && count == kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(place + j * channel_step, block[j]);
      } else {
        for (int j = 0; j < lanes; ++j) store_first(place + j * channel_step, block[j], count);
      }
    }
  }
}

template <class T>
void copy_planar(const ConvPool& p, const T* x, const Triple& from, const Triple& size, float* to,
                 const PlanarCopy& copy) {
  const Span span = span_of(from.w, size.w, p.in.w);
  const Strides& s = copy.s;
  const bool transposes = p.xs.w != 1 && p.xs.c == 1 && copy.phases == 1 && p.group_in > 1;
  for (int64_t d = 0; d < size.d; ++d)
    for (int64_t h = 0; h < size.h; ++h) {
      const int64_t xd = from.d + d, xh = from.h + h;
      const bool outside = xd < 0 || xd >= p.in.d || xh < 0 || xh >= p.in.h;
      const T* source = x + xd * p.xs.d + xh * p.xs.h + (from.w + span.left) * p.xs.w;
      for (int64_t c = 0; c < p.group_in; ++c) {
        float* row = to + c * s.c + d * s.d + h * s.h;
        if (outside) {
          fill_zero(row, copy.phases * copy.pitch);
          continue;
        }
        for (int64_t phase = 0; phase < copy.phases; ++phase, row += copy.pitch) {
          // Places of this phase before, inside and after x's extent.
          const int64_t begin = divide_up(greatest(0, span.left - phase), copy.phases);
          const int64_t end = greatest(begin, divide_up(greatest(0, span.left + span.inside - phase), copy.phases));
          fill_zero(row, begin);
          if (!transposes)
            copy_steps(row + begin, source + c * p.xs.c + (begin * copy.phases + phase - span.left) * p.xs.w,
                       copy.phases * p.xs.w, end - begin);
          fill_zero(row + end, copy.pitch - end);
        }
      }
      if (transposes && !outside)
        transpose_row(source, p.xs.w, span.inside, p.group_in, to + d * s.d + h * s.h + span.left, s.c);
    }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
