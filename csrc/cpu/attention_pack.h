// How the attention kernels lay out what they read: in the order of the register tile, as floats. Per-ISA.
#pragma once

#include "common/attention.h"
#include "common/gemm.h"
#include "common/transpose.h"

namespace interfuse {
namespace INTERFUSE_ISA {

constexpr int kRows = gemm_tile_rows(2);  // of queries in a tile
constexpr int kPanel = 2 * kLanes;        // keys, or columns of the values, beside them

// Base 2 throughout: the scores carry this factor, so that the exponentials need none.
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

INTERFUSE_INLINE float infinity() { return __builtin_inff(); }

// The caller's rows: `count` of `width` elements, `stride` apart.
struct Rows {
  const void* data;
  int64_t stride, count, width;
};

// kLanes rows from `first` on, elements from `column` on, transposed: out[j] holds element column + j of each row.
// What lies outside is zero.
template <class T>
INTERFUSE_INLINE void load_transposed(const Rows& rows, int64_t first, int64_t column, Vec (&out)[kLanes]) {
  const T* p = static_cast<const T*>(rows.data) + first * rows.stride + column;
  const int present = static_cast<int>(least(greatest(rows.count - first, 0), kLanes));
  const int columns = static_cast<int>(least(rows.width - column, kLanes));
  // Projected heads are narrow pieces of long rows, which no hardware fetches ahead.
  for (int i = 0; i < present; ++i) __builtin_prefetch(p + (i + 2 * kLanes) * rows.stride);
  for (int i = 0; i < kLanes; ++i)
    out[i] = i >= present ? zero() : columns == kLanes ? load(p + i * rows.stride) : load_first(p + i * rows.stride, columns);
  transpose(out);
}

// out[panel][element][kPanel rows]: the operand that is read as vectors, for products over the elements.
template <class T>
void pack_columns_of(const Rows& rows, float* out) {
  for (int64_t first = 0; first < rows.count; first += kPanel)
    for (int v = 0; v < 2; ++v)
      for (int64_t column = 0; column < rows.width; column += kLanes) {
        Vec block[kLanes];
        load_transposed<T>(rows, first + v * kLanes, column, block);
        const int columns = static_cast<int>(least(rows.width - column, kLanes));
        for (int j = 0; j < columns; ++j)
          store(out + first * rows.width + (column + j) * kPanel + v * kLanes, block[j]);
      }
}

// out[tile][element][kRows]: the operand that is read one float at a time. Writes up to kLanes floats beyond the end.
template <class T>
void pack_tiles_of(const Rows& rows, float factor, float* out) {
  for (int64_t first = 0; first < rows.count; first += kRows)
    for (int at = 0; at < kRows; at += kLanes)
      for (int64_t column = 0; column < rows.width; column += kLanes) {
        Vec block[kLanes];
        // Rows of the next tile come along where a tile is no multiple of a vector; its own packing overwrites them.
        load_transposed<T>(rows, first + at, column, block);
        const int columns = static_cast<int>(least(rows.width - column, kLanes));
        for (int j = 0; j < columns; ++j) store(out + first * rows.width + (column + j) * kRows + at, block[j] * factor);
      }
}

// out[panel of kPanel elements][capacity rows][kPanel]: read as vectors, for products over the rows.
template <class T>
void pack_rows_of(const Rows& rows, int64_t capacity, float* out) {
  for (int64_t column = 0; column < rows.width; column += kLanes, out += column % kPanel ? kLanes : capacity * kPanel - kLanes) {
    const T* p = static_cast<const T*>(rows.data) + column;
    const int columns = static_cast<int>(least(rows.width - column, kLanes));
    if (columns == kLanes)
      for (int64_t r = 0; r < rows.count; ++r) {
        __builtin_prefetch(p + (r + 2 * kLanes) * rows.stride);
        store(out + r * kPanel, load(p + r * rows.stride));
      }
    else
      for (int64_t r = 0; r < rows.count; ++r) store(out + r * kPanel, load_first(p + r * rows.stride, columns));
  }
}

void pack_columns(bool half, const Rows& rows, float* out);
void pack_tiles(bool half, const Rows& rows, float factor, float* out);
void pack_rows(bool half, const Rows& rows, int64_t capacity, float* out);

// Floats that the three take.
INTERFUSE_INLINE int64_t packed_columns(int64_t rows, int64_t width) { return round_up(rows, kPanel) * width; }
INTERFUSE_INLINE int64_t packed_tiles(int64_t rows, int64_t width) { return round_up(rows, kRows) * width + kLanes; }
INTERFUSE_INLINE int64_t packed_rows(int64_t capacity, int64_t width) { return capacity * round_up(width, kPanel); }

// `count` floats times `factor` to the caller's memory.
void store_row(bool half, void* to, int64_t at, const float* from, int64_t count, float factor);
void zero_row(bool half, void* to, int64_t at, int64_t count);

INTERFUSE_INLINE const void* element(bool half, const void* data, int64_t at) {
  return static_cast<const char*>(data) + at * (half ? 2 : 4);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
