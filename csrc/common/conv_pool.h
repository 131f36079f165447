// The checked conv_pool problem, as the kernels see it. Everything has three dimensions: (depth, height, width).
#pragma once

#include <stdint.h>

#include <string>

#include "common/isa.h"
#include "interfuse.h"

namespace interfuse {

// Always inlined: the per-ISA files include this, and a copy compiled for a newer machine must not be linked in place
// of an older one's. constexpr lets nvcc call them on the device.
#define INTERFUSE_PLAIN __attribute__((always_inline)) constexpr

struct Triple {
  int64_t d, h, w;
  INTERFUSE_PLAIN int64_t volume() const { return d * h * w; }
};

struct ConvPool {
  int64_t batch, in_channels, out_channels, groups;
  int64_t group_in, group_out;  // channels of one group
  Triple in, kernel, stride, dilation, pad_lo, pad_hi;
  Triple conv;  // the convolution's own size
  Triple window, window_stride, window_pad;
  Triple out;  // y's size; equals conv without pooling
  struct {
    int64_t n, c, d, h, w;
  } xs;  // strides of x, in elements
  struct {
    int64_t c, tap;
  } ws;  // strides of the weight and its gradient within a filter, which is dense, in elements
  int dtype, activation, pool;
  float slope;
  bool channels_last, ceil_mode, count_include_pad, highest, save;

  // Offset of an element of a dense tensor of `size` with out_channels channels (y, index, pre), in this layout.
  INTERFUSE_PLAIN int64_t at(const Triple& size, int64_t n, int64_t k, int64_t d, int64_t h, int64_t w) const {
    const int64_t pixel = (d * size.h + h) * size.w + w;
    return channels_last ? (n * size.volume() + pixel) * out_channels + k
                         : (n * out_channels + k) * size.volume() + pixel;
  }

  INTERFUSE_PLAIN int64_t y_count() const { return batch * out_channels * out.volume(); }
  INTERFUSE_PLAIN int64_t conv_count() const { return batch * out_channels * conv.volume(); }
  // gelu and silu are not monotone and their slope does not follow from their value.
  INTERFUSE_PLAIN bool needs_preactivation() const {
    return activation == INTERFUSE_GELU || activation == INTERFUSE_GELU_TANH || activation == INTERFUSE_SILU;
  }
  INTERFUSE_PLAIN int64_t index_count() const { return save && pool == INTERFUSE_POOL_MAX ? y_count() : 0; }
  INTERFUSE_PLAIN int64_t pre_count() const {
    if (!save || activation == INTERFUSE_NONE) return 0;
    if (pool == INTERFUSE_POOL_AVG) return conv_count();
    return needs_preactivation() ? y_count() : 0;
  }
  INTERFUSE_PLAIN bool backward_reads_y() const {
    if (pool == INTERFUSE_POOL_AVG) return false;
    if (activation == INTERFUSE_RELU) return pool == INTERFUSE_POOL_NONE;
    return activation == INTERFUSE_LEAKY_RELU || activation == INTERFUSE_TANH || activation == INTERFUSE_SIGMOID;
  }
};

// Throws Invalid with a full sentence where the spec breaks a rule.
ConvPool checked_conv_pool(const interfuse_conv_pool_spec& spec);

constexpr uint8_t kNoGradient = 255;  // in the index: relu let nothing through this window

struct ConvPoolForward {
  const void* x;
  const void* weight;
  const void* bias;
  void* y;
  uint8_t* index;
  void* pre;
  int threads;
};

struct ConvPoolBackward {
  const void* grad_y;
  const void* x;
  const void* weight;
  const void* y;
  const uint8_t* index;
  const void* pre;
  void* grad_x;
  void* grad_weight;
  void* grad_bias;
  int threads;
};

// What one instruction set offers.
struct ConvPoolKernels {
  void (*matrix)(const ConvPool&, const ConvPoolForward&);
  void (*direct)(const ConvPool&, const ConvPoolForward&);
  void (*winograd)(const ConvPool&, const ConvPoolForward&);
  void (*backward)(const ConvPool&, const ConvPoolBackward&);
  // The name of the method that backward takes; only which gradients are wanted, and threads, are read.
  const char* (*backward_method)(const ConvPool&, const ConvPoolBackward&);
};

// Empty where the matrix units take the problem, else the sentence that says why not.
std::string matrix_why_not(const ConvPool& p);
// Steps of 32 terms that one slice of the kernel takes there.
int64_t matrix_chunks(const ConvPool& p);
constexpr int64_t kMostMatrixSlices = 8;  // of the kernel
// Empty where Winograd takes the problem, else the sentence that says why not.
std::string winograd_why_not(const ConvPool& p);
// Whether its transposed form gives the gradients too.
bool winograd_has_gradients(const ConvPool& p);
// The results along depth that one Winograd tile holds: 1, 2 or 4.
int winograd_depth_tile(const ConvPool& p);

#define INTERFUSE_DECLARE(isa) \
  namespace isa {              \
  extern const ConvPoolKernels conv_pool_kernels; \
  }
INTERFUSE_FOR_EACH_ISA(INTERFUSE_DECLARE)
#undef INTERFUSE_DECLARE

}  // namespace interfuse
