// conv_pool where Winograd takes it: tiles that hang over every edge, several blocks of tiles and of filters, windows
// of every size that fills a tile, two and three dimensions, values that the transforms cannot carry.
#include <array>
#include <cfloat>

#include "tests/run_conv_pool.h"

using namespace interfuse_test;

namespace {

using Axes = std::array<int64_t, 3>;

Problem winograd(const char* name, int64_t batch, int64_t in_channels, int64_t out_channels, int64_t groups, Axes input,
                 int64_t kernel_depth, Axes padding_lo, Axes padding_hi, int activation, int pool, Axes window) {
  Problem p = {name, batch, in_channels, out_channels, groups, {}, {kernel_depth, 3, 3}, {1, 1, 1}, {}, {}, {1, 1, 1},
               activation, pool, {}, {}, {}, 0, 1, 1};
  for (size_t axis : {0, 1, 2}) {
    p.input[axis] = input[axis], p.padding_lo[axis] = padding_lo[axis], p.padding_hi[axis] = padding_hi[axis];
    p.pool_size[axis] = p.pool_stride[axis] = window[axis];
  }
  return p;
}

// Tiles hold 4x4 results; their blocks some hundred tiles where channels are few, their chunks at least 16 filters.
// clang-format off
const Problem kProblems[] = {
    winograd("whole tiles", 1, 16, 16, 1, {1, 8, 16}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_RELU, kMax, {1, 2, 2}),
    winograd("tails of 1, 33 to 47 channels", 2, 33, 47, 1, {1, 9, 13}, 1, {0, 1, 1}, {0, 1, 1},
             INTERFUSE_RELU, kMax, {1, 2, 2}),
    winograd("tails of 2 and 3, no padding", 1, 17, 19, 1, {1, 12, 9}, 1, {0, 0, 0}, {0, 0, 0},
             INTERFUSE_NONE, kNone, {1, 1, 1}),
    winograd("one result, far smaller than a tile", 3, 16, 18, 1, {1, 3, 3}, 1, {0, 0, 0}, {0, 0, 0},
             INTERFUSE_RELU, kNone, {1, 1, 1}),
    winograd("one pixel of input", 1, 20, 16, 1, {1, 1, 1}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_NONE, kNone, {1, 1, 1}),
    winograd("padding beyond the kernel, and uneven", 1, 16, 21, 1, {1, 6, 7}, 1, {0, 3, 0}, {0, 1, 4},
             INTERFUSE_LEAKY_RELU, kMax, {1, 2, 2}),
    winograd("rows and columns that no window reads", 1, 18, 16, 1, {1, 7, 11}, 1, {0, 1, 1}, {0, 1, 1},
             INTERFUSE_RELU, kAvg, {1, 4, 4}),
    winograd("windows of 4 by 1", 1, 16, 16, 1, {1, 9, 6}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_GELU, kMax, {1, 4, 1}),
    winograd("windows of 1 by 4", 1, 16, 24, 1, {1, 5, 10}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_SILU, kAvg, {1, 1, 4}),
    winograd("windows of 2 by 4, average", 2, 16, 16, 1, {1, 10, 9}, 1, {0, 1, 1}, {0, 1, 1},
             INTERFUSE_TANH, kAvg, {1, 2, 4}),
    winograd("gelu_tanh behind max", 1, 16, 16, 1, {1, 6, 6}, 1, {0, 1, 1}, {0, 1, 1},
             INTERFUSE_GELU_TANH, kMax, {1, 2, 2}),
    winograd("sigmoid alone", 1, 16, 16, 1, {1, 5, 7}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_SIGMOID, kNone, {1, 1, 1}),
    winograd("silu alone saves the value before it", 1, 16, 17, 1, {1, 7, 6}, 1, {0, 1, 1}, {0, 1, 1},
             INTERFUSE_SILU, kNone, {1, 1, 1}),
    winograd("3 groups", 2, 48, 60, 3, {1, 9, 10}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_RELU, kMax, {1, 2, 2}),
    winograd("several blocks and chunks, two images in a block", 2, 16, 40, 1, {1, 42, 46}, 1, {0, 1, 1}, {0, 1, 1},
             INTERFUSE_RELU, kMax, {1, 2, 2}),
    winograd("many channels", 1, 130, 72, 1, {1, 6, 6}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_RELU, kMax, {1, 2, 2}),
    winograd("slices of a volume, 3x3 in each", 2, 16, 16, 1, {3, 6, 5}, 1, {0, 1, 1}, {0, 1, 1},
             INTERFUSE_RELU, kMax, {1, 2, 2}),
    winograd("3-D, windows of 2", 1, 16, 20, 1, {6, 7, 10}, 3, {1, 1, 1}, {1, 1, 1}, INTERFUSE_RELU, kMax, {2, 2, 2}),
    winograd("3-D, tiles of 4 in depth", 1, 17, 16, 1, {9, 6, 5}, 3, {1, 1, 1}, {1, 1, 1},
             INTERFUSE_RELU, kMax, {4, 2, 2}),
    winograd("3-D, one slice in the last tile", 2, 16, 18, 1, {5, 5, 6}, 3, {1, 1, 1}, {1, 1, 1},
             INTERFUSE_NONE, kNone, {1, 1, 1}),
    winograd("3-D without padding, average", 1, 20, 16, 1, {6, 8, 7}, 3, {0, 0, 0}, {0, 0, 0},
             INTERFUSE_GELU, kAvg, {2, 2, 2}),
    winograd("3-D, uneven padding, 2 groups", 1, 32, 34, 2, {4, 5, 6}, 3, {2, 0, 1}, {0, 2, 1},
             INTERFUSE_LEAKY_RELU, kMax, {1, 2, 2}),
    winograd("3-D, windows of 1 by 2 by 4", 1, 16, 16, 1, {5, 6, 8}, 3, {1, 1, 1}, {1, 1, 1},
             INTERFUSE_TANH, kMax, {1, 2, 4}),
};
// clang-format on

std::string algorithm(const interfuse_conv_pool_spec& spec) {
  interfuse_conv_pool* plan = nullptr;
  if (interfuse_conv_pool_create(&spec, &plan) != INTERFUSE_OK) return interfuse_last_error();
  const std::string name = interfuse_conv_pool_algorithm(plan);
  interfuse_conv_pool_destroy(plan);
  return name;
}

void run_all(const Run& how) {
  for (const Problem& problem : kProblems)
    for (bool channels_last : {false, true}) {
      CHECK_EQUAL(algorithm(spec_of(problem, INTERFUSE_FLOAT32, channels_last, false)), "winograd");
      run<float>(problem, spec_of(problem, INTERFUSE_FLOAT32, channels_last, false), how);
      run<uint16_t>(problem, spec_of(problem, INTERFUSE_BFLOAT16, channels_last, false), how);
    }
}

// What forward gives for x with these values at these places, in float32.
std::vector<float> forward(const interfuse_conv_pool_spec& spec, const std::vector<float>& x,
                           const std::vector<float>& weight, const std::vector<float>& bias, int64_t outputs) {
  interfuse_conv_pool* plan = nullptr;
  CHECK_EQUAL(interfuse_conv_pool_create(&spec, &plan), INTERFUSE_OK);
  std::vector<float> y(static_cast<size_t>(outputs));
  CHECK_EQUAL(interfuse_conv_pool_forward(plan, x.data(), weight.data(), bias.data(), y.data(), nullptr, nullptr, 2),
              INTERFUSE_OK);
  interfuse_conv_pool_destroy(plan);
  return y;
}

}  // namespace

TEST(winograd_one_thread) { run_all({1, Values::reals, Flush::back, 0}); }
TEST(winograd_two_threads_front) { run_all({2, Values::reals, Flush::front, 0}); }
TEST(winograd_more_threads_than_tiles_misaligned) { run_all({5, Values::integers, Flush::back, 1}); }

// One value that is not finite, or so large that the transforms overflow, in one image of three: that image comes out
// as sums of products give it, the others as Winograd does.
TEST(winograd_leaves_special_values_where_they_belong) {
  const Problem problem = winograd("special values", 3, 16, 16, 1, {1, 12, 12}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_RELU,
                                   kMax, {1, 2, 2});
  const float specials[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX / 8};
  for (bool channels_last : {false, true})
    for (float special : specials) {
      std::ostringstream text;
      text << special << (channels_last ? ", channels last" : ", contiguous");
      const Context context(text.str());
      interfuse_conv_pool_spec spec = spec_of(problem, INTERFUSE_FLOAT32, channels_last, false);
      spec.save = 0;
      const Shape5 in{3, 16, 1, 12, 12, channels_last}, out{3, 16, 1, 6, 6, channels_last};
      Guarded<float> reals(in.count()), weights(16 * 16 * 9), biases(16);
      fill(reals, Values::reals, 1), fill(weights, Values::reals, 2), fill(biases, Values::reals, 3);
      std::vector<float> x(reals.data(), reals.data() + reals.size());
      const std::vector<float> weight(weights.data(), weights.data() + weights.size());
      const std::vector<float> bias(biases.data(), biases.data() + biases.size());
      const std::vector<float> clean = forward(spec, x, weight, bias, out.count());
      x[in.at(1, 3, 0, 5, 6)] = special;
      const std::vector<float> got = forward(spec, x, weight, bias, out.count());
      spec.precision = INTERFUSE_PRECISION_HIGHEST;
      const std::vector<float> sums = forward(spec, x, weight, bias, out.count());
      int64_t strange = 0;
      for (int64_t n : {0, 1, 2})
        for (int64_t c = 0; c < 16; ++c)
          for (int64_t h = 0; h < 6; ++h)
            for (int64_t w = 0; w < 6; ++w) {
              const int64_t at = out.at(n, c, 0, h, w);
              const float want = n == 1 ? sums[at] : clean[at];
              CHECK(got[at] == want || (std::isnan(got[at]) && std::isnan(want)));
              strange += !(std::fabs(got[at]) < 1e30f);
            }
      CHECK(strange > 0);
    }
}

TEST(winograd_says_why_not) {
  const Problem problem = winograd("common", 1, 16, 16, 1, {1, 8, 8}, 1, {0, 1, 1}, {0, 1, 1}, INTERFUSE_RELU, kMax,
                                   {1, 2, 2});
  const auto refused = [&](void (*change)(interfuse_conv_pool_spec&), const char* word) {
    interfuse_conv_pool_spec spec = spec_of(problem, INTERFUSE_FLOAT32, false, false);
    change(spec);
    interfuse_conv_pool* plan = nullptr;
    CHECK_EQUAL(interfuse_conv_pool_create(&spec, &plan), INTERFUSE_OK);
    if (!plan) return;
    CHECK_EQUAL(std::string(interfuse_conv_pool_algorithm(plan)), "direct");
    const std::string why = interfuse_conv_pool_why(plan);
    if (why.find(word) == std::string::npos) fail(__FILE__, __LINE__, "no '" + std::string(word) + "' in: " + why);
    interfuse_conv_pool_destroy(plan);
  };
  using Spec = interfuse_conv_pool_spec;
  refused([](Spec& s) { s.precision = INTERFUSE_PRECISION_HIGHEST; }, "precision");
  refused([](Spec& s) { s.kernel[2] = 5; }, "size 5 along width");
  refused([](Spec& s) { s.stride[1] = 2; }, "stride 2");
  refused([](Spec& s) { s.dilation[2] = 2; }, "dilation 2");
  refused([](Spec& s) { s.pool_size[1] = s.pool_stride[1] = 3; }, "size 3");
  refused([](Spec& s) { s.pool_padding[2] = 1; }, "padding 1");
  refused([](Spec& s) { s.groups = 2; }, "8 input and 8 output channels");
}
