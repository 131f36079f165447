// A tile of 32 query rows on the matrix units: what forward and backward share. Per-ISA.
#pragma once

#include "cpu/attention_scores.h"
#include "cpu/split_product.h"

#if defined(INTERFUSE_SPLIT_PRODUCT)

namespace interfuse {
namespace INTERFUSE_ISA {

// A 32 x 32 block is four tiles; where the sixteen floats of row r lie that belong to half `j`.
INTERFUSE_INLINE int64_t at_row(int64_t r, int64_t j) {
  return (r / split::kSide * 2 + j) * split::kSide * split::kSide + r % split::kSide * split::kSide;
}

// The scores of these rows with `pairs` key panels from `key` on, of which `keys` keys are there.
INTERFUSE_INLINE void mask_scores(const Attention& p, const void* mask, const QueryRows& rows, int64_t key, int64_t keys,
                                  int64_t pairs, float* scores) {
  const int64_t padded = pairs * split::kWide;
  if (p.mask == INTERFUSE_MASK_NONE && !p.causal && keys >= padded) return;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t query = rows.query + r, most = keys_read(p, query, key, keys);
    for (int64_t at = p.mask == INTERFUSE_MASK_NONE ? most / split::kSide * split::kSide : 0; at < padded; at += split::kSide) {
      float* const s = scores + at / split::kWide * split::kSums + at_row(r, at / split::kSide % 2);
      const int64_t count = least(greatest(most - at, 0), split::kSide);
      if (p.mask == INTERFUSE_MASK_NONE)
        store(s, (Vec)_mm512_mask_mov_ps((__m512)splat(-infinity()), (__mmask16)((1u << count) - 1u), (__m512)load(s)));
      else
        apply_mask(mask_row(p, mask, rows.batch, rows.head, query, key + at), s, count, split::kSide);
    }
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#endif
