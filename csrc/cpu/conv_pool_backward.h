// conv_pool's gradients: what the files of the backward pass share. Per-ISA (see common/simd.h).
//
// The work goes strip by strip: a strip is a run of pooling windows (or of the convolution's own pixels) along one
// axis, whole along the others. For a strip, the part of x that its windows touch lies packed, padding written out as
// zeros, in a buffer that stays in the second-level cache; the gradient of x accumulates in a buffer of the same shape.
// One offset then names a convolution pixel in both.
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

enum class Method {
  // Behind max pooling only the winners have a gradient; each is a scalar times a patch of x (or of weights).
  sparse,
  // The gradient of every convolution pixel is written out, and blocked matrix products do the rest.
  dense,
  // As dense, but with vectors along the width, for few input channels.
  planes,
  // As sparse, for few input channels: a patch of x, of all channels and taps, is a few vectors.
  patches,
  // As dense, but in the points of Winograd's tiles.
  winograd
};

struct BackwardPlan {
  const ConvPool* p;
  const ConvPoolBackward* a;
  Method method;
  int64_t in[3], conv[3], kernel[3], stride[3], dilation[3], pad[3];  // (depth, height, width)
  // Pooling windows for sparse and patches; the convolution's pixels, as windows of one, or winograd's tiles.
  int64_t count[3], window[3], window_stride[3], window_pad[3];
  bool uncovered_columns;                 // pooling windows leave gaps along the width, or an end
  int axis;                               // strips follow each other along it
  int64_t strip_steps, strip_images;      // windows along the axis, images: the most that a strip holds
  int64_t tile[3];                        // windows of a tile: what of x they touch stays in the first-level cache
  int64_t unit_groups, units;             // groups that a strip's buffers hold at once: one, but for planes
  int64_t taps, lanes, chunks;            // lanes: channels of a chunk, a multiple of the vector's
  int depth_points;                       // winograd: points of a tile along the depth
  int64_t panel;                          // winograd: input channels of a register tile
  int64_t patch;                          // patches: floats of one, in whole vectors
  int64_t k_padded;                       // output channels of a group, rounded up to what the kernels take
  // sparse [group][chunk][k][tap][lane], dense [group][chunk][tap][k][lane], planes [group][tap][k][c],
  // patches [k][place in the patch], winograd [group][point][panel of c][k][c of the panel]
  float* packed_weight;
  // [part][group][chunk][k][tap][lane], planes [part][group][k][c][tap][vector lane], winograd
  // [part][group][point][k][c], patches [part][k][place in the patch]; parts and planes' lanes are summed at the end.
  float* grad_weight;
  double* grad_bias;                      // [part][channel]
  uint8_t* broken;                        // winograd: set where a gradient came out that is not finite

  int64_t weight_floats() const {
    if (method == Method::planes) return p->out_channels * p->group_in * taps * kLanes;
    if (method == Method::patches) return p->out_channels * patch;
    return p->groups * chunks * k_padded * lanes * (method == Method::winograd ? depth_points * 36 : taps);
  }
  // Strips hold one plane of x per channel, not pixels of channels.
  bool in_planes() const { return method == Method::planes || method == Method::patches; }
  // The convolution's pixels along an axis: winograd's tiles are whole, even if they reach beyond.
  int64_t extent(int i) const { return method == Method::winograd ? count[i] * window[i] : conv[i]; }
  void mark_broken() const { __atomic_store_n(broken, uint8_t(1), __ATOMIC_RELAXED); }
  // First padded coordinate that window `step` of the strips' axis touches, and the first beyond it.
  int64_t touch_begin(int64_t step) const { return first_pixel(step) * stride[axis]; }
  int64_t touch_end(int64_t step) const {
    int64_t end = step * window_stride[axis] - window_pad[axis] + window[axis];
    if (end > extent(axis)) end = extent(axis);
    return (end - 1) * stride[axis] + reach(axis);
  }
  int64_t first_pixel(int64_t step) const {
    int64_t pixel = step * window_stride[axis] - window_pad[axis];
    return pixel < 0 ? 0 : pixel;
  }
  int64_t reach(int i) const { return (kernel[i] - 1) * dilation[i] + 1; }
};

struct Strip {
  int64_t image, images, begin, end;  // windows begin..end along the plan's axis
  int64_t lo[3], size[3];             // the box of the padded input that they touch
  int64_t step[3], image_step, floats;  // distances in a chunk's buffer
};

// ---- conv_pool_backward_strips.cpp: the way through the strips ----------------------------------------------------

// What one thread does: windows (of all images) begin..end along the plan's axis, for units of groups and, where
// grad_x is not wanted, for some of their output channels.
struct Task {
  int64_t begin, end, unit_begin, unit_end, k_begin, k_end;
  bool grad_x;
  float* grad_weight;  // NULL: not wanted
  double* grad_bias;
};
void run_strips(const BackwardPlan&, const Task&);
// Of a chunk's buffer for the largest strip.
int64_t largest_strip_floats(const BackwardPlan&);

// ---- conv_pool_backward_pack.cpp: between the tensors and the packed buffers -------------------------------------

void pack_input(const BackwardPlan&, const Strip&, int64_t channel, int64_t channels, float* to);
// Writes the gradient of x between the padded coordinates begin and end of the plan's axis, whole along the others.
void store_input_gradient(const BackwardPlan&, const Strip&, int64_t channel, int64_t channels, int64_t begin,
                          int64_t end, const float* from);
void pack_weight(const BackwardPlan&, int thread, int threads);
void store_weight_gradient(const BackwardPlan&, int parts, int thread, int threads);

// ---- conv_pool_backward_lists.cpp, _sparse.cpp: only the winners of max pooling ------------------------------------

// The nonzero gradients of a strip by tile and output channel: where in the strip's buffers the first kernel tap of
// each one's pixel lies, in bytes, and its value. List (tile, channel) has `capacity` places, counts[tile][channel] are
// taken.
struct SparseLists {
  int64_t tiles[3], tile_count, channels, capacity;
  int32_t* counts;
  int32_t* offsets;
  float* values;
};

// All but the pointers.
void plan_lists(const BackwardPlan&, const Strip&, int64_t channels, SparseLists*);
void list_gradients(const BackwardPlan&, const Strip&, int64_t first_channel, const SparseLists&);
// Add to one chunk's buffer; `sums` and `weight` start at the [tap][lane] of the lists' first channel.
void sparse_weight_gradient(const BackwardPlan&, const Strip&, const SparseLists&, const float* x, float* sums);
void sparse_input_gradient(const BackwardPlan&, const Strip&, const SparseLists&, const float* weight, float* grad_x);

// ---- conv_pool_backward_pixels.cpp, _dense.cpp: all pixels of the convolution --------------------------------------

// Output channels that the dense kernels take at once: with two vectors of input channels each, the accumulators of
// 8 (4) fill half of 32 (16) registers, enough to hide the latency of a fused multiply-add.
constexpr int kBlock = kRegisters == 32 ? 8 : 4;

// gradient[k block][pixel][kBlock] for output channels first.. of the tensor; pixels in (image, d, h, w) order. `row`
// is working space.
void dense_gradients(const BackwardPlan&, const Strip&, int64_t first_channel, int64_t channels, float* gradient,
                     float* row);
// Add to one chunk's buffer. offsets: where each pixel's first kernel tap lies in the strip, in floats.
void dense_weight_gradient(const BackwardPlan&, const Strip&, const float* gradient, const int32_t* offsets,
                           int64_t pixels, int64_t k_blocks, const float* x, float* sums);
void dense_input_gradient(const BackwardPlan&, const Strip&, const float* gradient, const int32_t* offsets,
                          int64_t pixels, int64_t k_blocks, const float* weight, float* grad_x);

// ---- conv_pool_backward_planes.cpp, _planes_pack.cpp: few input channels -------------------------------------------

// Where things lie in a strip's planes: x and grad_x [channel][image][d][h][phase][column], the gradient
// [image][d][h][k][column] with `left` zeros before each row.
struct Planes {
  int64_t columns, shift;                        // of one phase, rounded up to vectors; the most that a tap shifts by
  int64_t phase, row, slice, image, channel;     // distances in x
  int64_t first[3], pixels[3];                   // the convolution's pixels of the strip
  int64_t left, gradient_channel, gradient_row;  // distances in the gradient
  int64_t gradient_floats() const { return pixels[0] * pixels[1] * gradient_row; }  // of one image
};
Planes planes_of(const BackwardPlan&, const Strip&, int64_t out_channels);
void pack_planes(const BackwardPlan&, const Strip&, const Planes&, int64_t channel, int64_t channels, float* to,
                 float* row);
void store_planes(const BackwardPlan&, const Strip&, const Planes&, int64_t channel, int64_t channels, int64_t begin,
                  int64_t end, const float* from, float* row);
void planes_gradients(const BackwardPlan&, const Strip&, const Planes&, int64_t first_channel, int64_t channels,
                      float* gradient, float* row);
// One group's share, all from its first channel on; `channels` output channels.
void planes_weight_gradient(const BackwardPlan&, const Strip&, const Planes&, const float* gradient, int64_t channels,
                            const float* x, float* sums);
// `sources`: working space for one entry per kernel tap.
struct PlaneSource {
  const float* gradient;
  const float* weight;
};
void planes_input_gradient(const BackwardPlan&, const Strip&, const Planes&, const float* gradient, int64_t channels,
                           const float* weight, float* grad_x, PlaneSource* sources);

// ---- conv_pool_backward_patches.cpp: few input channels, only the winners of max pooling ----------------------------

// The most vectors of a patch, of all input channels and taps.
constexpr int kMostPatchVectors = kLanes == 16 ? 6 : 8;

int64_t patches_floats(const BackwardPlan&, int64_t channels);  // of the working space
// Adds to the sums of output channels first.. and to the strip's planes of grad_x; any may be NULL.
void patches_gradients(const BackwardPlan&, const Strip&, const Planes&, int64_t first_channel, int64_t channels,
                       const float* x, float* sums, float* grad_x, double* biases, float* memory);

// ---- conv_pool_backward_winograd.cpp, _winograd_pack.cpp: the points of Winograd's tiles ---------------------------

// The tiles of a strip, their windows of pooling (single pixels without), and where their points lie.
struct TileStrip {
  int64_t images, tiles[3], count;                 // along each axis, and in all
  int64_t windows[3], first_window[3], k_lanes;    // values and places are [image][d][h][w][k_lanes]
  int64_t slice_windows;                           // from one depth to the next
  int64_t k_row, k_plane, c_row, c_plane;          // from tile to tile and from point to point of the gradient and of x
  int64_t slices_floats;                           // of the strip transformed along the depth
  int64_t window_floats() const { return images * windows[0] * slice_windows; }
};
TileStrip tiles_of(const BackwardPlan&, const Strip&);
int64_t winograd_floats(const TileStrip&);  // of winograd_gradients' working space
// The product of the rows behind the last tile is not used, but must not be slow.
void clear_spare_rows(const TileStrip&, float* memory);
// The gradients of `run` windows side by side, whose first output is element `first`, and their winners' places in them
// (kNoGradient or anything where relu let nothing through), as [window][k_lanes].
void window_row(const BackwardPlan&, int64_t first, int64_t channels, int64_t run, int64_t k_lanes, float* values,
                int32_t* places);
// The same of every window of a strip.
void window_gradients(const BackwardPlan&, const Strip&, const TileStrip&, int64_t first_channel, int64_t channels,
                      float* values, int32_t* places);
// Adds to one group's sums and to the strip's grad_x; either may be NULL.
void winograd_gradients(const BackwardPlan&, const Strip&, const TileStrip&, const float* values, const int32_t* places,
                        const float* x, const float* weight, float* sums, float* grad_x, float* memory);
// Transforms the weight; transforms the weight's gradient back and says whether it is finite.
struct TileKernel {
  void (*pack_weight)(const BackwardPlan&, int thread, int threads);
  bool (*store_weight_gradient)(const BackwardPlan&, int parts, int thread, int threads);
};
TileKernel tile_kernel(const BackwardPlan&);
// Of values times zero, summed up: were the values finite?
bool is_finite(Vec sum_of_zeros);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
