// The families of direct kernels, and what a row of pixels costs in each. Per-ISA (see common/simd.h).
#pragma once

#include "common/conv_pool.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Lanes are output channels. Takes every problem. `pixel_step`: in x, from one pixel of the convolution to the next
// along w, where that does not follow from the problem; else 0.
void conv_pool_channels(const ConvPool& p, const ConvPoolForward& a, int threads, int64_t pixel_step);
// Lanes are columns. Takes every problem.
void conv_pool_columns(const ConvPool& p, const ConvPoolForward& a, int threads);

// Lanes are channels. Takes what has one input and one output channel per group.
void conv_pool_depthwise(const ConvPool& p, const ConvPoolForward& a, int threads);

// Does the images whose flag is set again, sum by sum, which has NaN and infinities as torch has.
void redo_broken(const ConvPool& p, const ConvPoolForward& a, const uint8_t* broken);

// Estimated cycles of one group for one row of the convolution and one step of the reduction.
double conv_pool_channels_cost(const ConvPool& p);
double conv_pool_columns_cost(const ConvPool& p);

INTERFUSE_INLINE double most_of(double a, double b, double c) {
  const double ab = a > b ? a : b;
  return ab > c ? ab : c;
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
