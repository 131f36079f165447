// What the attention kernels' table collects from their files. Per-ISA.
#pragma once

#include "common/attention.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Writes what forward leaves for the query rows from `queries` on, which are padding.
void zero_padding(const Attention& p, const AttentionForward& a, int64_t b, int64_t kv_head, int64_t queries);

void attention_backward(const Attention& p, const AttentionBackward& a, AttentionWork& work);
void attention_pool_forward(const AttentionPool& p, const AttentionPoolForward& a);
void attention_pool_backward(const AttentionPool& p, const AttentionPoolBackward& a);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
