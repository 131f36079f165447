// The tensors' side of conv_pool_backward_winograd.cpp: the windows' gradients with channels in the lanes, the weight's
// transform, and the way back of its gradient.
#include "common/parallel.h"
#include "common/transpose.h"
#include "cpu/conv_pool_backward_source.h"
#include "cpu/conv_pool_winograd.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// The gradients of windows side by side, and their winners' places, of a vector of channels or of windows.
template <class T>
struct WindowSource {
  OutputGradient<T> gradient;
  const uint8_t* index;

  explicit WindowSource(const BackwardPlan& plan)
      : gradient(plan), index(plan.p->index_count() ? plan.a->index : nullptr) {}
  // Where relu let nothing through, the gradient is zero and the place may be anything.
  INTERFUSE_INLINE void take(int64_t at, int64_t n, Vec* value, Vec* place) const {
    const IVec taken = index ? load_index(index + at, static_cast<int>(least(n, kLanes))) : IVec{};
    const Vec given = gradient(at, n);
    *value = index ? select(taken == kNoGradient, zero(), given) : given;
    *place = (Vec)taken;
  }
};

template <class T>
void row_of_pixels(const BackwardPlan& plan, const WindowSource<T>& source, int64_t k_lanes, int64_t first,
                   int64_t channels, int64_t run, float* values, float* places) {
  for (int64_t w = 0; w < run; ++w)
    for (int64_t k = 0; k < channels; k += kLanes) {
      Vec value, place;
      source.take(first + w * plan.p->out_channels + k, channels - k, &value, &place);
      store(values + w * k_lanes + k, value);
      store(places + w * k_lanes + k, place);
    }
}

template <class T>
void row_of_planes(const BackwardPlan& plan, const WindowSource<T>& source, int64_t k_lanes, int64_t first,
                   int64_t channels, int64_t run, float* values, float* places) {
  const int64_t plane = plan.p->out.volume();
  for (int64_t k = 0; k < channels; k += kLanes)
    for (int64_t w = 0; w < run; w += kLanes) {
      Vec value[kLanes], place[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        value[i] = place[i] = zero();
        if (k + i < channels) source.take(first + (k + i) * plane + w, run - w, value + i, place + i);
      }
      transpose(value);
      if (source.index) transpose(place);
      for (int64_t i = 0; i < least(kLanes, run - w); ++i) {
        store(values + (w + i) * k_lanes + k, value[i]);
        store(places + (w + i) * k_lanes + k, place[i]);
      }
    }
}

template <class T>
void row_as(const BackwardPlan& plan, int64_t first, int64_t channels, int64_t run, int64_t k_lanes, float* values,
            float* places) {
  const WindowSource<T> source(plan);
  plan.p->channels_last ? row_of_pixels(plan, source, k_lanes, first, channels, run, values, places)
                        : row_of_planes(plan, source, k_lanes, first, channels, run, values, places);
}

template <class T>
void windows_as(const BackwardPlan& plan, const Strip& s, const TileStrip& t, int64_t first_channel, int64_t channels,
                float* values, float* places) {
  const ConvPool& p = *plan.p;
  const int64_t row = t.windows[2] * t.k_lanes, w = t.first_window[2];
  for (int64_t n = s.image; n < s.image + s.images; ++n)
    for (int64_t d = t.first_window[0]; d < t.first_window[0] + t.windows[0]; ++d)
      for (int64_t h = t.first_window[1]; h < t.first_window[1] + t.windows[1]; ++h, values += row, places += row) {
        // Whole tiles may reach beyond the windows.
        const int64_t run = d < p.out.d && h < p.out.h ? least(t.windows[2], p.out.w - w) : 0;
        const size_t rest = static_cast<size_t>(row - run * t.k_lanes) * sizeof(float);
        memset(values + run * t.k_lanes, 0, rest);
        memset(places + run * t.k_lanes, 0, rest);
        if (run == 0) continue;
        row_as<T>(plan, p.at(p.out, n, first_channel, d, h, w), channels, run, t.k_lanes, values, places);
      }
}

// [group][point][panel of c][k][c of the panel]
template <class Axis, class T>
void pack_weight_as(const BackwardPlan& plan, int thread, int threads) {
  constexpr int taps = Axis::taps * 9, points = Axis::points * kPlane;
  const ConvPool& p = *plan.p;
  const Range mine = share(p.out_channels, thread, threads);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t group = i / p.group_out, k = i % p.group_out;
    for (int64_t c = 0; c < plan.lanes; c += kLanes) {
      Vec taken[taps] = {}, made[points];
      for (int64_t lane = 0; lane < least(kLanes, p.group_in - c); ++lane) {
        const T* from = static_cast<const T*>(plan.a->weight) + i * p.group_in * taps + (c + lane) * p.ws.c;
        for (int tap = 0; tap < taps; ++tap)
          reinterpret_cast<float*>(taken + tap)[lane] = to_float(from[tap * p.ws.tap]);
      }
      weight_tile<Axis>(taken, made, 1);
      const int64_t panel = c / plan.panel * plan.panel, width = least(plan.panel, plan.lanes - panel),
                    step = p.group_out * plan.lanes;
      float* to = plan.packed_weight + group * points * step + panel * p.group_out + k * width + c - panel;
      for (int point = 0; point < points; ++point, to += step) store(to, made[point]);
    }
  }
}

// G' along all axes: 36 vectors of each slice of points to 9 of each tap along depth.
template <class Axis>
INTERFUSE_INLINE void weight_of_points(const Vec* points, Vec* taps) {
  Vec slices[Axis::points][9];
  for (int s = 0; s < Axis::points; ++s) {
    Vec rows[3][kTileIn];
    for (int v = 0; v < kTileIn; ++v)
      weight_transposed_along<Winograd4>(points + s * kPlane + v, kTileIn, &rows[0][v], kTileIn);
    for (int r = 0; r < 3; ++r) weight_transposed_along<Winograd4>(rows[r], 1, slices[s] + r * 3, 1);
  }
  for (int i = 0; i < 9; ++i) weight_transposed_along<Axis>(slices[0] + i, 9, taps + i, 9);
}

template <class Axis, class T>
bool store_weight_gradient_as(const BackwardPlan& plan, int parts, int thread, int threads) {
  constexpr int taps = Axis::taps * 9, points = Axis::points * kPlane;
  const ConvPool& p = *plan.p;
  const int64_t step = plan.k_padded * plan.lanes, size = plan.weight_floats();
  const Range mine = share(p.out_channels, thread, threads);
  Vec check = zero();
  for (int64_t i = mine.begin; i < mine.end; ++i)
    for (int64_t c = 0; c < p.group_in; c += kLanes) {
      const float* from = plan.grad_weight + i / p.group_out * points * step + i % p.group_out * plan.lanes + c;
      Vec sums[points], made[taps];
      for (int point = 0; point < points; ++point) {
        sums[point] = load(from + point * step);
        for (int part = 1; part < parts; ++part) sums[point] += load(from + part * size + point * step);
      }
      weight_of_points<Axis>(sums, made);
      for (int tap = 0; tap < taps; ++tap) check = multiply_add(made[tap], zero(), check);
      T* to = static_cast<T*>(plan.a->grad_weight) + i * p.group_in * taps + c * p.ws.c;
      for (int64_t lane = 0; lane < least(kLanes, p.group_in - c); ++lane)
        for (int tap = 0; tap < taps; ++tap)
          put(to + lane * p.ws.c + tap * p.ws.tap, reinterpret_cast<const float*>(made + tap)[lane]);
    }
  return is_finite(check);
}

template <class Axis>
constexpr TileKernel kernels_of(bool bf16) {
  return bf16 ? TileKernel{pack_weight_as<Axis, uint16_t>, store_weight_gradient_as<Axis, uint16_t>}
              : TileKernel{pack_weight_as<Axis, float>, store_weight_gradient_as<Axis, float>};
}

}  // namespace

TileKernel tile_kernel(const BackwardPlan& plan) {
  const bool bf16 = plan.p->dtype == INTERFUSE_BFLOAT16;
  return plan.depth_points == 1   ? kernels_of<Winograd1>(bf16)
         : plan.depth_points == 4 ? kernels_of<Winograd2>(bf16)
                                  : kernels_of<Winograd4>(bf16);
}

void window_row(const BackwardPlan& plan, int64_t first, int64_t channels, int64_t run, int64_t k_lanes, float* values,
                int32_t* places) {
  float* as_floats = reinterpret_cast<float*>(places);
  plan.p->dtype == INTERFUSE_FLOAT32 ? row_as<float>(plan, first, channels, run, k_lanes, values, as_floats)
                                     : row_as<uint16_t>(plan, first, channels, run, k_lanes, values, as_floats);
}

void window_gradients(const BackwardPlan& plan, const Strip& s, const TileStrip& t, int64_t first_channel,
                      int64_t channels, float* values, int32_t* places) {
  float* as_floats = reinterpret_cast<float*>(places);
  plan.p->dtype == INTERFUSE_FLOAT32 ? windows_as<float>(plan, s, t, first_channel, channels, values, as_floats)
                                     : windows_as<uint16_t>(plan, s, t, first_channel, channels, values, as_floats);
}

bool is_finite(Vec sum_of_zeros) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum_of_zeros[i];
  return total == 0;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
