// What the entries of rnn hand to its kernels, on a device or (csrc/tests/emulated_rnn.cpp) without one.
#pragma once

#include <stdint.h>

#include "cuda/rnn_team.h"
#include "interfuse_cuda.h"

namespace interfuse {
namespace cuda {

// `pre` (tokens, directions, gates, hidden) is the input's part of the gates in float32; h0, c0, hn, cn
// (directions, batch, hidden); `gates` (tokens, directions, 4, hidden) and `state` (tokens, directions, hidden), an
// LSTM's c in float32, are written for the backward pass or null. Where no step comes nothing is written to y.
struct RnnForwardArrays {
  const float* pre;
  const void *b_hn, *h0, *c0;
  const int64_t* lengths;
  void *y, *hn, *cn, *gates;
  float* state;
  float* carry;  // between parts of the steps: an LSTM's c, others' h
};

// `grads` (tokens, directions, slots, hidden): before the gates, an LSTM's i f g o, a GRU's n r z n' (n' at the
// recurrent side), an RNN's one. Where no step comes nothing is written.
struct RnnBackwardArrays {
  const void *grad_y, *grad_hn, *grad_cn, *h0, *c0;
  const int64_t* lengths;
  const void *y, *gates;
  const float* state;
  void *grads, *grad_h0, *grad_c0;
  float* carry;  // between parts of the steps: h's gradient through the weights, then the rest (a GRU's) or c's
};

struct RnnLaunch {
  RnnWalk walk;
  RnnTeam team;
  char* workspace;
  void* stream;

  // The first launch finds no packed weights in the workspace.
  bool first(bool backward) const { return backward ? walk.end == walk.steps : walk.begin == 0; }
};

// Of the current device; throws Invalid where there is none.
interfuse_cuda_device current_device();

#define INTERFUSE_DECLARE(arithmetic)                                                           \
  void launch_##arithmetic(const RnnLaunch&, const void* w_hh, const RnnForwardArrays& arrays); \
  void launch_##arithmetic(const RnnLaunch&, const void* w_hh, const RnnBackwardArrays& arrays);
INTERFUSE_DECLARE(bfloat16)
INTERFUSE_DECLARE(float16)
INTERFUSE_DECLARE(tf32)
INTERFUSE_DECLARE(float32)
#undef INTERFUSE_DECLARE

// The definitions for one arithmetic, where a template launch<Kind>(given, backward, w_hh, arrays) is known.
#define INTERFUSE_DEFINE_LAUNCHES(arithmetic, type)                                                     \
  void launch_##arithmetic(const RnnLaunch& given, const void* w_hh, const RnnForwardArrays& arrays) {  \
    launch<Fragments<type, Arithmetic::arithmetic>>(given, false, w_hh, arrays);                        \
  }                                                                                                     \
  void launch_##arithmetic(const RnnLaunch& given, const void* w_hh, const RnnBackwardArrays& arrays) { \
    launch<Fragments<type, Arithmetic::arithmetic>>(given, true, w_hh, arrays);                         \
  }

}  // namespace cuda
}  // namespace interfuse
