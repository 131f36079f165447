#include "cpu/attention_pack.h"

namespace interfuse {
namespace INTERFUSE_ISA {

void pack_columns(bool half, const Rows& rows, float* out) {
  half ? pack_columns_of<uint16_t>(rows, out) : pack_columns_of<float>(rows, out);
}

void pack_tiles(bool half, const Rows& rows, float factor, float* out) {
  half ? pack_tiles_of<uint16_t>(rows, factor, out) : pack_tiles_of<float>(rows, factor, out);
}

void pack_rows(bool half, const Rows& rows, int64_t capacity, float* out) {
  half ? pack_rows_of<uint16_t>(rows, capacity, out) : pack_rows_of<float>(rows, capacity, out);
}

namespace {

template <class T>
void store_row_of(T* to, const float* from, int64_t count, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i) * factor);
  if (i < count) store_first(to + i, load_first(from + i, static_cast<int>(count - i)) * factor, static_cast<int>(count - i));
}

}  // namespace

void store_row(bool half, void* to, int64_t at, const float* from, int64_t count, float factor) {
  if (half)
    store_row_of(static_cast<uint16_t*>(to) + at, from, count, factor);
  else
    store_row_of(static_cast<float*>(to) + at, from, count, factor);
}

void zero_row(bool half, void* to, int64_t at, int64_t count) {
  const int64_t size = half ? 2 : 4;
  memset(static_cast<char*>(to) + at * size, 0, static_cast<size_t>(count * size));
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
