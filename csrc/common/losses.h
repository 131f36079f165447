// The checked losses, as the kernels see them.
#pragma once

#include <stdint.h>

#include "common/isa.h"
#include "interfuse.h"

namespace interfuse {

struct CrossEntropy {
  interfuse_cross_entropy_spec spec;
  interfuse_cross_entropy_tensors in;
  float weights;      // the sum of the classes' weights, or their number
  float denominator;  // of a mean: the sum of the labels' weights; else 1
  float* loss;        // null: the losses are known, only gradients are wanted
  float* lse_out;     // or null
  const float* lse;   // where the losses are known: what lse_out received
  const float* grad_loss;  // one, or with reduction none one for each row; null: one
  interfuse_cross_entropy_gradients grads;
  int threads;

  __attribute__((always_inline)) bool wants_gradients() const { return grads.input || grads.weight || grads.bias; }
  __attribute__((always_inline)) float class_weight(int64_t target) const {
    return in.class_weight ? in.class_weight[target] : 1.f;
  }
};

struct LossKernels {
  void (*cross_entropy)(const CrossEntropy&);
};

struct Elementwise {
  interfuse_elementwise_loss_spec spec;
  const void *input, *target;
  const float *weight, *pos_weight;
  const float* grad_loss;  // null: ones
  float* loss;             // or null
  void* grad;              // or null
  float scale;             // of every element's loss: 1, or for a mean 1 / their number
  int threads;
};

struct Contrastive {
  interfuse_contrastive_spec spec;
  const void *a, *b;
  const float* target;
  float *loss, *slope;
  int threads;
};

struct ContrastiveBackward {
  interfuse_contrastive_spec spec;
  const void *a, *b;
  const float *slope, *grad_loss;
  void *grad_a, *grad_b;
  int threads;
};

struct InfoNce {
  interfuse_info_nce_spec spec;
  const void *a, *b;
  const float* grad_loss;
  float* loss;  // null: backward
  struct {
    float *lse[2], *loss[2];  // of rows and of columns
  } sums;
  float* kept;  // or null
  void *grad_a, *grad_b;
  double* along;  // or null
  int threads;
};

struct InfoNceKernels {
  void (*info_nce)(const InfoNce&);
};

struct PairLossKernels {
  void (*elementwise)(const Elementwise&);
  void (*contrastive)(const Contrastive&);
  void (*contrastive_backward)(const ContrastiveBackward&);
};

#define INTERFUSE_DECLARE(isa) \
  namespace isa {              \
  extern const LossKernels loss_kernels; \
  extern const PairLossKernels pair_loss_kernels; \
  extern const InfoNceKernels info_nce_kernels; \
  }
INTERFUSE_FOR_EACH_ISA(INTERFUSE_DECLARE)
#undef INTERFUSE_DECLARE

}  // namespace interfuse
