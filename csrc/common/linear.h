// The checked linear problem, as the kernels see it.
//
// The depth of the product, the inputs one behind the other, is cut into blocks, and a block into pieces that lie in one
// input each: a tile adds up all pieces of a block in registers, so several inputs cost no more than one.
#pragma once

#include <stdint.h>

#include "common/isa.h"
#include "interfuse.h"

namespace interfuse {

struct LinearInput {
  int64_t width, row_stride;
  int64_t column;  // of the weight, where this input's part begins
};

struct LinearPiece {
  int64_t input, offset;  // the input, and where in its rows the piece begins
  int64_t column, depth;  // of the weight
};

struct Linear {
  int64_t rows, outputs, depth;
  int dtype, weight_dtype, activation;
  float slope;
  bool save;
  const LinearInput* inputs;
  int64_t input_count;
  const LinearPiece* pieces;
  const int64_t* block_ends;  // block b is pieces block_ends[b - 1] (0 for the first) to block_ends[b]
  int64_t blocks;

  __attribute__((always_inline)) int64_t count() const { return rows * outputs; }
  // gelu and silu are not monotone: their slope does not follow from their value.
  __attribute__((always_inline)) bool needs_preactivation() const {
    return activation == INTERFUSE_GELU || activation == INTERFUSE_GELU_TANH || activation == INTERFUSE_SILU;
  }
  __attribute__((always_inline)) bool backward_reads_y() const {
    return activation != INTERFUSE_NONE && !needs_preactivation();
  }
};

struct LinearForward {
  const void* const* inputs;
  interfuse_linear_weights weights;
  void* y;
  void* pre;
  int threads;
};

struct LinearBackward {
  const void* grad_y;
  const void* const* inputs;
  const void* weight;
  const void* y;
  const void* pre;
  void* const* grad_inputs;
  void* grad_weight;
  void* grad_bias;
  int threads;
};

struct LinearKernels {
  void (*forward)(const Linear&, const LinearForward&);
  void (*backward)(const Linear&, const LinearBackward&);
};

#define INTERFUSE_DECLARE(isa) \
  namespace isa {              \
  extern const LinearKernels linear_kernels; \
  }
INTERFUSE_FOR_EACH_ISA(INTERFUSE_DECLARE)
#undef INTERFUSE_DECLARE

}  // namespace interfuse
