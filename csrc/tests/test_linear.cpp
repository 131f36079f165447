// linear through the C API against plain double loops: every buffer between guard pages, flush with either end or
// misaligned, every dtype, one and two threads.
#include <cmath>
#include <map>
#include <memory>
#include <type_traits>
#include <vector>

#include "interfuse.h"
#include "tests/values.h"

using namespace interfuse_test;

namespace {

struct Problem {
  int64_t rows, outputs;
  std::vector<int64_t> widths;
  int activation;
  bool bias;
  int64_t depth() const {
    int64_t sum = 0;
    for (const int64_t width : widths) sum += width;
    return sum;
  }
};

// clang-format off
const Problem kProblems[] = {
    {1, 1, {1}, INTERFUSE_NONE, true},
    {1, 9, {37, 16}, INTERFUSE_RELU, true},
    {2, 5, {4100}, INTERFUSE_NONE, false},
    {5, 4, {17, 1, 3}, INTERFUSE_LEAKY_RELU, true},
    {7, 18, {64}, INTERFUSE_RELU, true},
    {33, 35, {15, 100}, INTERFUSE_NONE, true},
    {40, 60, {1300}, INTERFUSE_RELU, true},
    {210, 6, {31}, INTERFUSE_RELU, false},
    {20, 43, {70, 5, 200}, INTERFUSE_RELU, true},
    {29, 70, {4300}, INTERFUSE_NONE, true},
    {130, 150, {70, 5}, INTERFUSE_RELU, true},
    {141, 43, {70, 5, 200}, INTERFUSE_NONE, true},
    {1, 131, {16200}, INTERFUSE_NONE, true},        // weights that stream from memory
    {2, 259, {70, 16300}, INTERFUSE_RELU, false},
    {7, 131, {16200}, INTERFUSE_RELU, true},        // and gradients that are stored past the caches
    {9, 259, {70, 16300}, INTERFUSE_NONE, false},
    {21, 260, {16200}, INTERFUSE_NONE, true},
    {0, 3, {4}, INTERFUSE_RELU, true},
};
// clang-format on

double active(int kind, double v) {
  if (kind == INTERFUSE_RELU) return v > 0 ? v : 0;
  if (kind == INTERFUSE_LEAKY_RELU) return v > 0 ? v : 0.25 * v;
  return v;
}
double slope(int kind, double y) {
  if (kind == INTERFUSE_NONE || y > 0) return 1;
  return kind == INTERFUSE_RELU ? 0 : 0.25;
}

struct Truth {
  std::vector<Doubles> inputs;
  Doubles weight, bias, grad_y;
  Doubles products;  // before the weights' scale, the bias and the activation
  Doubles by_weight, by_bias;
  std::vector<Doubles> by_input;
};

// Integers so small that every sum is exact in float32.
Doubles drawn(int64_t count, unsigned seed) {
  Guarded<float> numbers(count);
  return fill(numbers, Values::integers, seed);
}

Truth truth_of(const Problem& p) {
  const int64_t depth = p.depth();
  Truth t;
  for (const int64_t width : p.widths) {
    t.inputs.push_back(drawn(p.rows * width, static_cast<unsigned>(t.inputs.size() + 1)));
    t.by_input.emplace_back(t.inputs.back().size());
  }
  t.weight = drawn(p.outputs * depth, 20), t.bias = drawn(p.outputs, 21), t.grad_y = drawn(p.rows * p.outputs, 22);
  t.by_weight.resize(t.weight.size()), t.by_bias.resize(t.bias.size());
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t n = 0; n < p.outputs; ++n) {
      double sum = 0;
      int64_t column = 0;
      for (size_t i = 0; i < p.widths.size(); column += p.widths[i++])
        for (int64_t k = 0; k < p.widths[i]; ++k) sum += t.inputs[i][r * p.widths[i] + k] * t.weight[n * depth + column + k];
      t.products.push_back(sum);
      const double value = active(p.activation, p.bias ? sum + t.bias[n] : sum);
      const double slant = t.grad_y[r * p.outputs + n] * slope(p.activation, value);
      t.by_bias[n] += slant;
      column = 0;
      for (size_t i = 0; i < p.widths.size(); column += p.widths[i++])
        for (int64_t k = 0; k < p.widths[i]; ++k) {
          t.by_weight[n * depth + column + k] += slant * t.inputs[i][r * p.widths[i] + k];
          t.by_input[i][r * p.widths[i] + k] += slant * t.weight[n * depth + column + k];
        }
    }
  return t;
}

// The same in every dtype and setting, and it takes longer than they do.
const Truth& known_truth(const Problem& p) {
  static std::map<const Problem*, Truth> known;
  auto found = known.find(&p);
  if (found == known.end()) found = known.emplace(&p, truth_of(p)).first;
  return found->second;
}

template <class T>
void copy(const Doubles& values, Guarded<T>& to) {
  for (size_t i = 0; i < values.size(); ++i) store(static_cast<float>(values[i]), to[static_cast<int64_t>(i)]);
}

// Exact but for the rounding to T.
template <class T>
void compare(const char* what, const Guarded<T>& ours, const Doubles& truth) {
  for (size_t i = 0; i < truth.size(); ++i) {
    T expected;
    store(static_cast<float>(truth[i]), expected);
    const float found = load(ours[static_cast<int64_t>(i)]);
    if (found == load(expected)) continue;
    std::ostringstream text;
    text << what << "[" << i << "] is " << found << ", not " << truth[i];
    return fail(__FILE__, __LINE__, text.str());
  }
}

template <class T, class W>
void run(const Problem& p, int dtype, int weight_dtype, const Setting& how) {
  const int64_t depth = p.depth();
  std::ostringstream text;
  text << p.rows << " rows, " << p.outputs << " outputs, depth " << depth << ", dtype " << dtype << ", weight "
       << weight_dtype << ", " << how;
  const Context context(text.str());
  const bool saves = weight_dtype == dtype;

  interfuse_linear_spec spec;
  interfuse_linear_defaults(&spec);
  spec.dtype = dtype, spec.weight_dtype = weight_dtype, spec.rows = p.rows, spec.out_features = p.outputs;
  spec.inputs = static_cast<int32_t>(p.widths.size());
  spec.widths = p.widths.data(), spec.row_strides = p.widths.data();
  spec.activation = p.activation, spec.negative_slope = 0.25f, spec.save = saves;
  interfuse_linear* plan = nullptr;
  CHECK_EQUAL(interfuse_linear_create(&spec, &plan), INTERFUSE_OK);
  if (!plan) return fail(__FILE__, __LINE__, interfuse_last_error());
  CHECK_EQUAL(interfuse_linear_saved(plan), int64_t(0));

  const auto guarded = [&](int64_t count) { return Guarded<T>(count, how.flush, how.offset); };
  std::vector<std::unique_ptr<Guarded<T>>> inputs, grads;
  std::vector<const void*> x;
  std::vector<void*> grad_x;
  const Truth& truth = known_truth(p);
  for (const Doubles& values : truth.inputs) {
    const int64_t count = static_cast<int64_t>(values.size());
    inputs.push_back(std::make_unique<Guarded<T>>(count, how.flush, how.offset));
    grads.push_back(std::make_unique<Guarded<T>>(count, how.flush, how.offset));
    copy(values, *inputs.back());
    x.push_back(inputs.back()->data()), grad_x.push_back(grads.back()->data());
  }
  Guarded<W> weight(p.outputs * depth, how.flush, how.offset), weight_grad(p.outputs * depth, how.flush, how.offset);
  Guarded<T> bias = guarded(p.outputs), bias_grad = guarded(p.outputs), y = guarded(p.rows * p.outputs),
             grad_y = guarded(p.rows * p.outputs);
  Guarded<float> scale(p.outputs, how.flush, how.offset);
  copy(truth.weight, weight), copy(truth.bias, bias), copy(truth.grad_y, grad_y);
  const bool scaled = weight_dtype == INTERFUSE_INT8;
  fill_by(scale, [](int64_t) { return 0.5f; });

  const interfuse_linear_weights weights{weight.data(), scaled ? scale.data() : nullptr, p.bias ? bias.data() : nullptr};
  CHECK_EQUAL(interfuse_linear_forward(plan, x.data(), &weights, y.data(), nullptr, how.threads), INTERFUSE_OK);
  Doubles activated;
  for (size_t i = 0; i < truth.products.size(); ++i) {
    const double sum = truth.products[i] * (scaled ? 0.5 : 1);
    activated.push_back(active(p.activation, p.bias ? sum + truth.bias[i % truth.bias.size()] : sum));
  }
  compare("y", y, activated);
  if constexpr (std::is_same_v<T, W>) {
    CHECK_EQUAL(interfuse_linear_backward(plan, grad_y.data(), x.data(), weight.data(), y.data(), nullptr, grad_x.data(),
                                          weight_grad.data(), bias_grad.data(), how.threads),
                INTERFUSE_OK);
    compare("grad_weight", weight_grad, truth.by_weight);
    compare("grad_bias", bias_grad, truth.by_bias);
    for (size_t i = 0; i < grads.size(); ++i) {
      compare("grad_x", *grads[i], truth.by_input[i]);
      CHECK(grads[i]->intact());
      CHECK(inputs[i]->intact());
    }
    CHECK(weight_grad.intact());
    CHECK(bias_grad.intact());
  }
  CHECK(y.intact());
  CHECK(weight.intact());
  CHECK(bias.intact());
  interfuse_linear_destroy(plan);
}

}  // namespace

TEST(linear_float32) {
  for (const Problem& p : kProblems)
    for (const Setting& how : kSettings) run<float, float>(p, INTERFUSE_FLOAT32, INTERFUSE_FLOAT32, how);
}
TEST(linear_bfloat16) {
  for (const Problem& p : kProblems)
    for (const Setting& how : kSettings) run<uint16_t, uint16_t>(p, INTERFUSE_BFLOAT16, INTERFUSE_BFLOAT16, how);
}
TEST(linear_int8_weights) {
  for (const Problem& p : kProblems)
    for (const Setting& how : kSettings) run<float, int8_t>(p, INTERFUSE_FLOAT32, INTERFUSE_INT8, how);
}
TEST(linear_bfloat16_weights) {
  for (const Problem& p : kProblems)
    for (const Setting& how : kSettings) run<float, uint16_t>(p, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16, how);
}

// On matrix units such rows are computed again by the vector units.
TEST(linear_an_infinity_stays_in_its_row) {
  const int64_t rows = 40, depth = 70, outputs = 60, spoilt = 7;
  for (const Setting& how : kSettings) {
    Guarded<float> x(rows * depth, how.flush, how.offset), weight(outputs * depth, how.flush, how.offset);
    Guarded<float> clean(rows * outputs), y(rows * outputs, how.flush, how.offset);
    fill(x, Values::integers, 1), fill(weight, Values::integers, 2);
    interfuse_linear_spec spec;
    interfuse_linear_defaults(&spec);
    spec.rows = rows, spec.out_features = outputs, spec.inputs = 1, spec.widths = spec.row_strides = &depth;
    interfuse_linear* plan = nullptr;
    CHECK_EQUAL(interfuse_linear_create(&spec, &plan), INTERFUSE_OK);
    const void* const from = x.data();
    const interfuse_linear_weights weights{weight.data(), nullptr, nullptr};
    CHECK_EQUAL(interfuse_linear_forward(plan, &from, &weights, clean.data(), nullptr, how.threads), INTERFUSE_OK);
    x[spoilt * depth + 3] = INFINITY;
    CHECK_EQUAL(interfuse_linear_forward(plan, &from, &weights, y.data(), nullptr, how.threads), INTERFUSE_OK);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < outputs; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += x[r * depth + k] * weight[n * depth + k];
        CHECK(close(y[r * outputs + n], r == spoilt ? sum : clean[r * outputs + n], 0));
      }
    CHECK(y.intact());
    interfuse_linear_destroy(plan);
  }
}

TEST(linear_chain_is_its_layers) {
  const int64_t sizes[] = {20, 9, 4, 1};
  interfuse_linear* plans[3];
  std::vector<std::unique_ptr<Guarded<float>>> weights, values;
  interfuse_linear_weights layers[3];
  values.push_back(std::make_unique<Guarded<float>>(3 * sizes[0]));
  fill(*values[0], Values::reals, 1, 0.3f);
  for (int i = 0; i < 3; ++i) {
    interfuse_linear_spec spec;
    interfuse_linear_defaults(&spec);
    spec.rows = 3, spec.out_features = sizes[i + 1], spec.inputs = 1, spec.widths = spec.row_strides = &sizes[i];
    spec.activation = INTERFUSE_TANH;
    CHECK_EQUAL(interfuse_linear_create(&spec, &plans[i]), INTERFUSE_OK);
    weights.push_back(std::make_unique<Guarded<float>>(sizes[i] * sizes[i + 1]));
    fill(*weights[i], Values::reals, 5u + static_cast<unsigned>(i), 0.3f);
    layers[i] = {weights[i]->data(), nullptr, nullptr};
    values.push_back(std::make_unique<Guarded<float>>(3 * sizes[i + 1]));
    const void* from = values[i]->data();
    CHECK_EQUAL(interfuse_linear_forward(plans[i], &from, &layers[i], values[i + 1]->data(), nullptr, 2), INTERFUSE_OK);
  }
  Guarded<float> y(3);
  const void* from = values[0]->data();
  CHECK_EQUAL(interfuse_linear_chain(plans, layers, 3, &from, y.data(), 2), INTERFUSE_OK);
  for (int i = 0; i < 3; ++i) CHECK_EQUAL(y[i], (*values[3])[i]);
  CHECK_EQUAL(interfuse_linear_chain(plans, layers, 0, &from, y.data(), 2), INTERFUSE_INVALID);
  for (interfuse_linear* plan : plans) interfuse_linear_destroy(plan);
}
