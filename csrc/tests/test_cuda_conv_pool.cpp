// The CUDA kernel of conv_pool, executed on the CPU and compared with the core's own result.
#include "emulate.h"

#include "cuda/conv_pool_kernel.h"

#include <cmath>
#include <string>

#include "common/error.h"
#include "test.h"

namespace {

using namespace interfuse;

struct Case {
  const char* name;
  int64_t batch, in_channels, out_channels, groups, input[3], kernel[3], stride[3], dilation[3], lo[3], hi[3];
  int activation, pool;
  int64_t window[3], window_stride[3], window_pad[3];
  int ceil_mode, count_include_pad, channels_last;
};

const Case kCases[] = {
    {"block", 2, 3, 70, 1, {1, 9, 10}, {1, 3, 3}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {0, 0, 0}, INTERFUSE_RELU,
     INTERFUSE_POOL_MAX, {1, 2, 2}, {1, 2, 2}, {0, 0, 0}, 0, 1, 0},
    {"stem", 1, 3, 5, 1, {1, 17, 15}, {1, 7, 7}, {1, 2, 2}, {1, 1, 1}, {0, 3, 3}, {0, 3, 3}, INTERFUSE_GELU,
     INTERFUSE_POOL_MAX, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, 1, 1, 1},
    {"grouped average", 3, 6, 4, 2, {1, 8, 11}, {1, 2, 3}, {1, 1, 2}, {1, 2, 1}, {0, 1, 2}, {0, 0, 1}, INTERFUSE_SILU,
     INTERFUSE_POOL_AVG, {1, 3, 2}, {1, 2, 2}, {0, 1, 1}, 1, 0, 0},
    {"volume", 1, 2, 66, 1, {5, 6, 6}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 0, 1}, {1, 0, 1}, INTERFUSE_LEAKY_RELU,
     INTERFUSE_POOL_MAX, {2, 2, 2}, {2, 2, 2}, {0, 0, 0}, 0, 1, 1},
    {"line without pooling", 2, 17, 3, 1, {1, 1, 70}, {1, 1, 5}, {1, 1, 1}, {1, 1, 1}, {0, 0, 2}, {0, 0, 2},
     INTERFUSE_TANH, INTERFUSE_POOL_NONE, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 0, 1, 0},
};

interfuse_conv_pool_spec spec_of(const Case& c) {
  interfuse_conv_pool_spec s;
  interfuse_conv_pool_defaults(&s);
  s.batch = c.batch, s.in_channels = c.in_channels, s.out_channels = c.out_channels, s.groups = c.groups;
  for (int i = 0; i < 3; ++i) {
    s.input[i] = c.input[i], s.kernel[i] = c.kernel[i], s.stride[i] = c.stride[i], s.dilation[i] = c.dilation[i];
    s.padding_lo[i] = c.lo[i], s.padding_hi[i] = c.hi[i];
    s.pool_size[i] = c.window[i], s.pool_stride[i] = c.window_stride[i], s.pool_padding[i] = c.window_pad[i];
  }
  s.activation = c.activation, s.pool = c.pool, s.ceil_mode = c.ceil_mode, s.count_include_pad = c.count_include_pad;
  s.channels_last = c.channels_last;
  s.precision = INTERFUSE_PRECISION_HIGHEST;
  s.save = 1;
  return s;
}

std::vector<float> random_values(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

struct Result {
  std::vector<float> y, pre;
  std::vector<uint8_t> index;
  explicit Result(const ConvPool& p)
      : y(static_cast<size_t>(p.y_count()), NAN),
        pre(static_cast<size_t>(p.pre_count()), 0),
        index(static_cast<size_t>(p.index_count()), 77) {}
};

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double apart = std::fabs(static_cast<double>(a[i]) - b[i]);
    if (!(apart <= worst)) worst = apart;
  }
  return worst;
}

Result emulated(const ConvPool& p, const std::vector<float>& x, const std::vector<float>& w,
                const std::vector<float>& b, emulate::Order order) {
  Result r(p);
  const auto tiles = [](int64_t count) { return static_cast<unsigned>((count + cuda::kTile - 1) / cuda::kTile); };
  emulate::launch({tiles(p.batch * p.out.volume()), tiles(p.group_out), static_cast<unsigned>(p.groups)},
                  cuda::kThreads, order, [&] {
                    cuda::conv_pool_forward<float>(p, x.data(), w.data(), b.data(), r.y.data(),
                                                   r.index.empty() ? nullptr : r.index.data(),
                                                   r.pre.empty() ? nullptr : r.pre.data());
                  });
  return r;
}

void check(const Case& c) {
  const interfuse_test::Context context(c.name);
  const interfuse_conv_pool_spec spec = spec_of(c);
  const ConvPool p = checked_conv_pool(spec);
  const auto x = random_values(p.batch * p.in_channels * p.in.volume(), 1);
  const auto w = random_values(p.out_channels * p.group_in * p.kernel.volume(), 2);
  const auto b = random_values(p.out_channels, 3);
  Result truth(p);
  interfuse_conv_pool* plan = nullptr;
  CHECK_EQUAL(interfuse_conv_pool_create(&spec, &plan), INTERFUSE_OK);
  CHECK_EQUAL(interfuse_conv_pool_forward(plan, x.data(), w.data(), b.data(), truth.y.data(), truth.index.data(),
                                          truth.pre.data(), 1),
              INTERFUSE_OK);
  interfuse_conv_pool_destroy(plan);
  // Sums of at most 150 products of normal variates, added in another order.
  const double tolerance = 150 * 1.2e-7 * 12;
  const Result first = emulated(p, x, w, b, emulate::Order::forward);
  for (emulate::Order order : {emulate::Order::backward, emulate::Order::shuffled}) {
    const Result other = emulated(p, x, w, b, order);
    // Another order of threads that changes the result means that a barrier is missing.
    CHECK(!std::memcmp(first.y.data(), other.y.data(), first.y.size() * 4));
    CHECK(first.index == other.index);
  }
  CHECK(distance(first.y, truth.y) <= tolerance);
  CHECK(distance(first.pre, truth.pre) <= tolerance);
  CHECK(first.index == truth.index);
}

}  // namespace

TEST(cuda_conv_pool_emulated) {
  for (const Case& c : kCases) check(c);
}
