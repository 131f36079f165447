// What the attention kernels' table collects from their files. Per-ISA.
#pragma once

#include "common/attention.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Each piece goes to whichever thread of a team asks first.
template <class Take>
INTERFUSE_INLINE void take_pieces(AttentionWork& work, Take&& take) {
  for (;;) {
    const int64_t at = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED);
    if (at >= work.count) return;
    take(work.pieces[at]);
  }
}

// Writes what forward leaves for the query rows from `queries` on, which are padding.
void zero_padding(const Attention& p, const AttentionForward& a, int64_t b, int64_t kv_head, int64_t queries);

// The same of backward, by one of the pieces.
void zero_gradient_padding(const Attention& p, const AttentionBackward& a, const AttentionPiece& piece);

// Of `count` query rows of one head (room for `padded`): what is taken from their scores before the exponential, in base
// 2, and the sum of each row's weights times their gradients. Rows that attend to nothing, and missing ones, get an
// infinity, which makes their weights zeros, and a zero.
void row_states(const Attention& p, const AttentionBackward& a, int64_t b, int64_t head, int64_t query, int64_t count,
                int64_t padded, float* offset, float* delta);

void attention_backward(const Attention& p, const AttentionBackward& a, AttentionWork& work);
void attention_pool_forward(const AttentionPool& p, const AttentionPoolForward& a);
void attention_pool_backward(const AttentionPool& p, const AttentionPoolBackward& a);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
