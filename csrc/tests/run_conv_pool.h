// One conv_pool problem, forward and backward, through the C API against the naive double loops: every buffer between
// guard pages, flush with either end or misaligned.
#pragma once

#include "tests/naive_conv_pool.h"
#include "tests/values.h"

namespace interfuse_test {

constexpr int kNone = INTERFUSE_POOL_NONE, kMax = INTERFUSE_POOL_MAX, kAvg = INTERFUSE_POOL_AVG;

struct Problem {
  const char* name;
  int64_t batch, in_channels, out_channels, groups;
  int64_t input[3], kernel[3], stride[3], padding_lo[3], padding_hi[3], dilation[3];
  int activation, pool;
  int64_t pool_size[3], pool_stride[3], pool_padding[3];
  int ceil_mode, count_include_pad, bias;
};

inline interfuse_conv_pool_spec spec_of(const Problem& p, int dtype, bool channels_last, bool highest) {
  interfuse_conv_pool_spec s;
  interfuse_conv_pool_defaults(&s);
  s.dtype = dtype;
  s.channels_last = channels_last;
  s.batch = p.batch, s.in_channels = p.in_channels, s.out_channels = p.out_channels, s.groups = p.groups;
  for (int axis = 0; axis < 3; ++axis) {
    s.input[axis] = p.input[axis], s.kernel[axis] = p.kernel[axis], s.stride[axis] = p.stride[axis];
    s.padding_lo[axis] = p.padding_lo[axis], s.padding_hi[axis] = p.padding_hi[axis],
    s.dilation[axis] = p.dilation[axis];
    s.pool_size[axis] = p.pool_size[axis], s.pool_stride[axis] = p.pool_stride[axis];
    s.pool_padding[axis] = p.pool_padding[axis];
  }
  s.activation = p.activation, s.pool = p.pool;
  s.ceil_mode = p.ceil_mode, s.count_include_pad = p.count_include_pad;
  s.precision = highest ? INTERFUSE_PRECISION_HIGHEST : INTERFUSE_PRECISION_DEFAULT;
  s.save = 1;
  return s;
}

// How far a result may be from the truth, as a relative Frobenius norm. These sizes are small: one wrong
// element among a few thousand gives 1e-2. At 0 the results must be equal to the last bit.
inline double tolerance(const interfuse_conv_pool_spec& s, Values values) {
  if (s.dtype == INTERFUSE_BFLOAT16) return 3e-3;  // one rounding to 8 bits: 2^-9 at most, 1.7e-3 on average
  if (s.precision == INTERFUSE_PRECISION_DEFAULT) return 1e-5;
  const bool exact = values == Values::integers && s.activation <= INTERFUSE_RELU &&
                     (s.pool != INTERFUSE_POOL_AVG || (!s.ceil_mode && s.pool_size[1] == 2));
  return exact ? 0 : 1e-6;
}

// The index may name any element that is the largest within rounding; 255 stands for a relu that let nothing
// through. Where the arithmetic is exact it must be the first of the largest, and 255 wherever nothing is
// above zero.
inline void check_index(const NaiveConvPool& naive, const std::vector<uint8_t>& index, const Doubles& activated,
                 const Doubles& y, double tolerance) {
  const bool relu = naive.s.activation == INTERFUSE_RELU;
  double scale = 0;
  for (double v : activated) scale = std::max(scale, std::fabs(v));
  const double slack = 20 * tolerance * scale;
  std::vector<uint8_t> found(index.size());
  std::vector<int64_t> first(index.size(), -1);
  naive.windows([&](int64_t o, int64_t i, int64_t place) {
    if (index[o] == place) found[o] = activated[i] >= y[o] - slack;
    if (first[o] < 0 && activated[i] == y[o]) first[o] = relu && y[o] <= 0 ? 255 : place;
  });
  for (size_t o = 0; o < index.size(); ++o) {
    const bool closed = index[o] == 255 && relu && y[o] <= slack;
    if (tolerance == 0 ? index[o] == first[o] : found[o] || closed) continue;
    std::ostringstream text;
    text << "index[" << o << "] is " << int(index[o]) << "; the first of the largest is at " << first[o];
    fail(__FILE__, __LINE__, text.str());
    return;
  }
}

struct Run {
  int threads;
  Values values;
  Flush flush;
  int64_t offset;
};

template <class T>
void run(const Problem& problem, const interfuse_conv_pool_spec& spec, const Run& how) {
  interfuse_conv_pool* plan = nullptr;
  const interfuse_status status = interfuse_conv_pool_create(&spec, &plan);
  CHECK_EQUAL(status, INTERFUSE_OK);
  if (status != INTERFUSE_OK) return fail(__FILE__, __LINE__, interfuse_last_error());
  int64_t conv[3], out[3], index_count, pre_count;
  interfuse_conv_pool_sizes(plan, conv, out);
  interfuse_conv_pool_saved(plan, &index_count, &pre_count);
  const NaiveConvPool naive(spec, conv, out);
  std::ostringstream text;
  text << problem.name << ", " << (spec.dtype == INTERFUSE_BFLOAT16 ? "bfloat16" : "float32") << ", "
       << (spec.channels_last ? "channels last" : "contiguous") << ", " << interfuse_conv_pool_algorithm(plan)
       << ", threads " << how.threads << (how.values == Values::integers ? ", integers" : ", reals")
       << ", offset " << how.offset << (how.flush == Flush::front ? " from the front" : " from the back");
  const Context context(text.str());

  auto buffer = [&](int64_t count) { return Guarded<T>(count, how.flush, how.offset); };
  Guarded<T> x = buffer(naive.x.count()), weight = buffer(naive.weight_count());
  Guarded<T> bias = buffer(problem.bias ? spec.out_channels : 0), y = buffer(naive.y.count()),
             pre = buffer(pre_count);
  Guarded<uint8_t> index(index_count, how.flush, how.offset);
  const Doubles x_values = fill(x, how.values, 1), weight_values = fill(weight, how.values, 2);
  const Doubles bias_values = fill(bias, how.values, 3);

  CHECK_EQUAL(interfuse_conv_pool_forward(plan, x.data(), weight.data(), problem.bias ? bias.data() : nullptr,
                                          y.data(), index_count ? index.data() : nullptr,
                                          pre_count ? pre.data() : nullptr, how.threads),
              INTERFUSE_OK);
  const double allowed = tolerance(spec, how.values);
  const Doubles before = naive.preactivation(x_values, weight_values, bias_values);
  Doubles activated = before;
  for (double& v : activated) v = activate(spec, v);
  const Doubles truth = naive.pooled(activated), y_values = read(y);
  Doubles pre_values = read(pre);
  compare("y", y_values, truth, allowed);
  CHECK(x.intact() && weight.intact() && bias.intact() && y.intact() && index.intact() && pre.intact());

  // Inference has kernels of its own.
  interfuse_conv_pool_spec inference = spec;
  inference.save = 0;
  interfuse_conv_pool* unsaving = nullptr;
  CHECK_EQUAL(interfuse_conv_pool_create(&inference, &unsaving), INTERFUSE_OK);
  Guarded<T> again = buffer(naive.y.count());
  CHECK_EQUAL(interfuse_conv_pool_forward(unsaving, x.data(), weight.data(), problem.bias ? bias.data() : nullptr,
                                          again.data(), nullptr, nullptr, how.threads),
              INTERFUSE_OK);
  interfuse_conv_pool_destroy(unsaving);
  compare("y without saving", read(again), truth, allowed);
  CHECK(again.intact());

  const bool saves_preactivation = spec.activation >= INTERFUSE_GELU && spec.activation <= INTERFUSE_SILU;
  // Forward may leave out what no window covers, so backward must not let it count.
  std::vector<bool> covered(static_cast<size_t>(naive.conv.count()), spec.pool == INTERFUSE_POOL_NONE);
  naive.windows([&](int64_t, int64_t i, int64_t) { covered[i] = true; });
  const std::vector<uint8_t> places(index.data(), index.data() + index_count);
  if (spec.pool == INTERFUSE_POOL_MAX) check_index(naive, places, activated, truth, allowed);
  if (pre_count && spec.pool != INTERFUSE_POOL_MAX) {
    Doubles expected = saves_preactivation ? before : activated;
    for (int64_t i = 0; i < pre_count; ++i) {
      if (covered[i]) continue;
      pre_values[i] = expected[i] = 0;
      store(INFINITY, pre[i]);
    }
    compare("pre", pre_values, expected, allowed);
  }
  if (pre_count && spec.pool == INTERFUSE_POOL_MAX) {
    Doubles winners(static_cast<size_t>(pre_count));
    naive.windows([&](int64_t o, int64_t i, int64_t place) {
      if (places[o] == place) winners[o] = before[i];
    });
    compare("pre", pre_values, winners, allowed);
  }

  Guarded<T> grad_y = buffer(naive.y.count()), grad_x = buffer(naive.x.count());
  Guarded<T> grad_weight = buffer(naive.weight_count()),
             grad_bias = buffer(problem.bias ? spec.out_channels : 0);
  const Doubles grad_values = fill(grad_y, how.values, 4);
  CHECK_EQUAL(interfuse_conv_pool_backward(
                  plan, grad_y.data(), x.data(), weight.data(), y.data(),
                  index_count ? index.data() : nullptr, pre_count ? pre.data() : nullptr, grad_x.data(),
                  grad_weight.data(), problem.bias ? grad_bias.data() : nullptr, how.threads),
              INTERFUSE_OK);
  const Doubles grad = naive.grad_conv(grad_values, y_values, places, pre_values);
  compare("grad_x", read(grad_x), naive.grad_x(grad, weight_values), allowed);
  compare("grad_weight", read(grad_weight), naive.grad_weight(grad, x_values), allowed);
  if (problem.bias) compare("grad_bias", read(grad_bias), naive.grad_bias(grad), allowed);
  CHECK(grad_y.intact() && grad_x.intact() && grad_weight.intact() && grad_bias.intact());
  CHECK(x.intact() && weight.intact() && bias.intact() && y.intact() && index.intact() && pre.intact());
  interfuse_conv_pool_destroy(plan);
}

}  // namespace interfuse_test
