// Products of whole matrices for linear, made of the register tiles of gemm.h. Per-ISA (see simd.h).
#pragma once

#include "common/gemm.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Rows of a tile: a dozen accumulators are enough, and each size is one more copy of the loop.
constexpr int panel_rows(int vectors) { return gemm_tile_rows(vectors) < 12 ? gemm_tile_rows(vectors) : 12; }

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(Count<n>) with the largest n of Most, Most / 2, ..., 1 that is at most `rows`, and returns it: a kernel for
// every number of rows would be two dozen copies of the same loop.
template <int Most, class Body>
INTERFUSE_INLINE int one_tile(int64_t rows, Body&& body) {
  if constexpr (Most > 1) {
    if (rows < Most) return one_tile<Most / 2>(rows, body);
  }
  body(Count<Most>{});
  return Most;
}

// c = or += a * b for a whole matrix of `rows`: a(r, k) at a[r * a_row + k * a_step], b packed as [block][k][Vectors]
// with `blocks` blocks b_block floats apart, c's block v-vectors c_block floats apart and rows c_row apart. start(block,
// v) is what a fresh sum begins with (add: what c holds).
template <int Vectors, class Start>
INTERFUSE_INLINE void panel_product(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                                     const float* b, int64_t b_step, int64_t b_block, int64_t first_block,
                                     int64_t end_block, float* c, int64_t c_row, int64_t c_block, bool add, Start&& start) {
  constexpr int kRows = panel_rows(Vectors);
  for (int64_t block = first_block; block < end_block; ++block)
    for (int64_t r = 0; r < rows;) {
      float* to = c + r * c_row + block * c_block;
      r += one_tile<kRows>(rows - r, [&](auto count) __attribute__((always_inline)) {
        gemm_tile<decltype(count)::value, Vectors>(
            depth, a + r * a_row, a_row, a_step, b + block * b_block, b_step,
            [&](int i, int v) __attribute__((always_inline)) {
              return add ? load(to + i * c_row + v * kLanes) : start(block, v);
            },
            [&](int i, int v, Vec sum) __attribute__((always_inline)) { store(to + i * c_row + v * kLanes, sum); });
      });
    }
}

// c (rows, blocks * kLanes, c_row apart) = or += a * b, where b is in panels of four vectors and a last one of what is
// left: either packed one after the other (b_row 0), or rows of a plain matrix b_row apart.
INTERFUSE_INLINE void wide_product(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                   int64_t b_row, int64_t b_panel, int64_t blocks, float* c, int64_t c_row, bool add) {
  const auto nothing = [](int64_t, int) __attribute__((always_inline)) { return zero(); };
  const int64_t full = blocks / 4, rest = blocks % 4, panel = 4 * kLanes;
  panel_product<4>(rows, depth, a, a_row, a_step, b, b_row ? b_row : panel, b_panel * panel, 0, full, c, c_row, panel, add, nothing);
  b += full * b_panel * panel, c += full * panel;
  const int64_t width = rest * kLanes;
  switch (rest) {
    case 3: panel_product<3>(rows, depth, a, a_row, a_step, b, b_row ? b_row : width, 0, 0, 1, c, c_row, 0, add, nothing); break;
    case 2: panel_product<2>(rows, depth, a, a_row, a_step, b, b_row ? b_row : width, 0, 0, 1, c, c_row, 0, add, nothing); break;
    case 1: panel_product<1>(rows, depth, a, a_row, a_step, b, b_row ? b_row : width, 0, 0, 1, c, c_row, 0, add, nothing); break;
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
