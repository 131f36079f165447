#include "cpu/losses_blocks.h"

#include "common/parallel.h"
#include "common/transpose.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace blocks {
namespace {

// Of the features, that one product takes: a panel of the chunk's rows then stays in the first-level cache.
constexpr int64_t kDepth = 128;

// c (rows, vectors) = or += a b, a's rows dense; b's are b_row apart, or packed as panels of four vectors and the rest (0).
__attribute__((noinline)) void multiply(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* b,
                                        int64_t b_row, int64_t vectors, float* c, int64_t c_row, bool add) {
  wide_product(rows, depth, a, a_row, 1, b, b_row, b_row ? 1 : depth, vectors, c, c_row, add);
}

// Rows of a matrix as panels of four vectors and one of the rest, their lanes along what `at` walks:
// to[panel][i][vector][lane]. step(i, vector) is the vector.
template <class Read>
INTERFUSE_INLINE void pack_panels(int64_t count, int64_t vectors, float* to, Read&& read) {
  for (int64_t first = 0; first < vectors; first += 4) {
    const int64_t wide = smaller(4, vectors - first);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < wide; ++v, to += kLanes) store(to, read(i, first + v));
  }
}

// to(column, row) of from(row, column): kLanes rows from `row` on, of which `rows` exist, others as zeros; columns
// column to column + columns, a row of `to` being to_row floats.
template <class T>
INTERFUSE_INLINE void turn_rows(const T* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int width = static_cast<int>(smaller(kLanes, columns - c));
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const T* at = from + i * from_row + c;
      block[i] = i >= rows ? zero() : width == kLanes ? load(at) : load_first(at, width);
    }
    transpose(block);
    for (int i = 0; i < width; ++i) store(to + (c + i) * to_row, block[i]);
  }
}

template <class T>
void pack_rows(const Chunk& chunk, const T* rows, int64_t row_stride, bool turned, bool plain, int thread, int team) {
  const Range mine = share(turned ? (chunk.vectors + 3) / 4 : 0, thread, team);
  for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
    const int64_t wide = smaller(4, chunk.vectors - panel * 4);
    for (int64_t k = 0; k < chunk.depth; k += kDepth) {
      const int64_t deep = smaller(kDepth, chunk.depth - k);
      float* const to = chunk.turned + k * chunk.vectors * kLanes + panel * deep * kPanel;
      for (int64_t v = 0; v < wide; ++v) {
        const int64_t row = (panel * 4 + v) * kLanes;
        turn_rows(rows + row * row_stride + k, row_stride, chunk.rows - row, deep, to + v * kLanes, wide * kLanes);
      }
    }
  }
  const int64_t vectors = vectors_of(chunk.depth);
  const Range panels = share(plain ? (vectors + 3) / 4 : 0, thread, team);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel)
    pack_panels(chunk.rows, smaller(4, vectors - panel * 4), chunk.plain + panel * kPanel * chunk.rows,
                [&](int64_t r, int64_t v) __attribute__((always_inline)) {
                  const int64_t column = (panel * 4 + v) * kLanes;
                  const T* at = rows + r * row_stride + column;
                  return chunk.depth - column >= kLanes ? load(at) : load_first(at, static_cast<int>(chunk.depth - column));
                });
}

template <class T>
void add_up(const Chunk& chunk, const float* parts, int count, T* to, int thread, int team) {
  const Range mine = share(chunk.vectors, thread, team);
  for (int64_t v = mine.begin; v < mine.end; ++v)
    for (int64_t k = 0; k < chunk.depth; k += kLanes) {
      const int width = static_cast<int>(smaller(kLanes, chunk.depth - k));
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = zero();
        if (i < width)
          for (int t = 0; t < count; ++t)
            block[i] = block[i] + load(parts + (t * chunk.depth + k + i) * chunk.stride + v * kLanes);
      }
      transpose(block);
      for (int i = 0; i < kLanes && v * kLanes + i < chunk.rows; ++i)
        store_first(to + (v * kLanes + i) * chunk.depth + k, block[i], width);
    }
}

}  // namespace

void pack(const Chunk& chunk, const float* rows, int64_t row_stride, bool turned, bool plain, int thread, int team) {
  pack_rows(chunk, rows, row_stride, turned, plain, thread, team);
}
void pack(const Chunk& chunk, const uint16_t* rows, int64_t row_stride, bool turned, bool plain, int thread, int team) {
  pack_rows(chunk, rows, row_stride, turned, plain, thread, team);
}

void multiply_rows(const Chunk& chunk, const float* weight, int64_t count, float* z) {
  for (int64_t k = 0; k < chunk.depth; k += kDepth)
    multiply(count, smaller(kDepth, chunk.depth - k), weight + k, chunk.depth, chunk.turned + k * chunk.vectors * kLanes, 0,
             chunk.vectors, z, chunk.stride, k > 0);
}

void weight_gradient(const Chunk& chunk, int64_t count, const float* z, float* room, float* to, bool add) {
  const int64_t wide = chunk.wide();
  multiply(count, chunk.rows, z, chunk.stride, chunk.plain, 0, wide / kLanes, room, wide, false);
  for (int64_t j = 0; j < count; ++j, to += chunk.depth) {
    const float* const from = room + j * wide;
    int64_t k = 0;
    if (!add) {
      for (; k + kLanes <= chunk.depth; k += kLanes) store(to + k, load(from + k));
      if (k < chunk.depth) store_first(to + k, load(from + k), static_cast<int>(chunk.depth - k));
    } else {
      for (; k + kLanes <= chunk.depth; k += kLanes) store(to + k, load(to + k) + load(from + k));
      const int left = static_cast<int>(chunk.depth - k);
      if (left) store_first(to + k, load_first(to + k, left) + load(from + k), left);
    }
  }
}

InputGradient::InputGradient(const Chunk& chunk, float* sum, float* group) : chunk_(chunk), sum_(sum), group_(group) {
  if (sum)
    for (int64_t i = 0; i < chunk.depth * chunk.stride; i += kLanes) store(sum + i, zero());
}

void InputGradient::add(const float* weight, int64_t count, const float* z, float* room) {
  const int64_t depth = chunk_.depth, stride = chunk_.stride;
  for (int64_t j = 0; j < count; j += kLanes) turn_rows(weight + j * depth, depth, count - j, depth, room + j, kBlockStride);
  multiply(depth, count, room, kBlockStride, z, stride, chunk_.vectors, group_, stride, grouped_ > 0);
  if (++grouped_ == kGroup) close();
}

void InputGradient::close() {
  if (!grouped_) return;
  for (int64_t i = 0; i < chunk_.depth * chunk_.stride; i += kLanes) store(sum_ + i, load(sum_ + i) + load(group_ + i));
  grouped_ = 0;
}

void add_up_inputs(const Chunk& chunk, const float* parts, int count, float* to, int thread, int team) {
  add_up(chunk, parts, count, to, thread, team);
}
void add_up_inputs(const Chunk& chunk, const float* parts, int count, uint16_t* to, int thread, int team) {
  add_up(chunk, parts, count, to, thread, team);
}

}  // namespace blocks
}  // namespace INTERFUSE_ISA
}  // namespace interfuse
