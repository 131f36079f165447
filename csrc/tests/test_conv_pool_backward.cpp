// conv_pool's gradients by the family of kernels that computes them. Which one does depends on the channels of a group
// against the lanes of a vector and on what the pool leaves: each problem is large enough to be cut into strips, and
// runs with channels for few and for many lanes.
#include "common/conv_pool.h"
#include "tests/run_conv_pool.h"

using namespace interfuse_test;

namespace {

// clang-format off
// Max pools that leave a third of the pixels or fewer: only the winners have a gradient.
const Problem kSparse[] = {
    {"long image", 1, 24, 20, 1, {1, 61, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"many small images", 9, 33, 7, 1, {1, 5, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"windows overlap", 2, 17, 18, 1, {1, 15, 16}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 0, 1, 1},
    {"gaps between windows", 1, 16, 9, 1, {1, 20, 17}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_NONE, kMax, {1, 2, 2}, {1, 3, 3}, {0, 1, 1}, 0, 1, 1},
    {"windows over the edge", 1, 18, 8, 1, {1, 13, 14}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_LEAKY_RELU, kMax, {1, 3, 2}, {1, 3, 2}, {0, 1, 1}, 1, 1, 1},
    {"strides, dilation, uneven padding", 1, 20, 11, 1, {1, 31, 29}, {1, 3, 2}, {1, 2, 3}, {0, 2, 0}, {0, 1, 3},
     {1, 2, 3},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3 groups of 17", 1, 51, 12, 3, {1, 12, 11}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"a window of 255", 1, 16, 3, 1, {1, 33, 36}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 15, 17}, {1, 15, 17}, {0, 0, 0}, 0, 1, 1},
    {"1-D", 3, 40, 6, 1, {1, 1, 77}, {1, 1, 5}, {1, 1, 1}, {0, 0, 2}, {0, 0, 2}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 1, 4}, {1, 1, 4}, {0, 0, 0}, 0, 1, 1},
    {"3-D", 1, 16, 9, 1, {9, 8, 7}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"gelu", 1, 16, 8, 1, {1, 10, 12}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_GELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"tanh", 1, 17, 8, 1, {1, 10, 12}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_TANH, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
};

// Every pixel of the convolution has a gradient.
const Problem kDense[] = {
    {"long image", 1, 24, 20, 1, {1, 61, 9}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"many small images", 40, 33, 9, 1, {1, 3, 4}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_NONE, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"average of 2", 2, 17, 18, 1, {1, 15, 16}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kAvg, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"averages overlap", 1, 16, 9, 1, {1, 14, 17}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_SILU, kAvg, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 1, 0, 1},
    {"averages with gaps", 1, 16, 9, 1, {1, 14, 17}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_GELU, kAvg, {1, 2, 2}, {1, 3, 4}, {0, 0, 1}, 0, 1, 1},
    {"max of 2 along one axis leaves half", 1, 18, 10, 1, {1, 12, 20}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1},
     {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 1, 2}, {1, 1, 2}, {0, 0, 0}, 0, 1, 1},
    {"1x1", 2, 40, 21, 1, {1, 13, 11}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
     INTERFUSE_SIGMOID, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"strides beyond the kernel leave pixels unread", 1, 16, 8, 1, {1, 19, 23}, {1, 2, 1}, {1, 3, 4}, {0, 0, 0},
     {0, 0, 0}, {1, 1, 1},
     INTERFUSE_NONE, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"kernel larger than the image", 3, 17, 9, 1, {1, 3, 2}, {1, 5, 6}, {1, 1, 1}, {0, 2, 4}, {0, 3, 3}, {1, 1, 1},
     INTERFUSE_LEAKY_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"2 groups of 19, dilation", 1, 38, 26, 2, {1, 15, 13}, {1, 3, 3}, {1, 1, 2}, {0, 2, 3}, {0, 2, 3}, {1, 2, 3},
     INTERFUSE_TANH, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"3-D", 1, 16, 9, 1, {6, 7, 5}, {2, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_GELU_TANH, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
};

// Few channels of input: vectors lie along the width.
const Problem kPlanes[] = {
    {"first layer, long image", 1, 3, 20, 1, {1, 67, 21}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"stem, stride 2", 2, 3, 9, 1, {1, 29, 38}, {1, 7, 7}, {1, 2, 2}, {0, 3, 3}, {0, 3, 3}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 0, 1, 1},
    {"stride 3, dilation 2, uneven padding", 1, 2, 5, 1, {1, 25, 41}, {1, 3, 3}, {1, 3, 3}, {0, 0, 4}, {0, 2, 1},
     {1, 2, 2},
     INTERFUSE_SILU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"one channel, one filter", 3, 1, 1, 1, {1, 9, 70}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_NONE, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"depthwise", 2, 21, 21, 21, {1, 11, 18}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"depthwise with two filters each, no pool", 1, 10, 20, 10, {1, 9, 33}, {1, 5, 3}, {1, 2, 1}, {0, 2, 1},
     {0, 2, 1}, {1, 1, 1},
     INTERFUSE_GELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
    {"3 groups of 2, average of sigmoids", 2, 6, 6, 3, {1, 12, 13}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1},
     {1, 1, 1},
     INTERFUSE_SIGMOID, kAvg, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"averages with gaps and pads not counted", 1, 2, 7, 1, {1, 14, 37}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1},
     {1, 1, 1},
     INTERFUSE_TANH, kAvg, {1, 2, 3}, {1, 3, 4}, {0, 1, 1}, 1, 0, 1},
    {"1-D", 2, 2, 12, 1, {1, 1, 150}, {1, 1, 9}, {1, 1, 1}, {0, 0, 4}, {0, 0, 4}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 1, 3}, {1, 1, 2}, {0, 0, 1}, 0, 1, 1},
    {"3-D", 1, 3, 8, 1, {6, 7, 19}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"3-D with a stride in depth", 1, 2, 5, 1, {7, 5, 17}, {3, 2, 2}, {2, 1, 2}, {1, 0, 1}, {1, 1, 0}, {1, 1, 1},
     INTERFUSE_LEAKY_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1},
};

// Few channels of input and many filters, behind max pools whose windows lie side by side.
const Problem kPatches[] = {
    {"first layer, more filters than a mask names, long image", 1, 3, 70, 1, {1, 131, 23}, {1, 3, 3}, {1, 1, 1},
     {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"one channel, windows over the edge", 3, 1, 17, 1, {1, 15, 18}, {1, 5, 5}, {1, 1, 1}, {0, 2, 2}, {0, 2, 2},
     {1, 1, 1},
     INTERFUSE_NONE, kMax, {1, 2, 4}, {1, 2, 4}, {0, 0, 0}, 1, 1, 1},
    {"strides, dilation, uneven padding, rows and columns without a window", 2, 2, 16, 1, {1, 31, 47}, {1, 3, 2},
     {1, 2, 3}, {0, 2, 0}, {0, 1, 3}, {1, 2, 3},
     INTERFUSE_SILU, kMax, {1, 2, 3}, {1, 2, 3}, {0, 0, 0}, 0, 1, 1},
    {"many small images", 9, 2, 33, 1, {1, 6, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
     INTERFUSE_TANH, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 0},
    {"1-D", 2, 2, 18, 1, {1, 1, 323}, {1, 1, 7}, {1, 1, 1}, {0, 0, 3}, {0, 0, 3}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {1, 1, 3}, {1, 1, 3}, {0, 0, 0}, 0, 1, 1},
    {"3-D", 2, 1, 20, 1, {7, 8, 19}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1},
     INTERFUSE_RELU, kMax, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
};
// clang-format on

template <size_t N>
void run_all(const Problem (&problems)[N], const Run& how) {
  for (const Problem& problem : problems)
    for (bool channels_last : {false, true}) {
      run<float>(problem, spec_of(problem, INTERFUSE_FLOAT32, channels_last, true), how);
      run<uint16_t>(problem, spec_of(problem, INTERFUSE_BFLOAT16, channels_last, true), how);
    }
}

const Run kExact = {1, Values::integers, Flush::back, 0}, kSplit = {3, Values::reals, Flush::front, 0},
          kMisaligned = {2, Values::integers, Flush::back, 1};

}  // namespace

TEST(conv_pool_sparse_backward) { run_all(kSparse, kExact); }
TEST(conv_pool_sparse_backward_split) { run_all(kSparse, kSplit); }
TEST(conv_pool_sparse_backward_misaligned) { run_all(kSparse, kMisaligned); }
TEST(conv_pool_dense_backward) { run_all(kDense, kExact); }
TEST(conv_pool_dense_backward_split) { run_all(kDense, kSplit); }
TEST(conv_pool_dense_backward_misaligned) { run_all(kDense, kMisaligned); }
TEST(conv_pool_patches_backward) { run_all(kPatches, kExact); }
TEST(conv_pool_patches_backward_split) { run_all(kPatches, kSplit); }
TEST(conv_pool_patches_backward_misaligned) { run_all(kPatches, kMisaligned); }
TEST(conv_pool_planes_backward) { run_all(kPlanes, kExact); }
TEST(conv_pool_planes_backward_split) { run_all(kPlanes, kSplit); }
TEST(conv_pool_planes_backward_misaligned) { run_all(kPlanes, kMisaligned); }

std::string method_of(const Problem& problem) {
  const interfuse::ConvPool p = interfuse::checked_conv_pool(spec_of(problem, INTERFUSE_FLOAT32, false, true));
  interfuse::ConvPoolBackward wanted{};
  float gradient;
  wanted.grad_x = wanted.grad_weight = &gradient;
  wanted.threads = 2;
  return INTERFUSE_PICK(conv_pool_kernels)->backward_method(p, wanted);
}

TEST(conv_pool_backward_takes_the_method_it_is_tested_for) {
  // Vectors of four lanes are filled by three channels already.
  const bool narrow = std::string(interfuse_isa()) == "baseline";
  for (const Problem& problem : kPatches)
    if (!narrow || problem.in_channels < 3) CHECK_EQUAL(method_of(problem), std::string("patches"));
  CHECK_EQUAL(method_of(kSparse[0]), std::string("sparse"));
  CHECK_EQUAL(method_of(kDense[0]), std::string("dense"));
  CHECK_EQUAL(method_of(kPlanes[3]), std::string("planes"));
}

// Strips are whole along two axes: there the offsets of a pixel in 32 bits, of bytes or of floats, would overflow.
TEST(conv_pool_backward_of_strips_beyond_32_bits) {
  Problem problem = {"large", 1, 32, 32, 1, {1, 9, 70000}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1},
                     INTERFUSE_RELU, kMax, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 1};
  CHECK_EQUAL(method_of(problem), std::string("sparse"));
  problem.input[0] = 300;
  CHECK_EQUAL(method_of(problem), std::string("planes"));
  problem.pool = kNone,
  problem.pool_size[1] = problem.pool_size[2] = problem.pool_stride[1] = problem.pool_stride[2] = 1;
  CHECK_EQUAL(method_of(problem), std::string("dense"));
  problem.input[0] = 2000;
  CHECK_EQUAL(method_of(problem), std::string("planes"));
}

// A weight of which every thread cannot have a sum of its own: they share the filters instead of the image.
TEST(conv_pool_backward_of_a_large_weight) {
  Problem problem = {"large weight", 1, 256, 468, 1, {1, 4, 4}, {1, 3, 3}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, {1, 1, 1},
                     INTERFUSE_RELU, kNone, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 1};
  const Run how = {8, Values::integers, Flush::back, 0};
  for (int pool : {kNone, kMax}) {
    problem.pool = pool;
    for (int axis : {1, 2}) problem.pool_size[axis] = problem.pool_stride[axis] = pool == kNone ? 1 : 2;
    run<float>(problem, spec_of(problem, INTERFUSE_FLOAT32, true, true), how);
  }
}

// Integers are summed exactly, so whatever else is computed beside it, a gradient is the same to the last bit.
TEST(conv_pool_backward_gives_each_gradient_alone) {
  for (const Problem* problem : {&kSparse[0], &kDense[0], &kPlanes[1], &kPlanes[4], &kPatches[0]})
    for (bool channels_last : {false, true}) {
      const Context context(std::string(problem->name) + (channels_last ? ", channels last" : ", contiguous"));
      const interfuse_conv_pool_spec spec = spec_of(*problem, INTERFUSE_FLOAT32, channels_last, true);
      interfuse_conv_pool* plan = nullptr;
      CHECK_EQUAL(interfuse_conv_pool_create(&spec, &plan), INTERFUSE_OK);
      if (!plan) return;
      int64_t conv[3], out[3], index_count, pre_count;
      interfuse_conv_pool_sizes(plan, conv, out);
      interfuse_conv_pool_saved(plan, &index_count, &pre_count);
      const NaiveConvPool naive(spec, conv, out);
      Guarded<float> x(naive.x.count()), weight(naive.weight_count()), bias(spec.out_channels), y(naive.y.count()),
          pre(pre_count), grad_y(naive.y.count());
      Guarded<uint8_t> index(index_count);
      fill(x, Values::integers, 1), fill(weight, Values::integers, 2), fill(bias, Values::integers, 3);
      fill(grad_y, Values::integers, 4);
      CHECK_EQUAL(interfuse_conv_pool_forward(plan, x.data(), weight.data(), bias.data(), y.data(), index.data(),
                                              pre.data(), 2),
                  INTERFUSE_OK);
      const auto gradients = [&](bool of_x, bool of_weight, bool of_bias) {
        std::vector<Doubles> all;
        Guarded<float> grad_x(of_x ? x.size() : 0), grad_weight(of_weight ? weight.size() : 0),
            grad_bias(of_bias ? bias.size() : 0);
        CHECK_EQUAL(interfuse_conv_pool_backward(plan, grad_y.data(), x.data(), weight.data(), y.data(), index.data(),
                                                 pre.data(), of_x ? grad_x.data() : nullptr,
                                                 of_weight ? grad_weight.data() : nullptr,
                                                 of_bias ? grad_bias.data() : nullptr, 2),
                    INTERFUSE_OK);
        CHECK(grad_x.intact() && grad_weight.intact() && grad_bias.intact());
        for (const Guarded<float>* grad : {&grad_x, &grad_weight, &grad_bias}) all.push_back(read(*grad));
        return all;
      };
      const std::vector<Doubles> all = gradients(true, true, true);
      CHECK(gradients(true, false, false)[0] == all[0]);
      CHECK(gradients(false, true, false)[1] == all[1]);
      CHECK(gradients(false, false, true)[2] == all[2]);
      interfuse_conv_pool_destroy(plan);
    }
}

// A relu that lets nothing through leaves lists without entries and gradients of zero.
TEST(conv_pool_backward_where_nothing_passes) {
  const Problem& problem = kSparse[0];
  const interfuse_conv_pool_spec spec = spec_of(problem, INTERFUSE_FLOAT32, false, true);
  interfuse_conv_pool* plan = nullptr;
  CHECK_EQUAL(interfuse_conv_pool_create(&spec, &plan), INTERFUSE_OK);
  if (!plan) return;
  int64_t conv[3], out[3];
  interfuse_conv_pool_sizes(plan, conv, out);
  const NaiveConvPool naive(spec, conv, out);
  Guarded<float> x(naive.x.count()), weight(naive.weight_count()), grad_y(naive.y.count());
  Guarded<float> grad_x(x.size()), grad_weight(weight.size()), grad_bias(spec.out_channels);
  Guarded<uint8_t> index(naive.y.count());
  fill(x, Values::reals, 1), fill(weight, Values::reals, 2), fill(grad_y, Values::reals, 3);
  std::fill(index.data(), index.data() + index.size(), uint8_t(255));
  CHECK_EQUAL(interfuse_conv_pool_backward(plan, grad_y.data(), x.data(), weight.data(), nullptr, index.data(), nullptr,
                                           grad_x.data(), grad_weight.data(), grad_bias.data(), 2),
              INTERFUSE_OK);
  for (const Guarded<float>* grad : {&grad_x, &grad_weight, &grad_bias})
    CHECK(std::all_of(grad->data(), grad->data() + grad->size(), [](float v) { return v == 0; }));
  interfuse_conv_pool_destroy(plan);
}
