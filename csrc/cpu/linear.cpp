// linear's forward. Each thread takes some of the outputs for all rows, so that the weight is read once by one of them;
// with few outputs, some of the rows for all outputs.
#include "cpu/linear.h"

#include "common/matrix_units.h"
#include "common/scratch.h"
#include "cpu/linear_tile.h"
#include "cpu/split_product.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// Rows whose part of a block (4 KiB each) stays in the second-level cache while the weight's rows pass.
constexpr int64_t kRowsAtOnce = 96;
// Rows of bfloat16 that are floats at the same time.
constexpr int64_t kRowsConverted = 384;

template <int Columns, class W>
INTERFUSE_INLINE void dot_rows(const LinearPiece* piece, const LinearPiece* end, const InputRows* inputs, Range rows,
                               const W* weight, const W* ahead, int64_t depth, float* to, int64_t outputs, bool add) {
  const int64_t tiles = divide_up(rows.end - rows.begin, kDotRows);
  int64_t turn = 0;
  const auto tile = [&](auto count, int64_t row) __attribute__((always_inline)) {
    // Tile number i brings row i of the weight's next rows and, where there are fewer tiles than rows, every further one.
    Ahead next{reinterpret_cast<const char*>(ahead + (turn < kDotColumns ? turn : 0) * depth + piece->column), {}};
    for (int64_t i = 0; i < 3; ++i)
      if (const int64_t further = (i + 1) * tiles; turn + further < kDotColumns) next.rows[i] = further * depth * sizeof(W);
    dot_tile<decltype(count)::value, Columns, false>(piece, end, inputs, row, weight, depth, next, to + row * outputs, outputs, add);
    ++turn;
    return row + decltype(count)::value;
  };
  int64_t row = rows.begin;
  // Eight rows as four and four: tiles of equal size bring the weight at an even pace.
  while (row + kDotRows <= rows.end && (kDotRows < 5 || rows.end - row != 8)) row = tile(Count<kDotRows>{}, row);
  if constexpr (kDotRows > 4)
    while (row + 4 <= rows.end) row = tile(Count<4>{}, row);
  if constexpr (kDotRows > 2)
    if (row + 2 <= rows.end) row = tile(Count<2>{}, row);
  if (row < rows.end) tile(Count<1>{}, row);
}

// One or two rows and a weight that comes from memory: it is read from end to end, one group of its rows after the other
// over the whole depth, while the inputs stay in the second-level cache. Otherwise each fetch would cost more than it gives.
template <int RowCount, class W>
void few_rows(const Linear& p, const InputRows* inputs, const W* weight, int64_t row, Range outputs, float* y) {
  const auto blocks = [&](auto columns, int64_t n) __attribute__((always_inline)) {
    for (int64_t b = 0; b < p.blocks; ++b)
      dot_tile<RowCount, decltype(columns)::value, true>(p.pieces + (b ? p.block_ends[b - 1] : 0), p.pieces + p.block_ends[b],
                                                         inputs, row, weight + n * p.depth, p.depth, Ahead{},
                                                         y + row * p.outputs + n, p.outputs, b > 0);
  };
  int64_t n = outputs.begin;
  for (; n + kDotColumns <= outputs.end; n += kDotColumns) blocks(Count<kDotColumns>{}, n);
  for (; n < outputs.end; ++n) blocks(Count<1>{}, n);
}

template <class W>
void products(const Linear& p, const InputRows* inputs, const W* weight, Range rows, Range outputs, float* y) {
  if constexpr (sizeof(W) > 1) {  // int8 takes its time to be converted, which hides the memory's
    const bool streams = p.outputs * p.depth * static_cast<int64_t>(sizeof(W)) >= kFromMemory;
    if (streams && rows.end - rows.begin == 1) return few_rows<1>(p, inputs, weight, rows.begin, outputs, y);
    if (streams && rows.end - rows.begin == 2) return few_rows<2>(p, inputs, weight, rows.begin, outputs, y);
  }
  for (int64_t b = 0; b < p.blocks; ++b) {
    const LinearPiece *piece = p.pieces + (b ? p.block_ends[b - 1] : 0), *end = p.pieces + p.block_ends[b];
    int64_t n = outputs.begin;
    for (; n + kDotColumns <= outputs.end; n += kDotColumns) {
      const int64_t next = n + 2 * kDotColumns <= outputs.end ? n + kDotColumns : n;
      dot_rows<kDotColumns>(piece, end, inputs, rows, weight + n * p.depth, weight + next * p.depth, p.depth, y + n, p.outputs, b > 0);
    }
    for (; n < outputs.end; ++n)
      dot_rows<1>(piece, end, inputs, rows, weight + n * p.depth, weight + n * p.depth, p.depth, y + n, p.outputs, b > 0);
  }
}

void products_of(const Linear& p, const InputRows* inputs, const void* weight, Range rows, Range outputs, float* y) {
  switch (p.weight_dtype) {
    case INTERFUSE_BFLOAT16: return products(p, inputs, static_cast<const uint16_t*>(weight), rows, outputs, y);
    case INTERFUSE_INT8: return products(p, inputs, static_cast<const int8_t*>(weight), rows, outputs, y);
    default: return products(p, inputs, static_cast<const float*>(weight), rows, outputs, y);
  }
}

struct Floats {  // everything in float but the weight
  const InputRows* inputs;
  const interfuse_linear_weights& weights;
  const float* bias;
  float* y;
  float* pre;
};

// Scale, bias and activation of these sums; softmax only where the rows are whole: softmax_rows does it elsewhere.
void finish(const Linear& p, const Floats& t, Range rows, Range outputs, bool whole_rows) {
  const bool softmax = p.activation == INTERFUSE_SOFTMAX;
  const Activation f{softmax ? int(INTERFUSE_NONE) : p.activation, p.slope};
  const int64_t first = outputs.begin, count = outputs.end - outputs.begin;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    float* const y = t.y + r * p.outputs + first;
    finish_row(f, t.weights.scale ? t.weights.scale + first : nullptr, t.bias ? t.bias + first : nullptr, y,
               t.pre ? t.pre + r * p.outputs + first : nullptr, count);
    if (softmax && whole_rows) softmax_row(y, p.outputs);
  }
}

void softmax_rows(const Linear& p, float* y, int64_t row_count, int threads) {
  if (p.activation != INTERFUSE_SOFTMAX) return;
  parallel(worth_threads(row_count * p.outputs, threads), [&](int thread, int team) {
    const Range rows = share(row_count, thread, team);
    for (int64_t r = rows.begin; r < rows.end; ++r) softmax_row(y + r * p.outputs, p.outputs);
  });
}

#if defined(INTERFUSE_SPLIT_PRODUCT)
// Panels are of 32 rows: with fewer than two thirds of them, the vector units are as fast. More rows at a time than a few
// hundred save nothing any more.
constexpr int64_t kRowsWorthSplitting = 20, kRowsSplit = 256;

bool worth_splitting(const Linear& p, int64_t rows) {
  return p.weight_dtype == INTERFUSE_FLOAT32 && p.dtype == INTERFUSE_FLOAT32 && rows >= kRowsWorthSplitting &&
         p.outputs >= split::kSide && p.depth >= split::kDepth && matrix_units();
}

// A step of sixteen rows of the inputs side by side, as the second factor.
void cut_inputs(const Linear& p, const InputRows* inputs, Range rows, int64_t step, uint16_t* to) {
  const int64_t begin = step * split::kDepth, end = least(begin + split::kDepth, p.depth);
  int64_t i = 0;
  while (p.inputs[i].column + p.inputs[i].width <= begin) ++i;
  const bool one = p.inputs[i].column + p.inputs[i].width >= end;
  float joined[split::kSide][split::kDepth];
  for (int64_t half = 0; half < 2; ++half) {
    Vec lines[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = least(rows.begin + r, rows.end - 1);
      const float* from = joined[r];
      if (one) {
        from = inputs[i].data + row * inputs[i].stride + (begin - p.inputs[i].column);
      } else if (half == 0) {
        int64_t at = begin;
        for (int64_t k = i; at < end; ++k) {
          const int64_t until = least(p.inputs[k].column + p.inputs[k].width, end);
          memcpy(joined[r] + (at - begin), inputs[k].data + row * inputs[k].stride + (at - p.inputs[k].column),
                 static_cast<size_t>(until - at) * sizeof(float));
          at = until;
        }
      }
      lines[r] = load_some(from + half * kLanes, end - begin - half * kLanes);
    }
    transpose(lines);
    for (int k = 0; k < kLanes; k += 2)
      split::cut_across(lines[k], lines[k + 1], to + (half * kLanes + k) / 2 * split::kDepth);
  }
}

// A weight's rows. By value, so that the compiler keeps it in registers between stores.
struct Weight {
  const float* data;
  int64_t outputs, depth;

  // Line `line` of `count` steps of 32 of them. Beyond the last row it is taken again: nobody reads those sums.
  INTERFUSE_INLINE void cut(int64_t block, int64_t step, int64_t count, int64_t line, uint16_t* to) const {
    const float* from = data + least(block * split::kWide + line, outputs - 1) * depth + step * split::kDepth;
    const int64_t left = depth - step * split::kDepth;
    if (left >= count * split::kDepth)
      for (int64_t i = 0; i < count; ++i, from += split::kDepth)
        split::cut_along(load(from), load(from + kLanes), to + i * split::kStep);
    else
      for (int64_t i = 0; i < count; ++i) split::cut_some(from + i * split::kDepth, left - i * split::kDepth, to + i * split::kStep);
  }
};

// Products of at most kRowsSplit rows with 32 rows of the weight for each of `blocks`.
void split_rows(const Linear& p, const Floats& t, Range rows, Range blocks) {
  const int64_t panels = split::panels_of(rows.end - rows.begin);
  split::Product product{nullptr, split::steps_of(p.depth), {0, panels / 2}, blocks, nullptr, nullptr};
  const int64_t steps = product.part();
  uint16_t* const kept = static_cast<uint16_t*>(scratch(Slot::tiles, static_cast<size_t>(panels * steps * split::kStep) * 2));
  product.kept = kept;
  product.streamed = static_cast<uint16_t*>(scratch(Slot::weight, split::kStreamed * 2));
  product.sums = scratch_floats(Slot::products, product.room_for_sums());
  const Weight weight{static_cast<const float*>(t.weights.weight), p.outputs, p.depth};
  IVec other{};
  split::multiply_in_turn<true>(
      product,
      [&](int64_t first, int64_t count) {
        for (int64_t panel = 0; panel < panels; ++panel)
          for (int64_t step = 0; step < count; ++step)
            cut_inputs(p, t.inputs, {rows.begin + panel * split::kSide, rows.end}, first + step, kept + (panel * steps + step) * split::kStep);
      },
      [&](int64_t block, int64_t step, int64_t count, int64_t line, uint16_t* to) __attribute__((always_inline)) {
        weight.cut(block, step, count, line, to);
      },
      [&](int64_t block, int64_t pair, const float* sums) __attribute__((always_inline)) {
        for (int tile = 0; tile < 4; ++tile, sums += split::kSide * kLanes) {  // the weight's rows by the inputs': transposed
          const int64_t n = block * split::kWide + tile / 2 * split::kSide;
          const int64_t row = rows.begin + pair * split::kWide + tile % 2 * split::kSide;
          if (n >= p.outputs || row >= rows.end) continue;
          Vec lines[kLanes];
          for (int i = 0; i < kLanes; ++i) {
            lines[i] = load(sums + i * kLanes);
            split::look(lines[i], other);
          }
          transpose(lines);
          const int64_t count = least(p.outputs - n, kLanes), high = least(rows.end - row, kLanes);
          for (int i = 0; i < kLanes; ++i)
            if (i < high) store_first(t.y + (row + i) * p.outputs + n, lines[i], static_cast<int>(count));
        }
      });
  if (split::any(other))
    products(p, t.inputs, weight.data, rows, {blocks.begin * split::kWide, least(blocks.end * split::kWide, p.outputs)}, t.y);
}

// Each thread cuts its part of either factor: what threads hand to each other costs more than cutting it twice. They share
// the rows, and cut the whole weight; or the outputs where there are more threads than rows to give, and where the weight
// comes from memory, which is then read once.
void forward_split(const Linear& p, const Floats& t, int64_t row_count, int threads) {
  const int64_t units = divide_up(row_count, split::kWide), blocks = divide_up(p.outputs, split::kWide);
  const bool by_outputs = p.outputs * p.depth * 4 >= kFromMemory;
  const int first = static_cast<int>(least(threads, by_outputs ? blocks : units));
  const int second = static_cast<int>(least(threads / first, by_outputs ? units : blocks));
  const int down = by_outputs ? second : first, across = by_outputs ? first : second;
  parallel(threads, [&](int thread, int team) {
    const Range jobs = share(down * across, thread, team);
    for (int64_t job = jobs.begin; job < jobs.end; ++job) {
      const Range mine = share(units, static_cast<int>(job / across), down);
      const Range columns = share(blocks, static_cast<int>(job % across), across);
      const int64_t last = least(mine.end * split::kWide, row_count);
      for (int64_t begin = mine.begin * split::kWide; begin < last; begin += kRowsSplit) {
        const Range rows{begin, least(begin + kRowsSplit, last)};
        split_rows(p, t, rows, columns);
        finish(p, t, rows, {columns.begin * split::kWide, least(columns.end * split::kWide, p.outputs)}, across == 1);
      }
    }
  });
  if (across > 1) softmax_rows(p, t.y, row_count, threads);
}
#endif

void forward_floats(const Linear& p, const Floats& t, int64_t row_count, int threads) {
  threads = worth_threads(row_count * p.outputs * p.depth, threads);
#if defined(INTERFUSE_SPLIT_PRODUCT)
  if (worth_splitting(p, row_count)) return forward_split(p, t, row_count, threads);
#endif
  const int64_t groups = divide_up(p.outputs, kDotColumns);
  const bool by_outputs = groups >= 4 * threads || row_count < 2 * threads;
  parallel(threads, [&](int thread, int team) {
    Range rows{0, row_count}, outputs{0, p.outputs};
    if (by_outputs) {
      const Range mine = share(groups, thread, team);
      outputs.begin = mine.begin * kDotColumns;
      outputs.end = mine.end * kDotColumns < p.outputs ? mine.end * kDotColumns : p.outputs;
    } else {
      rows = share(row_count, thread, team);
    }
    for (int64_t begin = rows.begin; begin < rows.end; begin += kRowsAtOnce) {
      const int64_t end = begin + kRowsAtOnce < rows.end ? begin + kRowsAtOnce : rows.end;
      products_of(p, t.inputs, t.weights.weight, {begin, end}, outputs, t.y);
      finish(p, t, {begin, end}, outputs, !by_outputs);
    }
  });
  if (by_outputs) softmax_rows(p, t.y, row_count, threads);
}

// bfloat16: some rows at a time are turned into floats and the results back; the weight is converted in registers.
void forward_halves(const Linear& p, const LinearForward& call) {
  const int64_t most = p.rows < kRowsConverted ? p.rows : kRowsConverted, outputs = round_up(p.outputs, kLanes);
  float* const x = scratch_floats(Slot::rows, most * (p.depth + p.input_count * kLanes));
  float* const y = scratch_floats(Slot::products, (2 * most + 1) * outputs);
  float* const pre = call.pre ? y + most * outputs : nullptr;
  float* bias = nullptr;
  if (call.weights.bias) {
    bias = y + 2 * most * outputs;
    convert_row(static_cast<const uint16_t*>(call.weights.bias), bias, p.outputs);
  }
  InputRows* const inputs = static_cast<InputRows*>(scratch(Slot::other, static_cast<size_t>(p.input_count) * sizeof(InputRows)));
  for (int64_t begin = 0; begin < p.rows; begin += most) {
    const int64_t rows = p.rows - begin < most ? p.rows - begin : most;
    float* to = x;
    for (int64_t i = 0; i < p.input_count; ++i) {
      const LinearInput& in = p.inputs[i];
      convert_rows(static_cast<const uint16_t*>(call.inputs[i]) + begin * in.row_stride, in.row_stride, to, rows, in.width,
                   call.threads);
      inputs[i] = {to, in.width};
      to += rows * in.width;
    }
    forward_floats(p, {inputs, call.weights, bias, y, pre}, rows, call.threads);
    const int64_t at = begin * p.outputs, count = rows * p.outputs;
    convert_row(y, static_cast<uint16_t*>(call.y) + at, count);
    if (pre) convert_row(pre, static_cast<uint16_t*>(call.pre) + at, count);
  }
}

void linear_forward(const Linear& p, const LinearForward& call) {
  if (p.dtype == INTERFUSE_BFLOAT16) return forward_halves(p, call);
  InputRows* const inputs = static_cast<InputRows*>(scratch(Slot::other, static_cast<size_t>(p.input_count) * sizeof(InputRows)));
  for (int64_t i = 0; i < p.input_count; ++i) inputs[i] = {static_cast<const float*>(call.inputs[i]), p.inputs[i].row_stride};
  forward_floats(p,
                 {inputs, call.weights, static_cast<const float*>(call.weights.bias), static_cast<float*>(call.y),
                  static_cast<float*>(call.pre)},
                 p.rows, call.threads);
}

}  // namespace

extern const LinearKernels linear_kernels = {linear_forward, linear_backward};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
