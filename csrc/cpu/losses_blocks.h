// Products over all pairs of a row and a class (or of a row and another row), some rows and some classes at a time: what
// the losses of a matrix that never exists as a whole have in common. Per-ISA (see common/simd.h).
//
// A block of the matrix is kept transposed, [class][row], so that a vector holds rows and one layout serves all three
// products:
//
//   z^T = W x^T,   grad_x^T = W^T G^T,   grad_W = G^T x,    G the gradient of z
//
// Where the processor has matrix units, they multiply in float32's precision (split_product.h); what is not finite goes to
// the vector units.
#pragma once

#include "common/simd.h"
#include "common/vector_math.h"
#include "cpu/linear_product.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace blocks {

// Whole tiles of rows for every instruction set; a block of the matrix stays in the second-level cache.
constexpr int64_t kBlock = 132;
constexpr int64_t kBlockStride = (kBlock + kLanes - 1) / kLanes * kLanes;
constexpr int64_t kMostRows = 512;  // of a chunk
constexpr int64_t kPanel = 4 * kLanes;

// Blocks of classes whose products with the weight are added up before they join the sum over all: one running sum over
// tens of thousands of classes would round several times as much as torch's products do.
constexpr int64_t kGroup = 4;

constexpr float kLowest = -3.4028235e38f;

INTERFUSE_INLINE int64_t vectors_of(int64_t count) { return divide_up(count, kLanes); }

// exp(x) for x far below what overflows; a NaN stays. One instruction scales by any power of two where there is one.
INTERFUSE_INLINE Vec exp_in_range(Vec x) {
#if defined(__AVX512F__)
  const Reduced x2 = reduced(at_least(x, -104.f));
  return scaled(multiply_add(multiply_add(x2.r, exp_rest(x2.r), splat(1.f)), x2.r, splat(1.f)), x2.n);
#else
  return exp(x);
#endif
}

// Whether the matrix units multiply: there are some, and tiles enough for them.
bool on_matrix_units(int64_t rows, int64_t classes, int64_t depth);

// Classes of a block: as many blocks as give every thread some, where there are few classes; whole tiles.
INTERFUSE_INLINE int64_t block_of(int64_t classes, int threads, bool split) {
  const int64_t tile = split ? 32 : 6, most = kBlock / tile * tile;
  return least(most, (classes + threads * tile - 1) / (threads * tile) * tile);
}

// Rows of a chunk, at most `most`: as many in each, since a last chunk of few would read the weight for little.
INTERFUSE_INLINE int64_t rows_of_chunk(int64_t rows, int64_t most) {
  const int64_t chunks = divide_up(rows, most);
  return round_up(divide_up(rows, chunks), kPanel);
}

// Floats from one class to the next: an odd number of vectors, so that classes do not share sets of the cache.
INTERFUSE_INLINE int64_t stride_of(int64_t rows) { return (vectors_of(rows) | 1) * kLanes; }

// One chunk of rows of x, and the packs of it.
struct Chunk {
  int64_t depth, first, rows, vectors, stride;
  float* turned;  // [block of features][panel of rows][feature], for z
  float* plain;   // [panel of features][row], for grad_W
  bool split;     // both in pieces, too, for the matrix units
  uint16_t *turned_pieces, *plain_pieces;

  // Room for the packs of at most `rows` rows.
  void make_room(int64_t rows);
  void start(int64_t at, int64_t count) { first = at, rows = count, vectors = vectors_of(count), stride = stride_of(count); }
  int64_t wide() const { return vectors_of(depth) * kLanes; }
};

// A member's part of packing `rows`, the chunk's first row; turned or plain may be left out.
void pack(const Chunk& chunk, const float* rows, int64_t row_stride, bool turned, bool plain, int thread, int team);
void pack(const Chunk& chunk, const uint16_t* rows, int64_t row_stride, bool turned, bool plain, int thread, int team);

// Whether the matrix units may multiply with z, a block's gradient: all of it is finite.
bool fits_matrix_units(const Chunk& chunk, int64_t count, const float* z);

// z (count, stride) = weight (count, depth) x^T.
void multiply_rows(const Chunk& chunk, const float* weight, int64_t count, float* z);

// Room of weight_gradient, and of input_gradient.
INTERFUSE_INLINE int64_t room_of(int64_t depth) { return kBlockStride * (depth + kLanes); }

// to (count, depth) = or += z x. Each chunk's sum is formed by itself before it is added: one running sum over thousands
// of rows would round several times as much as torch's products do.
void weight_gradient(const Chunk& chunk, bool split, int64_t count, const float* z, float* room, float* to, bool add);

// grad_x^T (depth, stride) of a member's blocks, in groups of them.
class InputGradient {
 public:
  // sum and group: (depth, stride) each; null where nothing will be added.
  InputGradient(const Chunk& chunk, float* sum, float* group);
  void add(bool split, const float* weight, int64_t count, const float* z, float* room);
  void close();

 private:
  void add_on_matrix_units(int64_t count, const float* z, const float* turned);

  const Chunk& chunk_;
  float *sum_, *group_;
  int64_t grouped_ = 0;
};

// The `count` sums of InputGradient, (depth, stride) each, added and turned back: a member's part of (rows, depth).
void add_up_inputs(const Chunk& chunk, const float* parts, int count, float* to, int thread, int team);
void add_up_inputs(const Chunk& chunk, const float* parts, int count, uint16_t* to, int thread, int team);

// body(Count<vectors>, at) along a row of z: four vectors, then one at a time.
template <class Body>
INTERFUSE_INLINE void along_rows(const Chunk& chunk, Body&& body) {
  int64_t at = 0;
  const int64_t end = chunk.vectors * kLanes;
  for (; at + kPanel <= end; at += kPanel) body(Count<4>{}, at);
  for (; at < end; at += kLanes) body(Count<1>{}, at);
}

// z's classes `count`, of some vectors of rows: sum and top, which is the largest so far, go on; exp(z - top) goes in z's
// place where it is kept.
template <int Vectors>
INTERFUSE_INLINE void sum_exponentials(float* z, int64_t stride, const float* biases, int64_t count, float* top, float* sum,
                                       bool keep) {
  Vec most[Vectors], total[Vectors];
  unrolled<Vectors>([&](int v) __attribute__((always_inline)) { most[v] = load(top + v * kLanes); });
  for (int64_t j = 0; j < count; ++j)
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
      most[v] = maximum(load(z + j * stride + v * kLanes) + biases[j], most[v]);
    });
  unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
    total[v] = load(sum + v * kLanes) * exp_in_range(load(top + v * kLanes) - most[v]);
    store(top + v * kLanes, most[v]);
  });
  for (int64_t j = 0; j < count; ++j)
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
      float* const at = z + j * stride + v * kLanes;
      const Vec e = exp_in_range(load(at) + biases[j] - most[v]);
      total[v] = total[v] + e;
      if (keep) store(at, e);
    });
  unrolled<Vectors>([&](int v) __attribute__((always_inline)) { store(sum + v * kLanes, total[v]); });
}

}  // namespace blocks
}  // namespace INTERFUSE_ISA
}  // namespace interfuse
