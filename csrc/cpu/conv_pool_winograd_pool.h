// The end of a Winograd tile: bias, activation and pooling of its 16, 32 or 64 results, each a vector (over tiles or
// over filters; nothing here depends on which). Per-ISA.
#pragma once

#include "cpu/conv_pool_winograd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

enum class Finish { plain, max2x2, any };  // no pooling; the windows that everybody uses; all others

struct TileFinish {
  Activation f;
  Triple window;
  bool maximum;
  bool late;   // the activation does not decrease, so it may follow the maximum
  bool index;  // write the winner's place
  bool pre;    // write pre
  Finish kind;
};

template <Finish Kind, bool Index>
struct FinishAs {
  static constexpr Finish kind = Kind;
  static constexpr bool index = Index;
};

// Calls body(FinishAs) with what the tile wants as constants.
template <class Body>
INTERFUSE_INLINE void finish_as(const TileFinish& t, Body&& body) {
  switch (t.kind) {
    case Finish::plain: return body(FinishAs<Finish::plain, false>());
    case Finish::any: return body(FinishAs<Finish::any, false>());
    case Finish::max2x2:
      if (t.index) return body(FinishAs<Finish::max2x2, true>());
      return body(FinishAs<Finish::max2x2, false>());
  }
}

inline TileFinish tile_finish(const ConvPool& p) {
  TileFinish t;
  t.f = {p.activation, p.slope};
  t.window = p.window;
  t.maximum = p.pool == INTERFUSE_POOL_MAX;
  t.late = !p.needs_preactivation() && !(p.activation == INTERFUSE_LEAKY_RELU && p.slope < 0);
  t.index = p.index_count() > 0;
  t.pre = p.pre_count() > 0;
  t.kind = Finish::any;
  if (p.pool == INTERFUSE_POOL_NONE) t.kind = Finish::plain;
  const bool whole =
      p.out.d * p.window.d <= p.conv.d && p.out.h * p.window.h <= p.conv.h && p.out.w * p.window.w <= p.conv.w;
  if (t.maximum && t.late && whole && p.window.d <= 2 && p.window.h == 2 && p.window.w == 2) t.kind = Finish::max2x2;
  return t;
}

__attribute__((noinline)) inline Vec activate_other(Activation f, Vec z) { return activate(f, z); }
INTERFUSE_INLINE Vec activate_tile(Activation f, Vec z) {
  if (f.kind == INTERFUSE_NONE) return z;
  if (f.kind == INTERFUSE_RELU) return select(z <= zero(), zero(), z);
  return activate_other(f, z);
}

INTERFUSE_INLINE IVec splat_int(int value) { return IVec{} + value; }

struct Winner {
  Vec value;
  IVec place;
};
template <bool Index>
INTERFUSE_INLINE Winner better(Winner a, Winner b, int b_adds) {
  if constexpr (!Index) return {larger(a.value, b.value), IVec{}};
  const IVec second = b.value > a.value;
  return {larger(a.value, b.value), second ? b.place + b_adds : a.place};
}

// The maxima of one slice's four 2x2 windows, with the place inside the window.
template <bool Index>
INTERFUSE_INLINE void max2x2(const Vec* z, Winner* best) {
  unrolled<4>([&](int i) __attribute__((always_inline)) {
    const Vec* at = z + i / 2 * 2 * kTile + i % 2 * 2;
    const Winner top = better<Index>({at[0], IVec{}}, {at[1], IVec{}}, 1);
    const Winner bottom = better<Index>({at[kTile], IVec{}}, {at[kTile + 1], IVec{}}, 1);
    best[i] = better<Index>(top, bottom, 2);
  });
}

INTERFUSE_INLINE IVec index_of(const TileFinish& t, const Vec& value, IVec place) {
  return t.f.kind == INTERFUSE_RELU && t.maximum ? (IVec)(value <= zero() ? splat_int(kNoGradient) : place) : place;
}

// Any window that divides the tile, of any pooling, for `limit` valid results per axis (fewer than the tile has where
// ceil_mode lets the last window hang over). pooled, place and winner are indexed by the window: depth, height, width.
inline void pool_any(const TileFinish& t, int depth_tile, const Triple& limit, const Vec* z, Vec bias, Vec* pooled,
                     IVec* place, Vec* winner) {
  const int64_t windows_h = kTile / t.window.h, windows_w = kTile / t.window.w;
  for (int64_t d = 0; d < depth_tile / t.window.d; ++d)
    for (int64_t h = 0; h < windows_h; ++h)
      for (int64_t w = 0; w < windows_w; ++w) {
        const int64_t d1 = least(t.window.d, limit.d - d * t.window.d),
                      h1 = least(t.window.h, limit.h - h * t.window.h);
        const int64_t w1 = least(t.window.w, limit.w - w * t.window.w), at = (d * windows_h + h) * windows_w + w;
        Vec best = zero(), best_z = zero(), sum = zero();
        IVec best_place = {};
        bool first = true;
        for (int64_t i = 0; i < d1; ++i)
          for (int64_t j = 0; j < h1; ++j)
            for (int64_t l = 0; l < w1; ++l) {
              const Vec value_z =
                  z[((d * t.window.d + i) * kTile + h * t.window.h + j) * kTile + w * t.window.w + l] + bias;
              const Vec value = activate_tile(t.f, value_z);
              sum += value;
              const IVec wins = first ? ~IVec{} : (IVec)(value > best);
              best = select(wins, value, best), best_z = select(wins, value_z, best_z), first = false;
              best_place = wins ? splat_int(static_cast<int>((i * t.window.h + j) * t.window.w + l)) : best_place;
            }
        pooled[at] = t.maximum ? best : sum / splat(static_cast<float>(d1 * h1 * w1));
        if (t.index) place[at] = index_of(t, best, best_place);
        if (t.pre) winner[at] = best_z;
      }
}

// 0 where value is finite, NaN where not; sums of such keep it.
INTERFUSE_INLINE Vec finite_check(Vec value, Vec sum) { return multiply_add(value, zero(), sum); }

// Is one of the first n lanes NaN?
INTERFUSE_INLINE bool any_nan(Vec v, int n) {
#if defined(__AVX512F__)
  return (_mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) & ((1u << n) - 1u)) != 0;
#else
  bool any = false;
  for (int i = 0; i < n; ++i) any |= v[i] != v[i];
  return any;
#endif
}

// ---- a vector of tiles to its outputs ------------------------------------------------------------------------------
//
// Target is the layout: call, t (TileFinish), run (the tile, or the row of tiles, under the vector), and
//   store_values(tensor, size, per, d, h, v): v holds row (d, h) of a tile's `per` elements, for a tensor of `size`
//   store_index(per, d, h, v): the same for the index

template <class Target>
INTERFUSE_INLINE void finish_plain(const Target& target, int64_t d, const Vec* z, Vec bias) {
  const Triple per{target.call.plan.depth_tile, kTile, kTile};
  for (int h = 0; h < kTile; ++h) {
    Vec before[kTile], after[kTile];
    for (int w = 0; w < kTile; ++w)
      before[w] = z[h * kTile + w] + bias, after[w] = activate_tile(target.t.f, before[w]);
    target.store_values(target.call.a.y, target.call.p.out, per, d, h, after);
    if (target.t.pre) target.store_values(target.call.a.pre, target.call.p.out, per, d, h, before);
  }
}

template <bool Index, class Target>
INTERFUSE_INLINE void finish_max2x2(const Target& target, int64_t d, const Winner* best, Vec bias) {
  const Triple per{target.call.plan.depth_tile / target.call.p.window.d, kTile / 2, kTile / 2};
  for (int h = 0; h < kTile / 2; ++h) {
    Vec value[2];
    IVec place[2];
    for (int w = 0; w < 2; ++w) {
      value[w] = activate_tile(target.t.f, best[h * 2 + w].value + bias);
      if constexpr (Index) place[w] = index_of(target.t, value[w], best[h * 2 + w].place);
    }
    target.store_values(target.call.a.y, target.call.p.out, per, d, h, value);
    if constexpr (Index) target.store_index(per, d, h, place);
  }
}

template <class Target>
__attribute__((noinline)) void finish_any(const Target& target, const Vec* z, Vec bias) {
  const ConvPool& p = target.call.p;
  const int depth = target.call.plan.depth_tile;
  const Triple per{depth / p.window.d, kTile / p.window.h, kTile / p.window.w}, whole{depth, kTile, kTile};
  const TileRun& run = target.run;
  // A tile that hangs over the end is alone in its vector.
  const Triple limit{least(depth, p.conv.d - run.d * depth), least(kTile, p.conv.h - run.h * kTile),
                     run.count > 1 ? kTile : least(kTile, p.conv.w - run.w * kTile)};
  Vec pooled[kPlane * 2], winner[kPlane * 2];
  IVec place[kPlane * 2];
  pool_any(target.t, depth, limit, z, bias, pooled, place, winner);
  for (int64_t d = 0; d < per.d; ++d)
    for (int64_t h = 0; h < per.h; ++h) {
      const int64_t at = (d * per.h + h) * per.w;
      target.store_values(target.call.a.y, p.out, per, d, h, pooled + at);
      if (target.t.index) target.store_index(per, d, h, place + at);
      if (target.t.pre && target.t.maximum) target.store_values(target.call.a.pre, p.out, per, d, h, winner + at);
    }
  if (!target.t.pre || target.t.maximum) return;
  for (int64_t d = 0; d < depth; ++d)
    for (int64_t h = 0; h < kTile; ++h) {
      Vec values[kTile];
      for (int w = 0; w < kTile; ++w) {
        const Vec value = z[(d * kTile + h) * kTile + w] + bias;
        values[w] = p.needs_preactivation() ? value : activate_tile(target.t.f, value);
      }
      target.store_values(target.call.a.pre, p.conv, whole, d, h, values);
    }
}

// 36 points of one slice to its 16 results; adds to the check for values that are not finite.
template <class Source>
INTERFUSE_INLINE Vec results_of_slice(Source&& source, Vec* z, Vec check) {
  Vec columns[kTile][kTileIn];
  unrolled<kTileIn>([&](int v) __attribute__((always_inline)) {
    Vec t[kTileIn], y[kTile];
    unrolled<kTileIn>([&](int r) __attribute__((always_inline)) { t[r] = source(r * kTileIn + v); });
    Winograd4::output(t, y);
    unrolled<kTile>([&](int r) __attribute__((always_inline)) { columns[r][v] = y[r]; });
  });
  unrolled<kTile>([&](int r) __attribute__((always_inline)) {
    Winograd4::output(columns[r], z + r * kTile);
    unrolled<kTile>([&](int v) __attribute__((always_inline)) { check = finite_check(z[r * kTile + v], check); });
  });
  return check;
}

// product points to the first point's vector; the planes of the points are `plane` floats apart.
template <class Axis, Finish Kind, bool Index, class Target>
INTERFUSE_INLINE Vec finish_vector(const Target& target, const float* product, int64_t plane, Vec bias, Vec check) {
  constexpr int depth = Axis::outputs;
  Vec slices[depth > 1 ? depth : 1][kPlane];
  if constexpr (depth > 1)
    for (int i = 0; i < kPlane; ++i) {
      Vec t[Axis::points], y[depth];
      unrolled<Axis::points>([&](int s)
                                 __attribute__((always_inline)) { t[s] = load(product + (s * kPlane + i) * plane); });
      Axis::output(t, y);
      unrolled<depth>([&](int s) __attribute__((always_inline)) { slices[s][i] = y[s]; });
    }
  const auto results = [&](int s, Vec* z) __attribute__((always_inline)) {
    check = results_of_slice(
        [&](int i) __attribute__((always_inline)) { return depth > 1 ? slices[s][i] : load(product + i * plane); }, z,
        check);
  };
  if constexpr (Kind == Finish::any) {
    Vec z[depth * kTile * kTile];
    for (int s = 0; s < depth; ++s) results(s, z + s * kTile * kTile);
    finish_any(target, z, bias);
  } else if constexpr (Kind == Finish::plain) {
    for (int s = 0; s < depth; ++s) {
      Vec z[kTile * kTile];
      results(s, z);
      finish_plain(target, s, z, bias);
    }
  } else {
    Winner best[depth][4];
    for (int s = 0; s < depth; ++s) {
      Vec z[kTile * kTile];
      results(s, z);
      max2x2<Index>(z, best[s]);
    }
    if (depth > 1 && target.call.p.window.d == 2) {
      for (int s = 0; s + 1 < depth; s += 2) {
        for (int i = 0; i < 4; ++i) best[s][i] = better<Index>(best[s][i], best[s + 1][i], 4);
        finish_max2x2<Index>(target, s / 2, best[s], bias);
      }
    } else {
      for (int s = 0; s < depth; ++s) finish_max2x2<Index>(target, s, best[s], bias);
    }
  }
  return check;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
