// Gradients of first layers behind max pooling: an input patch, of all channels and taps, is a few vectors, and of each
// window's pixels one per output channel has a gradient. A pixel's winners are the output channels whose window it won:
//
//   sums[winner][patch] += gradient * x[patch],   grad_x[patch] += gradient * weight[winner][patch]
//
// with the pixel's patches of x and of grad_x in registers, sums and weight in the first-level cache. Patches are cut
// from planes, and added back to them, for a vector of pixels at a time.
//
// Zeros are skipped, so 0 * Inf and 0 * NaN, which dense arithmetic would turn into NaN, do not arise.
#include "common/gemm.h"
#include "common/transpose.h"
#include "cpu/conv_pool_backward.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int kWinners = 64;           // output channels whose winners one mask names
constexpr int64_t kWindowsOfSum = 96;  // windows that the sums take before they are added up: short chains of rounding


int64_t k_lanes_of(int64_t channels) { return round_up(channels, kLanes); }

// Which lanes hold the place.
INTERFUSE_INLINE uint64_t lanes_at(const int32_t* places, int32_t place) {
#if defined(__AVX512F__)
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(places), _mm512_set1_epi32(place));
#else
  uint64_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<uint64_t>(places[i] == place) << i;
  return lanes;
#endif
}

INTERFUSE_INLINE uint64_t winners_of(const int32_t* places, int32_t place, int64_t channels) {
  uint64_t winners = 0;
  for (int64_t k = 0; k < least(channels, kWinners); k += kLanes) winners |= lanes_at(places + k, place) << k;
  return channels < kWinners ? winners & ((uint64_t(1) << channels) - 1) : winners;
}

// A row of windows: gradients and winners' places [window][k_lanes], and where the row's first pixel and its first
// kernel tap lie.
struct WindowRow {
  const float* values;
  const int32_t* places;
  int64_t channels, k_lanes, pixels;
  int32_t first_place, width;  // of the pixel row within its windows, and of a window
  const int64_t* offsets;      // of each place of a patch, in the planes
  int64_t depth;               // places of a patch
};

// Places of patches of kLanes pixels: [pixel][patch] from the planes, and added back.
template <int V>
INTERFUSE_INLINE void cut_patches(const WindowRow& row, const float* x, float* patches) {
  for (int v = 0; v < V; ++v) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t place = v * kLanes + i;
      block[i] = place < row.depth ? load(x + row.offsets[place]) : zero();
    }
    transpose(block);
    for (int i = 0; i < kLanes; ++i) store(patches + i * V * kLanes + v * kLanes, block[i]);
  }
}

template <int V>
INTERFUSE_INLINE void add_patches(const WindowRow& row, const float* patches, float* grad_x) {
  for (int v = 0; v < V; ++v) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = load(patches + i * V * kLanes + v * kLanes);
    transpose(block);
    for (int i = 0; i < least(kLanes, row.depth - v * kLanes); ++i) {
      float* to = grad_x + row.offsets[v * kLanes + i];
      store(to, load(to) + block[i]);
    }
  }
}

template <int V, bool Weights, bool Input>
INTERFUSE_INLINE void add_winners(uint64_t winners, const float* values, const float* weight, const Vec* x, float* sums,
                                  Vec* grad) {
  for (; winners; winners &= winners - 1) {
    const int64_t k = __builtin_ctzll(winners), at = k * V * kLanes;
    const Vec g = splat(values[k]);
    unrolled<V>([&](int v) __attribute__((always_inline)) {
      if (Input) grad[v] = multiply_add(g, load(weight + at + v * kLanes), grad[v]);
      if (Weights) store(sums + at + v * kLanes, multiply_add(g, x[v], load(sums + at + v * kLanes)));
    });
  }
}

template <int V, bool Weights, bool Input>
void pixel_row(const WindowRow& row, const float* x, const float* weight, float* sums, float* grad_x) {
  float patches[kLanes * V * kLanes], grads[kLanes * V * kLanes];
  int64_t window = 0;
  int32_t column = 0;  // of the pixel in its window
  for (int64_t first = 0; first < row.pixels; first += kLanes) {
    if (Weights) cut_patches<V>(row, x + first, patches);
    for (int i = 0; i < kLanes; ++i) {
      Vec patch[V], grad[V];
      unrolled<V>([&](int v) __attribute__((always_inline)) {
        grad[v] = zero();
        if (Weights) patch[v] = load(patches + (i * V + v) * kLanes);
      });
      if (first + i < row.pixels) {
        const int32_t place = row.first_place + column;
        for (int64_t k = 0; k < row.channels; k += kWinners) {
          const int64_t at = window * row.k_lanes + k;
          add_winners<V, Weights, Input>(winners_of(row.places + at, place, row.channels - k), row.values + at,
                                         Input ? weight + k * V * kLanes : nullptr, patch, sums + k * V * kLanes, grad);
        }
        if (++column == row.width) column = 0, ++window;
      }
      if (Input)
        unrolled<V>([&](int v) __attribute__((always_inline)) { store(grads + (i * V + v) * kLanes, grad[v]); });
    }
    if (Input) add_patches<V>(row, grads, grad_x + first);
  }
}

typedef void (*RowKernel)(const WindowRow&, const float*, const float*, float*, float*);
struct RowKernels {
  RowKernel weights, input, both;
};
template <int V>
constexpr RowKernels row_kernels() {
  if constexpr (V <= kMostPatchVectors)
    return {pixel_row<V, true, false>, pixel_row<V, false, true>, pixel_row<V, true, true>};
  else
    return {nullptr, nullptr, nullptr};
}
constexpr RowKernels kRowKernels[8] = {row_kernels<1>(), row_kernels<2>(), row_kernels<3>(), row_kernels<4>(),
                                       row_kernels<5>(), row_kernels<6>(), row_kernels<7>(), row_kernels<8>()};

void add_up(float* sums, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(to + i, load(to + i) + load(sums + i));
    store(sums + i, zero());
  }
}

void sum_row(const WindowRow& row, int64_t windows, double* biases) {
  for (int64_t k = 0; k < row.channels; k += kLanes) {
    Vec sums = zero();
    for (int64_t i = 0; i < windows; ++i) sums += load(row.values + i * row.k_lanes + k);
    for (int64_t lane = 0; lane < least(kLanes, row.channels - k); ++lane) biases[k + lane] += sums[lane];
  }
}

}  // namespace

// The sums of a run of windows, then a row's gradients and places.
int64_t patches_floats(const BackwardPlan& plan, int64_t channels) {
  return channels * plan.patch + 2 * plan.count[2] * k_lanes_of(channels);
}

void patches_gradients(const BackwardPlan& plan, const Strip& strip, const Planes& s, int64_t first_channel,
                       int64_t channels, const float* x, float* sums, float* grad_x, double* biases, float* memory) {
  const ConvPool& p = *plan.p;
  const int64_t k_lanes = k_lanes_of(channels), floats = channels * plan.patch;
  float* values = memory + floats;
  int32_t* places = reinterpret_cast<int32_t*>(values + plan.count[2] * k_lanes);
  int64_t offsets[kMostPatchVectors * kLanes], depth = 0, begin[3], end[3];
  for (int64_t c = 0; c < p.in_channels; ++c)
    for (int64_t i = 0; i < plan.kernel[0]; ++i)
      for (int64_t j = 0; j < plan.kernel[1]; ++j)
        for (int64_t l = 0; l < plan.kernel[2]; ++l) {
          const int64_t column = l * plan.dilation[2];
          offsets[depth++] = c * s.channel + i * plan.dilation[0] * s.slice + j * plan.dilation[1] * s.row +
                             column % plan.stride[2] * s.phase + column / plan.stride[2];
        }
  for (int i = 0; i < 3; ++i) {
    begin[i] = i == plan.axis ? strip.begin : 0;
    end[i] = i == plan.axis ? strip.end : plan.count[i];
  }
  const RowKernels& kernels = kRowKernels[plan.patch / kLanes - 1];
  const RowKernel kernel = !grad_x ? kernels.weights : !sums ? kernels.input : kernels.both;
  const int64_t windows = end[2] - begin[2];
  WindowRow row{values,
                places,
                channels,
                k_lanes,
                least(windows * plan.window[2], s.pixels[2]),
                0,
                static_cast<int32_t>(plan.window[2]),
                offsets,
                depth};
  const float* weight = plan.packed_weight;
  float* all = sums ? sums + first_channel * plan.patch : nullptr;
  memset(memory, 0, static_cast<size_t>(floats) * sizeof(float));
  int64_t taken = 0;
  for (int64_t n = 0; n < strip.images; ++n)
    for (int64_t od = begin[0]; od < end[0]; ++od)
      for (int64_t oh = begin[1]; oh < end[1]; ++oh) {
        window_row(plan, p.at(p.out, strip.image + n, first_channel, od, oh, begin[2]), channels, windows, k_lanes,
                   values, places);
        if (biases) sum_row(row, windows, biases + first_channel);
        if (!sums && !grad_x) continue;
        for (int64_t i = 0; i < plan.window[0]; ++i)
          for (int64_t j = 0; j < plan.window[1]; ++j) {
            // A last window may reach over the edge.
            const int64_t d = od * plan.window[0] + i - s.first[0], h = oh * plan.window[1] + j - s.first[1];
            if (d >= s.pixels[0] || h >= s.pixels[1]) continue;
            const int64_t at = n * s.image + d * plan.stride[0] * s.slice + h * plan.stride[1] * s.row;
            row.first_place = static_cast<int32_t>((i * plan.window[1] + j) * plan.window[2]);
            kernel(row, x + at, weight, memory, grad_x ? grad_x + at : nullptr);
          }
        taken += windows;
        if (!sums || taken < kWindowsOfSum) continue;
        add_up(memory, floats, all);
        taken = 0;
      }
  if (sums) add_up(memory, floats, all);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
