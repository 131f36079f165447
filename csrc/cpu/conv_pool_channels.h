// From the convolution's sums to what is stored: pooling, activation, the saved index and values, and the layout.
// Per-ISA (see common/simd.h).
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"
#include "cpu/conv_pool_store.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// ---- pooling ------------------------------------------------------------------------------------------------------

// The convolution of a box of its pixels, for one panel: at(d, h, w) are lanes() floats.
struct Sums {
  float* data;
  Box box;
  int lanes;
  int64_t pixels() const { return box.size().volume(); }
  float* at(int64_t d, int64_t h, int64_t w) const {
    const Triple size = box.size();
    return data + (((d - box.from.d) * size.h + (h - box.from.h)) * size.w + (w - box.from.w)) * lanes;
  }
};

// One vector of channels of one window: the largest value, where it lies, and the value before the activation there.
struct Winner {
  Vec value, before;
  IVec place;
};

INTERFUSE_INLINE Winner window_winner(const ConvPool& p, const Window& r, const Sums& values, const float* before,
                                      int lane) {
  Winner best{};
  bool first = true;
  for (int64_t d = r.d0; d < r.d1; ++d)
    for (int64_t h = r.h0; h < r.h1; ++h) {
      const float* at = values.at(d, h, r.w0) + lane;
      const float* z = before + (at - values.data);
      int32_t place = static_cast<int32_t>(((d - r.od) * p.window.h + (h - r.oh)) * p.window.w + (r.w0 - r.ow));
      for (int64_t w = r.w0; w < r.w1; ++w, at += values.lanes, z += values.lanes, ++place) {
        const Vec v = load(at);
        const IVec wins = first ? ~IVec{} : (v > best.value) | (v != v);
        best.value = select(wins, v, best.value);
        best.before = select(wins, load(z), best.before);
        best.place = wins ? place - IVec{} : best.place;
        first = false;
      }
    }
  return best;
}

INTERFUSE_INLINE Vec window_maximum(const Window& r, const Sums& values, int lane) {
  Vec best = load(values.at(r.d0, r.h0, r.w0) + lane);
  for (int64_t d = r.d0; d < r.d1; ++d)
    for (int64_t h = r.h0; h < r.h1; ++h) {
      const float* at = values.at(d, h, r.w0) + lane;
      for (int64_t w = r.w0; w < r.w1; ++w, at += values.lanes) best = maximum(best, load(at));
    }
  return best;
}

INTERFUSE_INLINE Vec window_mean(const Window& r, const Sums& values, int lane) {
  Vec sum = zero();
  for (int64_t d = r.d0; d < r.d1; ++d)
    for (int64_t h = r.h0; h < r.h1; ++h) {
      const float* at = values.at(d, h, r.w0) + lane;
      for (int64_t w = r.w0; w < r.w1; ++w, at += values.lanes) sum += load(at);
    }
  return sum / splat(r.divisor);
}

// ---- a box of outputs -----------------------------------------------------------------------------------------------

struct FinishScratch {
  float* row;        // 3 rows of outputs: values, index, value before the activation
  float* activated;  // as large as the sums where the maximum is taken over activated values; else unused
};

// `own`: the first pixel of the convolution that no earlier box has written where `pre` has its resolution.
template <class T>
void finish(const ConvPool& p, const ConvPoolForward& a, const Panel& panel, const Sums& sums, const Box& out,
            const Triple& own, const FinishScratch& scratch) {
  T* y = static_cast<T*>(a.y);
  T* pre = p.pre_count() ? static_cast<T*>(a.pre) : nullptr;
  const int lanes = panel.lanes();
  const int64_t columns = out.to.w - out.from.w;

  if (p.pool == INTERFUSE_POOL_NONE) {
    for (int64_t d = out.from.d; d < out.to.d; ++d)
      for (int64_t h = out.from.h; h < out.to.h; ++h) {
        float* row = sums.at(d, h, out.from.w);
        if (pre) put_pixels(pre, p, p.out, panel, d, h, out.from.w, row, columns);
        if (p.activation != INTERFUSE_NONE) activate_run(p, row, row, columns * lanes);
        put_pixels(y, p, p.out, panel, d, h, out.from.w, row, columns);
      }
    return;
  }

  Sums values = sums;
  if (p.pool == INTERFUSE_POOL_AVG && p.activation != INTERFUSE_NONE) {
    const Box& box = sums.box;
    auto save = [&] {
      for (int64_t d = greatest(box.from.d, own.d); d < box.to.d; ++d)
        for (int64_t h = greatest(box.from.h, own.h); h < box.to.h; ++h)
          put_pixels(pre, p, p.conv, panel, d, h, greatest(box.from.w, own.w), sums.at(d, h, greatest(box.from.w, own.w)),
                  box.to.w - greatest(box.from.w, own.w));
    };
    if (pre && p.needs_preactivation()) save();
    activate_run(p, sums.data, sums.data, sums.pixels() * lanes);
    if (pre && !p.needs_preactivation()) save();
  } else if (keeps_activated(p)) {
    values.data = scratch.activated;
    activate_run(p, sums.data, values.data, sums.pixels() * lanes);
  }

  float* value_row = scratch.row;
  float* index_row = scratch.row + columns * lanes;
  float* pre_row = index_row + columns * lanes;
  const bool activate_last = p.pool == INTERFUSE_POOL_MAX && p.activation != INTERFUSE_NONE && monotone(p);
  for (int64_t d = out.from.d; d < out.to.d; ++d)
    for (int64_t h = out.from.h; h < out.to.h; ++h) {
      for (int64_t w = out.from.w; w < out.to.w; ++w) {
        const Window r = window_at(p, d, h, w);
        const int64_t to = (w - out.from.w) * lanes;
        for (int lane = 0; lane < lanes; lane += kLanes) {
          Vec value;
          if (p.pool == INTERFUSE_POOL_AVG) {
            value = window_mean(r, values, lane);
          } else if (!p.save) {
            value = window_maximum(r, values, lane);
          } else {
            const Winner best = window_winner(p, r, values, sums.data, lane);
            value = best.value;
            IVec place = best.place;
            if (p.activation == INTERFUSE_RELU) place = value <= zero() ? int32_t(kNoGradient) - IVec{} : place;
            store(index_row + to + lane, (Vec)place);
            store(pre_row + to + lane, best.before);
          }
          store(value_row + to + lane, value);
        }
      }
      if (activate_last) activate_run(p, value_row, value_row, columns * lanes);
      put_pixels(y, p, p.out, panel, d, h, out.from.w, value_row, columns);
      if (p.index_count()) put_pixels(a.index, p, p.out, panel, d, h, out.from.w, index_row, columns);
      if (pre && p.pool == INTERFUSE_POOL_MAX) put_pixels(pre, p, p.out, panel, d, h, out.from.w, pre_row, columns);
    }
}

// ---- a box and a panel, a few rows at a time -----------------------------------------------------------------------

struct PartsWork {
  float *sums, *activated,
      *row;  // of a part: its sums, as many again where keeps_activated(), and FinishScratch's rows
};

// convolve(sums, first) forms the sums of the pixels in sums.box from row `first` on; earlier rows are there already.
// `by_rows`: in parts of `rows` output rows, else the whole box at once.
template <class T, class Convolve>
void finish_in_parts(const ConvPool& p, const ConvPoolForward& a, const Panel& panel, const Box& out, int64_t rows,
                     bool by_rows, const PartsWork& work, Convolve&& convolve) {
  const Triple own = first_owned(p, out);
  Box part = out;
  for (int64_t d = out.from.d; d < out.to.d; d = part.to.d) {
    part.from.d = d, part.to.d = by_rows ? d + 1 : out.to.d;
    int64_t have = -1;  // rows of the convolution up to here are in the working memory
    Box before{};
    for (int64_t h = out.from.h; h < out.to.h; h = part.to.h) {
      part.from.h = h, part.to.h = by_rows ? least(out.to.h, h + rows) : out.to.h;
      const Sums sums{work.sums, conv_box(p, part), panel.lanes()};
      const Box& box = sums.box;
      // Overlapping windows: the last rows of the part before are the first of this one.
      const bool overlap = have > box.from.h;
      if (overlap) {
        const int64_t row = (box.to.w - box.from.w) * panel.lanes();
        const int64_t kept = have - box.from.h, old_rows = before.to.h - before.from.h,
                      new_rows = box.to.h - box.from.h;
        for (int64_t i = 0; i < box.to.d - box.from.d; ++i)
          memmove(work.sums + i * new_rows * row, work.sums + (i * old_rows + (box.from.h - before.from.h)) * row,
                  static_cast<size_t>(kept * row) * sizeof(float));
      }
      convolve(sums, overlap ? have : box.from.h);
      finish<T>(p, a, panel, sums, part, own, {work.row, work.activated});
      have = box.to.h;
      before = box;
    }
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
