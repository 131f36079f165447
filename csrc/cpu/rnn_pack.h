// Weights in the order in which the recurrent kernels read them. Per-ISA (see common/simd.h).
#pragma once

#include "common/transpose.h"
#include "cpu/rnn_cells.h"
#include "cpu/rnn_products.h"
#include "cpu/rnn_shapes.h"
#include "cpu/rnn_split.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Rows w[0..rows), `depth` floats each, become the lanes of one vector: to[k * step + lane], k in pairs where halves.
// Lanes without a row are zero.
INTERFUSE_INLINE void pack_vector(const float* w, int64_t rows, int64_t depth, Packing packing, float* to, int64_t step) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    const int count = static_cast<int>(depth - k < kLanes ? depth - k : kLanes);
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      if (j >= rows)
        block[j] = zero();
      else
        block[j] = count == kLanes ? load(w + j * depth + k) : load_first(w + j * depth + k, count);
    }
    transpose(block);
    if (packing.half) {
      for (int j = 0; j < count; j += 2) {
        const Vec odd = j + 1 < count ? block[j + 1] : zero();
        store(to + (k + j) / 2 * step, (Vec)(bf16_bits(block[j]) | (bf16_bits(odd) << 16)));
      }
    } else {
      for (int j = 0; j < count; ++j)
        store(to + (k + j) * step, packing.rounded ? (Vec)(bf16_bits(block[j]) << 16) : block[j]);
    }
  }
}

// Where vector `vector` of a packed weight starts, and the distance of its k.
struct PackPlace {
  int64_t at, step;
  INTERFUSE_INLINE PackPlace(Packing packing, int64_t vectors, int64_t depth, int64_t vector) {
    const int64_t panel = packing.panel > 1 ? packing.panel : vector / 4 < vectors / 4 ? 4 : 1;
    at = (vector / panel * panel * packing.words(depth) + vector % panel) * kLanes;
    step = panel * kLanes;
  }
};

// Vectors of w (gates * units, depth), as torch keeps it; vector (block, gate) is number block * gates + gate.
inline void pack_gates(const float* w, int64_t gates, int64_t units, int64_t depth, Packing packing, Range vectors, float* to) {
  const int64_t all = padded(units) / kLanes * gates;
  for (int64_t v = vectors.begin; v < vectors.end; ++v) {
    const PackPlace place(packing, all, depth, v);
    const int64_t unit = v / gates * kLanes;
    pack_vector(w + (v % gates * units + unit) * depth, units - unit, depth, packing, to + place.at, place.step);
  }
}

// The same weight for products with the gates' gradient: its vectors are columns, its k is [unit block][gate][lane]. `mine`
// are whole panels: of four vectors, as many as there are, then of one.
inline void pack_gates_transposed(const float* w, int64_t gates, int64_t units, int64_t columns, Range mine, float* to) {
  const int64_t depth = padded(units) * gates, vectors = padded(columns) / kLanes;
  for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
    const int64_t fours = vectors / 4, count = panel < fours ? 4 : 1, v = panel < fours ? panel * 4 : fours * 3 + panel;
    const int64_t left = columns - (v + count - 1) * kLanes, last = (count - 1) * kLanes;
    const int width = left < kLanes ? static_cast<int>(left) : kLanes;
    float* place = to + v * depth * kLanes;
    if (units % kLanes)  // the lanes beyond the last unit are never written below
      memset(place, 0, static_cast<size_t>(count * depth * kLanes) * 4);
    for (int64_t gate = 0; gate < gates; ++gate)
      for (int64_t unit = 0; unit < units; ++unit) {
        const float* from = w + (gate * units + unit) * columns + v * kLanes;
        float* row = place + ((unit / kLanes * gates + gate) * kLanes + unit % kLanes) * count * kLanes;
        for (int64_t i = 0; i < last; i += kLanes) store(row + i, load(from + i));
        store(row + last, width == kLanes ? load(from + last) : load_first(from + last, width));
      }
  }
}

// What the gates start with, [unit block][slot][lane]: the biases' sum; but where the cell keeps the two products of its
// last gate apart, the recurrent one's in the last gate's own slot and the input's in the slot behind.
template <class Cell>
INTERFUSE_INLINE void pack_bias(const Rnn& p, const interfuse_rnn_weights& w, float* to) {
  memset(to, 0, static_cast<size_t>(padded(p.hidden)) * Cell::kSlots * 4);
  if (!p.bias) return;
  for (int64_t gate = 0; gate < Cell::kGates; ++gate)
    for (int64_t unit = 0; unit < p.hidden; ++unit) {
      const int64_t from = gate * p.hidden + unit;
      float* slot = to + (unit / kLanes * Cell::kSlots + gate) * kLanes + unit % kLanes;
      if (Cell::kTwoSums && gate == Cell::kGates - 1)
        slot[0] = w.b_hh[from], slot[kLanes] = w.b_ih[from];
      else
        slot[0] = w.b_ih[from] + w.b_hh[from];
    }
}

// All of a stack's weights for the forward pass, one (layer, direction) after the other.
template <class Cell>
class ForwardWeights {
 public:
  struct Of {
    const float *w_ih, *w_hh, *w_hr, *bias;
    const float *ih_pieces, *hh_pieces;  // null without
  };

  INTERFUSE_INLINE explicit ForwardWeights(const Rnn& p) : p_(p) {
    w_hh_ = recurrent().floats(vectors(), p.output());
    w_hr_ = p.projection ? kPlain.floats(padded(p.projection) / kLanes, p.hidden) : 0;
    bias_ = padded(p.hidden) * Cell::kSlots;
  }

  static constexpr Packing kPlain{1, false};
  static constexpr Packing input() { return {Cell::kGates > 1 ? Cell::kGates : 1, false}; }
  INTERFUSE_INLINE Packing recurrent() const { return {input().panel, p_.half_weights, p_.rounded_weights}; }
  INTERFUSE_INLINE int64_t vectors() const { return padded(p_.hidden) / kLanes * Cell::kGates; }

  INTERFUSE_INLINE int64_t floats() const {
    return p_.directions * (size(0) + (p_.layers > 1 ? (p_.layers - 1) * size(1) : 0));
  }
  INTERFUSE_INLINE Of at(const float* base, int64_t layer, int d) const {
    const float* one = base + (layer ? p_.directions * (size(0) + (layer - 1) * size(1)) + d * size(1) : d * size(0));
    Of of{one + w_hh_ + w_hr_ + bias_, one, one + w_hh_, one + w_hh_ + w_hr_, nullptr, nullptr};
    if (!p_.pieces) return of;
    of.hh_pieces = of.w_ih + input().floats(vectors(), p_.layer_input(layer));
    of.ih_pieces = of.hh_pieces + split_floats(vectors(), p_.output());
    return of;
  }

  // This thread's share of them.
  void fill(const interfuse_rnn_weights* weights, float* base, int thread, int threads) const {
    for (int64_t layer = 0; layer < p_.layers; ++layer)
      for (int d = 0; d < p_.directions; ++d) {
        const interfuse_rnn_weights& w = weights[layer * p_.directions + d];
        const Of to = at(base, layer, d);
        const Range mine = share(vectors(), thread, threads);
        pack_gates(w.w_ih, Cell::kGates, p_.hidden, p_.layer_input(layer), input(), mine, const_cast<float*>(to.w_ih));
        pack_gates(w.w_hh, Cell::kGates, p_.hidden, p_.output(), recurrent(), mine, const_cast<float*>(to.w_hh));
        if (p_.pieces) {
          split_weight(input(), vectors(), p_.layer_input(layer), mine, to.w_ih, const_cast<float*>(to.ih_pieces));
          split_weight(recurrent(), vectors(), p_.output(), mine, to.w_hh, const_cast<float*>(to.hh_pieces));
        }
        if (p_.projection)
          pack_gates(w.w_hr, 1, p_.projection, p_.hidden, kPlain, share(padded(p_.projection) / kLanes, thread, threads),
                     const_cast<float*>(to.w_hr));
        if (thread == 0) pack_bias<Cell>(p_, w, const_cast<float*>(to.bias));
      }
  }

 private:
  INTERFUSE_INLINE int64_t size(int64_t layer) const {
    const int64_t floats = w_hh_ + w_hr_ + bias_ + input().floats(vectors(), p_.layer_input(layer));
    if (!p_.pieces) return floats;
    return floats + split_floats(vectors(), p_.output()) + split_floats(vectors(), p_.layer_input(layer));
  }
  const Rnn& p_;
  int64_t w_hh_, w_hr_, bias_;
};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
