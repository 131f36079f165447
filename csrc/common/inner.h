// Calls of one op from within another: the problem is checked, and nothing here asks how many threads there are.
#pragma once

#include "common/attention.h"
#include "common/linear.h"

namespace interfuse {

// Throws where one of them (NULL: there are none) is below 0 or above `most`.
void check_lengths(const char* op, const char* name, const int64_t* lengths, int64_t batch, int64_t most);

// Of a problem with a batch and queries.
void run_attention(const Attention& p, const AttentionForward& call, int threads);

// The plan for `rows` rows in the place of its own, at least one, of one input without a preactivation to save.
void run_linear(const interfuse_linear& plan, int64_t rows, const void* input, const interfuse_linear_weights& weights, void* y,
                int threads);

}  // namespace interfuse
