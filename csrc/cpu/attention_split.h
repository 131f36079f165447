// Attention on the matrix units, for those instruction sets that have them. Per-ISA.
#pragma once

#include "common/attention.h"
#include "cpu/split_product.h"

#if defined(INTERFUSE_SPLIT_PRODUCT)

namespace interfuse {
namespace INTERFUSE_ISA {

constexpr int kSplitTileRows = split::kWide;

// Whether this call runs there.
bool on_matrix_units(const Attention& p);

// again: computes query rows begin..end of one head on the vector units.
using AttentionRows = void (*)(const Attention& p, const AttentionForward& a, int64_t b, int64_t head, int64_t begin, int64_t end);
void attention_forward_split(const Attention& p, const AttentionForward& a, AttentionWork& work, AttentionRows again);

// again: computes a piece on the vector units.
using AttentionGradients = void (*)(const Attention& p, const AttentionBackward& a, const AttentionPiece& piece);
void attention_backward_split(const Attention& p, const AttentionBackward& a, AttentionWork& work, AttentionGradients again);

}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#endif
