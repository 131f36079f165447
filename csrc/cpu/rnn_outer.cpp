// Weight gradients of the recurrent layers. Compiled once per ISA.
#include "cpu/rnn_outer.h"

#include "common/gemm.h"
#include "common/matrix_units.h"
#include "common/scratch.h"
#include "cpu/split_product.h"

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

#if defined(INTERFUSE_SPLIT_PRODUCT)
// With fewer tokens, those of one sequence most of all, too little is left of what the tiles save; with fewer columns their
// width stays empty.
constexpr int64_t kTokensWorthSplitting = 112;

bool worth_splitting(const OuterTarget& to, int64_t tokens) {
  return tokens >= kTokensWorthSplitting && to.columns >= split::kSide && matrix_units();
}

// Sixteen numbers of two tokens that are neighbours, zeros for tokens beyond the last.
template <class At>
INTERFUSE_INLINE void cut_pair(int64_t token, int64_t tokens, At&& at, uint16_t* to) {
  split::cut_across(token < tokens ? at(token) : zero(), token + 1 < tokens ? at(token + 1) : zero(), to);
}

// Weight gradients of the gates' vectors `mine` (a unit block has `gates` of them) on the matrix units.
struct SplitOuter {
  const OuterTarget& to;
  const OuterSource& from;
  int64_t tokens;
  bool first;

  INTERFUSE_INLINE const float* grads(int64_t token, int64_t vector) const {
    return from.grads + token * from.grads_row + vector * kLanes;
  }
  INTERFUSE_INLINE int width(int64_t column) const {
    const int64_t left = to.columns - column;
    return left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
  }

  // The gates' gradients as the first factor: its lines run along the tokens.
  void cut_grads(Range mine, int64_t steps, uint16_t* kept) const {
    for (int64_t v = mine.begin; v < mine.end; ++v)
      for (int64_t step = 0; step < steps; ++step, kept += split::kStep) {
        for (int64_t pair = 0; pair < split::kSide; ++pair)
          cut_pair(step * split::kDepth + 2 * pair, tokens,
                   [&](int64_t token) __attribute__((always_inline)) { return load(grads(token, v)); }, kept + pair * split::kDepth);
        split::turn(kept);
      }
    // The last pair's second panel: what stood there before must not decide how the pair is multiplied.
    if ((mine.end - mine.begin) % 2) memset(kept, 0, static_cast<size_t>(steps * split::kStep) * 2);
  }

  // Four tiles of sums that something infinite or no number has spoilt, as the vector units give them.
  __attribute__((noinline)) void plain_sums(int64_t vector, int64_t column, int64_t vectors, float* sums) const {
    for (int tile = 0; tile < 4; ++tile)
      for (int64_t r = 0; r < split::kSide; ++r, sums += kLanes) {
        const int64_t v = vector + tile / 2, c = column + tile % 2 * kLanes;
        Vec sum = zero();
        for (int64_t token = 0; token < tokens && v < vectors && c < to.columns; ++token)
          sum = multiply_add(splat(grads(token, v)[r]), load_first(from.columns[token] + c, width(c)), sum);
        store(sums, sum);
      }
  }

  INTERFUSE_INLINE void add(int64_t v, int64_t column, const float* sums) const {
    const int64_t unit = v / to.gates * kLanes, left = to.units - unit, rows = left < kLanes ? left : kLanes;
    float* c = to.weight + (v % to.gates * to.units + unit) * to.columns + column;
    const int wide = width(column);
    for (int64_t r = 0; r < rows; ++r, c += to.columns, sums += kLanes)
      store_first(c, first ? load(sums) : load(sums) + load_first(c, wide), wide);
  }

  void run(Range mine) const {
    const int64_t steps = split::steps_of(tokens), each = steps * split::kStep * 2;  // bytes of sixteen rows
    const int64_t most = split::kKept / each / 2 * 2;
    for (int64_t begin = mine.begin; begin < mine.end; begin += most) {
      const Range part{begin, begin + most < mine.end ? begin + most : mine.end};
      const int64_t pairs = (part.end - part.begin + 1) / 2;
      uint16_t* const kept = static_cast<uint16_t*>(scratch(Slot::tiles, static_cast<size_t>(2 * pairs * each)));
      cut_grads(part, steps, kept);
      split::Product product{kept, steps, {0, pairs}, {0, divide_up(to.columns, split::kWide)}, nullptr, nullptr};
      product.streamed = static_cast<uint16_t*>(scratch(Slot::rows, split::kStreamed * 2));
      product.sums = scratch_floats(Slot::products, product.room_for_sums());
      split::multiply_all<false>(
          product,
          [&](int64_t block, int64_t step, int64_t count, int64_t line, uint16_t* at) __attribute__((always_inline)) {
            const int64_t column = block * split::kWide + line / split::kSide * split::kSide, pair = line % split::kSide;
            const int wide = width(column);
            for (int64_t i = 0; i < count; ++i)
              cut_pair((step + i) * split::kDepth + 2 * pair, tokens,
                       [&](int64_t token) __attribute__((always_inline)) { return load_first(from.columns[token] + column, wide); },
                       at + i * split::kStep);
          },
          [&](int64_t block, int64_t pair, const float* sums) __attribute__((always_inline)) {
            const int64_t v = part.begin + 2 * pair, column = block * split::kWide;
            float plain[split::kSums];
            IVec other{};
            for (int64_t i = 0; i < split::kSums; i += kLanes) split::look(load(sums + i), other);
            if (split::any(other)) plain_sums(v, column, part.end, plain), sums = plain;
            for (int tile = 0; tile < 4; ++tile)
              if (v + tile / 2 < part.end && column + tile % 2 * kLanes < to.columns)
                add(v + tile / 2, column + tile % 2 * kLanes, sums + tile * split::kSide * kLanes);
          });
    }
  }
};
#endif

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
  bool done[2] = {};
  for (int i = 0; i < count; ++i) {
    if (!to[i].weight) continue;
#if defined(INTERFUSE_SPLIT_PRODUCT)
    if (worth_splitting(to[i], tokens)) {
      SplitOuter{to[i], from[i], tokens, first}.run({mine.begin * to[i].gates, mine.end * to[i].gates});
      done[i] = true;
      continue;
    }
#endif
    pack_columns(from[i], tokens, to[i].columns, columns[i]);
  }
  for (int64_t block = mine.begin; block < mine.end; ++block)
    for (int i = 0; i < count; ++i) {
      if (i == 0 || from[i].grads != from[i - 1].grads) pack_grads(from[i], tokens, to[i].gates, block, packed);
      if (to[i].bias || to[i].other_bias) add_biases(to[i], packed, tokens, block, first);
      if (to[i].weight && !done[i]) add_block(to[i], packed, columns[i], tokens, block, first);
    }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
