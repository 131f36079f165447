// A product of two plain matrices on the matrix units. Per-ISA (see simd.h).
#pragma once

#include "cpu/split_product.h"

#if defined(INTERFUSE_SPLIT_PRODUCT)

namespace interfuse {
namespace INTERFUSE_ISA {

// c (rows, columns) = a (rows, depth) b (depth, columns); a(r, k) at a[r * a_row + k * a_step], where one of the two is 1,
// rows of b and c so many floats apart. False where not all of it is finite, and then c has to be computed in another way.
// `past`: c is stored past the caches, and the caller calls end_stores_past(). Uses the slots tiles, weight and products.
bool multiply_matrices(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_step, const float* b,
                       int64_t b_row, float* c, int64_t c_row, bool past);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#endif
