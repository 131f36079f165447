// Weights in the order in which the recurrent kernels read them. Per-ISA (see common/simd.h).
#pragma once

#include "cpu/rnn_cells.h"
#include "cpu/rnn_shapes.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// w (gates * units, depth), as torch keeps it, to [unit block][k][gate][lane]; lanes beyond the last unit are zero.
template <class W>
INTERFUSE_INLINE void pack_gates(const float* w, int64_t gates, int64_t units, int64_t depth, int64_t first_block,
                                 int64_t end_block, W* to) {
  for (int64_t block = first_block; block < end_block; ++block) {
    W* panel = to + block * depth * gates * kLanes;
    for (int64_t gate = 0; gate < gates; ++gate)
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t unit = block * kLanes + lane;
        W* out = panel + gate * kLanes + lane;
        if (unit < units) {
          const float* row = w + (gate * units + unit) * depth;
          for (int64_t k = 0; k < depth; ++k) put(out + k * gates * kLanes, row[k]);
        } else {
          for (int64_t k = 0; k < depth; ++k) put(out + k * gates * kLanes, 0.f);
        }
      }
  }
}

// The same weight for products with the gates' gradient: [panel of columns][unit block, gate, lane][column of the panel].
// A panel has Panel vectors; the last one has what is left.
template <int Panel>
INTERFUSE_INLINE void pack_gates_transposed(const float* w, int64_t gates, int64_t units, int64_t columns,
                                            int64_t first_block, int64_t end_block, float* to) {
  const int64_t depth = padded(units) * gates, blocks = padded(columns) / kLanes;
  for (int64_t block = first_block; block < end_block; ++block) {
    const int64_t panel = block / Panel * Panel, vectors = blocks - panel < Panel ? blocks - panel : Panel;
    float* column = to + panel * depth * kLanes + (block - panel) * kLanes;
    const int64_t step = vectors * kLanes, left = columns - block * kLanes;
    const int width = left < kLanes ? static_cast<int>(left) : kLanes;
    if (units % kLanes)  // the lanes beyond the last unit are never written below
      for (int64_t k = 0; k < depth; ++k) store(column + k * step, zero());
    for (int64_t gate = 0; gate < gates; ++gate)
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t k = (unit / kLanes * gates + gate) * kLanes + unit % kLanes;
        store(column + k * step, load_first(w + (gate * units + unit) * columns + block * kLanes, width));
      }
  }
}

// The bias that the input's product starts with, [unit block][gate][lane], and the one that the recurrent sum of the
// cell's last gate starts with (GRU), [unit block][lane].
template <class Cell>
INTERFUSE_INLINE void pack_bias(const Rnn& p, const interfuse_rnn_weights& w, float* input, float* recurrent) {
  const int64_t units = padded(p.hidden);
  memset(input, 0, static_cast<size_t>(units) * Cell::kGates * 4);
  memset(recurrent, 0, static_cast<size_t>(units) * 4);
  if (!p.bias) return;
  for (int64_t gate = 0; gate < Cell::kGates; ++gate)
    for (int64_t unit = 0; unit < p.hidden; ++unit) {
      const int64_t from = gate * p.hidden + unit;
      const bool apart = Cell::kTwoSums && gate == Cell::kGates - 1;
      input[(unit / kLanes * Cell::kGates + gate) * kLanes + unit % kLanes] = w.b_ih[from] + (apart ? 0.f : w.b_hh[from]);
      if (apart) recurrent[unit] = w.b_hh[from];
    }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
