// Winograd convolution with pooling for contiguous tensors: vectors run along the tiles of a row. Compiled once per
// ISA.
#include "common/parallel.h"
#include "common/shuffle.h"
#include "cpu/conv_pool_winograd.h"
#include "cpu/conv_pool_winograd_pool.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int kWindowVectors = 5;  // a vector of tiles reads 4 * kLanes + 2 columns

// ---- the weight: packed[group][chunk][point][channel slice][filter row block][channel][row] -----------------------

template <class Axis, class T>
void pack_weight(const ConvPool& p, const WinogradPlan& plan, const void* weight, float* packed, int thread,
                 int threads) {
  constexpr int taps = Axis::taps * 9, points = Axis::points * kPlane;
  const int64_t blocks = divide_up(plan.filters, kFilterRows);
  const Range mine = share(p.groups * blocks, thread, threads);
  for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
    const int64_t group = unit / blocks, filter = unit % blocks * kFilterRows, chunk = filter / plan.chunk;
    const int64_t in_chunk = filter % plan.chunk, rows = chunk_filters(plan, chunk, kFilterRows);
    float* out = packed + group * plan.weight_group() + chunk * plan.weight_chunk();
    const int64_t valid = least(kFilterRows, plan.filters - filter);
    for (int64_t c = 0; c < plan.channels; ++c) {
      float taken[taps][kFilterRows] = {}, made[points][kFilterRows];
      for (int64_t r = 0; r < valid; ++r) {
        const T* from =
            static_cast<const T*>(weight) + (group * plan.filters + filter + r) * plan.channels * taps + c * p.ws.c;
        for (int i = 0; i < taps; ++i) taken[i][r] = to_float(from[i * p.ws.tap]);
      }
      for (int r = 0; r < kFilterRows; ++r) weight_tile<Axis>(&taken[0][r], &made[0][r], kFilterRows);
      const int64_t slice = c / plan.slice_depth() * plan.slice_depth(),
                    depth = least(plan.slice_depth(), plan.channels - slice);
      float* to = out + slice * rows + (in_chunk / kFilterRows * depth + c - slice) * kFilterRows;
      for (int i = 0; i < points; ++i, to += rows * plan.channels) memcpy(to, made[i], sizeof made[i]);
    }
  }
}

// ---- the data -----------------------------------------------------------------------------------------------------

// The input under one run of tiles, of one channel: rows of columns, zero outside the image.
template <class T>
class Window {
 public:
  Window() = default;
  Window(const ConvPool& p, const WinogradPlan& plan, const TileRun& run) {
    const int64_t d = run.d * plan.depth_tile - p.pad_lo.d, h = run.h * kTile - p.pad_lo.h,
                  w = run.w * kTile - p.pad_lo.w;
    offset_ = run.n * p.xs.n + d * p.xs.d + h * p.xs.h + w;
    slice_ = p.xs.d, row_ = p.xs.h;
    for (int i = 0; i < plan.depth_points; ++i) slices_ |= (d + i >= 0 && d + i < p.in.d) << i;
    for (int i = 0; i < kTileIn; ++i) rows_ |= (h + i >= 0 && h + i < p.in.h) << i;
    all_ = slices_ == (1u << plan.depth_points) - 1 && rows_ == (1u << kTileIn) - 1;
    for (int v = 0; v < kWindowVectors; ++v) {
      const int64_t needed = v < 4 ? kLanes : kTileIn - kTile;  // of the last vector
      const int64_t low = -(w + v * kLanes), high = p.in.w - (w + v * kLanes);
      first_[v] = static_cast<int>(low < 0 ? 0 : least(low, kLanes));
      last_[v] = static_cast<int>(high < 0 ? 0 : least(high, needed));
    }
  }
  bool all_inside() const { return all_; }

  // Vector v of row r of slice s, in the channel that starts at x. Whole: all rows and slices are inside the image.
  template <bool Whole>
  INTERFUSE_INLINE Vec load_part(const T* x, int s, int r, int v) const {
    const bool inside = Whole || ((slices_ >> s & 1) && (rows_ >> r & 1));
    const T* from = x + (offset_ + s * slice_ + r * row_ + v * kLanes);
#if defined(__AVX512F__)
    const unsigned lanes = ((1u << last_[v]) - 1u) & ~((1u << first_[v]) - 1u);
    return load_masked(from, static_cast<__mmask16>(inside ? lanes : 0));
#else
    if (!inside || first_[v] >= last_[v]) return zero();
    if (first_[v] == 0 && last_[v] == kLanes) return load(from);
    float lanes[kLanes] = {};
    for (int i = first_[v]; i < last_[v]; ++i) lanes[i] = to_float(from[i]);
    return load(lanes);
#endif
  }

 private:
#if defined(__AVX512F__)
  static INTERFUSE_INLINE Vec load_masked(const float* p, __mmask16 lanes) {
    return (Vec)_mm512_maskz_loadu_ps(lanes, p);
  }
  static INTERFUSE_INLINE Vec load_masked(const uint16_t* p, __mmask16 lanes) {
    return (Vec)((IVec)_mm512_maskz_cvtepu16_epi32(lanes, _mm256_maskz_loadu_epi16(lanes, p)) << 16);
  }
#endif
  int64_t offset_ = 0, slice_ = 0, row_ = 0;
  unsigned slices_ = 0, rows_ = 0;
  bool all_ = false;
  int first_[kWindowVectors] = {}, last_[kWindowVectors] = {};
};

// One slice: 6 rows of columns to 36 points. source(r, v) gives vector v of row r, sink(point, vector) takes.
template <class Source, class Sink>
INTERFUSE_INLINE void transform_slice(Source&& source, Sink&& sink) {
  Vec rows[kTileIn][kWindowVectors];
  unrolled<kWindowVectors>([&](int v) __attribute__((always_inline)) {
    Vec d[kTileIn], t[kTileIn];
    unrolled<kTileIn>([&](int r) __attribute__((always_inline)) { d[r] = source(r, v); });
    Winograd4::data(d, t);
    unrolled<kTileIn>([&](int r) __attribute__((always_inline)) { rows[r][v] = t[r]; });
  });
  for (int r = 0; r < kTileIn; ++r) {
    Vec d[kTileIn], t[kTileIn];
    deinterleave4(rows[r], d);
    d[4] = shift_in<0>(d[0], rows[r][4]);
    d[5] = shift_in<1>(d[1], rows[r][4]);
    Winograd4::data(d, t);
    unrolled<kTileIn>([&](int i) __attribute__((always_inline)) { sink(r * kTileIn + i, t[i]); });
  }
}

template <class Axis, class T, bool Whole>
INTERFUSE_INLINE void transform_run(const Window<T>& window, const T* x, int64_t plane, float* to, int lanes) {
  const auto put_point = [&](int point, Vec v) __attribute__((always_inline)) {
    if (lanes == kLanes) store(to + point * plane, v);
    else store_first(to + point * plane, v, lanes);
  };
  if constexpr (Axis::points == 1) {
    transform_slice(
        [&](int r, int v) __attribute__((always_inline)) { return window.template load_part<Whole>(x, 0, r, v); },
        put_point);
  } else {
    Vec slices[Axis::points][kTileIn][kWindowVectors];
    for (int r = 0; r < kTileIn; ++r)
      for (int v = 0; v < kWindowVectors; ++v) {
        Vec d[Axis::points], t[Axis::points];
        unrolled<Axis::points>([&](int s) __attribute__((always_inline)) {
          d[s] = window.template load_part<Whole>(x, s, r, v);
        });
        Axis::data(d, t);
        unrolled<Axis::points>([&](int s) __attribute__((always_inline)) { slices[s][r][v] = t[s]; });
      }
    for (int s = 0; s < Axis::points; ++s)
      transform_slice([&](int r, int v) __attribute__((always_inline)) { return slices[s][r][v]; },
                      [&](int point, Vec v) __attribute__((always_inline)) { put_point(s * kPlane + point, v); });
  }
}

// Cuts tiles tile..tile + count into runs. With alone, the last tile of a row is a run of its own.
int cut(const WinogradPlan& plan, int64_t tile, int64_t count, bool alone, TileRun* runs) {
  TileRun place = tile_place(plan, tile);
  int made = 0;
  for (int64_t at = 0; at < count;) {
    int64_t length = least(least(count - at, plan.tiles.w - place.w), kLanes);
    if (alone && length > 1 && place.w + length == plan.tiles.w) --length;
    runs[made] = place, runs[made].at = static_cast<int>(at), runs[made].count = static_cast<int>(length), ++made;
    at += length, place.w += length;
    if (place.w == plan.tiles.w) next_row(plan, place);
  }
  return made;
}

template <class Axis, class T>
void transform_data(const WinogradCall& call, int64_t group, int64_t tile, int64_t count, int64_t first, int64_t last,
                    float* data) {
  const ConvPool& p = call.p;
  const WinogradPlan& plan = call.plan;
  TileRun runs[kMostBlock];
  Window<T> windows[kMostBlock];
  const int cuts = cut(plan, tile, count, false, runs);
  for (int i = 0; i < cuts; ++i) windows[i] = Window<T>(p, plan, runs[i]);
  const int64_t padded = round_up(count, kLanes);
  const T* x = static_cast<const T*>(call.a.x) + group * plan.channels * p.xs.c;
  for (int64_t c = first; c < last; ++c) {
    float* row = data + c * plan.data_row;
    // The product is taken of whole vectors: what stands behind the last tile must not be slow or infinite.
    if (count < padded)
      for (int i = 0; i < plan.points; ++i) store(row + i * plan.data_plane + padded - kLanes, zero());
    for (int i = 0; i < cuts; ++i) {
      // A run's vector reaches into the next run's place, which is written after it; only the last must stop.
      const int lanes = static_cast<int>(least(kLanes, padded - runs[i].at));
      float* to = row + runs[i].at;
      if (windows[i].all_inside()) transform_run<Axis, T, true>(windows[i], x + c * p.xs.c, plan.data_plane, to, lanes);
      else transform_run<Axis, T, false>(windows[i], x + c * p.xs.c, plan.data_plane, to, lanes);
    }
  }
}

// ---- the products -------------------------------------------------------------------------------------------------

template <int Vectors>
__attribute__((noinline)) void multiply_tile(int64_t depth, const float* weight, const float* data, int64_t data_row,
                                             float* product, int64_t product_row, bool add) {
  if (add)
    gemm_tile_store<kFilterRows, Vectors, true>(depth, weight, 1, kFilterRows, data, data_row, product, product_row);
  else
    gemm_tile_store<kFilterRows, Vectors, false>(depth, weight, 1, kFilterRows, data, data_row, product, product_row);
}

void multiply(const WinogradPlan& plan, int64_t rows, int64_t vectors, const float* weight, const float* data,
              float* product) {
  for (int point = 0; point < plan.points; ++point, data += plan.data_plane, product += plan.product_plane)
    for (int64_t c = 0; c < plan.channels; c += plan.slice_depth()) {
      const int64_t depth = least(plan.slice_depth(), plan.channels - c);
      for (int64_t v = 0; v < vectors;) {
        const int64_t left = vectors - v,
                      taken = left == kTileVectors + 1 ? kTileVectors - 1 : least(left, kTileVectors);
        const auto tile = taken == 3 ? multiply_tile<kTileVectors> : taken == 2 ? multiply_tile<2> : multiply_tile<1>;
        for (int64_t r = 0; r < rows; r += kFilterRows)
          tile(depth, weight + r * depth, data + c * plan.data_row + v * kLanes, plan.data_row,
               product + r * plan.product_row + v * kLanes, plan.product_row, c > 0);
        v += taken;
      }
      weight += rows * depth;
    }
}

// ---- the outputs --------------------------------------------------------------------------------------------------

// The first n of `count` interleaved vectors' elements.
template <class T>
INTERFUSE_INLINE void store_row(T* to, Vec* v, int count, int64_t n) {
  interleave(v, count);
  for (int i = 0; i < count && n > 0; ++i, n -= kLanes) {
    if (n >= kLanes) store(to + i * kLanes, v[i]);
    else store_first(to + i * kLanes, v[i], static_cast<int>(n));
  }
}
INTERFUSE_INLINE void store_index_row(uint8_t* to, IVec* v, int count, int64_t n) {
  interleave(v, count);
  for (int i = 0; i < count && n > 0; ++i, n -= kLanes)
    store_bytes(to + i * kLanes, v[i], static_cast<int>(least(n, kLanes)));
}

// One filter's outputs under a run of tiles.
template <class T>
struct RowTarget {
  const WinogradCall& call;
  const TileFinish& t;
  const TileRun& run;
  int64_t filter;  // among all groups

  // The place of the run's part of row (d, h), and how many elements of it there are; none where it is outside.
  INTERFUSE_INLINE int64_t place(const Triple& size, const Triple& per, int64_t d, int64_t h, int64_t* n) const {
    const int64_t at_d = run.d * per.d + d, at_h = run.h * per.h + h, at_w = run.w * per.w;
    *n = at_d < size.d && at_h < size.h ? least(run.count * per.w, size.w - at_w) : 0;
    return (((run.n * call.p.out_channels + filter) * size.d + at_d) * size.h + at_h) * size.w + at_w;
  }
  INTERFUSE_INLINE void store_values(void* to, const Triple& size, const Triple& per, int64_t d, int64_t h,
                                     Vec* v) const {
    int64_t n;
    const int64_t at = place(size, per, d, h, &n);
    store_row(static_cast<T*>(to) + at, v, static_cast<int>(per.w), n);
  }
  INTERFUSE_INLINE void store_index(const Triple& per, int64_t d, int64_t h, IVec* v) const {
    int64_t n;
    const int64_t at = place(call.p.out, per, d, h, &n);
    store_index_row(call.a.index + at, v, static_cast<int>(per.w), n);
  }
};

template <class Axis, class T, Finish Kind, bool Index>
void finish_filters(const WinogradCall& call, const TileFinish& t, const TileRun* runs, int cuts, int64_t filter,
                    int64_t filters, const float* product) {
  Vec checks[kMostBlock];
  for (int i = 0; i < cuts; ++i) checks[i] = zero();
  for (int64_t k = 0; k < filters; ++k) {
    const Vec bias = splat(call.a.bias ? to_float(static_cast<const T*>(call.a.bias)[filter + k]) : 0.f);
    for (int i = 0; i < cuts; ++i) {
      const RowTarget<T> target{call, t, runs[i], filter + k};
      checks[i] = finish_vector<Axis, Kind, Index>(target, product + k * call.plan.product_row + runs[i].at,
                                                   call.plan.product_plane, bias, checks[i]);
    }
  }
  for (int i = 0; i < cuts; ++i)
    if (any_nan(checks[i], runs[i].count)) call.mark_broken(runs[i].n);
}

template <class Axis, class T>
void finish_chunk(const WinogradCall& call, int64_t group, int64_t tile, int64_t count, int64_t chunk,
                  const float* data, float* product) {
  const WinogradPlan& plan = call.plan;
  const int64_t vectors = divide_up(count, kLanes);
  multiply(plan, chunk_filters(plan, chunk, kFilterRows), vectors,
           call.weight + group * plan.weight_group() + chunk * plan.weight_chunk(), data, product);
  const TileFinish t = tile_finish(call.p);
  TileRun runs[kMostBlock];
  const int cuts = cut(plan, tile, count, t.kind == Finish::any, runs);
  const int64_t filter = chunk * plan.chunk, filters = least(plan.chunk, plan.filters - filter),
                at = group * plan.filters + filter;
  finish_as(t, [&](auto as) __attribute__((always_inline)) {
    finish_filters<Axis, T, decltype(as)::kind, decltype(as)::index>(call, t, runs, cuts, at, filters, product);
  });
}

struct Rows {
  template <class Axis, class T>
  static constexpr WinogradKernel of = {pack_weight<Axis, T>, transform_data<Axis, T>, finish_chunk<Axis, T>};
};

}  // namespace

const WinogradKernel* winograd_rows(bool bf16, int depth_tile) { return winograd_kernel<Rows>(bf16, depth_tile); }

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
