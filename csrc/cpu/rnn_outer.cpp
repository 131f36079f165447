// Weight gradients of the recurrent layers. Compiled once per ISA.
#include "cpu/rnn_outer.h"

#include "common/gemm.h"
#include "common/scratch.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

struct Tile {
  int64_t tokens;
  const float* a;  // [token][a_step]
  int64_t a_step;
  const float* b;  // [token][vector][lane]
  float* c;
  int64_t c_row;
  int width;  // columns of the last vector
  bool first;
};

template <int Rows, int Vectors>
__attribute__((noinline)) void tile(const Tile& t) {
  gemm_tile<Rows, Vectors>(
      t.tokens, t.a, 1, t.a_step, t.b, Vectors * kLanes,
      [&](int r, int v) __attribute__((always_inline)) {
        if (t.first) return zero();
        const float* from = t.c + r * t.c_row + v * kLanes;
        return v < Vectors - 1 || t.width == kLanes ? load(from) : load_first(from, t.width);
      },
      [&](int r, int v, Vec sum) __attribute__((always_inline)) {
        float* to = t.c + r * t.c_row + v * kLanes;
        if (v < Vectors - 1 || t.width == kLanes)
          store(to, sum);
        else
          store_first(to, sum, t.width);
      });
}

// All rows of the gradient that one gate's units in a block are.
template <int Vectors>
void tiles(Tile t, int64_t rows) {
  constexpr int kTall = gemm_tile_rows(4);
  const auto next = [&](int count) __attribute__((always_inline)) { t.a += count, t.c += count * t.c_row, rows -= count; };
  for (; rows >= kTall; next(kTall)) tile<kTall, Vectors>(t);
  if constexpr (kTall > 4)
    for (; rows >= 4; next(4)) tile<4, Vectors>(t);
  if constexpr (kTall > 2)
    for (; rows >= 2; next(2)) tile<2, Vectors>(t);
  for (; rows >= 1; next(1)) tile<1, Vectors>(t);
}

// The columns' rows as panels of four vectors and then of one: [panel][token][vector][lane], zeros beyond the last.
void pack_columns(const OuterSource& from, int64_t tokens, int64_t columns, float* to) {
  const int64_t vectors = padded(columns) / kLanes, fours = vectors / 4;
  const int64_t whole = columns / kLanes;  // vectors that may be read as such
  for (int64_t token = 0; token < tokens; ++token) {
    const float* row = from.columns[token];
    for (int64_t v = 0; v < vectors; ++v) {
      float* at = v < fours * 4 ? to + ((v / 4 * tokens + token) * 4 + v % 4) * kLanes : to + (v * tokens + token) * kLanes;
      store(at, v < whole ? load(row + v * kLanes) : load_first(row + v * kLanes, static_cast<int>(columns - v * kLanes)));
    }
  }
}

// One unit block's gradients, [token][gate][lane].
void pack_grads(const OuterSource& from, int64_t tokens, int64_t gates, int64_t block, float* packed) {
  const float* row = from.grads + block * gates * kLanes;
  for (int64_t token = 0; token < tokens; ++token, row += from.grads_row)
    for (int64_t gate = 0; gate < gates; ++gate, packed += kLanes) store(packed, load(row + gate * kLanes));
}

// Their sums over the tokens.
void add_biases(const OuterTarget& to, const float* packed, int64_t tokens, int64_t block, bool first) {
  const int64_t left = to.units - block * kLanes, step = to.gates * kLanes;
  const int width = left < kLanes ? static_cast<int>(left) : kLanes;
  for (int64_t gate = 0; gate < to.gates; ++gate) {
    Vec sum = zero();
    for (int64_t token = 0; token < tokens; ++token) sum += load(packed + token * step + gate * kLanes);
    const int64_t at = gate * to.units + block * kLanes;
    float* const biases[] = {to.bias, to.other_bias};
    for (float* bias : biases)
      if (bias) store_first(bias + at, first ? sum : sum + load_first(bias + at, width), width);
  }
}

// One unit block's rows of a weight's gradient.
void add_block(const OuterTarget& to, const float* packed, const float* columns, int64_t tokens, int64_t block, bool first) {
  const int64_t left = to.units - block * kLanes, rows = left < kLanes ? left : kLanes;
  const int64_t vectors = padded(to.columns) / kLanes, step = to.gates * kLanes;
  for (int64_t v = 0; v < vectors;) {
    const int64_t panel = vectors - v >= 4 ? 4 : 1, end = to.columns - (v + panel) * kLanes;
    Tile t{tokens, packed, step, columns + v * tokens * kLanes, to.weight + block * kLanes * to.columns + v * kLanes,
           to.columns, end < 0 ? static_cast<int>(end + kLanes) : kLanes, first};
    for (int64_t gate = 0; gate < to.gates; ++gate, t.a += kLanes, t.c += to.units * to.columns)
      if (panel == 4)
        tiles<4>(t, rows);
      else
        tiles<1>(t, rows);
    v += panel;
  }
}

}  // namespace

void outer_products(const OuterTarget* to, const OuterSource* from, int count, int64_t tokens, Range mine, bool first) {
  bool any = false;
  int64_t room = 0;
  for (int i = 0; i < count; ++i) {
    any = any || to[i].weight || to[i].bias || to[i].other_bias;
    room += padded(to[i].columns);
  }
  if (!any || mine.begin >= mine.end) return;
  float* packed = scratch_floats(Slot::weight, kOuterTokens * (to[0].gates * kLanes + room));
  float* columns[2] = {packed + kOuterTokens * to[0].gates * kLanes};
  columns[1] = columns[0] + kOuterTokens * padded(to[0].columns);
  for (int i = 0; i < count; ++i)
    if (to[i].weight) pack_columns(from[i], tokens, to[i].columns, columns[i]);
  for (int64_t block = mine.begin; block < mine.end; ++block)
    for (int i = 0; i < count; ++i) {
      if (i == 0 || from[i].grads != from[i - 1].grads) pack_grads(from[i], tokens, to[i].gates, block, packed);
      if (to[i].bias || to[i].other_bias) add_biases(to[i], packed, tokens, block, first);
      if (to[i].weight) add_block(to[i], packed, columns[i], tokens, block, first);
    }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
