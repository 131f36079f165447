// linear's C API: checks the problem and cuts its depth into blocks.
#include "common/linear.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/error.h"
#include "common/inner.h"
#include "common/parallel.h"
#include "common/scratch.h"

struct interfuse_linear {
  interfuse::Linear problem;
  const interfuse::LinearKernels* kernels;
  std::vector<interfuse::LinearInput> inputs;
  std::vector<interfuse::LinearPiece> pieces;
  std::vector<int64_t> block_ends;
};

namespace interfuse {
namespace {

void check_spec(const interfuse_linear_spec& s) {
  check_range("linear", "dtype", s.dtype, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16);
  check_range("linear", "weight_dtype", s.weight_dtype, INTERFUSE_FLOAT32, INTERFUSE_INT8);
  check_range("linear", "activation", s.activation, INTERFUSE_NONE, INTERFUSE_SOFTMAX);
  check_range("linear", "rows", s.rows, 0, kMostElements);
  check_range("linear", "out_features", s.out_features, 1, INT32_MAX);
  check_range("linear", "inputs", s.inputs, 1, 1 << 16);
  if (!s.widths || !s.row_strides) invalid("linear: widths or row_strides is a null pointer; pass one entry for each input.");
  if (s.weight_dtype != s.dtype && s.save)
    invalid("linear: a weight of another dtype than the inputs' is for inference; use save = 0, or a weight of the inputs' "
            "dtype.");
  int64_t depth = 0;
  for (int32_t i = 0; i < s.inputs; ++i) {
    check_range("linear", "the width of an input", s.widths[i], 1, INT32_MAX);
    check_range("linear", "the row stride of an input", s.row_strides[i], 0, kMostElements);
    depth += s.widths[i];
  }
  if (depth > kMostElements / s.out_features || (s.rows && std::max(depth, s.out_features) > kMostElements / s.rows))
    invalid("linear: %lld rows, %lld inputs' columns and %lld outputs are too large together; split the rows.",
            (long long)s.rows, (long long)depth, (long long)s.out_features);
}

// The floats of a row that one block takes. With several rows, a block of theirs stays in the second-level cache, and a
// few rows of the weight's block in the first while all rows pass; with one or two there is nothing to stay, and longer
// stretches of the weight are read faster.
int64_t block_depth(const interfuse_linear_spec& s) { return s.rows <= 2 ? 4096 : 1024; }

void cut(interfuse_linear& plan, int64_t most) {
  int64_t room = most;
  for (int64_t i = 0; i < static_cast<int64_t>(plan.inputs.size()); ++i) {
    const LinearInput& in = plan.inputs[i];
    for (int64_t offset = 0; offset < in.width;) {
      // A rest of less than half a block joins the block before.
      const int64_t left = in.width - offset, depth = left < room + most / 2 ? left : room;
      plan.pieces.push_back({i, offset, in.column + offset, depth});
      offset += depth;
      room -= depth;
      if (room <= 0) {
        plan.block_ends.push_back(static_cast<int64_t>(plan.pieces.size()));
        room = most;
      }
    }
  }
  if (room < most) plan.block_ends.push_back(static_cast<int64_t>(plan.pieces.size()));
}

int64_t saved(const Linear& p) { return p.save && p.needs_preactivation() ? p.count() : 0; }

void forward(const interfuse_linear& plan, const void* const* inputs, const interfuse_linear_weights* weights, void* y,
             void* pre, int threads) {
  const Linear& p = plan.problem;
  if (p.rows == 0) return;
  if (!inputs || !weights || !weights->weight || !y)
    invalid("linear: forward was given a null pointer for inputs, weights or y; all three are needed.");
  for (int64_t i = 0; i < p.input_count; ++i)
    if (!inputs[i])
      invalid("linear: input %lld is a null pointer; the plan has %lld inputs.", (long long)i, (long long)p.input_count);
  if (p.weight_dtype == INTERFUSE_INT8 && !weights->scale) invalid("linear: an int8 weight needs its scale, one float an output.");
  if (saved(p) && !pre) invalid("linear: this plan saves for backward; pass pre as large as interfuse_linear_saved says.");
  plan.kernels->forward(p, {inputs, *weights, y, saved(p) ? pre : nullptr, threads});
}

}  // namespace

void run_linear(const interfuse_linear& plan, int64_t rows, const void* input, const interfuse_linear_weights& weights, void* y,
                int threads) {
  Linear p = plan.problem;
  p.rows = rows;
  plan.kernels->forward(p, {&input, weights, y, nullptr, threads});
}
}  // namespace interfuse

using interfuse::invalid;

extern "C" {

void interfuse_linear_defaults(interfuse_linear_spec* spec) {
  *spec = interfuse_linear_spec{};
  spec->negative_slope = 0.01f;
}

interfuse_status interfuse_linear_create(const interfuse_linear_spec* spec, interfuse_linear** plan) {
  return interfuse::guarded([&] {
    if (!spec || !plan) invalid("linear: create was given a null pointer; pass a spec and a place for the plan.");
    interfuse::check_spec(*spec);
    auto made = std::make_unique<interfuse_linear>();
    interfuse::Linear& p = made->problem;
    p = {};
    p.rows = spec->rows, p.outputs = spec->out_features;
    p.dtype = spec->dtype, p.weight_dtype = spec->weight_dtype;
    p.activation = spec->activation, p.slope = spec->negative_slope, p.save = spec->save != 0;
    for (int32_t i = 0; i < spec->inputs; ++i) {
      made->inputs.push_back({spec->widths[i], spec->row_strides[i], p.depth});
      p.depth += spec->widths[i];
    }
    interfuse::cut(*made, interfuse::block_depth(*spec));
    p.inputs = made->inputs.data(), p.input_count = spec->inputs;
    p.pieces = made->pieces.data();
    p.block_ends = made->block_ends.data(), p.blocks = static_cast<int64_t>(made->block_ends.size());
    made->kernels = INTERFUSE_PICK(linear_kernels);
    *plan = made.release();
  });
}

void interfuse_linear_destroy(interfuse_linear* plan) { delete plan; }

int64_t interfuse_linear_saved(const interfuse_linear* plan) { return interfuse::saved(plan->problem); }

interfuse_status interfuse_linear_forward(const interfuse_linear* plan, const void* const* inputs,
                                          const interfuse_linear_weights* weights, void* y, void* pre, int32_t threads) {
  return interfuse::guarded([&] {
    if (!plan) invalid("linear: forward was given no plan; make one with interfuse_linear_create.");
    interfuse::forward(*plan, inputs, weights, y, pre, interfuse::usable_threads(threads));
  });
}

interfuse_status interfuse_linear_chain(const interfuse_linear* const* plans, const interfuse_linear_weights* weights,
                                        int32_t layers, const void* const* inputs, void* y, int32_t threads) {
  return interfuse::guarded([&] {
    if (!plans || !weights || layers < 1) invalid("linear: a chain was given null pointers or no layers; at least one is needed.");
    size_t widest = 0;
    for (int32_t i = 0; i < layers; ++i) {
      if (!plans[i]) invalid("linear: layer %d of the chain has no plan; make one with interfuse_linear_create.", i);
      const interfuse::Linear& p = plans[i]->problem;
      if (p.save) invalid("linear: layer %d of the chain saves for backward; a chain is for inference, use save = 0.", i);
      if (i > 0) {
        const interfuse::Linear& before = plans[i - 1]->problem;
        if (p.input_count != 1 || p.depth != before.outputs || p.rows != before.rows || p.dtype != before.dtype ||
            (p.rows > 1 && p.inputs[0].row_stride != p.depth))
          invalid("linear: layer %d of the chain does not take what layer %d gives: one dense input of %lld rows and %lld columns.",
                  i, i - 1, (long long)before.rows, (long long)before.outputs);
      }
      if (i + 1 < layers) widest = std::max(widest, static_cast<size_t>(p.count()));
    }
    const size_t bytes = (widest * (plans[0]->problem.dtype == INTERFUSE_FLOAT32 ? 4 : 2) + 63) / 64 * 64;
    char* const between = static_cast<char*>(interfuse::scratch(interfuse::Slot::between, 2 * bytes));
    const void* const* from = inputs;
    const void* last;
    for (int32_t i = 0; i < layers; ++i) {
      void* const to = i + 1 < layers ? between + (i % 2) * bytes : y;
      interfuse::forward(*plans[i], from, &weights[i], to, nullptr, interfuse::usable_threads(threads));
      last = to, from = &last;
    }
  });
}

interfuse_status interfuse_linear_backward(const interfuse_linear* plan, const void* grad_y, const void* const* inputs,
                                           const void* weight, const void* y, const void* pre, void* const* grad_inputs,
                                           void* grad_weight, void* grad_bias, int32_t threads) {
  return interfuse::guarded([&] {
    if (!plan) invalid("linear: backward was given no plan; make one with interfuse_linear_create.");
    const interfuse::Linear& p = plan->problem;
    if (!p.save) invalid("linear: backward needs a plan with save = 1, the one its forward ran with.");
    if (p.rows > 0) {
      if (!grad_y || !inputs || !weight || !grad_inputs)
        invalid("linear: backward was given a null pointer for grad_y, inputs, weight or grad_inputs; all are needed.");
      for (int64_t i = 0; i < p.input_count; ++i)
        if (grad_weight && !inputs[i]) invalid("linear: input %lld is a null pointer; the gradient of the weight needs it.", (long long)i);
      if ((p.needs_preactivation() && !pre) || (p.backward_reads_y() && !y))
        invalid("linear: backward was not given what forward saved; pass its pre and, for this activation, y.");
    }
    plan->kernels->backward(p, {grad_y, inputs, weight, y, pre, grad_inputs, grad_weight, grad_bias,
                                interfuse::usable_threads(threads)});
  });
}

}  // extern "C"
