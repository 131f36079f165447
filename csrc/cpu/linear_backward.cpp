// linear's backward: the gradient before the activation, and two products that read weight and inputs as they are.
//
//   grad_x_i = grad W_i,  grad_W_i = grad^T x_i
//
// Both run along the weight's columns. Of the first, each thread takes some of these, with few columns some of the rows; of
// the second some of the weight's rows, with few of them some of the columns.
#include "cpu/linear_product.h"
#include "common/matrix_units.h"
#include "common/scratch.h"
#include "common/stream.h"
#include "common/transpose.h"
#include "cpu/linear.h"
#include "cpu/split_matrices.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int64_t kPanel = 4 * kLanes;
// A block of b, packed: 128 KiB, which stay in the second-level cache while the rows of a pass, and of which a panel
// (32 KiB) stays in the first.
constexpr int64_t kColumnsAtOnce = 256, kDepthAtOnce = 128;
constexpr int64_t kRowsAtOnce = 192;
// Fewer rows than this read b too seldom to pay for packing it. Plain rows of b that are a power of two apart fall into
// a few sets of the first-level cache and drive each other out.
constexpr int64_t kRowsWorthAPack = 24;
constexpr int64_t kBiasRows = 64;
constexpr int64_t kOutputsWorthSharing = 64;  // for each thread

// c (rows, columns) = or += a b; a(r, k) at a[r * a_row + k * a_step], b and c rows of plain matrices.
void block_product(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_step,
                   const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  const int64_t whole = columns / kLanes;
  const int left = static_cast<int>(columns % kLanes);
  float* const pack = scratch_floats(Slot::pack, depth * (kColumnsAtOnce + kLanes) + rows * kLanes);
  if (rows < kRowsWorthAPack && b_row) {  // (0: one row that is repeated, which wide_product takes for a pack)
    wide_product(rows, depth, a, a_row, a_step, b, b_row, 1, whole, c, c_row, add);
  } else {
    for (int64_t v = 0; v < whole; v += 4) {
      const int64_t vectors = whole - v < 4 ? whole - v : 4;
      float* to = pack + v * kLanes * depth;
      for (int64_t k = 0; k < depth; ++k, to += vectors * kLanes)
        for (int64_t i = 0; i < vectors; ++i) store(to + i * kLanes, load(b + k * b_row + (v + i) * kLanes));
    }
    wide_product(rows, depth, a, a_row, a_step, pack, 0, depth, whole, c, c_row, add);
  }
  if (!left) return;
  // The last columns, less than a vector: through copies, since nothing beyond the tensors may be touched.
  float* const tail = pack + depth * kColumnsAtOnce;
  float* const sums = tail + depth * kLanes;
  b += whole * kLanes, c += whole * kLanes;
  for (int64_t k = 0; k < depth; ++k) store(tail + k * kLanes, load_first(b + k * b_row, left));
  // As for whole vectors, a sum goes on from what c holds: where a column is cut must not change how it is rounded.
  if (add)
    for (int64_t r = 0; r < rows; ++r) store(sums + r * kLanes, load_first(c + r * c_row, left));
  wide_product(rows, depth, a, a_row, a_step, tail, 0, depth, 1, sums, kLanes, add);
  for (int64_t r = 0; r < rows; ++r) store_first(c + r * c_row, load(sums + r * kLanes), left);
}

// c = a b; `split`: on the matrix units, and then with `past` past the caches.
void product(bool split, int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_step,
             const float* b, int64_t b_row, float* c, int64_t c_row, bool past = false) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (split && multiply_matrices(rows, depth, columns, a, a_row, a_step, b, b_row, c, c_row, past)) return;
#else
  (void)split, (void)past;
#endif
  for (int64_t column = 0; column < columns; column += kColumnsAtOnce) {
    const int64_t wide = columns - column < kColumnsAtOnce ? columns - column : kColumnsAtOnce;
    for (int64_t k = 0; k < depth; k += kDepthAtOnce) {
      const int64_t deep = depth - k < kDepthAtOnce ? depth - k : kDepthAtOnce;
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const int64_t high = rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce;
        block_product(high, deep, wide, a + r * a_row + k * a_step, a_row, a_step, b + k * b_row + column, b_row,
                      c + r * c_row + column, c_row, k > 0);
      }
    }
  }
}

// With so few rows both gradients take the time of reading and writing a matrix as large as the weight.
constexpr int64_t kFewRows = 4, kFewRowsOfLarge = 19;
constexpr int64_t kColumnsRead = 4096;

bool few_rows(const Linear& p) {
  return p.rows <= kFewRows || (p.rows <= kFewRowsOfLarge && p.outputs * p.depth * 4 >= kFromMemory);
}

// c (rows, columns) = a b with few rows, a dense.
void few_products(int64_t rows, int64_t depth, int64_t columns, const float* a, const float* b, int64_t b_row, float* c,
                  int64_t c_row) {
  for (int64_t column = 0; column < columns; column += kColumnsRead) {
    const int64_t wide = columns - column < kColumnsRead ? columns - column : kColumnsRead;
    const auto add = [&](auto high, auto deep, int64_t r, int64_t k) __attribute__((always_inline)) {
      constexpr int kHigh = decltype(high)::value, kDeep = decltype(deep)::value;
      const float *const from = b + k * b_row + column, *const factors = a + r * depth + k;
      float* const to = c + r * c_row + column;
      along_row(wide, [&](auto&& read, auto&& write) __attribute__((always_inline)) {
        Vec sums[kHigh];
        unrolled<kHigh>([&](int i) __attribute__((always_inline)) { sums[i] = k > 0 ? read(to + i * c_row) : zero(); });
        unrolled<kDeep>([&](int j) __attribute__((always_inline)) {
          const Vec value = read(from + j * b_row);
          unrolled<kHigh>([&](int i) __attribute__((always_inline)) {
            sums[i] = multiply_add(splat(factors[i * depth + j]), value, sums[i]);
          });
        });
        unrolled<kHigh>([&](int i) __attribute__((always_inline)) { write(to + i * c_row, sums[i]); });
      });
    };
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) add(Count<4>{}, Count<4>{}, r, k), add(Count<4>{}, Count<4>{}, r, k + 4);
      for (; r < rows; ++r) add(Count<1>{}, Count<8>{}, r, k);
    }
    for (; k < depth; ++k)
      for (int64_t r = 0; r < rows; ++r) add(Count<1>{}, Count<1>{}, r, k);
  }
}

// c (columns of a, columns) = a^T b with few rows of a and b; `past`: past the caches.
void few_outer_products(int64_t rows, int64_t outputs, int64_t columns, const float* a, int64_t a_row, const float* b,
                        int64_t b_row, float* c, int64_t c_row, bool past) {
  constexpr int kVectors = 8;
  const int64_t at_once = (kColumnsRead / rows + kVectors * kLanes - 1) / (kVectors * kLanes) * (kVectors * kLanes);
  for (int64_t column = 0; column < columns; column += at_once) {
    const int64_t wide = columns - column < at_once ? columns - column : at_once;
    for (int64_t n = 0; n < outputs; ++n) {
      float* const to = c + n * c_row + column;
      // `write` vectors from `at` on, which `read` reads.
      const auto sum = [&](auto vectors, int64_t at, auto&& read, auto&& write) __attribute__((always_inline)) {
        constexpr int kCount = decltype(vectors)::value;
        Vec sums[kCount] = {};
        for (int64_t r = 0; r < rows; ++r) {
          const Vec factor = splat(a[r * a_row + n]);
          const float* const from = b + r * b_row + column + at;
          unrolled<kCount>([&](int i) __attribute__((always_inline)) {
            const Vec value = read(from + i * kLanes);
            sums[i] = r > 0 ? multiply_add(factor, value, sums[i]) : factor * value;
          });
        }
        unrolled<kCount>([&](int i) __attribute__((always_inline)) { write(to + at + i * kLanes, sums[i]); });
      };
      const auto some = [&](int64_t at, int count) __attribute__((always_inline)) {
        sum(Count<1>{}, at, [&](const float* from) __attribute__((always_inline)) { return load_first(from, count); },
            [&](float* end, Vec v) __attribute__((always_inline)) { store_first(end, v, count); });
      };
      const auto whole = [&](auto vectors, int64_t at) __attribute__((always_inline)) {
        sum(vectors, at, [](const float* from) __attribute__((always_inline)) { return load(from); },
            [&](float* end, Vec v) __attribute__((always_inline)) { past ? store_past(end, v) : store(end, v); });
      };
      const int64_t before = past ? before_line(to) : 0;
      int64_t at = before < wide ? before : wide;
      if (at) some(0, static_cast<int>(at));
      for (; at + kVectors * kLanes <= wide; at += kVectors * kLanes) whole(Count<kVectors>{}, at);
      for (; at + kLanes <= wide; at += kLanes) whole(Count<1>{}, at);
      if (at < wide) some(at, static_cast<int>(wide - at));
    }
  }
}

struct Floats {
  const float* grad;      // (rows, outputs), before the activation
  const float* turned;    // its transpose; unwritten with few rows, and on matrix units
  const float* weight;
  const float* const* inputs;
  const int64_t* input_rows;  // their row strides
  float* const* grad_inputs;  // dense, or null
  float* grad_weight;
  float* grad_bias;
  bool past;  // grad_weight is larger than the caches
};

// Columns begin to end of the weight, cut where an input ends: body(input, offset in it, column, count).
template <class Body>
INTERFUSE_INLINE void each_input(const Linear& p, int64_t begin, int64_t end, Body&& body) {
  for (int64_t i = 0; i < p.input_count; ++i) {
    const LinearInput& in = p.inputs[i];
    const int64_t from = begin > in.column ? begin : in.column;
    const int64_t to = end < in.column + in.width ? end : in.column + in.width;
    if (from < to) body(i, from - in.column, from, to - from);
  }
}

// With fewer rows, cutting the factors into pieces takes longer than the matrix units save. The same for all threads:
// their number must not change a result.
bool worth_splitting([[maybe_unused]] const Linear& p) {
#if defined(INTERFUSE_SPLIT_PRODUCT)
  return p.rows >= 20 && p.outputs >= split::kDepth && p.depth >= split::kDepth && matrix_units();
#else
  return false;
#endif
}

void gradients(const Linear& p, const Floats& t, int thread, int team) {
  const bool split = worth_splitting(p), few = few_rows(p);
  const int64_t units = divide_up(p.depth, kPanel);
  Range columns{0, p.depth}, rows{0, p.rows};
  if (units >= 4 * team) {
    const Range mine = share(units, thread, team);
    columns.begin = mine.begin * kPanel;
    columns.end = mine.end * kPanel < p.depth ? mine.end * kPanel : p.depth;
  } else {
    rows = share(p.rows, thread, team);
  }
  each_input(p, columns.begin, columns.end, [&](int64_t i, int64_t offset, int64_t column, int64_t count) {
    if (!t.grad_inputs[i]) return;
    const int64_t width = p.inputs[i].width;
    const float* const grad = t.grad + rows.begin * p.outputs;
    float* const to = t.grad_inputs[i] + rows.begin * width + offset;
    if (few) few_products(rows.end - rows.begin, p.outputs, count, grad, t.weight + column, p.depth, to, width);
    else product(split, rows.end - rows.begin, p.outputs, count, grad, p.outputs, 1, t.weight + column, p.depth, to, width);
  });
  if (t.grad_weight) {
    // Whole rows where there are enough: two threads on one page that is new would each fill it with zeros.
    Range outputs{0, p.outputs};
    if (p.outputs >= kOutputsWorthSharing * team || units < 4 * team)
      outputs = share(p.outputs, thread, team), columns = {0, p.depth};
    each_input(p, columns.begin, columns.end, [&](int64_t i, int64_t offset, int64_t column, int64_t count) {
      const float* const from = t.inputs[i] + offset;
      float* const to = t.grad_weight + outputs.begin * p.depth + column;
      const int64_t high = outputs.end - outputs.begin;
      if (few) few_outer_products(p.rows, high, count, t.grad + outputs.begin, p.outputs, from, t.input_rows[i], to, p.depth, t.past);
      else if (split) product(split, high, p.rows, count, t.grad + outputs.begin, 1, p.outputs, from, t.input_rows[i], to, p.depth, t.past);
      else product(split, high, p.rows, count, t.turned + outputs.begin * p.rows, p.rows, 1, from, t.input_rows[i], to, p.depth);
    });
    end_stores_past();
  }
  if (!t.grad_bias) return;
  const Range mine = share(p.outputs, thread, team);
  const int64_t count = mine.end - mine.begin;
  float* const bias = t.grad_bias + mine.begin;
  // Some rows at a time: rounding grows with the length of a chain of sums.
  float* const some = scratch_floats(Slot::rows, count);
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  memset(bias, 0, bytes);
  for (int64_t first = 0; first < p.rows; first += kBiasRows) {
    memset(some, 0, bytes);
    for (int64_t r = first; r < p.rows && r < first + kBiasRows; ++r) {
      const float* grad = t.grad + r * p.outputs + mine.begin;
      along_row(count, [&](auto&& read, auto&& write) __attribute__((always_inline)) { write(some, read(some) + read(grad)); });
    }
    along_row(count, [&](auto&& read, auto&& write) __attribute__((always_inline)) { write(bias, read(bias) + read(some)); });
  }
}

// to (columns, rows) = from (rows, columns) transposed, for rows begin to end of from.
void turn(const float* from, float* to, int64_t rows, int64_t columns, Range mine) {
  int64_t r = mine.begin;
  for (; r + kLanes <= mine.end; r += kLanes) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + (r + i) * columns + c);
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(to + (c + i) * rows + r, block[i]);
    }
    for (; c < columns; ++c)
      for (int i = 0; i < kLanes; ++i) to[c * rows + r + i] = from[(r + i) * columns + c];
  }
  for (; r < mine.end; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

template <class T>
INTERFUSE_INLINE const float* as_floats(const T* from, int64_t from_row, float*& room, int64_t rows, int64_t width, int threads) {
  float* const to = room;
  convert_rows(from, from_row, to, rows, width, threads);
  room += rows * width;
  return to;
}

void no_rows(const Linear& p, const LinearBackward& call) {
  const size_t size = p.dtype == INTERFUSE_BFLOAT16 ? 2 : 4;
  if (call.grad_weight) memset(call.grad_weight, 0, static_cast<size_t>(p.outputs * p.depth) * size);
  if (call.grad_bias) memset(call.grad_bias, 0, static_cast<size_t>(p.outputs) * size);
}

}  // namespace

void linear_backward(const Linear& p, const LinearBackward& call) {
  if (p.rows == 0) return no_rows(p, call);
  const bool half = p.dtype == INTERFUSE_BFLOAT16;
  const bool active = p.activation != INTERFUSE_NONE;
  const void* const saved = p.needs_preactivation() ? call.pre : call.y;
  const int64_t count = p.count(), weights = p.outputs * p.depth;
  bool any_input = false;
  for (int64_t i = 0; i < p.input_count; ++i) any_input = any_input || call.grad_inputs[i];

  // Room for grad and its transpose; for bfloat16, for all tensors as floats.
  int64_t floats = 2 * count;
  if (half) floats += 2 * count + 2 * p.rows * p.depth + 2 * weights + p.outputs;
  float* room = scratch_floats(Slot::gradient, floats);
  float* const made = room;
  float* const turned = made + count;
  room = turned + count;
  const size_t each = static_cast<size_t>(p.input_count) * 8;
  char* const lists = static_cast<char*>(scratch(Slot::other, 3 * each));
  const float** const inputs = reinterpret_cast<const float**>(lists);
  float** const grad_inputs = reinterpret_cast<float**>(lists + each);
  int64_t* const input_rows = reinterpret_cast<int64_t*>(lists + 2 * each);

  Floats t{nullptr, turned, static_cast<const float*>(call.weight), inputs, input_rows, grad_inputs,
           static_cast<float*>(call.grad_weight), static_cast<float*>(call.grad_bias), !half && weights * 4 >= kStreamedBytes};
  const float *grad_y = static_cast<const float*>(call.grad_y), *from = static_cast<const float*>(saved);
  for (int64_t i = 0; i < p.input_count; ++i) {
    inputs[i] = static_cast<const float*>(call.inputs[i]);
    input_rows[i] = p.inputs[i].row_stride;
    grad_inputs[i] = static_cast<float*>(call.grad_inputs[i]);
  }
  if (half) {
    grad_y = as_floats(static_cast<const uint16_t*>(call.grad_y), p.outputs, room, p.rows, p.outputs, call.threads);
    if (active) from = as_floats(static_cast<const uint16_t*>(saved), p.outputs, room, p.rows, p.outputs, call.threads);
    if (any_input) t.weight = as_floats(static_cast<const uint16_t*>(call.weight), p.depth, room, p.outputs, p.depth, call.threads);
    for (int64_t i = 0; i < p.input_count; ++i) {
      const LinearInput& in = p.inputs[i];
      if (call.grad_weight)
        inputs[i] = as_floats(static_cast<const uint16_t*>(call.inputs[i]), in.row_stride, room, p.rows, in.width, call.threads);
      input_rows[i] = in.width;
      if (grad_inputs[i]) grad_inputs[i] = room, room += p.rows * in.width;
    }
    if (t.grad_weight) t.grad_weight = room, room += weights;
    if (t.grad_bias) t.grad_bias = room, room += p.outputs;
  }

  t.grad = active ? made : grad_y;
  const Activation f{p.activation, p.slope};
  const int threads = worth_threads(2 * count * p.depth, call.threads);
  const bool few = few_rows(p), turns = t.grad_weight && !few && !worth_splitting(p);
  if (active || turns) parallel(few ? 1 : threads, [&](int thread, int team) {
    // Shares of whole vectors, so that transposed blocks are not cut.
    const Range blocks = share(divide_up(p.rows, kLanes), thread, team);
    const Range rows{blocks.begin * kLanes, blocks.end * kLanes < p.rows ? blocks.end * kLanes : p.rows};
    for (int64_t r = rows.begin; active && r < rows.end; ++r)
      grad_row(f, grad_y + r * p.outputs, from + r * p.outputs, made + r * p.outputs, p.outputs);
    if (turns) turn(t.grad, turned, p.rows, p.outputs, rows);
  });
  parallel(threads, [&](int thread, int team) { gradients(p, t, thread, team); });

  if (!half) return;
  for (int64_t i = 0; i < p.input_count; ++i)
    if (grad_inputs[i])
      convert_rows(grad_inputs[i], p.inputs[i].width, static_cast<uint16_t*>(call.grad_inputs[i]), p.rows, p.inputs[i].width,
                   call.threads);
  if (call.grad_weight) convert_rows(t.grad_weight, p.depth, static_cast<uint16_t*>(call.grad_weight), p.outputs, p.depth, call.threads);
  if (call.grad_bias) convert_row(t.grad_bias, static_cast<uint16_t*>(call.grad_bias), p.outputs);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
