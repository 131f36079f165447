// linear's forward. Each thread takes some of the outputs for all rows, so that the weight is read once by one of them;
// with few outputs, some of the rows for all outputs.
#include "cpu/linear.h"

#include "common/scratch.h"
#include "cpu/linear_tile.h"

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
  const auto tile = [&](auto count, int64_t row) __attribute__((always_inline)) {
    // Tile number i brings row i of the weight's next rows.
    const int64_t turn = (row - rows.begin) / kDotRows;
    const W* const next = ahead + (turn < kDotColumns ? turn : 0) * depth + piece->column;
    dot_tile<decltype(count)::value, Columns>(piece, end, inputs, row, weight, depth, reinterpret_cast<const char*>(next),
                                              to + row * outputs, outputs, add);
    return row + decltype(count)::value;
  };
  int64_t row = rows.begin;
  while (row + kDotRows <= rows.end) row = tile(Count<kDotRows>{}, row);
  if constexpr (kDotRows > 4)
    if (row + 4 <= rows.end) row = tile(Count<4>{}, row);
  if constexpr (kDotRows > 2)
    if (row + 2 <= rows.end) row = tile(Count<2>{}, row);
  if (row < rows.end) tile(Count<1>{}, row);
}

template <class W>
void products(const Linear& p, const InputRows* inputs, const W* weight, Range rows, Range outputs, float* y) {
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

// Everything in float but the weight.
void forward_floats(const Linear& p, const InputRows* inputs, int64_t row_count, const interfuse_linear_weights& weights,
                    const float* bias, float* y, float* pre, int threads) {
  const bool softmax = p.activation == INTERFUSE_SOFTMAX;
  const Activation f{softmax ? int(INTERFUSE_NONE) : p.activation, p.slope};
  threads = worth_threads(row_count * p.outputs * p.depth, threads);
  const int64_t groups = (p.outputs + kDotColumns - 1) / kDotColumns;
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
    const int64_t first = outputs.begin;
    for (int64_t begin = rows.begin; begin < rows.end; begin += kRowsAtOnce) {
      const int64_t end = begin + kRowsAtOnce < rows.end ? begin + kRowsAtOnce : rows.end;
      products_of(p, inputs, weights.weight, {begin, end}, outputs, y);
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * p.outputs + first;
        finish_row(f, weights.scale ? weights.scale + first : nullptr, bias ? bias + first : nullptr, y + at,
                   pre ? pre + at : nullptr, outputs.end - first);
        if (softmax && !by_outputs) softmax_row(y + at, p.outputs);
      }
    }
  });
  if (softmax && by_outputs)  // a row was many threads' work
    parallel(worth_threads(row_count * p.outputs, threads), [&](int thread, int team) {
      const Range rows = share(row_count, thread, team);
      for (int64_t r = rows.begin; r < rows.end; ++r) softmax_row(y + r * p.outputs, p.outputs);
    });
}

// bfloat16: some rows at a time are turned into floats and the results back; the weight is converted in registers.
void forward_halves(const Linear& p, const LinearForward& call) {
  const int64_t most = p.rows < kRowsConverted ? p.rows : kRowsConverted, outputs = (p.outputs + kLanes - 1) / kLanes * kLanes;
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
    forward_floats(p, inputs, rows, call.weights, bias, y, pre, call.threads);
    const int64_t at = begin * p.outputs, count = rows * p.outputs;
    convert_row(y, static_cast<uint16_t*>(call.y) + at, count);
    if (pre) convert_row(pre, static_cast<uint16_t*>(call.pre) + at, count);
  }
}

void linear_forward(const Linear& p, const LinearForward& call) {
  if (p.dtype == INTERFUSE_BFLOAT16) return forward_halves(p, call);
  InputRows* const inputs = static_cast<InputRows*>(scratch(Slot::other, static_cast<size_t>(p.input_count) * sizeof(InputRows)));
  for (int64_t i = 0; i < p.input_count; ++i) inputs[i] = {static_cast<const float*>(call.inputs[i]), p.inputs[i].row_stride};
  forward_floats(p, inputs, p.rows, call.weights, static_cast<const float*>(call.weights.bias), static_cast<float*>(call.y),
                 static_cast<float*>(call.pre), call.threads);
}

}  // namespace

extern const LinearKernels linear_kernels = {linear_forward, linear_backward};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
