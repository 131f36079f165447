// From sums whose lanes are columns to what is stored: pooling, activation, the saved index and values.
// Per-ISA (see common/simd.h).
#pragma once

#include <math.h>

#include "common/conv_pool.h"
#include "common/simd.h"
#include "cpu/conv_pool_store.h"
#include "cpu/conv_pool_view.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// The convolution of a box of its pixels, one channel: rows of `pitch` floats, whole vectors with slack behind.
struct Columns {
  float* data;
  Box box;
  int64_t pitch;
  int64_t rows() const { return (box.to.d - box.from.d) * (box.to.h - box.from.h); }
  float* row(int64_t d, int64_t h) const {
    return data + ((d - box.from.d) * (box.to.h - box.from.h) + (h - box.from.h)) * pitch;
  }
};

// p[0], p[step], p[2 step]...
INTERFUSE_INLINE Vec load_steps(const float* p, int64_t step) {
  if (step == 1) return load(p);
  if (step == 2) return even_lanes(load(p), load(p + kLanes));
  Vec v = zero();
  for (int i = 0; i < kLanes; ++i) v[i] = p[i * step];
  return v;
}

struct ColumnScratch {
  float *value, *index, *pre;  // rows of outputs
  float* activated;            // one channel's sums activated, where the maximum needs them
};

// Windows of outputs [begin, end) of a row: inside the convolution along w, so that one vector covers kLanes of them.
// Instantiated per pooling; Save: the winner's place and value before the activation.
template <int Pool, bool Save>
void pool_columns(const ConvPool& p, const Window& r, const Columns& values, const float* before, int64_t begin,
                  int64_t end, int64_t base, const ColumnScratch& scratch) {
  const int64_t step = p.window_stride.w;
  for (int64_t w = begin; w < end; w += kLanes) {
    const int64_t column = w * step - p.window_pad.w - values.box.from.w;
    Vec best = zero(), z = zero();
    IVec place{};
    bool first = true;
    for (int64_t d = r.d0; d < r.d1; ++d)
      for (int64_t h = r.h0; h < r.h1; ++h) {
        const float* at = values.row(d, h) + column;
        const int32_t row_place = static_cast<int32_t>(((d - r.od) * p.window.h + (h - r.oh)) * p.window.w);
        for (int64_t j = 0; j < p.window.w; ++j) {
          const Vec v = load_steps(at + j, step);
          if (Pool == INTERFUSE_POOL_AVG) {
            best += v;
          } else if (!Save) {
            best = first ? v : maximum(best, v);
          } else {
            const IVec wins = first ? ~IVec{} : (v > best) | (v != v);
            best = select(wins, v, best);
            z = select(wins, load_steps(before + (at - values.data) + j, step), z);
            place = wins ? (row_place + static_cast<int32_t>(j)) - IVec{} : place;
          }
          first = false;
        }
      }
    if (Pool == INTERFUSE_POOL_AVG) best = best / splat(r.divisor);
    store(scratch.value + w - base, best);
    if (Save) {
      if (p.activation == INTERFUSE_RELU) place = best <= zero() ? int32_t(kNoGradient) - IVec{} : place;
      store(scratch.index + w - base, (Vec)place);
      store(scratch.pre + w - base, z);
    }
  }
}

// One window that the convolution's edge cuts.
INTERFUSE_INLINE void pool_edge(const ConvPool& p, const Window& r, const Columns& values, const float* before,
                                int64_t at, const ColumnScratch& scratch) {
  float best = 0, z = 0, sum = 0;
  int32_t place = 0;
  bool first = true;
  for (int64_t d = r.d0; d < r.d1; ++d)
    for (int64_t h = r.h0; h < r.h1; ++h)
      for (int64_t w = r.w0; w < r.w1; ++w) {
        const float* from = values.row(d, h) + (w - values.box.from.w);
        const float v = *from;
        sum += v;
        if (!first && !(v > best || v != v)) continue;
        first = false;
        best = v, z = before[from - values.data];
        place = static_cast<int32_t>(((d - r.od) * p.window.h + (h - r.oh)) * p.window.w + (w - r.ow));
      }
  scratch.value[at] = p.pool == INTERFUSE_POOL_AVG ? sum / r.divisor : best;
  if (!p.save || p.pool == INTERFUSE_POOL_AVG) return;
  if (p.activation == INTERFUSE_RELU && best <= 0) place = kNoGradient;
  memcpy(scratch.index + at, &place, 4);
  scratch.pre[at] = z;
}

// `own` as in finish(): the first pixel that no other box writes to `pre` where that has the convolution's size.
template <class T>
void finish_columns(const ConvPool& p, const ConvPoolForward& a, int64_t image, int64_t channel, const Columns& sums,
                    const Box& out, const Triple& own, const ColumnScratch& scratch) {
  T* y = static_cast<T*>(a.y);
  T* pre = p.pre_count() ? static_cast<T*>(a.pre) : nullptr;
  const int64_t count = out.to.w - out.from.w;

  if (p.pool == INTERFUSE_POOL_NONE) {
    for (int64_t d = out.from.d; d < out.to.d; ++d)
      for (int64_t h = out.from.h; h < out.to.h; ++h) {
        float* row = sums.row(d, h);
        if (pre) put_channel(pre, p, p.out, image, channel, d, h, out.from.w, row, count);
        if (p.activation != INTERFUSE_NONE) activate_run(p, row, row, count);
        put_channel(y, p, p.out, image, channel, d, h, out.from.w, row, count);
      }
    return;
  }

  Columns values = sums;
  if (p.pool == INTERFUSE_POOL_AVG && p.activation != INTERFUSE_NONE) {
    const Box& box = sums.box;
    auto save = [&] {
      const int64_t w = greatest(box.from.w, own.w);
      for (int64_t d = greatest(box.from.d, own.d); d < box.to.d; ++d)
        for (int64_t h = greatest(box.from.h, own.h); h < box.to.h && w < box.to.w; ++h)
          put_channel(pre, p, p.conv, image, channel, d, h, w, sums.row(d, h) + (w - box.from.w), box.to.w - w);
    };
    if (pre && p.needs_preactivation()) save();
    activate_run(p, sums.data, sums.data, sums.rows() * sums.pitch);
    if (pre && !p.needs_preactivation()) save();
  } else if (keeps_activated(p)) {
    values.data = scratch.activated;
    activate_run(p, sums.data, values.data, sums.rows() * sums.pitch);
  }

  const bool saves = p.save && p.pool == INTERFUSE_POOL_MAX;
  const auto pool = p.pool == INTERFUSE_POOL_AVG ? pool_columns<INTERFUSE_POOL_AVG, false>
                    : saves                      ? pool_columns<INTERFUSE_POOL_MAX, true>
                                                 : pool_columns<INTERFUSE_POOL_MAX, false>;
  // Outputs whose windows lie inside the convolution along w.
  const int64_t inner_begin = least(out.to.w, greatest(out.from.w, divide_up(p.window_pad.w, p.window_stride.w)));
  const int64_t last = p.conv.w + p.window_pad.w - p.window.w;
  const int64_t inner_end = last < 0 ? inner_begin : greatest(inner_begin, least(out.to.w, last / p.window_stride.w + 1));
  for (int64_t d = out.from.d; d < out.to.d; ++d)
    for (int64_t h = out.from.h; h < out.to.h; ++h) {
      // The vectors go first: their last one may write past the inner outputs.
      if (inner_end > inner_begin)
        pool(p, window_at(p, d, h, inner_begin), values, sums.data, inner_begin, inner_end, out.from.w, scratch);
      for (int64_t w = out.from.w; w < inner_begin; ++w)
        pool_edge(p, window_at(p, d, h, w), values, sums.data, w - out.from.w, scratch);
      for (int64_t w = inner_end; w < out.to.w; ++w)
        pool_edge(p, window_at(p, d, h, w), values, sums.data, w - out.from.w, scratch);
      if (p.pool == INTERFUSE_POOL_MAX && p.activation != INTERFUSE_NONE && monotone(p))
        activate_run(p, scratch.value, scratch.value, count);
      put_channel(y, p, p.out, image, channel, d, h, out.from.w, scratch.value, count);
      if (p.index_count()) put_channel(a.index, p, p.out, image, channel, d, h, out.from.w, scratch.index, count);
      if (pre && saves) put_channel(pre, p, p.out, image, channel, d, h, out.from.w, scratch.pre, count);
    }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
