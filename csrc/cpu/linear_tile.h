// The register tile of linear's forward: dot products of rows of the inputs with rows of the weight. Both run along the
// depth, so the weight is read as torch keeps it: a pack would cost a pass over the weight, which for few rows is the
// whole price of the layer. Per-ISA (see simd.h).
//
// Rows x Columns accumulators stay in registers over a block of the depth; a step loads Rows + Columns vectors for
// Rows * Columns multiply-adds, two of each start per cycle. Adding up the lanes at the end costs about as much as
// three steps.
#pragma once

#include "cpu/linear_product.h"
#include "common/linear.h"
#include "common/simd.h"
#include "common/transpose.h"

namespace interfuse {
namespace INTERFUSE_ISA {

constexpr int kDotColumns = 4;
constexpr int kDotRows = kGemmAccumulators / kDotColumns;

INTERFUSE_INLINE Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i small = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm512_maskz_cvtepi32_ps((__mmask16)-1, _mm512_maskz_cvtepi8_epi32((__mmask16)-1, small));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t Small __attribute__((vector_size(kLanes), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Small*>(p), Vec);
#endif
}
INTERFUSE_INLINE Vec load_first(const int8_t* p, int n) {
  int8_t lanes[kLanes] = {};
  memcpy(lanes, p, static_cast<size_t>(n));
  return load(lanes);
}

typedef float Four __attribute__((vector_size(16)));
typedef float FourAnywhere __attribute__((vector_size(16), aligned(4), may_alias));

// Lanes 2 Half, 2 Half + 1 of a and of b in turn, in every group of four lanes.
template <int Half, int... J>
INTERFUSE_INLINE Vec alternate(Vec a, Vec b, std::integer_sequence<int, J...>) {
  return transposing::pick<((J & 1) * kLanes + (J & ~3) + 2 * Half + (J & 3) / 2)...>(a, b);
}
// The pairs of lanes number Half of a and of b, in every group of four lanes.
template <int Half, int... J>
INTERFUSE_INLINE Vec pairs(Vec a, Vec b, std::integer_sequence<int, J...>) {
  return transposing::pick<((J & 2) / 2 * kLanes + (J & ~3) + 2 * Half + (J & 1))...>(a, b);
}

// The sums of the lanes of four vectors.
INTERFUSE_INLINE Four sum_lanes(Vec a, Vec b, Vec c, Vec d) {
  constexpr std::make_integer_sequence<int, kLanes> lanes{};
  const Vec ab = alternate<0>(a, b, lanes) + alternate<1>(a, b, lanes);
  const Vec cd = alternate<0>(c, d, lanes) + alternate<1>(c, d, lanes);
  const Vec all = pairs<0>(ab, cd, lanes) + pairs<1>(ab, cd, lanes);
  Four parts[kLanes / 4];
  memcpy(parts, &all, sizeof parts);
  Four sum = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) sum = sum + parts[i];
  return sum;
}

struct InputRows {
  const float* data;
  int64_t stride;
};

// How far ahead of its use the weight is fetched where it streams from memory: the processor's own prefetching ends with
// each page of 4 KiB.
constexpr int64_t kFetchedAhead = 4096;

// What of the weight is read later on, brought towards the core meanwhile: lines of four rows, which may be the same.
struct Ahead {
  const char* at;
  int64_t rows[3];  // how far behind it the others lie, in bytes
};

// to(r, c) = or += the dot product of row `row` + r with row c of the weight, over the pieces of one block. Streams: what
// these rows of the weight come to themselves is brought, and nothing ahead.
template <int RowCount, int Columns, bool Streams, class W>
INTERFUSE_INLINE void dot_tile(const LinearPiece* pieces, const LinearPiece* end, const InputRows* inputs, int64_t row,
                               const W* weight, int64_t depth, Ahead ahead, float* to, int64_t to_row, bool add) {
  Vec sums[RowCount][Columns];
  unrolled<RowCount>([&](int r) __attribute__((always_inline)) {
    unrolled<Columns>([&](int c) __attribute__((always_inline)) { sums[r][c] = zero(); });
  });
  for (; pieces != end; ++pieces) {
    const int64_t stride = inputs[pieces->input].stride;
    const float* x = inputs[pieces->input].data + row * stride + pieces->offset;
    const W* w = weight + pieces->column;
    const auto step = [&](auto&& read) __attribute__((always_inline)) {
      Vec values[RowCount];
      unrolled<RowCount>([&](int r) __attribute__((always_inline)) { values[r] = read(x + r * stride); });
      unrolled<Columns>([&](int c) __attribute__((always_inline)) {
        const Vec column = read(w + c * depth);
        if constexpr (Streams) __builtin_prefetch(reinterpret_cast<const char*>(w + c * depth) + kFetchedAhead);
        unrolled<RowCount>([&](int r) __attribute__((always_inline)) {
          sums[r][c] = multiply_add(values[r], column, sums[r][c]);
        });
      });
    };
    int64_t left = pieces->depth;
    for (; left >= kLanes; left -= kLanes) {
      step([](auto* p) __attribute__((always_inline)) { return load(p); });
      x += kLanes, w += kLanes;
      if constexpr (!Streams) {
        __builtin_prefetch(ahead.at);
        for (int64_t row : ahead.rows) __builtin_prefetch(ahead.at + row);
        ahead.at += kLanes * sizeof(W);
      }
    }
    if (left) step([&](auto* p) __attribute__((always_inline)) { return load_first(p, static_cast<int>(left)); });
  }
  unrolled<RowCount>([&](int r) __attribute__((always_inline)) {
    float* at = to + r * to_row;
    if constexpr (Columns == 4) {
      Four sum = sum_lanes(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
      if (add) sum = sum + *reinterpret_cast<const FourAnywhere*>(at);
      *reinterpret_cast<FourAnywhere*>(at) = sum;
    } else {
      unrolled<Columns>([&](int c) __attribute__((always_inline)) {
        at[c] = sum_lanes(sums[r][c]) + (add ? at[c] : 0.f);
      });
    }
  });
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
