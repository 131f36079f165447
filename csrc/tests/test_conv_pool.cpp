// conv_pool: the problems that people run and those that break kernels, in both layouts and dtypes, on one and two
// threads.
#include "tests/run_conv_pool.h"

using namespace interfuse_test;

namespace {

// clang-format off
const Problem kProblems[] = {
    {"3x3 relu max2, the common block", 1, 32, 64, 1, {1, 8, 11}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3x3 relu max2 without padding, odd sizes", 1, 17, 37, 1, {1, 11, 12}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0},
     {0, 0, 0}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3x3 max2 with ceil_mode", 1, 16, 16, 1, {1, 9, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_NONE, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 1, 1, 1},
    {"first layer, 3 channels", 1, 3, 64, 1, {1, 14, 19}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"first layer, 1 channel", 2, 1, 8, 1, {1, 12, 12}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 0},
    {"stem 7x7 stride 2, max3 stride 2", 2, 3, 12, 1, {1, 19, 22}, {1, 7, 7}, {1, 2, 2}, {0, 3, 3}, {0, 3, 3},
     {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 0, 1, 1},
    {"1x1", 2, 33, 20, 1, {1, 6, 7}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_NONE, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"1x1 over more channels than a tile reads from at a time", 1, 132, 19, 1, {1, 24, 23}, {1, 1, 1}, {1, 1, 1},
     {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"3x3 silu, no pool", 1, 8, 24, 1, {1, 7, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_SILU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"3x3 gelu avg2", 1, 8, 8, 1, {1, 8, 10}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_GELU, kAvg, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3x3 relu avg2", 1, 16, 32, 1, {1, 9, 12}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kAvg, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"avg3 overlapping, padded, pads not counted", 1, 5, 6, 1, {1, 9, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1},
     {0, 1, 1}, {1, 1, 1},
     INTERFUSE_TANH, kAvg, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 1, 0, 1},
    {"max3 overlapping with gelu_tanh", 1, 4, 5, 1, {1, 10, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_GELU_TANH, kMax, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 0, 1, 1},
    {"sigmoid max2", 2, 6, 7, 1, {1, 8, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_SIGMOID, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"leaky relu, dilation 2, stride 2", 1, 6, 10, 1, {1, 14, 13}, {1, 3, 3}, {1, 2, 2}, {0, 2, 2}, {0, 2, 2},
     {1, 2, 2},
     INTERFUSE_LEAKY_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"groups", 1, 12, 18, 3, {1, 8, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"depthwise", 1, 20, 20, 20, {1, 9, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"depthwise with a last panel of fewer vectors, stride 2", 1, 144, 144, 144, {1, 7, 9}, {1, 3, 3}, {1, 2, 2},
     {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"depthwise 5x5 dilated, overlapping max3", 2, 32, 32, 32, {1, 12, 35}, {1, 5, 5}, {1, 1, 1}, {0, 4, 3},
     {0, 4, 5}, {1, 2, 2},
     INTERFUSE_GELU, kMax, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 0, 1, 1},
    {"depthwise with a kernel larger than the image", 2, 16, 16, 16, {1, 4, 3}, {1, 7, 7}, {1, 1, 1}, {0, 3, 6},
     {0, 3, 6}, {1, 1, 1},
     INTERFUSE_SILU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"depthwise 3-D", 1, 16, 16, 16, {4, 5, 6}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kAvg, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"depthwise 1-D", 2, 21, 21, 21, {1, 1, 41}, {1, 1, 4}, {1, 1, 2}, {0, 0, 1}, {0, 0, 2}, {1, 1, 1},
     INTERFUSE_NONE, kMax, {1, 1, 2}, {1, 1, 2}, {0, 0, 0}, 0, 1, 0},
    {"even kernel, padded as 'same'", 1, 4, 6, 1, {1, 7, 7}, {1, 4, 2}, {1, 1, 1}, {0, 1, 0}, {0, 2, 1}, {1, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"1-D", 2, 9, 16, 1, {1, 1, 37}, {1, 1, 5}, {1, 1, 1}, {0, 0, 2}, {0, 0, 2}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 1, 2}, {1, 1, 2}, {0, 0, 0}, 0, 1, 1},
    {"3-D relu max2", 1, 16, 20, 1, {5, 6, 7}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3-D without padding", 1, 5, 7, 1, {6, 6, 7}, {3, 3, 3}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_NONE, kAvg, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    // Enough tiles for Winograd's gradients.
    {"3x3 relu max2 in groups, many images", 6, 34, 36, 2, {1, 13, 15}, {1, 3, 3}, {1, 1, 1}, {0, 0, 2}, {0, 1, 2},
     {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3x3 tanh max2, more than one strip", 1, 17, 17, 1, {1, 42, 46}, {1, 3, 3}, {1, 1, 1}, {0, 1, 0}, {0, 0, 1},
     {1, 1, 1},
     INTERFUSE_TANH, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"1x3x3 with pooling, wide and low", 3, 16, 17, 1, {3, 5, 40}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0},
     {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 0},
    {"3-D without pooling, many images", 8, 16, 18, 1, {7, 6, 5}, {3, 3, 3}, {1, 1, 1}, {0, 1, 0}, {2, 1, 2}, {1, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"3-D relu max2, tiles of two", 1, 16, 17, 1, {6, 14, 22}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    // Enough filters and columns for the matrix units.
    {"first layer, no pool, odd rows", 2, 3, 20, 1, {1, 7, 33}, {1, 3, 3}, {1, 1, 1}, {0, 0, 1}, {0, 0, 1}, {1, 1, 1},
     INTERFUSE_TANH, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"first layer of a video", 1, 3, 20, 1, {4, 4, 34}, {3, 3, 3}, {1, 1, 1}, {1, 1, 0}, {1, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"first layer of a video, flat windows", 1, 2, 30, 1, {3, 6, 35}, {2, 3, 3}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_NONE, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 0},
    {"first layer of a video, no pool, dilated in time", 1, 3, 20, 1, {5, 4, 33}, {3, 3, 3}, {1, 1, 1}, {1, 0, 1},
     {1, 0, 1}, {2, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"one output element", 1, 3, 2, 1, {1, 3, 3}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"empty batch", 0, 4, 4, 1, {1, 8, 8}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
};
// clang-format on

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

// The weight as (out, kernel..., in): the same bits as from the order (out, in, kernel...), and its gradient in its
// order.
TEST(conv_pool_weight_channels_last) {
  for (const Problem& problem : kProblems)
    for (bool channels_last : {false, true})
      for (bool highest : {false, true}) {
        const Context context(std::string(problem.name) + (channels_last ? ", channels last" : ", contiguous"));
        interfuse_conv_pool_spec spec = spec_of(problem, INTERFUSE_FLOAT32, channels_last, highest);
        const int64_t taps = spec.kernel[0] * spec.kernel[1] * spec.kernel[2], inputs = spec.in_channels / spec.groups;
        std::vector<float> results[2];
        for (int32_t last : {0, 1}) {
          spec.weight_channels_last = last;
          const auto place = [&](int64_t i) {  // of element i of (out, in, taps)
            const int64_t c = i / taps % inputs, tap = i % taps;
            return last ? i / taps / inputs * inputs * taps + tap * inputs + c : i;
          };
          interfuse_conv_pool* plan = nullptr;
          CHECK_EQUAL(interfuse_conv_pool_create(&spec, &plan), INTERFUSE_OK);
          if (!plan) return;
          int64_t conv[3], out[3], index_count, pre_count;
          interfuse_conv_pool_sizes(plan, conv, out);
          interfuse_conv_pool_saved(plan, &index_count, &pre_count);
          const NaiveConvPool naive(spec, conv, out);
          Guarded<float> x(naive.x.count()), plain(naive.weight_count()), weight(plain.size()), y(naive.y.count()),
              pre(pre_count);
          Guarded<float> grad_y(y.size()), grad_x(x.size()), grad_weight(plain.size());
          Guarded<uint8_t> index(index_count);
          fill(x, Values::reals, 1), fill(plain, Values::reals, 2), fill(grad_y, Values::reals, 3);
          for (int64_t i = 0; i < plain.size(); ++i) weight[place(i)] = plain[i];
          CHECK_EQUAL(interfuse_conv_pool_forward(plan, x.data(), weight.data(), nullptr, y.data(), index.data(),
                                                  pre.data(), 2),
                      INTERFUSE_OK);
          CHECK_EQUAL(interfuse_conv_pool_backward(plan, grad_y.data(), x.data(), weight.data(), y.data(), index.data(),
                                                   pre.data(), grad_x.data(), grad_weight.data(), nullptr, 2),
                      INTERFUSE_OK);
          for (const Guarded<float>* values : {&y, &grad_x})
            results[last].insert(results[last].end(), values->data(), values->data() + values->size());
          for (int64_t i = 0; i < plain.size(); ++i) results[last].push_back(grad_weight[place(i)]);
          CHECK(weight.intact() && grad_weight.intact());
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
