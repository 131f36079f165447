// The gradient of a recurrent layer's weight: the product, over all tokens, of the gates' gradients with what the weight
// was multiplied by. Per-ISA (see common/simd.h).
#pragma once

#include "common/parallel.h"
#include "cpu/rnn_shapes.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Tokens that are taken in at a time: a unit block's gradients and four vectors of columns of them fill L1.
constexpr int64_t kOuterTokens = 128;

// What some tokens give to one weight's gradient.
struct OuterSource {
  const float* grads;  // the first token's, grads_row floats a token
  int64_t grads_row;
  const float* const* columns;  // for every token, what the weight was multiplied by
};

struct OuterTarget {
  int64_t gates, units, columns;  // of weight (gates * units, columns)
  float* weight;                  // or null
  float *bias, *other_bias;       // sums of the gradients themselves, or null; the second is a copy of the first
};

// Adds at most kOuterTokens tokens to (first: begins with them) the unit blocks [mine.begin, mine.end) of one or two
// gradients of as many units.
void outer_products(const OuterTarget* to, const OuterSource* from, int count, int64_t tokens, Range mine, bool first);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
