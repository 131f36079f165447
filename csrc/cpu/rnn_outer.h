// The gradient of a recurrent layer's weight: the product, over all tokens, of the gates' gradients with what the weight
// was multiplied by. Per-ISA (see common/simd.h).
#pragma once

#include "common/parallel.h"
#include "cpu/rnn_shapes.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Tokens that are taken in at a time: a unit block's gradients and four vectors of columns of them fill L1.
constexpr int64_t kOuterTokens = 128;

// Some tokens' rows: those of one part, consecutive but for what they are multiplied by.
struct OuterChunk {
  const float* grads;  // the first token's, grads_row floats a token
  int64_t tokens;
  const float* const* columns;  // a pointer for every token
};

struct OuterTarget {
  int64_t gates, units, columns;  // of weight (gates * units, columns)
  int64_t grads_row;
  float* weight;  // or null
  float *bias, *other_bias;  // sums of the gradients themselves, or null; the second is a copy of the first
};

// Adds a chunk to (first: begins with it) the unit blocks [mine.begin, mine.end) of the gradient.
void outer_product(const OuterTarget& to, const OuterChunk& chunk, Range mine, bool first);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
