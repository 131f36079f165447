// The innermost loop of the direct convolution: a tile of pixels times output channels, kept in registers.
// Per-ISA (see common/simd.h).
#pragma once

#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Lanes are output channels: the weights of one step of the reduction are `vectors` loads, and every input element
// is a broadcast straight from where it lies. A fused multiply-add takes four cycles and two start per cycle, so
// eight sums are the least; more sums mean fewer loads per product, up to what the registers hold beside
// the weights and the broadcast.
constexpr int kMostVectors = kRegisters >= 32 ? 4 : 3;
constexpr int kMostPixels = kRegisters >= 32 ? 14 : 12;
constexpr int most_pixels(int vectors) {
  if (kRegisters >= 32) return vectors <= 2 ? 14 : vectors == 3 ? 9 : 7;
  return 12 / vectors;
}

// sums[q][v] = start[q * start_step + v] + sum over k of x[q * step + offsets[k]] * weight[k][v].
// `start` is the bias (start_step 0) or the sums so far. It is added at the end: chains of rounding are then as short
// as a block of the reduction.
using Tile = void (*)(const float* x, int64_t step, const int32_t* offsets, int64_t depth, const float* weight,
                      const float* start, int64_t start_step, float* sums);

template <int Pixels, int Vectors>
void tile(const float* x, int64_t step, const int32_t* offsets, int64_t depth, const float* weight, const float* start,
          int64_t start_step, float* sums) {
  // The loops over the tile must be unrolled early for the sums to become registers.
  Vec sum[Pixels][Vectors];
#pragma GCC unroll 16
  for (int q = 0; q < Pixels; ++q)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) sum[q][v] = zero();
  for (int64_t k = 0; k < depth; ++k, weight += Vectors * kLanes) {
    const float* at = x + offsets[k];
    Vec w[Vectors];
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 16
    for (int q = 0; q < Pixels; ++q) {
      const Vec element = splat(at[q * step]);
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) sum[q][v] = multiply_add(element, w[v], sum[q][v]);
    }
  }
#pragma GCC unroll 16
  for (int q = 0; q < Pixels; ++q)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; ++v)
      store(sums + (q * Vectors + v) * kLanes, load(start + q * start_step + v * kLanes) + sum[q][v]);
}

template <int Pixels, int Vectors>
constexpr Tile tile_or_none() {
  if constexpr (Vectors <= kMostVectors && Pixels <= most_pixels(Vectors))
    return tile<Pixels, Vectors>;
  else
    return nullptr;
}

#define INTERFUSE_TILES(v)                                                                                        \
  {                                                                                                               \
    nullptr, tile_or_none<1, v>(), tile_or_none<2, v>(), tile_or_none<3, v>(), tile_or_none<4, v>(),              \
        tile_or_none<5, v>(), tile_or_none<6, v>(), tile_or_none<7, v>(), tile_or_none<8, v>(),                   \
        tile_or_none<9, v>(), tile_or_none<10, v>(), tile_or_none<11, v>(), tile_or_none<12, v>(),                \
        tile_or_none<13, v>(), tile_or_none<14, v>()                                                              \
  }
constexpr Tile kTiles[4][15] = {INTERFUSE_TILES(1), INTERFUSE_TILES(2), INTERFUSE_TILES(3), INTERFUSE_TILES(4)};
#undef INTERFUSE_TILES

// A row of `width` pixels is cut into tiles that differ by at most one pixel.
INTERFUSE_INLINE int64_t tile_count(int64_t width, int vectors) {
  return (width + most_pixels(vectors) - 1) / most_pixels(vectors);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
