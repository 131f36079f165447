// How the recurrent kernels lay out what they keep: everything padded to whole vectors, the gates of a unit block side
// by side. Per-ISA (see common/simd.h).
#pragma once

#include "common/parallel.h"
#include "common/rnn.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

INTERFUSE_INLINE int64_t padded(int64_t count) { return round_up(count, kLanes); }

// What one (layer, direction) keeps of a whole batch, in step order: for each token the gates, the cell state, the
// hidden state before a projection, and the output.
template <class Cell>
struct RnnLayout {
  int64_t units, outputs;  // padded
  int64_t gate_row;        // floats of one token's gates
  int64_t gates, cell, hidden, output, total;  // offsets

  RnnLayout(const Rnn& p, int64_t tokens) : units(padded(p.hidden)), outputs(padded(p.output())) {
    gate_row = units * Cell::kSlots;
    gates = 0;
    cell = gates + tokens * gate_row;
    hidden = cell + (Cell::kCell ? tokens * units : 0);
    output = hidden + (p.projection ? tokens * units : 0);
    total = output + tokens * outputs;
  }
};

// One token's input to a layer: a row of x, of the embedding table, or the two directions' outputs of the layer below.
struct RnnInput {
  const Rnn& p;
  const RnnOrder& order;
  const interfuse_rnn_sequences* in;
  const float* below[2];  // outputs of the layer below by direction; null in the first layer
  int64_t below_row;

  // Where the tokens' inputs from step s on already lie `row` floats apart, or null.
  INTERFUSE_INLINE const float* rows(int direction, int64_t s, int64_t& row) const {
    if (below[0]) {
      row = below_row;
      return p.directions == 1 ? below[0] + order.first[s] * below_row : nullptr;
    }
    row = p.x_step;
    return direction == 0 && order.rows == 1 && !p.vocabulary ? in->x + order.row[0] * p.x_row + s * p.x_step : nullptr;
  }

  // Row j of step s where it lies in one piece, or null.
  INTERFUSE_INLINE const float* row(int direction, int64_t s, int64_t j) const {
    if (below[0]) return p.directions == 1 ? below[0] + (order.first[s] + j) * below_row : nullptr;
    const int64_t at = order.time_of(direction, s, j) * p.x_step + order.row[j] * p.x_row;
    return in->x + (p.vocabulary ? in->ids[at] * p.input : at);
  }

  INTERFUSE_INLINE void copy(int direction, int64_t s, int64_t j, float* to) const {
    if (!below[0]) {
      memcpy(to, row(direction, s, j), static_cast<size_t>(p.input) * 4);
      return;
    }
    const int64_t t = order.time_of(direction, s, j);
    for (int d = 0; d < p.directions; ++d) {
      // The step at which direction d stood at time t.
      const int64_t step = d == 0 ? t : order.length[j] - 1 - t;
      memcpy(to + d * p.output(), below[d] + (order.first[step] + j) * below_row, static_cast<size_t>(p.output()) * 4);
    }
  }
};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
