// conv_pool through the C API against the naive double loops: every buffer between guard pages, flush with
// either end or misaligned, both layouts, both dtypes, one and two threads.
#include <random>

#include "tests/guarded.h"
#include "tests/naive_conv_pool.h"

using namespace interfuse_test;

namespace {

struct Problem {
  const char* name;
  int64_t batch, in_channels, out_channels, groups;
  int64_t input[3], kernel[3], stride[3], padding_lo[3], padding_hi[3], dilation[3];
  int activation, pool;
  int64_t pool_size[3], pool_stride[3], pool_padding[3];
  int ceil_mode, count_include_pad, bias;
};

constexpr int kNone = INTERFUSE_POOL_NONE, kMax = INTERFUSE_POOL_MAX, kAvg = INTERFUSE_POOL_AVG;

// clang-format off
const Problem kProblems[] = {
    {"3x3 relu max2, the common block", 1, 32, 64, 1, {1, 8, 11}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3x3 relu max2 without padding, odd sizes", 1, 17, 37, 1, {1, 11, 12}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3x3 max2 with ceil_mode", 1, 16, 16, 1, {1, 9, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_NONE, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 1, 1, 1},
    {"first layer, 3 channels", 1, 3, 64, 1, {1, 14, 19}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"first layer, 1 channel", 2, 1, 8, 1, {1, 12, 12}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 0},
    {"stem 7x7 stride 2, max3 stride 2", 2, 3, 12, 1, {1, 19, 22}, {1, 7, 7}, {1, 2, 2}, {0, 3, 3}, {0, 3, 3}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 0, 1, 1},
    {"1x1", 2, 33, 20, 1, {1, 6, 7}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_NONE, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"3x3 silu, no pool", 1, 8, 24, 1, {1, 7, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_SILU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"3x3 gelu avg2", 1, 8, 8, 1, {1, 8, 10}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_GELU, kAvg, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3x3 relu avg2", 1, 16, 32, 1, {1, 9, 12}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kAvg, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"avg3 overlapping, padded, pads not counted", 1, 5, 6, 1, {1, 9, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_TANH, kAvg, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 1, 0, 1},
    {"max3 overlapping with gelu_tanh", 1, 4, 5, 1, {1, 10, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_GELU_TANH, kMax, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 0, 1, 1},
    {"sigmoid max2", 2, 6, 7, 1, {1, 8, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_SIGMOID, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"leaky relu, dilation 2, stride 2", 1, 6, 10, 1, {1, 14, 13}, {1, 3, 3}, {1, 2, 2}, {0, 2, 2}, {0, 2, 2}, {1, 2, 2},
     INTERFUSE_LEAKY_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"groups", 1, 12, 18, 3, {1, 8, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"depthwise", 1, 20, 20, 20, {1, 9, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"even kernel, padded as 'same'", 1, 4, 6, 1, {1, 7, 7}, {1, 4, 2}, {1, 1, 1}, {0, 1, 0}, {0, 2, 1}, {1, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"1-D", 2, 9, 16, 1, {1, 1, 37}, {1, 1, 5}, {1, 1, 1}, {0, 0, 2}, {0, 0, 2}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 1, 2}, {1, 1, 2}, {0, 0, 0}, 0, 1, 1},
    {"3-D relu max2", 1, 16, 20, 1, {5, 6, 7}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3-D without padding", 1, 5, 7, 1, {6, 6, 7}, {3, 3, 3}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_NONE, kAvg, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"one output element", 1, 3, 2, 1, {1, 3, 3}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"empty batch", 0, 4, 4, 1, {1, 8, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
};
// clang-format on

interfuse_conv_pool_spec spec_of(const Problem& p, int dtype, bool channels_last, bool highest) {
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

float load(float v) { return v; }
float load(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
void store(float v, float& to) { to = v; }
void store(float v, uint16_t& to) {  // round to nearest even; NaN is not among the values
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  to = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

enum class Values { integers, reals };

template <class T>
Doubles fill(Guarded<T>& buffer, Values values, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> whole(-3, 3);
  std::normal_distribution<float> real;
  Doubles out(static_cast<size_t>(buffer.size()));
  for (int64_t i = 0; i < buffer.size(); ++i) {
    store(values == Values::integers ? static_cast<float>(whole(random)) : real(random), buffer[i]);
    out[i] = load(buffer[i]);
  }
  return out;
}

template <class T>
Doubles read(const Guarded<T>& buffer) {
  Doubles out(static_cast<size_t>(buffer.size()));
  for (int64_t i = 0; i < buffer.size(); ++i) out[i] = load(buffer[i]);
  return out;
}

// How far a result may be from the truth, as a relative Frobenius norm. These sizes are small: one wrong
// element among a few thousand gives 1e-2. At 0 the results must be equal to the last bit.
double tolerance(const interfuse_conv_pool_spec& s, Values values) {
  if (s.dtype == INTERFUSE_BFLOAT16) return 3e-3;  // one rounding to 8 bits: 2^-9 at most, 1.7e-3 on average
  if (s.precision == INTERFUSE_PRECISION_DEFAULT) return 1e-5;
  const bool exact = values == Values::integers && s.activation <= INTERFUSE_RELU &&
                     (s.pool != INTERFUSE_POOL_AVG || (!s.ceil_mode && s.pool_size[1] == 2));
  return exact ? 0 : 1e-6;
}

void compare(const char* what, const Doubles& ours, const Doubles& truth, double tolerance) {
  CHECK_EQUAL(ours.size(), truth.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < truth.size() && i < ours.size(); ++i) {
    error += (ours[i] - truth[i]) * (ours[i] - truth[i]);
    norm += truth[i] * truth[i];
  }
  if (error <= tolerance * tolerance * norm) return;
  std::ostringstream text;
  text << what << " differs by " << std::sqrt(error) << " where the norm is " << std::sqrt(norm)
       << ", a ratio of " << std::sqrt(error / norm) << "; allowed is " << tolerance;
  fail(__FILE__, __LINE__, text.str());
}

// The index may name any element that is the largest within rounding; 255 stands for a relu that let nothing
// through. Where the arithmetic is exact it must be the first of the largest, and 255 wherever nothing is
// above zero.
void check_index(const NaiveConvPool& naive, const std::vector<uint8_t>& index, const Doubles& activated,
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

void run_all(const Run& how) {
  for (const Problem& problem : kProblems)
    for (bool channels_last : {false, true}) {
      run<float>(problem, spec_of(problem, INTERFUSE_FLOAT32, channels_last, false), how);
      run<float>(problem, spec_of(problem, INTERFUSE_FLOAT32, channels_last, true), how);
      run<uint16_t>(problem, spec_of(problem, INTERFUSE_BFLOAT16, channels_last, false), how);
    }
}

}  // namespace

TEST(conv_pool_integers_one_thread) { run_all({1, Values::integers, Flush::back, 0}); }
TEST(conv_pool_reals_two_threads_front) { run_all({2, Values::reals, Flush::front, 0}); }
TEST(conv_pool_misaligned) { run_all({2, Values::integers, Flush::back, 1}); }

// x as a view into a larger tensor whose other elements are NaN: the same bits come out as from a dense x.
TEST(conv_pool_strided_input) {
  for (const Problem& problem : kProblems)
    for (bool channels_last : {false, true}) {
      const Context context(std::string(problem.name) + (channels_last ? ", channels last" : ", contiguous"));
      interfuse_conv_pool_spec spec = spec_of(problem, INTERFUSE_FLOAT32, channels_last, false);
      const Shape5 outer{spec.batch,        spec.in_channels + 3, spec.input[0] + 1,
                         spec.input[1] + 2, spec.input[2] + 5,    channels_last};
      const Shape5 inner{spec.batch,    spec.in_channels, spec.input[0],
                         spec.input[1], spec.input[2],    channels_last};
      Guarded<float> dense(inner.count()), wide(outer.count());
      fill(dense, Values::reals, 1);
      for (int64_t i = 0; i < outer.count(); ++i) wide[i] = NAN;
      for (int64_t n = 0; n < inner.n; ++n)
        for (int64_t c = 0; c < inner.c; ++c)
          for (int64_t d = 0; d < inner.d; ++d)
            for (int64_t h = 0; h < inner.h; ++h)
              for (int64_t w = 0; w < inner.w; ++w)
                wide[outer.at(n, c, d, h, w)] = dense[inner.at(n, c, d, h, w)];

      interfuse_conv_pool_spec viewed = spec;
      const int64_t strides[5] = {outer.at(1, 0, 0, 0, 0), outer.at(0, 1, 0, 0, 0), outer.at(0, 0, 1, 0, 0),
                                  outer.at(0, 0, 0, 1, 0), outer.at(0, 0, 0, 0, 1)};
      std::copy(strides, strides + 5, viewed.x_strides);
      std::vector<float> results[2];
      for (bool view : {false, true}) {
        interfuse_conv_pool* plan = nullptr;
        CHECK_EQUAL(interfuse_conv_pool_create(view ? &viewed : &spec, &plan), INTERFUSE_OK);
        if (!plan) return;
        int64_t conv[3], out[3], index_count, pre_count;
        interfuse_conv_pool_sizes(plan, conv, out);
        interfuse_conv_pool_saved(plan, &index_count, &pre_count);
        const NaiveConvPool naive(spec, conv, out);
        Guarded<float> weight(naive.weight_count()), y(naive.y.count()), pre(pre_count);
        Guarded<uint8_t> index(index_count);
        fill(weight, Values::reals, 2);
        CHECK_EQUAL(interfuse_conv_pool_forward(plan, view ? wide.data() : dense.data(), weight.data(),
                                                nullptr, y.data(), index.data(), pre.data(), 2),
                    INTERFUSE_OK);
        results[view].assign(y.data(), y.data() + y.size());
        Guarded<float> grad_y(naive.y.count()), grad_weight(naive.weight_count());
        fill(grad_y, Values::reals, 3);
        CHECK_EQUAL(interfuse_conv_pool_backward(plan, grad_y.data(), view ? wide.data() : dense.data(),
                                                 weight.data(), y.data(), index.data(), pre.data(), nullptr,
                                                 grad_weight.data(), nullptr, 2),
                    INTERFUSE_OK);
        results[view].insert(results[view].end(), grad_weight.data(),
                             grad_weight.data() + grad_weight.size());
        interfuse_conv_pool_destroy(plan);
      }
      CHECK(results[0] == results[1]);
    }
}

TEST(conv_pool_refuses_with_a_sentence) {
  interfuse_conv_pool_spec s = spec_of(kProblems[0], INTERFUSE_FLOAT32, false, false);
  interfuse_conv_pool* plan = nullptr;
  s.stride[1] = 0;
  CHECK_EQUAL(interfuse_conv_pool_create(&s, &plan), INTERFUSE_INVALID);
  CHECK(std::strlen(interfuse_last_error()) > 20);
  CHECK(plan == nullptr);
  CHECK_EQUAL(interfuse_conv_pool_create(nullptr, &plan), INTERFUSE_INVALID);
}
