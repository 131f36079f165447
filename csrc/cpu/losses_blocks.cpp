#include "cpu/losses_blocks.h"

#include "common/matrix_units.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/transpose.h"
#include "cpu/split_product.h"

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
    const int64_t wide = least(4, vectors - first);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < wide; ++v, to += kLanes) store(to, read(i, first + v));
  }
}

// to(column, row) of from(row, column): kLanes rows from `row` on, of which `rows` exist, others as zeros; columns
// column to column + columns, a row of `to` being to_row floats.
template <class T>
INTERFUSE_INLINE void turn_rows(const T* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int width = static_cast<int>(least(kLanes, columns - c));
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
    const int64_t wide = least(4, chunk.vectors - panel * 4);
    for (int64_t k = 0; k < chunk.depth; k += kDepth) {
      const int64_t deep = least(kDepth, chunk.depth - k);
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
    pack_panels(chunk.rows, least(4, vectors - panel * 4), chunk.plain + panel * kPanel * chunk.rows,
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
      const int width = static_cast<int>(least(kLanes, chunk.depth - k));
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

#if defined(INTERFUSE_SPLIT_PRODUCT)

// Multiply-adds from which cutting the factors into pieces pays.
constexpr int64_t kLeastProducts = int64_t(1) << 25;

using split::kSide;
using split::kStep;
using split::kWide;

// Pieces of x for z^T: [panel of rows][step of features], and for grad_W: [panel of features][step of rows].
int64_t turned_size(int64_t rows, int64_t depth) { return split::panels_of(rows) * split::steps_of(depth) * kStep; }
int64_t plain_size(int64_t rows, int64_t depth) { return split::panels_of(depth) * split::steps_of(rows) * kStep; }

template <class T>
void cut_rows(const Chunk& chunk, const T* rows, int64_t row_stride, bool turned, bool plain, int thread, int team) {
  const int64_t depth = chunk.depth, deep = split::steps_of(depth), high = split::steps_of(chunk.rows);
  const Range panels = share(turned ? split::panels_of(chunk.rows) : 0, thread, team);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel)
    for (int64_t step = 0; step < deep; ++step) {
      uint16_t* const to = chunk.turned_pieces + (panel * deep + step) * kStep;
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t row = panel * kSide + i, left = row < chunk.rows ? depth - step * split::kDepth : 0;
        const T* const from = rows + (left ? row * row_stride + step * split::kDepth : 0);
        split::cut_some(from, left, to + i * split::kDepth);
      }
      split::turn(to);
    }
  const Range columns = share(plain ? split::panels_of(depth) : 0, thread, team);
  for (int64_t panel = columns.begin; panel < columns.end; ++panel)
    for (int64_t step = 0; step < high; ++step)
      for (int64_t i = 0; i < kSide; ++i) {
        const int64_t row = step * split::kDepth + 2 * i, left = depth - panel * kSide;
        const auto read = [&](int64_t r) __attribute__((always_inline)) {
          return left > 0 && r < chunk.rows ? load_some(rows + r * row_stride + panel * kSide, left) : zero();
        };
        split::cut_across(read(row), read(row + 1), chunk.plain_pieces + (panel * high + step) * kStep + i * split::kDepth);
      }
}

// A product whose kept factor has `panels` panels and `steps` steps, with the thread's own room.
split::Product product_of(const uint16_t* kept, int64_t steps, int64_t panels, int64_t streamed) {
  split::Product p{kept, steps, {0, panels / 2}, {0, divide_up(streamed, kWide)}, nullptr, nullptr};
  p.streamed = static_cast<uint16_t*>(scratch(Slot::flags, split::kStreamed * 2));
  p.sums = scratch_floats(Slot::between, p.room_for_sums());
  return p;
}

// c's rows (rows, columns) are the streamed a's, of which cut_along is to read `depth` numbers each, and its columns the
// kept factor's. Returns whether all of it is finite.
bool multiply_streamed(const uint16_t* kept, int64_t panels, int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row,
                       float* c, int64_t c_row) {
  IVec other{};
  split::multiply_all<true>(
      product_of(kept, split::steps_of(depth), panels, rows),
      [&](int64_t block, int64_t step, int64_t count, int64_t line, uint16_t* to) __attribute__((always_inline)) {
        const int64_t row = block * kWide + line;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t left = row < rows ? depth - (step + i) * split::kDepth : 0;
          const float* const from = a + (left > 0 ? row * a_row + (step + i) * split::kDepth : 0);
          split::cut_some(from, left, to + i * kStep);
        }
      },
      [&](int64_t block, int64_t pair, const float* sums) __attribute__((always_inline)) {
        for (int tile = 0; tile < 4; ++tile, sums += kSide * kSide) {
          const int64_t row = block * kWide + tile / 2 * kSide, column = pair * kWide + tile % 2 * kSide;
          for (int64_t r = 0; column < columns && r < least(rows - row, kSide); ++r) {
            const Vec line = load(sums + r * kSide);
            split::look(line, other);
            store(c + (row + r) * c_row + column, line);
          }
        }
      });
  return !split::any(other);
}

#endif

}  // namespace

bool on_matrix_units(int64_t rows, int64_t classes, int64_t depth) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  return matrix_units() && rows >= 64 && classes >= 64 && depth >= 32 && rows * classes * depth >= kLeastProducts;
#else
  (void)rows, (void)classes, (void)depth;
  return false;
#endif
}

void Chunk::make_room(int64_t most) {
  const int64_t floats = (depth + wide()) * stride_of(most);
  int64_t pieces = 0;
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (split) pieces = turned_size(most, depth) + plain_size(most, depth);
#endif
  turned = scratch_floats(Slot::pack, floats + (pieces + 1) / 2);
  plain = turned + depth * stride_of(most);
#if defined(INTERFUSE_SPLIT_PRODUCT)
  turned_pieces = reinterpret_cast<uint16_t*>(turned + floats), plain_pieces = turned_pieces + turned_size(most, depth);
#endif
}

bool fits_matrix_units(const Chunk& chunk, int64_t count, const float* z) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  IVec other{};
  for (int64_t j = 0; chunk.split && j < count; ++j)
    for (int64_t at = 0; at < chunk.vectors * kLanes; at += kLanes) split::look(load(z + j * chunk.stride + at), other);
  return chunk.split && !split::any(other);
#else
  (void)chunk, (void)count, (void)z;
  return false;
#endif
}

void pack(const Chunk& chunk, const float* rows, int64_t row_stride, bool turned, bool plain, int thread, int team) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (chunk.split) cut_rows(chunk, rows, row_stride, turned, plain, thread, team);
#endif
  pack_rows(chunk, rows, row_stride, turned, plain, thread, team);
}
void pack(const Chunk& chunk, const uint16_t* rows, int64_t row_stride, bool turned, bool plain, int thread, int team) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (chunk.split) cut_rows(chunk, rows, row_stride, turned, plain, thread, team);
#endif
  pack_rows(chunk, rows, row_stride, turned, plain, thread, team);
}

void multiply_rows(const Chunk& chunk, const float* weight, int64_t count, float* z) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (chunk.split && multiply_streamed(chunk.turned_pieces, split::panels_of(chunk.rows), count, chunk.depth, chunk.vectors * kLanes,
                                       weight, chunk.depth, z, chunk.stride))
    return;
#endif
  for (int64_t k = 0; k < chunk.depth; k += kDepth)
    multiply(count, least(kDepth, chunk.depth - k), weight + k, chunk.depth, chunk.turned + k * chunk.vectors * kLanes, 0,
             chunk.vectors, z, chunk.stride, k > 0);
}

void weight_gradient(const Chunk& chunk, bool split, int64_t count, const float* z, float* room, float* to, bool add) {
  const int64_t wide = chunk.wide();
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (split)
    multiply_streamed(chunk.plain_pieces, split::panels_of(chunk.depth), count, chunk.rows, wide, z, chunk.stride, room, wide);
  else
#else
  (void)split;
#endif
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

void InputGradient::add(bool split, const float* weight, int64_t count, const float* z, float* room) {
  const int64_t depth = chunk_.depth, stride = chunk_.stride;
  for (int64_t j = 0; j < count; j += kLanes) turn_rows(weight + j * depth, depth, count - j, depth, room + j, kBlockStride);
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (split)
    add_on_matrix_units(count, z, room);
  else
#else
  (void)split;
#endif
    multiply(depth, count, room, kBlockStride, z, stride, chunk_.vectors, group_, stride, grouped_ > 0);
  if (++grouped_ == kGroup) close();
}

#if defined(INTERFUSE_SPLIT_PRODUCT)
// group = or += turned z: the transposed weight is kept, z streams past it.
void InputGradient::add_on_matrix_units(int64_t count, const float* z, const float* turned) {
  const int64_t depth = chunk_.depth, stride = chunk_.stride, steps = split::steps_of(count), panels = split::panels_of(depth);
  uint16_t* const kept = static_cast<uint16_t*>(scratch(Slot::tiles, static_cast<size_t>(panels * steps * kStep) * 2));
  split::cut_rows(turned, kBlockStride, depth, panels * kSide, count, kept);
  const bool add = grouped_ > 0;
  const int64_t columns = chunk_.vectors * kLanes;
  split::multiply_all<false>(
      product_of(kept, steps, panels, columns),
      [&](int64_t block, int64_t step, int64_t some, int64_t line, uint16_t* to) __attribute__((always_inline)) {
        const int64_t column = block * kWide + line / kSide * kSide;
        for (int64_t i = 0; i < some; ++i) {
          const int64_t j = (step + i) * split::kDepth + line % kSide * 2;
          const auto read = [&](int64_t row) __attribute__((always_inline)) {
            return column < columns && row < count ? load(z + row * stride + column) : zero();
          };
          split::cut_across(read(j), read(j + 1), to + i * kStep);
        }
      },
      [&](int64_t block, int64_t pair, const float* sums) __attribute__((always_inline)) {
        for (int tile = 0; tile < 4; ++tile, sums += kSide * kSide) {
          const int64_t column = block * kWide + tile % 2 * kSide, k = pair * kWide + tile / 2 * kSide;
          for (int64_t r = 0; column < columns && r < least(depth - k, kSide); ++r) {
            float* const to = group_ + (k + r) * stride + column;
            store(to, add ? load(to) + load(sums + r * kSide) : load(sums + r * kSide));
          }
        }
      });
}
#endif

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
