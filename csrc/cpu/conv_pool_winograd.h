// Winograd convolution with the pooling in its output transform: what its files share. Per-ISA.
//
// The convolution's result is cut into tiles of (1, 2 or 4) x 4 x 4 elements, numbered (image, depth, height, width)
// row-major. A thread takes a block of tiles, transforms their input (B' d) for all channels of a group into
//   data[point][channel][tile]  (contiguous tensors)   or   data[point][tile][channel]  (channels-last),
// and then, for one chunk of filters after the other, multiplies every point's matrix by the transformed weight into
//   product[point][filter][tile]                       or   product[point][tile][filter]
// and transforms, pools and stores that. Blocks and chunks are such that data and product stay in the L2 cache.
#pragma once

#include "common/activation.h"
#include "common/conv_pool.h"
#include "common/gemm.h"
#include "common/simd.h"
#include "cpu/conv_pool_windows.h"
#include "cpu/winograd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

constexpr int kTile = Winograd4::outputs;           // along height and width
constexpr int kTileIn = Winograd4::points;          // elements of the input along height and width; points as well
constexpr int kPlane = kTileIn * kTileIn;           // points of one slice
constexpr int kMostDepth = Winograd4::points;       // points along depth at most
constexpr int64_t kMostBlock = 192;                 // tiles of a block
constexpr int64_t kDepthSlice = 128;                // channels whose part of the matrices stays in the L1 cache

// The register tile of the contiguous layout, where vectors run along the tiles: filters x vectors.
constexpr int kTileVectors = kGemmAccumulators < 12 ? 2 : 3;
constexpr int kFilterRows = gemm_tile_rows(kTileVectors);
// The most vectors of filters in one register tile of the channels-last layout: 6x4 with 32 registers, 6x2 with 16.
constexpr int64_t kPanelVectors = kRegisters == 32 ? 4 : 2;

struct WinogradPlan {
  int depth_tile, depth_points, points;  // outputs and points along depth; points of the whole tile
  Triple tiles;                          // of one image
  int64_t all_tiles;                     // of the batch
  int64_t channels, filters;             // of one group
  int64_t block;                         // tiles that one block has room for, a multiple of the register tile
  int64_t chunk, chunks;                 // filters of a chunk (padded), and how many chunks a group has
  int64_t panel;                         // channels-last: filters of one register tile
  int64_t data_row, data_plane;          // floats between rows and between points of data
  int64_t product_row, product_plane;    // the same of product
  int64_t slice_depth() const { return channels < kDepthSlice ? channels : kDepthSlice; }
  int64_t weight_chunk() const { return points * channels * chunk; }
  int64_t weight_group() const { return weight_chunk() * chunks; }
};

// A run of tiles that lie side by side in one image, at most one vector of them.
struct TileRun {
  int64_t n, d, h, w;  // the image, and the first tile's place in it
  int at, count;       // the first tile's place in the block
};

// Everything that one call's workers read.
struct WinogradCall {
  const ConvPool& p;
  const WinogradPlan& plan;
  const ConvPoolForward& a;
  const float* weight;  // transformed
  uint8_t* broken;      // one flag per image: a result was not finite, the direct kernel must redo it
  void mark_broken(int64_t image) const { __atomic_store_n(broken + image, uint8_t(1), __ATOMIC_RELAXED); }
};

// One layout of one data type with one depth tile.
struct WinogradKernel {
  // Transforms the weight of all groups; thread of threads does its part.
  void (*weight)(const ConvPool&, const WinogradPlan&, const void* weight, float* packed, int thread, int threads);
  // Transforms channels first..last of a group for `count` tiles from `tile` on.
  void (*data)(const WinogradCall&, int64_t group, int64_t tile, int64_t count, int64_t first, int64_t last,
               float* data);
  // Multiplies by one chunk of filters and finishes the outputs.
  void (*finish)(const WinogradCall&, int64_t group, int64_t tile, int64_t count, int64_t chunk, const float* data,
                 float* product);
};

// Of a layout's kernels, Layout::of<Axis, T>, the one for a depth tile and a data type.
template <class Layout>
INTERFUSE_INLINE const WinogradKernel* winograd_kernel(bool bf16, int depth_tile) {
  switch (depth_tile) {
    case 1: return bf16 ? &Layout::template of<Winograd1, uint16_t> : &Layout::template of<Winograd1, float>;
    case 2: return bf16 ? &Layout::template of<Winograd2, uint16_t> : &Layout::template of<Winograd2, float>;
    default: return bf16 ? &Layout::template of<Winograd4, uint16_t> : &Layout::template of<Winograd4, float>;
  }
}
const WinogradKernel* winograd_rows(bool bf16, int depth_tile);      // contiguous tensors
const WinogradKernel* winograd_channels(bool bf16, int depth_tile);  // channels-last tensors

// product[tile][lane] = or += sum over k of data[tile][k] * weight[k][lane] for `count` tiles and a panel of `vectors`
// (at most kPanelVectors); weight's rows lie side by side. data and product have room for whole register tiles.
void multiply_panel(int64_t vectors, int64_t count, int64_t depth, const float* data, int64_t data_row,
                    const float* weight, float* product, int64_t product_row, bool add);


// A pitch between the points' planes that is an odd number of cache lines: a tile's points are written one to a
// plane, and at a power of two they would all fall into the same few sets of the L1 cache.
INTERFUSE_INLINE int64_t plane_pitch(int64_t floats) { return (round_up(floats, 16) / 16 | 1) * 16; }

// A pitch between rows of channels that is a cache line longer than a power of two: the rows of a register tile are
// read together.
INTERFUSE_INLINE int64_t channel_pitch(int64_t channels) {
  const int64_t floats = round_up(channels, kLanes);
  return floats % 128 == 0 ? floats + 16 : floats;
}

// Filters of one panel, of as equal panels as they can be cut into.
INTERFUSE_INLINE int64_t panel_width(int64_t filters) {
  const int64_t vectors = divide_up(filters, kLanes), panels = divide_up(vectors, kPanelVectors);
  return divide_up(vectors, panels) * kLanes;
}

// Filters of a chunk, rounded up to whole register tiles: the last chunk may be smaller.
INTERFUSE_INLINE int64_t chunk_filters(const WinogradPlan& plan, int64_t chunk, int64_t unit) {
  return round_up(least(plan.chunk, plan.filters - chunk * plan.chunk), unit);
}

// G g along all axes of one filter's taps of one channel, which lie `step` apart as the points will.
template <class Axis, class V>
INTERFUSE_INLINE void weight_tile(const V* taps, V* points, int step) {
  V rows[Axis::taps][3][kTileIn], slices[Axis::taps][kPlane];
  for (int s = 0; s < Axis::taps; ++s) {
    for (int r = 0; r < 3; ++r) weight_along<Winograd4>(taps + (s * 9 + r * 3) * step, step, rows[s][r], 1);
    for (int c = 0; c < kTileIn; ++c) weight_along<Winograd4>(rows[s][0] + c, kTileIn, slices[s] + c, kTileIn);
  }
  for (int i = 0; i < kPlane; ++i) weight_along<Axis>(slices[0] + i, kPlane, points + i * step, kPlane * step);
}

// B' d of the 36 vectors of one slice: source(r * 6 + c) gives them, sink(point, vector) takes.
template <class Source, class Sink>
INTERFUSE_INLINE void data_slice(Source&& source, Sink&& sink) {
  Vec rows[kTileIn][kTileIn];
  unrolled<kTileIn>([&](int v) __attribute__((always_inline)) {
    Vec d[kTileIn], t[kTileIn];
    unrolled<kTileIn>([&](int r) __attribute__((always_inline)) { d[r] = source(r * kTileIn + v); });
    Winograd4::data(d, t);
    unrolled<kTileIn>([&](int r) __attribute__((always_inline)) { rows[r][v] = t[r]; });
  });
  for (int r = 0; r < kTileIn; ++r) {
    Vec t[kTileIn];
    Winograd4::data(rows[r], t);
    unrolled<kTileIn>([&](int i) __attribute__((always_inline)) { sink(r * kTileIn + i, t[i]); });
  }
}

// The tile's place, from its number.
INTERFUSE_INLINE TileRun tile_place(const WinogradPlan& plan, int64_t tile) {
  TileRun run{};
  run.w = tile % plan.tiles.w, tile /= plan.tiles.w;
  run.h = tile % plan.tiles.h, tile /= plan.tiles.h;
  run.d = tile % plan.tiles.d, run.n = tile / plan.tiles.d;
  return run;
}
INTERFUSE_INLINE void next_row(const WinogradPlan& plan, TileRun& run) {
  run.w = 0;
  if (++run.h < plan.tiles.h) return;
  run.h = 0;
  if (++run.d < plan.tiles.d) return;
  run.d = 0, ++run.n;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
