#include "cpu/split_matrices.h"

#include "common/scratch.h"
#include "common/stream.h"

#if defined(INTERFUSE_SPLIT_PRODUCT)

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

using split::kDepth;
using split::kSide;
using split::kStep;
using split::kWide;

// Rows of a that are kept in pieces; b is cut once for all of them.
constexpr int64_t kRowsAtOnce = 256;

// As split::cut_rows, of a matrix that lies transposed: its rows stand side by side, a_step apart along the depth.
void cut_turned_rows(const float* a, int64_t a_step, int64_t rows, int64_t depth, uint16_t* to) {
  const int64_t steps = split::steps_of(depth);
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t row = 0; row < rows; row += kSide) {
      Vec halves[2][kLanes];
      for (int half = 0; half < 2; ++half) {
        const int64_t k = step * kDepth + half * kSide;
        const float* const from = a + k * a_step + row;
        for (int i = 0; i < kLanes; ++i) halves[half][i] = load_some(from + i * a_step, k + i < depth ? rows - row : 0);
        transpose(halves[half]);
      }
      uint16_t* const panel = to + (row / kSide * steps + step) * kStep;
      for (int i = 0; i < kLanes; ++i) split::cut_along(halves[0][i], halves[1][i], panel + i * kDepth);
    }
}

}  // namespace

bool multiply_matrices(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_step, const float* b,
                       int64_t b_row, float* c, int64_t c_row, bool past) {
  const int64_t steps = split::steps_of(depth);
  IVec other{};
  for (int64_t begin = 0; begin < rows; begin += kRowsAtOnce) {
    const int64_t high = least(rows - begin, kRowsAtOnce), panels = split::panels_of(high);
    uint16_t* const kept = static_cast<uint16_t*>(scratch(Slot::tiles, static_cast<size_t>(panels * steps * kStep) * 2));
    if (a_step == 1) split::cut_rows(a + begin * a_row, a_row, high, high, depth, kept);
    else cut_turned_rows(a + begin, a_step, high, depth, kept);
    split::Product product{kept, steps, {0, panels / 2}, {0, divide_up(columns, kWide)}, nullptr, nullptr};
    product.streamed = static_cast<uint16_t*>(scratch(Slot::weight, split::kStreamed * 2));
    product.sums = scratch_floats(Slot::products, product.room_for_sums());
    split::multiply_all<false>(
        product,
        [&](int64_t block, int64_t step, int64_t count, int64_t line, uint16_t* to) __attribute__((always_inline)) {
          const int64_t column = block * kWide + line / kSide * kSide, left = columns - column;
          for (int64_t i = 0; i < count; ++i) {
            const int64_t k = (step + i) * kDepth + line % kSide * 2;
            const float* const from = b + k * b_row + column;
            // 128 bytes of a row at a time are no stream that the processor would fetch by itself.
            __builtin_prefetch(from + kWide, 0, 2);
            if (k + 1 < depth) __builtin_prefetch(from + b_row + kWide, 0, 2);
            split::cut_across(k < depth ? load_some(from, left) : zero(),
                              k + 1 < depth ? load_some(from + b_row, left) : zero(), to + i * kStep);
          }
        },
        [&](int64_t block, int64_t pair, const float* sums) __attribute__((always_inline)) {
          for (int tile = 0; tile < 4; ++tile, sums += kSide * kSide) {
            const int64_t column = block * kWide + tile % 2 * kSide, row = pair * kWide + tile / 2 * kSide;
            const int count = static_cast<int>(least(columns - column, kSide));
            for (int64_t r = 0; count > 0 && r < least(high - row, kSide); ++r) {
              const Vec line = load(sums + r * kSide);
              split::look(line, other);
              float* const to = c + (begin + row + r) * c_row + column;
              if (past && count == kSide && !before_line(to)) {
                store_past(to, line);
              } else {
                __builtin_prefetch(to + kWide, 1, 2);
                store_first(to, line, count);
              }
            }
          }
        });
  }
  return !split::any(other);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#endif
