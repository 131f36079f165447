// A whole cross-attention for inference, in float32, from its projections to the output's: q of the query, k and v of the
// context (which may be the query), attention of their heads, and a projection of what that gives. In the manner of
// interfuse.h, for the bindings.
#pragma once

#include "interfuse.h"

extern "C" {

// Query is (batch, queries, query_dim), context (batch, keys, context_dim); their rows are query_row and context_row floats
// apart, batch entry behind batch entry. All weights are dense (outputs, inputs).
struct interfuse_attention_block_spec {
  int32_t mask, causal;  // as in interfuse_attention_spec; an additive mask is float
  float scale;
  int64_t batch, heads, kv_heads, queries, keys, head_dim;
  int64_t query_dim, context_dim, out_dim;
  int64_t query_row, context_row;
  int64_t mask_strides[3];
};

// Weights or biases that lie one behind the other (q, k, v of one tensor) are multiplied as one where they read the same
// input. A bias that is NULL is none.
struct interfuse_attention_block_tensors {
  const float *query, *context;
  const void* mask;           // NULL without a mask
  const int64_t* kv_lengths;  // of each batch entry, 0 to keys; NULL: all
  const float *q_weight, *k_weight, *v_weight, *out_weight;
  const float *q_bias, *k_bias, *v_bias, *out_bias;
};

struct interfuse_attention_block;
interfuse_status interfuse_attention_block_create(const interfuse_attention_block_spec* spec, interfuse_attention_block** plan);
void interfuse_attention_block_destroy(interfuse_attention_block* plan);
// y: (batch, queries, out_dim), dense. What lies between stays in the core.
interfuse_status interfuse_attention_block_forward(const interfuse_attention_block* plan,
                                                   const interfuse_attention_block_tensors* tensors, float* y, int32_t threads);

}  // extern "C"
