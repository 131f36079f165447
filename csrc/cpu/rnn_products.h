// The matrix products of the recurrent kernels: a few rows times packed weights. Per-ISA (see common/simd.h).
//
// A packed weight is a sequence of panels, [panel][k][vector][lane], of one, three or four vectors; panels of four
// followed by panels of one keep vector v of the weight at v * depth * kLanes. bfloat16 weights hold two steps of k in
// each 32-bit word, the even one below: a shift and a mask make floats of them.
#pragma once

#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// c(row, vector) = start(row, vector) + sum over k of a(row, k) * w(k, vector). Distances are in floats.
struct Product {
  int64_t depth;
  const float* a;
  int64_t a_row;
  const float* w;
  int64_t w_panel;
  const float* start;  // may be c; null: zeros
  int64_t start_row;   // 0: all rows start alike
  int64_t start_panel;
  float* c;
  int64_t c_row, c_panel;
  int64_t last;  // of panels of three: so much further on stands c's last vector
};
using ProductKernel = void (*)(const Product&, int64_t rows, int64_t panels);

extern const ProductKernel product4, product3, product1, half_product4, half_product3, half_product1;

// How a weight is packed: whole panels of `panel` vectors (3 or 4), or, with panel 1, panels of four and then of one.
struct Packing {
  int panel;
  bool half;
  bool rounded = false;  // to bfloat16, in words of float32

  INTERFUSE_INLINE int64_t words(int64_t depth) const { return half ? (depth + 1) / 2 : depth; }
  INTERFUSE_INLINE int64_t floats(int64_t vectors, int64_t depth) const { return vectors * words(depth) * kLanes; }
};

// The product with vectors [first, first + vectors) of a weight of depth `whole`, from its k `skipped` (even) on. w,
// start and c are those of vector 0 and k 0; w_panel is filled in here, and without panels so are the other distances.
INTERFUSE_INLINE void packed_product(Packing packing, int64_t whole, int64_t skipped, Product p, int64_t rows, int64_t first,
                                     int64_t vectors) {
  const int64_t vector_floats = packing.words(whole) * kLanes, before = packing.words(skipped) * kLanes;
  const auto run = [&](ProductKernel kernel, int panel, int64_t panels) __attribute__((always_inline)) {
    Product part = p;
    part.w += first * vector_floats + before * panel;
    part.w_panel = panel * vector_floats;
    if (part.start) part.start += first / panel * part.start_panel;
    part.c += first / panel * part.c_panel;
    kernel(part, rows, panels);
  };
  if (packing.panel == 3) return run(packing.half ? half_product3 : product3, 3, vectors / 3);
  if (packing.panel == 4) return run(packing.half ? half_product4 : product4, 4, vectors / 4);
  p.start_panel = p.c_panel = 4 * kLanes;
  if (vectors >= 4) run(packing.half ? half_product4 : product4, 4, vectors / 4);
  first += vectors / 4 * 4;
  p.start_panel = p.c_panel = kLanes;
  if (vectors % 4) run(packing.half ? half_product1 : product1, 1, vectors % 4);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
