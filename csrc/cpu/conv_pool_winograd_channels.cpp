// Winograd convolution with pooling for channels-last tensors: vectors run along the channels. Compiled once per ISA.
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/conv_pool_winograd.h"
#include "cpu/conv_pool_winograd_pool.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// ---- the weight: packed[group][chunk][point][channel slice][panel][channel][filter of the panel] ------------------

template <class Axis, class T>
void pack_weight(const ConvPool& p, const WinogradPlan& plan, const void* weight, float* packed, int thread,
                 int threads) {
  constexpr int taps = Axis::taps * 9, points = Axis::points * kPlane;
  const int64_t vectors = divide_up(plan.filters, kLanes);
  const Range mine = share(p.groups * vectors, thread, threads);
  for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
    const int64_t group = unit / vectors, filter = unit % vectors * kLanes, chunk = filter / plan.chunk;
    const int64_t in_chunk = filter % plan.chunk, width = chunk_filters(plan, chunk, kLanes);
    const int64_t panel = in_chunk / plan.panel * plan.panel, panel_width = least(plan.panel, width - panel);
    float* out = packed + group * plan.weight_group() + chunk * plan.weight_chunk();
    const int64_t valid = least(kLanes, plan.filters - filter);
    for (int64_t c = 0; c < plan.channels; ++c) {
      Vec taken[taps] = {}, made[points];
      for (int64_t r = 0; r < valid; ++r) {
        const T* from =
            static_cast<const T*>(weight) + (group * plan.filters + filter + r) * plan.channels * taps + c * p.ws.c;
        for (int i = 0; i < taps; ++i) reinterpret_cast<float*>(taken + i)[r] = to_float(from[i * p.ws.tap]);
      }
      weight_tile<Axis>(taken, made, 1);
      const int64_t slice = c / plan.slice_depth() * plan.slice_depth(),
                    depth = least(plan.slice_depth(), plan.channels - slice);
      float* to = out + slice * width + panel * depth + (c - slice) * panel_width + in_chunk - panel;
      for (int i = 0; i < points; ++i, to += width * plan.channels) store(to, made[i]);
    }
  }
}

// ---- the data -----------------------------------------------------------------------------------------------------

// The pixels under a tile: where each one's channels start. Outside the image they are all zero.
template <class Axis, class T>
struct Pixels {
  const T* at[Axis::points * kPlane];

  Pixels(const ConvPool& p, const WinogradPlan& plan, const T* x, const TileRun& tile, const T* zeros) {
    const int64_t d = tile.d * plan.depth_tile - p.pad_lo.d, h = tile.h * kTile - p.pad_lo.h,
                  w = tile.w * kTile - p.pad_lo.w;
    const T** to = at;
    for (int64_t i = d; i < d + Axis::points; ++i)
      for (int64_t j = h; j < h + kTileIn; ++j)
        for (int64_t l = w; l < w + kTileIn; ++l) {
          const bool inside = i >= 0 && i < p.in.d && j >= 0 && j < p.in.h && l >= 0 && l < p.in.w;
          *to++ = inside ? x + (tile.n * p.xs.n + i * p.xs.d + j * p.xs.h + l * p.xs.w) : zeros;
        }
  }
};

template <class Axis, class T, class Load>
INTERFUSE_INLINE void transform_vector(const Pixels<Axis, T>& pixels, int64_t c, int64_t plane, float* to,
                                       Load&& load_some) {
  if constexpr (Axis::points == 1) {
    data_slice([&](int i) __attribute__((always_inline)) { return load_some(pixels.at[i] + c); },
               [&](int point, Vec v) __attribute__((always_inline)) { store(to + point * plane, v); });
  } else {
    Vec slices[Axis::points][kPlane];
    for (int i = 0; i < kPlane; ++i) {
      Vec d[Axis::points], t[Axis::points];
      unrolled<Axis::points>([&](int s)
                                 __attribute__((always_inline)) { d[s] = load_some(pixels.at[s * kPlane + i] + c); });
      Axis::data(d, t);
      unrolled<Axis::points>([&](int s) __attribute__((always_inline)) { slices[s][i] = t[s]; });
    }
    for (int s = 0; s < Axis::points; ++s)
      data_slice([&](int i) __attribute__((always_inline)) { return slices[s][i]; },
                 [&](int point, Vec v) __attribute__((always_inline)) { store(to + (s * kPlane + point) * plane, v); });
  }
}

template <class Axis, class T>
void transform_data(const WinogradCall& call, int64_t group, int64_t tile, int64_t count, int64_t first, int64_t last,
                    float* data) {
  const ConvPool& p = call.p;
  const WinogradPlan& plan = call.plan;
  const T* x = static_cast<const T*>(call.a.x) + group * plan.channels * p.xs.c;
  T* zeros = static_cast<T*>(scratch(Slot::rows, static_cast<size_t>(plan.channels) * sizeof(T)));
  memset(zeros, 0, static_cast<size_t>(plan.channels) * sizeof(T));
  TileRun place = tile_place(plan, tile);
  for (int64_t i = 0; i < count; ++i) {
    const Pixels<Axis, T> pixels(p, plan, x, place, zeros);
    float* to = data + i * plan.data_row;
    int64_t c = first;
    for (; c + kLanes <= last; c += kLanes)
      transform_vector<Axis>(
          pixels, c, plan.data_plane, to + c, [](const T* from) __attribute__((always_inline)) { return load(from); });
    if (c < last) {
      const int rest = static_cast<int>(last - c);
      transform_vector<Axis>(pixels, c, plan.data_plane, to + c,
                             [&](const T* from) __attribute__((always_inline)) { return load_first(from, rest); });
    }
    if (++place.w == plan.tiles.w) next_row(plan, place);
  }
}

// ---- the products -------------------------------------------------------------------------------------------------

template <int Rows, int Vectors>
__attribute__((noinline)) void multiply_tile(int64_t depth, const float* data, int64_t data_row, const float* weight,
                                             float* product, int64_t product_row, bool add) {
  if (add)
    gemm_tile_store<Rows, Vectors, true>(depth, data, data_row, 1, weight, Vectors * kLanes, product, product_row);
  else gemm_tile_store<Rows, Vectors, false>(depth, data, data_row, 1, weight, Vectors * kLanes, product, product_row);
}

// The last rows take the smallest register tile that holds them; nothing reads the products of those behind the last.
template <int Vectors>
void multiply_vectors(int64_t count, int64_t depth, const float* data, int64_t data_row, const float* weight,
                      float* product, int64_t product_row, bool add) {
  constexpr int rows = gemm_tile_rows(Vectors), half = (rows + 1) / 2, quarter = (rows + 3) / 4;
  for (int64_t t = 0; t < count;) {
    const int64_t left = count - t;
    const int taken = left > half ? rows : left > quarter ? half : quarter;
    const auto tile = taken == rows   ? multiply_tile<rows, Vectors>
                      : taken == half ? multiply_tile<half, Vectors>
                                      : multiply_tile<quarter, Vectors>;
    tile(depth, data + t * data_row, data_row, weight, product + t * product_row, product_row, add);
    t += taken;
  }
}

void multiply(const WinogradPlan& plan, int64_t width, int64_t count, const float* weight, const float* data,
              float* product) {
  for (int point = 0; point < plan.points; ++point, data += plan.data_plane, product += plan.product_plane)
    for (int64_t c = 0; c < plan.channels; c += plan.slice_depth()) {
      const int64_t depth = least(plan.slice_depth(), plan.channels - c);
      for (int64_t panel = 0; panel < width;) {
        const int64_t taken = least(plan.panel, width - panel);
        multiply_panel(taken / kLanes, count, depth, data + c, plan.data_row, weight, product + panel, plan.product_row,
                       c > 0);
        weight += taken * depth;
        panel += taken;
      }
    }
}

// ---- the outputs --------------------------------------------------------------------------------------------------

// A vector of filters under one tile.
template <class T>
struct ChannelTarget {
  const WinogradCall& call;
  const TileFinish& t;
  const TileRun& run;
  int64_t filter;  // the first, among all groups
  int lanes;       // how many there are

  // Calls body(place of the first filter, i) for the elements of row (d, h) that are inside.
  template <class Body>
  INTERFUSE_INLINE void each(const Triple& size, const Triple& per, int64_t d, int64_t h, Body&& body) const {
    const int64_t at_d = run.d * per.d + d, at_h = run.h * per.h + h, at_w = run.w * per.w;
    if (at_d >= size.d || at_h >= size.h) return;
    const int64_t pixel = ((run.n * size.d + at_d) * size.h + at_h) * size.w + at_w, n = least(per.w, size.w - at_w);
    for (int64_t i = 0; i < n; ++i) body((pixel + i) * call.p.out_channels + filter, i);
  }
  INTERFUSE_INLINE void store_values(void* to, const Triple& size, const Triple& per, int64_t d, int64_t h,
                                     Vec* v) const {
    each(size, per, d, h, [&](int64_t place, int64_t i) __attribute__((always_inline)) {
      if (lanes == kLanes) store(static_cast<T*>(to) + place, v[i]);
      else store_first(static_cast<T*>(to) + place, v[i], lanes);
    });
  }
  INTERFUSE_INLINE void store_index(const Triple& per, int64_t d, int64_t h, IVec* v) const {
    each(call.p.out, per, d, h, [&](int64_t place, int64_t i) __attribute__((always_inline)) {
      store_bytes(call.a.index + place, v[i], lanes);
    });
  }
};

template <class Axis, class T, Finish Kind, bool Index>
void finish_tiles(const WinogradCall& call, const TileFinish& t, int64_t tile, int64_t count, int64_t filter,
                  int64_t filters, const float* product) {
  const WinogradPlan& plan = call.plan;
  TileRun place = tile_place(plan, tile);
  place.count = 1;
  for (int64_t i = 0; i < count; ++i) {
    Vec check = zero();
    for (int64_t k = 0; k < filters; k += kLanes) {
      const int lanes = static_cast<int>(least(kLanes, filters - k));
      const Vec bias = call.a.bias ? load_first(static_cast<const T*>(call.a.bias) + filter + k, lanes) : zero();
      const ChannelTarget<T> target{call, t, place, filter + k, lanes};
      check =
          finish_vector<Axis, Kind, Index>(target, product + i * plan.product_row + k, plan.product_plane, bias, check);
    }
    if (any_nan(check, kLanes)) call.mark_broken(place.n);
    if (++place.w == plan.tiles.w) next_row(plan, place);
  }
}

template <class Axis, class T>
void finish_chunk(const WinogradCall& call, int64_t group, int64_t tile, int64_t count, int64_t chunk,
                  const float* data, float* product) {
  const WinogradPlan& plan = call.plan;
  multiply(plan, chunk_filters(plan, chunk, kLanes), count,
           call.weight + group * plan.weight_group() + chunk * plan.weight_chunk(), data, product);
  const TileFinish t = tile_finish(call.p);
  const int64_t filter = chunk * plan.chunk, filters = least(plan.chunk, plan.filters - filter),
                at = group * plan.filters + filter;
  finish_as(t, [&](auto as) __attribute__((always_inline)) {
    finish_tiles<Axis, T, decltype(as)::kind, decltype(as)::index>(call, t, tile, count, at, filters, product);
  });
}

struct Channels {
  template <class Axis, class T>
  static constexpr WinogradKernel of = {pack_weight<Axis, T>, transform_data<Axis, T>, finish_chunk<Axis, T>};
};

}  // namespace

void multiply_panel(int64_t vectors, int64_t count, int64_t depth, const float* data, int64_t data_row,
                    const float* weight, float* product, int64_t product_row, bool add) {
  const auto all = vectors == 4   ? multiply_vectors<4>
                   : vectors == 3 ? multiply_vectors<3>
                   : vectors == 2 ? multiply_vectors<2>
                                  : multiply_vectors<1>;
  all(count, depth, data, data_row, weight, product, product_row, add);
}

const WinogradKernel* winograd_channels(bool bf16, int depth_tile) {
  return winograd_kernel<Channels>(bf16, depth_tile);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
