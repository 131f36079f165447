// linear through the C API against plain double loops: every buffer between guard pages, flush with either end or
// misaligned, every dtype, one and two threads.
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "interfuse.h"
#include "tests/guarded.h"

using namespace interfuse_test;

namespace {

using Doubles = std::vector<double>;

struct Problem {
  int64_t rows, outputs;
  std::vector<int64_t> widths;
  int activation;
  bool bias;
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

void put(float v, float& to) { to = v; }
void put(float v, uint16_t& to) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  to = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
void put(float v, int8_t& to) { to = static_cast<int8_t>(v); }
double get(float v) { return v; }
double get(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Integers small enough that every sum is exact in float32.
template <class T>
Doubles fill(Guarded<T>& buffer, unsigned seed, int most) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> whole(-most, most);
  Doubles values(static_cast<size_t>(buffer.size()));
  for (int64_t i = 0; i < buffer.size(); ++i) {
    values[i] = whole(random);
    put(static_cast<float>(values[i]), buffer[i]);
  }
  return values;
}

double active(int kind, double v) {
  if (kind == INTERFUSE_RELU) return v > 0 ? v : 0;
  if (kind == INTERFUSE_LEAKY_RELU) return v > 0 ? v : 0.25 * v;
  return v;
}
double slope(int kind, double y) {
  if (kind == INTERFUSE_NONE || y > 0) return 1;
  return kind == INTERFUSE_RELU ? 0 : 0.25;
}

// Exact but for the rounding to T.
template <class T>
void compare(const char* what, const Guarded<T>& ours, const Doubles& truth) {
  for (size_t i = 0; i < truth.size(); ++i) {
    T expected;
    put(static_cast<float>(truth[i]), expected);
    if (get(ours[static_cast<int64_t>(i)]) == get(expected)) continue;
    std::ostringstream text;
    text << what << "[" << i << "] is " << get(ours[static_cast<int64_t>(i)]) << ", not " << truth[i];
    return fail(__FILE__, __LINE__, text.str());
  }
}

struct Run {
  int threads;
  Flush flush;
  int64_t offset;
};

template <class T, class W>
void run(const Problem& p, int dtype, int weight_dtype, const Run& how) {
  int64_t depth = 0;
  for (const int64_t width : p.widths) depth += width;
  std::ostringstream text;
  text << p.rows << " rows, " << p.outputs << " outputs, depth " << depth << ", dtype " << dtype << ", weight "
       << weight_dtype << ", threads " << how.threads << ", offset " << how.offset
       << (how.flush == Flush::front ? " from the front" : " from the back");
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
  std::vector<Doubles> values;
  for (const int64_t width : p.widths) {
    inputs.push_back(std::make_unique<Guarded<T>>(p.rows * width, how.flush, how.offset));
    grads.push_back(std::make_unique<Guarded<T>>(p.rows * width, how.flush, how.offset));
    values.push_back(fill(*inputs.back(), static_cast<unsigned>(values.size() + 1), 2));
    x.push_back(inputs.back()->data()), grad_x.push_back(grads.back()->data());
  }
  Guarded<W> weight(p.outputs * depth, how.flush, how.offset), weight_grad(p.outputs * depth, how.flush, how.offset);
  Guarded<T> bias = guarded(p.outputs), bias_grad = guarded(p.outputs), y = guarded(p.rows * p.outputs),
             grad_y = guarded(p.rows * p.outputs);
  Guarded<float> scale(p.outputs, how.flush, how.offset);
  const Doubles w = fill(weight, 20, 1), b = fill(bias, 21, 3), g = fill(grad_y, 22, 1);
  for (int64_t n = 0; n < p.outputs; ++n) scale[n] = 0.5f;

  const interfuse_linear_weights weights{weight.data(), weight_dtype == INTERFUSE_INT8 ? scale.data() : nullptr,
                                         p.bias ? bias.data() : nullptr};
  CHECK_EQUAL(interfuse_linear_forward(plan, x.data(), &weights, y.data(), nullptr, how.threads), INTERFUSE_OK);
  Doubles truth;
  Doubles by_weight(w.size()), by_bias(b.size());
  std::vector<Doubles> by_input;
  for (const Doubles& v : values) by_input.emplace_back(v.size());
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t n = 0; n < p.outputs; ++n) {
      double sum = 0;
      int64_t column = 0;
      for (size_t i = 0; i < p.widths.size(); column += p.widths[i++])
        for (int64_t k = 0; k < p.widths[i]; ++k) sum += values[i][r * p.widths[i] + k] * w[n * depth + column + k];
      if (weight_dtype == INTERFUSE_INT8) sum *= 0.5;
      if (p.bias) sum += b[n];
      const double value = active(p.activation, sum), slant = g[r * p.outputs + n] * slope(p.activation, value);
      truth.push_back(value);
      by_bias[n] += slant;
      column = 0;
      for (size_t i = 0; i < p.widths.size(); column += p.widths[i++])
        for (int64_t k = 0; k < p.widths[i]; ++k) {
          by_weight[n * depth + column + k] += slant * values[i][r * p.widths[i] + k];
          by_input[i][r * p.widths[i] + k] += slant * w[n * depth + column + k];
        }
    }
  compare("y", y, truth);
  if constexpr (std::is_same_v<T, W>) {
    CHECK_EQUAL(interfuse_linear_backward(plan, grad_y.data(), x.data(), weight.data(), y.data(), nullptr, grad_x.data(),
                                          weight_grad.data(), bias_grad.data(), how.threads),
                INTERFUSE_OK);
    compare("grad_weight", weight_grad, by_weight);
    compare("grad_bias", bias_grad, by_bias);
    for (size_t i = 0; i < grads.size(); ++i) {
      compare("grad_x", *grads[i], by_input[i]);
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

const Run kRuns[] = {{1, Flush::back, 0}, {2, Flush::front, 0}, {2, Flush::back, 1}, {1, Flush::front, 3}};

}  // namespace

TEST(linear_float32) {
  for (const Problem& p : kProblems)
    for (const Run& how : kRuns) run<float, float>(p, INTERFUSE_FLOAT32, INTERFUSE_FLOAT32, how);
}
TEST(linear_bfloat16) {
  for (const Problem& p : kProblems)
    for (const Run& how : kRuns) run<uint16_t, uint16_t>(p, INTERFUSE_BFLOAT16, INTERFUSE_BFLOAT16, how);
}
TEST(linear_int8_weights) {
  for (const Problem& p : kProblems)
    for (const Run& how : kRuns) run<float, int8_t>(p, INTERFUSE_FLOAT32, INTERFUSE_INT8, how);
}
TEST(linear_bfloat16_weights) {
  for (const Problem& p : kProblems)
    for (const Run& how : kRuns) run<float, uint16_t>(p, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16, how);
}

TEST(linear_chain_is_its_layers) {
  const int64_t sizes[] = {20, 9, 4, 1};
  interfuse_linear* plans[3];
  std::vector<std::unique_ptr<Guarded<float>>> weights, values;
  interfuse_linear_weights layers[3];
  values.push_back(std::make_unique<Guarded<float>>(3 * sizes[0]));
  fill(*values[0], 1, 2);
  for (int i = 0; i < 3; ++i) {
    interfuse_linear_spec spec;
    interfuse_linear_defaults(&spec);
    spec.rows = 3, spec.out_features = sizes[i + 1], spec.inputs = 1, spec.widths = spec.row_strides = &sizes[i];
    spec.activation = INTERFUSE_TANH;
    CHECK_EQUAL(interfuse_linear_create(&spec, &plans[i]), INTERFUSE_OK);
    weights.push_back(std::make_unique<Guarded<float>>(sizes[i] * sizes[i + 1]));
    fill(*weights[i], 5u + static_cast<unsigned>(i), 1);
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
