// Gradients of 3x3 and 3x3x3 convolutions by Winograd's algorithm, transposed (see winograd.h): the gradient e of a
// tile of convolution pixels becomes A e, and with it
//
//   the weight's gradient is G' [sum over tiles of (A e) (B' d)'], x's is B [(G g)' (A e)]
//
// point by point: two matrix products per point that share A e, with a quarter of the dense products (an eighth in
// 3-D). That is as few as the nonzero ones behind 2x2 (2x2x2) max pooling, but in blocks that run near the peak.
//
// The tiles are those of the convolution, whole pooling windows each, so that those of x overlap by two pixels. Vectors
// lie along the channels. In 3-D the strip is transformed along the depth first, and the points are taken slice by
// slice, for the sake of the L2 cache.
#include "cpu/conv_pool_backward.h"
#include "cpu/conv_pool_winograd.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// Rows behind the last tile's that a register tile may reach: the highest is taken for more than half of its rows.
constexpr int64_t kSpareRows = kGemmAccumulators / 2;

// Calls body(number of the tile, image, place along depth, height and width) for the strip's tiles in order.
template <class Body>
INTERFUSE_INLINE void each_tile(const TileStrip& t, Body&& body) {
  int64_t tile = 0;
  for (int64_t n = 0; n < t.images; ++n)
    for (int64_t d = 0; d < t.tiles[0]; ++d)
      for (int64_t h = 0; h < t.tiles[1]; ++h)
        for (int64_t w = 0; w < t.tiles[2]; ++w, ++tile) body(tile, n, d, h, w);
}

// Slice `slice` of the points along depth that belongs to image n's tiles at depth d.
INTERFUSE_INLINE int64_t slice_number(const BackwardPlan& plan, const TileStrip& t, int64_t n, int slice, int64_t d) {
  return (n * plan.depth_points + slice) * t.tiles[0] + d;
}

// ---- the gradient: A e ---------------------------------------------------------------------------------------------

// The depth's share of A: what a pixel at each depth of the tile counts for the slice.
struct DepthShares {
  float of[kTile];
};
template <class Axis>
DepthShares depth_shares(int slice) {
  DepthShares shares{};
  for (int d = 0; d < Axis::outputs; ++d) {
    float one[Axis::outputs] = {}, points[Axis::points];
    one[d] = 1;
    Axis::output_transposed(one, points);
    shares.of[d] = points[slice];
  }
  return shares;
}
DepthShares depth_shares(const BackwardPlan& plan, int slice) {
  return plan.depth_points == 1   ? depth_shares<Winograd1>(slice)
         : plan.depth_points == 4 ? depth_shares<Winograd2>(slice)
                                  : depth_shares<Winograd4>(slice);
}

// Pooled: windows of 2x2 pixels, or 2x2x2 where Deep; else every pixel is a window. Deep: the tile has a depth.
template <bool Pooled, bool Deep>
INTERFUSE_INLINE void tile_pixels(const TileStrip& t, const float* values, const int32_t* places,
                                  const DepthShares& shares, int64_t deep_windows, int64_t window_depth, Vec* e) {
  if (Deep) unrolled<kTile * kTile>([&](int i) __attribute__((always_inline)) { e[i] = zero(); });
  constexpr int wide = Pooled ? 2 : 4;  // windows of the tile along height and width
  for (int64_t j = 0; j < (Deep ? deep_windows : 1); ++j) {
    unrolled<wide * wide>([&](int i) __attribute__((always_inline)) {
      const int64_t at = j * t.slice_windows + (i / wide * t.windows[2] + i % wide) * t.k_lanes;
      Vec value = load(values + at);
      if constexpr (!Pooled) {
        e[i] = Deep ? e[i] + shares.of[j] * value : value;
      } else {
        IVec place = (IVec)load(reinterpret_cast<const float*>(places) + at);
        if constexpr (Deep) {
          const Vec lower = splat(shares.of[j * window_depth]);
          value *= window_depth == 2 ? select(place >= 4, splat(shares.of[j * window_depth + 1]), lower) : lower;
          place &= 3;
        }
        unrolled<4>([&](int q) __attribute__((always_inline)) {
          Vec& pixel = e[(i / 2 * 2 + q / 2) * kTile + i % 2 * 2 + q % 2];
          const Vec own = select(place == q, value, zero());
          pixel = Deep ? pixel + own : own;
        });
      }
    });
  }
}

template <bool Pooled, bool Deep>
void gradient_points_of(const BackwardPlan& plan, const TileStrip& t, int slice, const float* values,
                        const int32_t* places, float* points) {
  const DepthShares shares = depth_shares(plan, slice);
  const int64_t window_depth = plan.p->window.d, deep_windows = plan.window[0] / window_depth, wide = Pooled ? 2 : 4;
  each_tile(
      t, [&](int64_t tile, int64_t n, int64_t d, int64_t h, int64_t w) __attribute__((always_inline)) {
        const int64_t first =
            (((n * t.windows[0] + d * deep_windows) * t.windows[1] + h * wide) * t.windows[2] + w * wide) * t.k_lanes;
        for (int64_t k = 0; k < t.k_lanes; k += kLanes) {
          Vec e[kTile * kTile], rows[kTileIn][kTile];
          tile_pixels<Pooled, Deep>(t, values + first + k, places + first + k, shares, deep_windows, window_depth, e);
          unrolled<kTile>([&](int v) __attribute__((always_inline)) {
            Vec column[kTile], made[kTileIn];
            unrolled<kTile>([&](int r) __attribute__((always_inline)) { column[r] = e[r * kTile + v]; });
            Winograd4::output_transposed(column, made);
            unrolled<kTileIn>([&](int r) __attribute__((always_inline)) { rows[r][v] = made[r]; });
          });
          float* to = points + tile * t.k_row + k;
          for (int r = 0; r < kTileIn; ++r) {
            Vec made[kTileIn];
            Winograd4::output_transposed(rows[r], made);
            unrolled<kTileIn>([&](int i) __attribute__((always_inline)) {
              store(to + (r * kTileIn + i) * t.k_plane, made[i]);
            });
          }
        }
      });
}

// ---- x: B' d and B t -----------------------------------------------------------------------------------------------

void data_points(const BackwardPlan& plan, const Strip& s, const TileStrip& t, int slice, const float* slices,
                 float* points) {
  each_tile(
      t, [&](int64_t tile, int64_t n, int64_t d, int64_t h, int64_t w) __attribute__((always_inline)) {
        const float* from =
            slices + slice_number(plan, t, n, slice, d) * s.step[0] + h * kTile * s.step[1] + w * kTile * s.step[2];
        for (int64_t c = 0; c < plan.lanes; c += kLanes) {
          float* to = points + tile * t.c_row + c;
          data_slice(
              [&](int i) __attribute__((always_inline)) {
                return load(from + i / kTileIn * s.step[1] + i % kTileIn * s.step[2] + c);
              },
              [&](int point, Vec v) __attribute__((always_inline)) { store(to + point * t.c_plane, v); });
        }
      });
}

void add_pixels(const BackwardPlan& plan, const Strip& s, const TileStrip& t, int slice, const float* points,
                float* slices) {
  each_tile(t, [&](int64_t tile, int64_t n, int64_t d, int64_t h, int64_t w) __attribute__((always_inline)) {
    float* to = slices + slice_number(plan, t, n, slice, d) * s.step[0] + h * kTile * s.step[1] + w * kTile * s.step[2];
    for (int64_t c = 0; c < plan.lanes; c += kLanes) {
      const float* from = points + tile * t.c_row + c;
      Vec rows[kTileIn][kTileIn];
      unrolled<kTileIn>([&](int v) __attribute__((always_inline)) {
        Vec column[kTileIn], made[kTileIn];
        unrolled<kTileIn>([&](int r) __attribute__((always_inline)) {
          column[r] = load(from + (r * kTileIn + v) * t.c_plane);
        });
        Winograd4::data_transposed(column, made);
        unrolled<kTileIn>([&](int r) __attribute__((always_inline)) { rows[r][v] = made[r]; });
      });
      for (int r = 0; r < kTileIn; ++r) {
        Vec made[kTileIn];
        Winograd4::data_transposed(rows[r], made);
        unrolled<kTileIn>([&](int i) __attribute__((always_inline)) {
          float* pixel = to + r * s.step[1] + i * s.step[2] + c;
          store(pixel, load(pixel) + made[i]);
        });
      }
    }
  });
}

template <class Axis>
void split_depth(const Strip& s, const TileStrip& t, const float* x, float* slices) {
  for (int64_t n = 0; n < t.images; ++n)
    for (int64_t d = 0; d < t.tiles[0]; ++d)
      for (int64_t i = 0; i < s.step[0]; i += kLanes) {
        const float* from = x + n * s.image_step + d * Axis::outputs * s.step[0] + i;
        Vec taken[Axis::points], made[Axis::points];
        unrolled<Axis::points>([&](int j) __attribute__((always_inline)) { taken[j] = load(from + j * s.step[0]); });
        Axis::data(taken, made);
        float* to = slices + (n * Axis::points * t.tiles[0] + d) * s.step[0] + i;
        unrolled<Axis::points>([&](int j)
                                   __attribute__((always_inline)) { store(to + j * t.tiles[0] * s.step[0], made[j]); });
      }
}

template <class Axis>
void join_depth(const Strip& s, const TileStrip& t, const float* slices, float* grad_x) {
  for (int64_t n = 0; n < t.images; ++n)
    for (int64_t d = 0; d < t.tiles[0]; ++d)
      for (int64_t i = 0; i < s.step[0]; i += kLanes) {
        const float* from = slices + (n * Axis::points * t.tiles[0] + d) * s.step[0] + i;
        Vec taken[Axis::points], made[Axis::points];
        unrolled<Axis::points>([&](int j) __attribute__((always_inline)) {
          taken[j] = load(from + j * t.tiles[0] * s.step[0]);
        });
        Axis::data_transposed(taken, made);
        float* to = grad_x + n * s.image_step + d * Axis::outputs * s.step[0] + i;
        unrolled<Axis::points>([&](int j) __attribute__((always_inline)) {
          float* pixel = to + j * s.step[0];
          store(pixel, load(pixel) + made[j]);
        });
      }
}

// ---- the products --------------------------------------------------------------------------------------------------

// Rows of output channels that keep enough accumulators busy; they divide a vector, as k_lanes is one or more.
constexpr int sum_rows(int vectors) {
  int rows = kLanes;
  while (rows > 1 && rows * vectors > (kRegisters == 32 ? 16 : 8)) rows /= 2;
  return rows;
}

// sums[k][lane] += sum over tiles of gradient[tile][k] * x[tile][lane]: every strip's sum starts at zero, for shorter
// chains of rounding than one through the whole batch.
template <int Vectors>
void add_products(const TileStrip& t, const float* gradient, const float* x, float* sums, int64_t sums_row) {
  constexpr int rows = sum_rows(Vectors);
  for (int64_t k = 0; k < t.k_lanes; k += rows, sums += rows * sums_row)
    gemm_tile<rows, Vectors>(
        t.count, gradient + k, 1, t.k_row, x, t.c_row, [&](int, int) __attribute__((always_inline)) { return zero(); },
        [&](int r, int v, Vec sum) __attribute__((always_inline)) {
          float* to = sums + r * sums_row + v * kLanes;
          store(to, load(to) + sum);
        });
}

// Of one point, all panels of input channels.
void add_weight_products(const BackwardPlan& plan, const TileStrip& t, const float* gradient, const float* x,
                         float* sums) {
  for (int64_t c = 0; c < plan.lanes; c += plan.panel) {
    const int64_t vectors = least(plan.panel, plan.lanes - c) / kLanes;
    const auto add = vectors == 4   ? add_products<4>
                     : vectors == 3 ? add_products<3>
                     : vectors == 2 ? add_products<2>
                                    : add_products<1>;
    add(t, gradient, x + c, sums + c, plan.lanes);
  }
}

void input_products(const BackwardPlan& plan, const TileStrip& t, const float* gradient, const float* weight,
                    float* product) {
  for (int64_t c = 0; c < plan.lanes; c += plan.panel) {
    const int64_t width = least(plan.panel, plan.lanes - c);
    multiply_panel(width / kLanes, t.count, plan.p->group_out, gradient, t.k_row, weight + c * plan.p->group_out,
                   product + c, t.c_row, false);
  }
}

}  // namespace

TileStrip tiles_of(const BackwardPlan& plan, const Strip& s) {
  TileStrip t{};
  t.images = t.count = s.images;
  for (int i = 0; i < 3; ++i) {
    t.tiles[i] = i == plan.axis ? s.end - s.begin : plan.count[i];
    t.count *= t.tiles[i];
  }
  const Triple window = plan.p->window;  // of one pixel where there is no pooling
  const int64_t per[3] = {plan.window[0] / window.d, plan.window[1] / window.h, plan.window[2] / window.w};
  for (int i = 0; i < 3; ++i) {
    t.windows[i] = t.tiles[i] * per[i];
    t.first_window[i] = i == plan.axis ? s.begin * per[i] : 0;
  }
  t.k_lanes = plan.k_padded;
  t.slice_windows = t.windows[1] * t.windows[2] * t.k_lanes;
  t.k_row = channel_pitch(t.k_lanes), t.c_row = channel_pitch(plan.lanes);
  // Behind the last tile there is room for the rest of a register tile. All strips have the planes of the largest: what
  // a smaller one leaves there are its predecessors' points.
  int64_t most_tiles = plan.strip_images * plan.strip_steps;
  for (int i = 0; i < 3; ++i) most_tiles *= i == plan.axis ? 1 : plan.count[i];
  t.k_plane = plane_pitch((most_tiles + kSpareRows) * t.k_row),
  t.c_plane = plane_pitch((most_tiles + kSpareRows) * t.c_row);
  t.slices_floats = plan.depth_points == 1 ? 0 : s.images * plan.depth_points * t.tiles[0] * s.step[0];
  return t;
}

int64_t winograd_floats(const TileStrip& t) { return kPlane * (t.k_plane + t.c_plane) + 2 * t.slices_floats; }

void clear_spare_rows(const TileStrip& t, float* memory) {
  const int64_t spare = kSpareRows * t.k_row + 32;  // a plane's pitch is rounded up by so much at most
  for (int point = 1; point <= kPlane; ++point)
    memset(memory + point * t.k_plane - spare, 0, static_cast<size_t>(spare) * sizeof(float));
}

void winograd_gradients(const BackwardPlan& plan, const Strip& s, const TileStrip& t, const float* values,
                        const int32_t* places, const float* x, const float* weight, float* sums, float* grad_x,
                        float* memory) {
  float *gradient = memory, *data = gradient + kPlane * t.k_plane, *slices = data + kPlane * t.c_plane,
        *grad_slices = slices + t.slices_floats;
  const bool deep = plan.depth_points > 1, pooled = plan.p->window.w > 1;
  if (deep && sums)
    plan.depth_points == 4 ? split_depth<Winograd2>(s, t, x, slices) : split_depth<Winograd4>(s, t, x, slices);
  if (deep && grad_x) memset(grad_slices, 0, static_cast<size_t>(t.slices_floats) * sizeof(float));
  const auto gradient_points = pooled ? deep ? gradient_points_of<true, true> : gradient_points_of<true, false>
                                      : deep ? gradient_points_of<false, true> : gradient_points_of<false, false>;
  for (int slice = 0; slice < plan.depth_points; ++slice) {
    gradient_points(plan, t, slice, values, places, gradient);
    if (sums) data_points(plan, s, t, slice, deep ? slices : x, data);
    for (int i = 0; i < kPlane; ++i) {
      const int point = slice * kPlane + i;
      if (sums)
        add_weight_products(plan, t, gradient + i * t.k_plane, data + i * t.c_plane,
                            sums + point * plan.k_padded * plan.lanes);
      // x's point has been used: the product takes its place.
      if (grad_x)
        input_products(plan, t, gradient + i * t.k_plane, weight + point * plan.p->group_out * plan.lanes,
                       data + i * t.c_plane);
    }
    if (grad_x) add_pixels(plan, s, t, slice, data, deep ? grad_slices : grad_x);
  }
  if (deep && grad_x)
    plan.depth_points == 4 ? join_depth<Winograd2>(s, t, grad_slices, grad_x)
                           : join_depth<Winograd4>(s, t, grad_slices, grad_x);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
