// A tile of scores, from the product to the probabilities: what forward and backward share. Per-ISA.
#pragma once

#include "common/parallel.h"
#include "common/vector_math.h"
#include "cpu/attention_pack.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Calls body.template run<R>() for the least R in (kRows, two thirds, one third) that holds `rows`: three sizes, since
// each one's tiles are compiled.
constexpr int kMiddleRows = kRows * 2 / 3, kFewRows = kRows / 3;
static_assert(kFewRows >= 1 && kMiddleRows > kFewRows, "a tile is divided in three");

template <class Body>
INTERFUSE_INLINE void for_tile_rows(int64_t rows, Body&& body) {
  if (rows > kMiddleRows) return body.template run<kRows>();
  if (rows > kFewRows) return body.template run<kMiddleRows>();
  return body.template run<kFewRows>();
}

// c[r][column] (rows Row floats apart, `columns` of them rounded up to vectors) = the sum over `depth` of
// a[k * kRows + r] * b[column / kPanel][k][column % kPanel].
struct TileProduct {
  int64_t depth;
  const float *a, *b;
  int64_t b_panel;  // floats from panel to panel
  float* c;
  int64_t columns;
};

template <int Row>
struct TileProductOf {
  const TileProduct& t;
  template <int R>
  INTERFUSE_INLINE void run() {
    int64_t column = 0;
    const float* b = t.b;
    for (; column + kLanes < t.columns; column += kPanel, b += t.b_panel)
      gemm_tile_store<R, 2, false, true>(t.depth, t.a, 1, kRows, b, kPanel, t.c + column, Row);
    if (column < t.columns) gemm_tile_store<R, 1, false, true>(t.depth, t.a, 1, kRows, b, kPanel, t.c + column, Row);
  }
};

struct QueryRows {
  int64_t batch, head, query, count;
};

// Number `index` of the tiles of `size` rows that some heads' query rows, the same ones of each, are divided into.
INTERFUSE_INLINE QueryRows query_rows(int64_t batch, int64_t first_head, Range queries, int64_t size, int64_t index) {
  const int64_t tiles = divide_up(queries.end - queries.begin, size), query = queries.begin + index % tiles * size;
  return {batch, first_head + index / tiles, query, least(queries.end - query, size)};
}

// Of keys key..key + keys, how many row `query` reads at most.
INTERFUSE_INLINE int64_t keys_read(const Attention& p, int64_t query, int64_t key, int64_t keys) {
  return p.causal ? greatest(least(keys, query + 1 - key), 0) : keys;
}

// The mask's row for one query, from the block's first key on.
struct MaskRow {
  int kind;  // interfuse_mask
  bool half;
  const void* data;
};

INTERFUSE_INLINE MaskRow mask_row(const Attention& p, const void* mask, int64_t b, int64_t head, int64_t query, int64_t key) {
  if (p.mask == INTERFUSE_MASK_NONE) return {INTERFUSE_MASK_NONE, false, nullptr};
  const int64_t at = p.mask_at.at(b, head) + query * p.mask_at.row + key;
  const int64_t size = p.mask == INTERFUSE_MASK_BOOLEAN ? 1 : p.half ? 2 : 4;
  return {p.mask, p.half, static_cast<const char*>(mask) + at * size};
}

// s[0..count) with the mask applied, and minus infinity from `limit` on up to `padded`.
void apply_mask(const MaskRow& mask, float* s, int64_t limit, int64_t padded);

// s[0..padded) becomes 2^(s - offset).
INTERFUSE_INLINE void exponentials(float* s, int64_t padded, float offset) {
  for (int64_t i = 0; i < padded; i += kLanes) store(s + i, exp2_of_negative(load(s + i) - offset));
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
