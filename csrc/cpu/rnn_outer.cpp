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

// The columns' rows as panels of four vectors and then of one: [panel][token][vector][lane].
void pack_columns(const OuterChunk& chunk, int64_t vectors, float* to) {
  const int64_t fours = vectors / 4;
  for (int64_t token = 0; token < chunk.tokens; ++token) {
    const float* from = chunk.columns[token];
    for (int64_t panel = 0; panel < fours; ++panel) {
      float* row = to + (panel * chunk.tokens + token) * 4 * kLanes;
      for (int v = 0; v < 4; ++v) store(row + v * kLanes, load(from + (panel * 4 + v) * kLanes));
    }
    for (int64_t v = fours * 4; v < vectors; ++v) store(to + (v * chunk.tokens + token) * kLanes, load(from + v * kLanes));
  }
}

// One unit block's gradients, [token][gate][lane], and their sums over the tokens.
void pack_grads(const OuterTarget& to, const OuterChunk& chunk, int64_t block, bool first, float* packed) {
  const int64_t left = to.units - block * kLanes;
  const int width = left < kLanes ? static_cast<int>(left) : kLanes;
  for (int64_t gate = 0; gate < to.gates; ++gate) {
    const float* from = chunk.grads + (block * to.gates + gate) * kLanes;
    float* row = packed + gate * kLanes;
    Vec sum = zero();
    for (int64_t token = 0; token < chunk.tokens; ++token) {
      const Vec value = load(from + token * to.grads_row);
      store(row + token * to.gates * kLanes, value);
      sum += value;
    }
    const int64_t at = gate * to.units + block * kLanes;
    float* const biases[] = {to.bias, to.other_bias};
    for (float* bias : biases)
      if (bias) store_first(bias + at, first ? sum : sum + load_first(bias + at, width), width);
  }
}

}  // namespace

void outer_product(const OuterTarget& to, const OuterChunk& chunk, Range mine, bool first) {
  if (mine.begin >= mine.end) return;
  const int64_t vectors = padded(to.columns) / kLanes, step = to.gates * kLanes;
  float* packed = scratch_floats(Slot::weight, kOuterTokens * (step + vectors * kLanes));
  float* columns = packed + kOuterTokens * step;
  if (to.weight) pack_columns(chunk, vectors, columns);
  for (int64_t block = mine.begin; block < mine.end; ++block) {
    pack_grads(to, chunk, block, first, packed);
    if (!to.weight) continue;
    const int64_t left = to.units - block * kLanes, rows = left < kLanes ? left : kLanes;
    for (int64_t v = 0; v < vectors;) {
      const int64_t panel = vectors - v >= 4 ? 4 : 1, end = to.columns - (v + panel) * kLanes;
      Tile t{chunk.tokens, packed, step, columns + v * chunk.tokens * kLanes, to.weight + block * kLanes * to.columns + v * kLanes,
             to.columns, end < 0 ? static_cast<int>(end + kLanes) : kLanes, first};
      for (int64_t gate = 0; gate < to.gates; ++gate, t.a += kLanes, t.c += to.units * to.columns)
        if (panel == 4)
          tiles<4>(t, rows);
        else
          tiles<1>(t, rows);
      v += panel;
    }
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
