// The recurrent kernels' products on the processor's matrix units. Compiled once per ISA.
#include "cpu/rnn_split.h"

#include "common/matrix_units.h"
#include "common/scratch.h"
#include "cpu/rnn_pack.h"
#include "cpu/split_product.h"

namespace interfuse {
namespace INTERFUSE_ISA {

#if defined(INTERFUSE_SPLIT_PRODUCT)
namespace {

// The matrix units take about the same time for any number of rows up to sixteen, and more than the vector units for few.
constexpr int64_t kRowsWorthSplitting = 12;
// Floats of a weight whose pieces, one and a half times as large, stay in the second-level cache.
constexpr int64_t kFloatsWorthSplitting = 192 << 10;

struct SplitProduct {
  const float* pieces;
  int64_t all;
  Packing packing;
  int64_t whole, skipped;
  const Product& p;
  int64_t first, vectors;

  INTERFUSE_INLINE int64_t steps() const { return split::steps_of(whole); }
  INTERFUSE_INLINE const uint16_t* kept(int64_t vector) const {
    return reinterpret_cast<const uint16_t*>(pieces) + ((first + vector) * steps() + skipped / split::kDepth) * split::kStep;
  }
  INTERFUSE_INLINE int64_t place(int64_t vector, int64_t panel_floats) const {
    const int64_t v = first + vector;
    if (packing.panel == 1) return v * kLanes;
    const int64_t i = v % packing.panel;
    return v / packing.panel * panel_floats + i * kLanes + (packing.panel == 3 && i == 2 ? p.last : 0);
  }

  // One line of some rows, `count` steps of it from `step` on.
  INTERFUSE_INLINE void cut_row(const float* row, int64_t step, int64_t count, uint16_t* to) const {
    row += step * split::kDepth;
    int64_t left = p.depth - step * split::kDepth;
    for (; count > 0 && left >= split::kDepth; --count, left -= split::kDepth, row += split::kDepth, to += split::kStep)
      split::cut_along(load(row), load(row + kLanes), to);
    if (count > 0) split::cut_some(row, left, to);
  }

  // What something infinite or no number has spoilt, as the vector units give it.
  __attribute__((noinline)) Vec plain_sum(int64_t row, int64_t vector) const {
    const PackPlace at(packing, all, whole, first + vector);
    const float* w = p.w + at.at + skipped * at.step;
    Vec sum = zero();
    for (int64_t k = 0; k < p.depth; ++k) sum = multiply_add(splat(p.a[row * p.a_row + k]), load(w + k * at.step), sum);
    return sum;
  }

  // The first row's results of a vector, and what they start with.
  struct Results {
    const float* start;
    float* c;
  };
  INTERFUSE_INLINE Results results(int64_t vector) const {
    return {p.start ? p.start + place(vector, p.start_panel) : nullptr, p.c + place(vector, p.c_panel)};
  }
  INTERFUSE_INLINE void finish(const Results& to, int64_t row, int64_t vector, Vec sum) const {
    IVec other{};
    split::look(sum, other);
    if (__builtin_expect(split::any(other), 0)) sum = plain_sum(row, vector);
    store(to.c + row * p.c_row, to.start ? load(to.start + row * p.start_row) + sum : sum);
  }

  void many_rows(int64_t rows) const {
    split::Product product{kept(0), steps(), {0, (vectors + 1) / 2}, {0, divide_up(rows, split::kWide)}, nullptr, nullptr};
    product.streamed = static_cast<uint16_t*>(scratch(Slot::weight, split::kStreamed * 2));
    product.sums = scratch_floats(Slot::products, product.room_for_sums());
    split::multiply_all<true>(
        product,
        [&](int64_t block, int64_t step, int64_t count, int64_t line, uint16_t* to) __attribute__((always_inline)) {
          const int64_t row = block * split::kWide + line;  // beyond the last it is taken again: nobody reads those sums
          cut_row(p.a + (row < rows ? row : rows - 1) * p.a_row, step, count, to);
        },
        [&](int64_t block, int64_t pair, const float* sums) __attribute__((always_inline)) {
          for (int tile = 0; tile < 4; ++tile, sums += split::kSide * kLanes) {
            const int64_t row = block * split::kWide + tile / 2 * split::kSide, vector = 2 * pair + tile % 2;
            if (vector >= vectors) continue;
            const int64_t high = rows - row < split::kSide ? rows - row : split::kSide;
            const Results to = results(vector);
            for (int64_t r = 0; r < high; ++r) finish(to, row + r, vector, load(sums + r * kLanes));
          }
        });
  }

  // Sixteen rows from `row` on at most: one tile of them by four of the weight. While the matrix units add up the next
  // four tiles, or the next steps of these, the vector units pass on the last ones' sums.
  void few_rows(int64_t row, int64_t rows) const {
    constexpr int64_t kAtOnce = 4, kTileSums = split::kSide * kLanes, kSums = kAtOnce * kTileSums;
    const int64_t steps = split::steps_of(p.depth), panel = this->steps() * split::kStep;
    uint16_t* const a = static_cast<uint16_t*>(scratch(Slot::tiles, static_cast<size_t>(steps * split::kStep) * 2));
    for (int64_t r = 0; r < rows; ++r) cut_row(p.a + (row + r) * p.a_row, 0, steps, a + r * split::kDepth);
    split::Shapes shapes;
    for (int i = 0; i < 7; ++i) shapes.rows[i] = static_cast<uint8_t>(rows);  // of sums and of a's pieces
    const split::Tiles tiles(shapes);
    alignas(64) float fresh[2][kSums], sums[kSums];
    struct {
      const float* fresh;
      bool begins, ends;  // the sums of the first and of the last steps
      int64_t vector, tiles, tile, r;
      Results to;
    } last{};
    const auto pass_on = [&]() __attribute__((always_inline)) {
      const int64_t at = last.tile * kTileSums + last.r * kLanes;
      const Vec sum = last.begins ? load(last.fresh + at) : load(sums + at) + load(last.fresh + at);
      if (last.ends)
        finish(last.to, row + last.r, last.vector + last.tile, sum);
      else
        store(sums + at, sum);
      if (++last.r < rows) return;
      last.r = 0;
      if (++last.tile < last.tiles) last.to = results(last.vector + last.tile);
    };
    int turn = 0;
    for (int64_t v = 0; v < vectors; v += kAtOnce) {
      const int64_t left = vectors - v < kAtOnce ? vectors - v : kAtOnce;
      const uint16_t* of[kAtOnce];
      for (int i = 0; i < kAtOnce; ++i) of[i] = kept(v) + (i < left ? i : 0) * panel;
      for (int64_t step = 0; step < steps; step += split::kSteps, turn ^= 1) {
        const int64_t count = steps - step < split::kSteps ? steps - step : split::kSteps;
        constexpr int kLines = kAtOnce * split::kSide / (3 * split::kSteps) + 1;
        split::multiply_few(a + step * split::kStep, of, step, count, fresh[turn], [&]() __attribute__((always_inline)) {
          for (int i = 0; i < kLines && last.tile < last.tiles; ++i) pass_on();
        });
        while (last.tile < last.tiles) pass_on();
        last = {fresh[turn], step == 0, step + count == steps, v, left, 0, 0, results(v)};
      }
    }
    while (last.tile < last.tiles) pass_on();
  }
};

}  // namespace

bool split_pays(int64_t rows, int64_t floats) {
  return rows >= kRowsWorthSplitting && floats <= kFloatsWorthSplitting && matrix_units();
}

// Products of many rows take the panels in pairs.
int64_t split_floats(int64_t vectors, int64_t depth) { return (vectors + 1) * split::steps_of(depth) * split::kStep / 2; }

void split_weight(Packing packing, int64_t vectors, int64_t depth, Range mine, const float* packed, float* pieces) {
  const int64_t steps = split::steps_of(depth);
  for (int64_t v = mine.begin; v < mine.end; ++v) {
    const PackPlace place(packing, vectors, depth, v);
    uint16_t* to = reinterpret_cast<uint16_t*>(pieces) + v * steps * split::kStep;
    for (int64_t step = 0; step < steps; ++step, to += split::kStep)
      for (int64_t pair = 0; pair < split::kSide; ++pair) {
        const int64_t k = step * split::kDepth + 2 * pair;
        const float* from = packed + place.at + k * place.step;
        split::cut_across(k < depth ? load(from) : zero(), k + 1 < depth ? load(from + place.step) : zero(), to + pair * split::kDepth);
      }
  }
}

void split_product(const float* pieces, int64_t all, Packing packing, int64_t whole, int64_t skipped, const Product& p,
                   int64_t rows, int64_t first, int64_t vectors) {
  if (!pieces || rows < kRowsWorthSplitting || skipped % split::kDepth)
    return packed_product(packing, whole, skipped, p, rows, first, vectors);
  const SplitProduct product{pieces, all, packing, whole, skipped, p, first, vectors};
  if (rows > split::kSide && p.depth == whole) return product.many_rows(rows);
  for (int64_t row = 0; row < rows; row += split::kSide)
    product.few_rows(row, rows - row < split::kSide ? rows - row : split::kSide);
}

#else

bool split_pays(int64_t, int64_t) { return false; }
int64_t split_floats(int64_t, int64_t) { return 0; }
void split_weight(Packing, int64_t, int64_t, Range, const float*, float*) {}
void split_product(const float*, int64_t, Packing packing, int64_t whole, int64_t skipped, const Product& p, int64_t rows,
                   int64_t first, int64_t vectors) {
  packed_product(packing, whole, skipped, p, rows, first, vectors);
}

#endif

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
