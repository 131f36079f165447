// From the convolution's sums to what is stored: pooling, activation, the saved index and values, and the layout.
// Per-ISA (see common/simd.h).
#pragma once

#include "common/activation.h"
#include "common/conv_pool.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "cpu/conv_pool_windows.h"

namespace interfuse {
namespace INTERFUSE_ISA {

struct Box {
  Triple from, to;  // half-open
  Triple size() const { return {to.d - from.d, to.h - from.h, to.w - from.w}; }
};

// Some output channels of one image: `vectors` vectors of them lie side by side in every pixel of the working
// memory, of which the first `channels` lanes are real.
struct Panel {
  int64_t image, first;
  int vectors, channels;
  int lanes() const { return vectors * kLanes; }
};

// Pooling before activating is the same and cheaper where the activation never decreases.
INTERFUSE_INLINE bool monotone(const ConvPool& p) {
  if (p.activation == INTERFUSE_LEAKY_RELU) return p.slope > 0;
  return !p.needs_preactivation();
}

// ---- one row of pixels into a dense tensor ---------------------------------------------------------------------

INTERFUSE_INLINE void store_bytes(uint8_t* to, Vec integers, int count) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Bytes bytes = __builtin_convertvector((IVec)integers, Bytes);
  if (count == kLanes)
    memcpy(to, &bytes, kLanes);
  else
    memcpy(to, &bytes, static_cast<size_t>(count));
}
INTERFUSE_INLINE void store_some(float* to, Vec v, int count) { count == kLanes ? store(to, v) : store_first(to, v, count); }
INTERFUSE_INLINE void store_some(uint16_t* to, Vec v, int count) { count == kLanes ? store(to, v) : store_first(to, v, count); }
// The index travels as integers in float lanes.
INTERFUSE_INLINE void store_some(uint8_t* to, Vec v, int count) { store_bytes(to, v, count); }

// row[pixel][lane] goes to pixels (d, h, w...) of a dense tensor of `size`.
template <class T>
void put_row(T* tensor, const ConvPool& p, const Triple& size, const Panel& panel, int64_t d, int64_t h, int64_t w,
             const float* row, int64_t pixels) {
  const int lanes = panel.lanes();
  T* to = tensor + dense_offset(p.channels_last, p.out_channels, size, panel.image, panel.first, d, h, w);
  if (p.channels_last) {
    for (int64_t i = 0; i < pixels; ++i, to += p.out_channels, row += lanes)
      for (int v = 0; v < panel.vectors; ++v)
        store_some(to + v * kLanes, load(row + v * kLanes), static_cast<int>(least(kLanes, panel.channels - v * kLanes)));
    return;
  }
  const int64_t plane = size.volume();
  for (int v = 0; v < panel.vectors; ++v) {
    const int channels = static_cast<int>(least(kLanes, panel.channels - v * kLanes));
    for (int64_t i = 0; i < pixels; i += kLanes) {
      const int count = static_cast<int>(least(kLanes, pixels - i));
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) block[j] = j < count ? load(row + (i + j) * lanes + v * kLanes) : zero();
      transpose(block);
      T* at = to + v * kLanes * plane + i;
      if (count == kLanes && channels == kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store_some(at + j * plane, block[j], kLanes);
      } else {
        for (int j = 0; j < channels; ++j) store_some(at + j * plane, block[j], count);
      }
    }
  }
}

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

INTERFUSE_INLINE Winner window_winner(const ConvPool& p, const Window& r, const Sums& values, const float* before, int lane) {
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

INTERFUSE_INLINE bool keeps_activated(const ConvPool& p) { return p.pool == INTERFUSE_POOL_MAX && !monotone(p); }

// `own`: the first pixel of the convolution that no earlier box has written where `pre` has its resolution.
template <class T>
void finish(const ConvPool& p, const ConvPoolForward& a, const Panel& panel, const Sums& sums, const Box& out,
            const Triple& own, const FinishScratch& scratch) {
  const Activation f{p.activation, p.slope};
  T* y = static_cast<T*>(a.y);
  T* pre = p.pre_count() ? static_cast<T*>(a.pre) : nullptr;
  const int lanes = panel.lanes();
  const int64_t columns = out.to.w - out.from.w;

  if (p.pool == INTERFUSE_POOL_NONE) {
    for (int64_t d = out.from.d; d < out.to.d; ++d)
      for (int64_t h = out.from.h; h < out.to.h; ++h) {
        float* row = sums.at(d, h, out.from.w);
        if (pre) put_row(pre, p, p.out, panel, d, h, out.from.w, row, columns);
        if (p.activation != INTERFUSE_NONE)
          for (int64_t i = 0; i < columns * lanes; i += kLanes) store(row + i, activate(f, load(row + i)));
        put_row(y, p, p.out, panel, d, h, out.from.w, row, columns);
      }
    return;
  }

  Sums values = sums;
  if (p.pool == INTERFUSE_POOL_AVG && p.activation != INTERFUSE_NONE) {
    const Box& box = sums.box;
    auto save = [&] {
      for (int64_t d = most(box.from.d, own.d); d < box.to.d; ++d)
        for (int64_t h = most(box.from.h, own.h); h < box.to.h; ++h)
          put_row(pre, p, p.conv, panel, d, h, most(box.from.w, own.w), sums.at(d, h, most(box.from.w, own.w)),
                  box.to.w - most(box.from.w, own.w));
    };
    if (pre && p.needs_preactivation()) save();
    for (int64_t i = 0; i < sums.pixels() * lanes; i += kLanes) store(sums.data + i, activate(f, load(sums.data + i)));
    if (pre && !p.needs_preactivation()) save();
  } else if (keeps_activated(p)) {
    values.data = scratch.activated;
    for (int64_t i = 0; i < sums.pixels() * lanes; i += kLanes) store(values.data + i, activate(f, load(sums.data + i)));
  }

  float* value_row = scratch.row;
  float* index_row = scratch.row + columns * lanes;
  float* pre_row = index_row + columns * lanes;
  const bool activate_last = p.pool == INTERFUSE_POOL_MAX && monotone(p);
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
          store(value_row + to + lane, activate_last ? activate(f, value) : value);
        }
      }
      put_row(y, p, p.out, panel, d, h, out.from.w, value_row, columns);
      if (p.index_count()) put_row(a.index, p, p.out, panel, d, h, out.from.w, index_row, columns);
      if (pre && p.pool == INTERFUSE_POOL_MAX) put_row(pre, p, p.out, panel, d, h, out.from.w, pre_row, columns);
    }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
