// The checked attention problem and how its work is cut into pieces that any thread may take.
//
// A piece writes its own part of the results and reads nothing that another one writes, so the bits do not depend on
// which thread takes it; the pieces stand in falling order of work, which keeps the threads' ends together where
// sequences differ in length.
#pragma once

#include <stdint.h>

#include "common/isa.h"
#include "interfuse.h"

namespace interfuse {

// Elements between neighbours along (batch, head, row); the last axis is dense.
struct AttentionStrides {
  int64_t batch, head, row;

  __attribute__((always_inline)) int64_t at(int64_t b, int64_t h) const { return b * batch + h * head; }
};

struct Attention {
  bool half, causal;
  int mask;  // interfuse_mask
  float scale;
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  AttentionStrides q, k, v, y, mask_at, grad_q, grad_k, grad_v;

  __attribute__((always_inline)) int64_t group() const { return heads / kv_heads; }
};

Attention checked_attention(const interfuse_attention_spec& spec);

// One (batch, kv head): forward works on tiles begin..end of the group's query rows, backward on keys begin..end.
struct AttentionPiece {
  int64_t batch, kv_head, begin, end, part;  // part: which cut of the keys, in backward
};

struct AttentionWork {
  const AttentionPiece* pieces;
  int64_t count;
  int64_t next;  // the first piece that no thread has taken
  int threads;
};

struct AttentionForward {
  const void *q, *k, *v, *mask;
  const int64_t *q_lengths, *kv_lengths;
  void* y;
  float* lse;     // or NULL
  void* weights;  // or NULL
};

struct AttentionBackward {
  AttentionForward in;  // what forward was given, and what it left in y and lse
  const void* grad_y;
  void *grad_q, *grad_k, *grad_v;
  int64_t parts;   // into so many pieces the keys of a (batch, kv head) are cut
  float* partial;  // with several parts: (part, batch, head, query, head_dim), to be summed
};

struct AttentionPool {
  bool half;
  int64_t batch, steps, width, hidden;
  int64_t x_batch, x_step, hidden_batch, hidden_step;  // strides
};

struct AttentionPoolForward {
  const void *x, *hidden, *context;
  const int64_t* lengths;
  void *y, *weights;
  int threads;
};

struct AttentionPoolBackward {
  AttentionPoolForward in;
  const void *grad_y, *grad_weights;  // either may be NULL
  void *grad_x, *grad_hidden;
  float* grad_context;  // by sequence
};

struct AttentionKernels {
  int (*tile_rows)(const Attention&);  // of a forward tile
  void (*forward)(const Attention&, const AttentionForward&, AttentionWork&);
  void (*backward)(const Attention&, const AttentionBackward&, AttentionWork&);
  void (*pool_forward)(const AttentionPool&, const AttentionPoolForward&);
  void (*pool_backward)(const AttentionPool&, const AttentionPoolBackward&);
};

#define INTERFUSE_DECLARE(isa)                   \
  namespace isa {                                \
  extern const AttentionKernels attention_kernels; \
  }
INTERFUSE_FOR_EACH_ISA(INTERFUSE_DECLARE)
#undef INTERFUSE_DECLARE

}  // namespace interfuse
