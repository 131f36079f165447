// The recurrent kernels' products on the processor's matrix units (see split_product.h), with a packed weight that is
// kept in pieces beside its floats. Per-ISA (see common/simd.h).
#pragma once

#include "common/parallel.h"
#include "cpu/rnn_products.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Whether there are matrix units, and products of so many rows with a weight of so many floats are faster on them.
bool split_pays(int64_t rows, int64_t floats);

// Floats of room for the pieces of a packed weight of so many vectors.
int64_t split_floats(int64_t vectors, int64_t depth);

// Cuts the vectors `mine` of a packed weight that has `vectors` of them.
void split_weight(Packing packing, int64_t vectors, int64_t depth, Range mine, const float* packed, float* pieces);

// As packed_product, with a weight of `all` vectors. Where `pieces` is null, and for few rows, it is packed_product.
void split_product(const float* pieces, int64_t all, Packing packing, int64_t whole, int64_t skipped, const Product& p,
                   int64_t rows, int64_t first, int64_t vectors);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
