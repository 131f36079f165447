// The checked recurrent problem and the order in which its tokens are worked on.
//
// Rows are sorted by falling length, so that at every step the active sequences are the first ones, and only real
// tokens exist: step s has active[s] rows, and row j of step s is token first[s] + j. The backward direction walks
// each sequence from its own end, so the same numbers serve both directions; only the time that a step stands for
// differs (see time_of). A batch may be dealt out to several such orders, which then run apart.
#pragma once

#include <stdint.h>

#include "common/isa.h"
#include "interfuse.h"

namespace interfuse {

constexpr int kMostRnnThreads = 64;

struct Rnn {
  int cell, directions;
  bool bias, save, batch_first, half_weights;
  bool rounded_weights;  // the same values as half_weights, in words of float32; the kernels choose between the two
  bool pieces;  // the weights are kept in pieces too, for the matrix units; the kernels choose that
  int64_t batch, steps, input, hidden, projection, layers;
  int64_t x_step, x_row, vocabulary;

  __attribute__((always_inline)) int64_t output() const { return projection ? projection : hidden; }
  __attribute__((always_inline)) int64_t gates() const {
    return cell == INTERFUSE_LSTM ? 4 : cell == INTERFUSE_GRU ? 3 : 1;
  }
  __attribute__((always_inline)) int64_t layer_input(int64_t layer) const {
    return layer == 0 ? input : directions * output();
  }
};

Rnn checked_rnn(const interfuse_rnn_spec& spec);

struct RnnOrder {
  const int64_t* row;     // of the batch, for sorted row j
  const int64_t* length;  // of sorted row j
  const int64_t* active;  // rows of step s; active[steps] = 0
  const int64_t* first;   // token number of step s's row 0
  int64_t rows;
  int64_t steps;   // the longest sequence's
  int64_t tokens;
  int64_t before;  // tokens of the parts before this one

  __attribute__((always_inline)) int64_t time_of(int direction, int64_t s, int64_t j) const {
    return direction == 0 ? s : length[j] - 1 - s;
  }
};

// The whole batch. Several parts are worked on by a thread each, without a word between them; the threads of a single
// part share out the hidden units and meet at every step.
struct RnnParts {
  const RnnOrder* part;
  int64_t count, tokens;
};

struct RnnForward {
  const interfuse_rnn_sequences* in;
  const interfuse_rnn_weights* weights;
  float *y, *hn, *cn, *reserve;
  int threads;
  const float* gate_table;  // the input's share of the first layer's gates by direction and token id, or null
};

struct RnnBackward {
  const interfuse_rnn_sequences* in;
  const interfuse_rnn_weights* weights;
  const float *reserve, *grad_y, *grad_hn, *grad_cn;
  float *grad_x, *grad_h0, *grad_c0;
  const interfuse_rnn_weights* grad_weights;
  int threads;
};

struct RnnKernels {
  int64_t (*reserve)(const Rnn&, int64_t tokens);
  void (*forward)(const Rnn&, const RnnParts&, const RnnForward&);
  void (*backward)(const Rnn&, const RnnParts&, const RnnBackward&);
};

#define INTERFUSE_DECLARE(isa) \
  namespace isa {              \
  extern const RnnKernels rnn_kernels; \
  }
INTERFUSE_FOR_EACH_ISA(INTERFUSE_DECLARE)
#undef INTERFUSE_DECLARE

}  // namespace interfuse
