// conv_pool's gradients: what the files of the backward pass share. Per-ISA (see common/simd.h).
//
// The work goes strip by strip: a strip is a run of pooling windows (or of the convolution's own pixels) along one
// axis, whole along the others. For a strip, the part of x that its windows touch lies packed as
// [image][d][h][w][channels of a chunk], padding written out as zeros, in a buffer that stays in the second-level
// cache; the gradient of x accumulates in a buffer of the same shape. One offset then names a convolution pixel in both.
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// One nonzero gradient of the convolution's result: where its pixel's first kernel tap lies in the strip, in floats.
struct SparseGradient {
  int32_t offset;
  float value;
};

struct BackwardPlan {
  const ConvPool* p;
  const ConvPoolBackward* a;
  // Sparse: behind max pooling only the winners have a gradient; each is a scalar times a patch of x (or of weights).
  // Dense: the gradient of every convolution pixel is written out, and blocked matrix products do the rest.
  bool sparse;
  int64_t in[3], conv[3], kernel[3], stride[3], dilation[3], pad[3];  // (depth, height, width)
  // Pooling windows; in dense plans the convolution's pixels, as windows of one.
  int64_t count[3], window[3], window_stride[3], window_pad[3];
  bool uncovered_columns;                  // pooling windows leave gaps along the width, or an end
  int axis;                                // strips follow each other along it
  int64_t strip_steps, strip_images;       // windows along the axis, images: the most that a strip holds
  int64_t tile[3];                         // windows of a tile: what of x they touch stays in the first-level cache
  int64_t taps, lanes, chunks;             // lanes: channels of a chunk, a multiple of the vector's
  int64_t k_padded;                        // output channels of a group, rounded up to what the kernels take
  float* packed_weight;                    // sparse [group][chunk][k][tap][lane], dense [group][chunk][tap][k][lane]
  float* grad_weight;                      // [part][group][chunk][k][tap][lane], summed over parts at the end
  double* grad_bias;                       // [part][channel]

  int64_t weight_floats() const { return p->groups * chunks * k_padded * taps * lanes; }
  // First padded coordinate that window `step` of the strips' axis touches, and the first beyond it.
  int64_t touch_begin(int64_t step) const { return first_pixel(step) * stride[axis]; }
  int64_t touch_end(int64_t step) const {
    int64_t end = step * window_stride[axis] - window_pad[axis] + window[axis];
    if (end > conv[axis]) end = conv[axis];
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

// ---- conv_pool_backward_pack.cpp: between the tensors and the packed buffers -------------------------------------

void pack_input(const BackwardPlan&, const Strip&, int64_t channel, int64_t channels, float* to);
// Writes the gradient of x between the padded coordinates begin and end of the plan's axis, whole along the others.
void store_input_gradient(const BackwardPlan&, const Strip&, int64_t channel, int64_t channels, int64_t begin,
                          int64_t end, const float* from);
void pack_weight(const BackwardPlan&, int thread, int threads);
void store_weight_gradient(const BackwardPlan&, int parts, int thread, int threads);

// ---- conv_pool_backward_source.cpp: through pooling and activation ------------------------------------------------

// Tiles of a strip along each axis.
struct Tiles {
  int64_t count[3], total, windows;  // windows: the most that one tile holds
};
Tiles tiles_of(const BackwardPlan&, const Strip&);
// entries[tile][k][windows], counts[tile][k] for the output channels k_begin..k_end of a group.
void list_gradients(const BackwardPlan&, const Strip&, const Tiles&, int64_t group, int64_t k_begin, int64_t k_end,
                    SparseGradient* entries, int32_t* counts, float* row);
// gradient[k block][pixel][kBlock]; pixels in (image, d, h, w) order.
void dense_gradients(const BackwardPlan&, const Strip&, int64_t group, int64_t k_begin, int64_t k_end, float* gradient,
                     float* row);

// ---- the two methods: add to the weight gradient's or the input gradient's buffer of one chunk --------------------

// Output channels that the dense kernels take at once: with two vectors of input channels each, the accumulators of
// 8 (4) fill half of 32 (16) registers, enough to hide the latency of a fused multiply-add.
constexpr int kBlock = kRegisters == 32 ? 8 : 4;

// For the lists of list_gradients; `sums` and `weight` start at the first of those channels' [tap][lane].
void sparse_weight_gradient(const BackwardPlan&, const Strip&, const Tiles&, const SparseGradient* entries,
                            const int32_t* counts, int64_t channels, const float* x, float* sums);
void sparse_input_gradient(const BackwardPlan&, const Strip&, const Tiles&, const SparseGradient* entries,
                           const int32_t* counts, int64_t channels, const float* weight, float* grad_x);
// For dense_gradients' blocks; offsets: where each pixel's first kernel tap lies in the strip, in floats.
void dense_weight_gradient(const BackwardPlan&, const Strip&, const float* gradient, const int32_t* offsets, int64_t pixels,
                           int64_t k_blocks, const float* x, float* sums);
void dense_input_gradient(const BackwardPlan&, const Strip&, const float* gradient, const int32_t* offsets, int64_t pixels,
                          int64_t k_blocks, const float* weight, float* grad_x);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
