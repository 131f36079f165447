// conv_pool's gradients: the plan, and the way through the strips. Compiled once per ISA.
//
// Every thread takes an even run of all images' windows. The input gradient of a row is summed by the one thread that
// owns it: at a boundary within an image the next thread computes the few windows that reach into its rows again, which
// is cheaper than combining. The weight gradient is summed per thread and then over threads in fixed order, or, where
// that would take too much memory, each thread sums some of the output channels over all windows. All of it is static:
// the same inputs and thread count give the same bits.
#include "cpu/conv_pool_backward.h"

#include "common/parallel.h"
#include "common/scratch.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int64_t kTileBytes = 30 << 10;           // of x, beside lists and sums in a first-level cache of 32 or 48 KiB
constexpr int64_t kPartialFloats = 8 << 20;        // of all threads' weight gradients together
constexpr int64_t kGradientFloats = 64 << 10;      // of a strip whose pixels are all written out
constexpr int64_t kLeastPixels = 256;              // of such a strip, so that loading the sums does not count

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void set(int64_t to[3], const Triple& t) { to[0] = t.d, to[1] = t.h, to[2] = t.w; }

// Sparse only behind a max pool that leaves less than a third of the pixels: per nonzero its kernels need about twice
// the time of the dense ones. With few channels most of a vector of channels would be empty, and planes win unless the
// pool leaves very little.
Method choose_method(const ConvPool& p) {
  const bool sparse = p.pool == INTERFUSE_POOL_MAX && 3 * p.out.volume() <= p.conv.volume();
  const int64_t vectors = divide_up(p.group_in, kLanes);
  if (sparse) return 5 * p.group_in * p.conv.volume() < 6 * vectors * kLanes * p.out.volume() ? Method::planes : Method::sparse;
  return 2 * p.group_in <= vectors * kLanes ? Method::planes : Method::dense;
}

// Grows the tile by the axis that adds most windows for what it adds of x, as long as that stays in the cache.
void choose_tile(BackwardPlan& plan, int64_t images) {
  int64_t size[4] = {1, 1, 1, 1};
  const int64_t most_of[4] = {plan.count[0], plan.count[1], plan.count[2], images};
  auto bytes = [&](const int64_t* s) {
    int64_t total = s[3] * plan.lanes * static_cast<int64_t>(sizeof(float));
    for (int i = 0; i < 3; ++i)
      total *= least(((s[i] - 1) * plan.window_stride[i] + plan.window[i] - 1) * plan.stride[i] + plan.reach(i),
                     (plan.conv[i] - 1) * plan.stride[i] + plan.reach(i));
    return total;
  };
  for (;;) {
    int best = -1;
    double best_gain = 0;
    for (int i = 0; i < 4; ++i) {
      // Several images only where one is a single strip.
      if (size[i] >= most_of[i] || (i == 3 && size[plan.axis] < most_of[plan.axis])) continue;
      int64_t larger[4] = {size[0], size[1], size[2], size[3]};
      ++larger[i];
      const double gain = static_cast<double>(larger[i]) / size[i] * bytes(size) / bytes(larger);
      if (bytes(larger) <= kTileBytes && gain > best_gain) best = i, best_gain = gain;
    }
    if (best < 0) break;
    ++size[best];
  }
  for (int i = 0; i < 3; ++i) plan.tile[i] = divide_up(plan.count[i], divide_up(plan.count[i], size[i]));
  plan.strip_steps = plan.tile[plan.axis];
  plan.strip_images = size[3];
}

// Strips of about so many pixels, all of an image's axis in equal parts, or several images.
void choose_strip(BackwardPlan& plan, int64_t images, int64_t pixels) {
  const int64_t steps = plan.count[plan.axis], per_step = plan.count[0] * plan.count[1] * plan.count[2] / steps;
  plan.strip_steps = least(most(pixels / per_step, 1), steps);
  plan.strip_steps = divide_up(steps, divide_up(steps, plan.strip_steps));
  plan.strip_images = plan.strip_steps < steps ? 1 : most(least(pixels / (per_step * steps), images), 1);
}

BackwardPlan make_plan(const ConvPool& p, const ConvPoolBackward& a) {
  BackwardPlan plan{};
  plan.p = &p;
  plan.a = &a;
  plan.method = choose_method(p);
  const bool sparse = plan.method == Method::sparse;
  set(plan.in, p.in), set(plan.conv, p.conv), set(plan.kernel, p.kernel);
  set(plan.stride, p.stride), set(plan.dilation, p.dilation), set(plan.pad, p.pad_lo);
  const Triple one{1, 1, 1}, none{0, 0, 0};
  set(plan.count, sparse ? p.out : p.conv);
  set(plan.window, sparse ? p.window : one);
  set(plan.window_stride, sparse ? p.window_stride : one);
  set(plan.window_pad, sparse ? p.window_pad : none);
  plan.uncovered_columns = p.window_stride.w > p.window.w || (p.out.w - 1) * p.window_stride.w - p.window_pad.w + p.window.w < p.conv.w;
  plan.axis = plan.count[1] > 1 ? 1 : plan.count[0] > plan.count[2] ? 0 : 2;
  plan.taps = p.kernel.volume();
  plan.lanes = p.group_in > kLanes && divide_up(p.group_in, kLanes) % 2 == 0 ? 2 * kLanes : kLanes;
  plan.chunks = plan.method == Method::planes ? 1 : divide_up(p.group_in, plan.lanes);
  plan.k_padded = plan.method == Method::dense ? divide_up(p.group_out, kBlock) * kBlock : p.group_out;
  plan.unit_groups = 1;
  if (plan.method == Method::planes) plan.unit_groups = least(most(kLanes / most(p.group_in, p.group_out), 1), p.groups);
  plan.units = divide_up(p.groups, plan.unit_groups);
  const int64_t channels = plan.unit_groups * (p.group_out + (plan.method == Method::planes ? p.group_in : 0));
  sparse ? choose_tile(plan, p.batch) : choose_strip(plan, p.batch, most(kGradientFloats / channels, kLeastPixels));
  return plan;
}

void zero_fill(void* to, int64_t count, int dtype) {
  if (to) memset(to, 0, static_cast<size_t>(count) * (dtype == INTERFUSE_FLOAT32 ? 4 : 2));
}

template <class T>
void store_bias(const BackwardPlan& plan, int parts) {
  for (int64_t k = 0; k < plan.p->out_channels; ++k) {
    double sum = 0;
    for (int part = 0; part < parts; ++part) sum += plan.grad_bias[part * plan.p->out_channels + k];
    put(static_cast<T*>(plan.a->grad_bias) + k, static_cast<float>(sum));
  }
}

}  // namespace

void conv_pool_backward(const ConvPool& p, const ConvPoolBackward& a) {
  if (p.batch == 0) {
    zero_fill(a.grad_weight, p.out_channels * p.group_in * p.kernel.volume(), p.dtype);
    zero_fill(a.grad_bias, p.out_channels, p.dtype);
    return;
  }
  BackwardPlan plan = make_plan(p, a);
  const int64_t weights = plan.weight_floats(), windows = p.batch * plan.count[plan.axis];
  const int threads = a.threads;
  const bool by_channels = a.grad_weight && threads > 1 && threads * weights > kPartialFloats;
  const int parts = by_channels ? 1 : threads;
  if (a.grad_x) plan.packed_weight = scratch_floats(Slot::pack, weights);
  if (a.grad_weight) plan.grad_weight = scratch_floats(Slot::weight, parts * weights);
  if (a.grad_bias) {
    plan.grad_bias = static_cast<double*>(scratch(Slot::other, static_cast<size_t>(threads * p.out_channels) * sizeof(double)));
    memset(plan.grad_bias, 0, static_cast<size_t>(threads * p.out_channels) * sizeof(double));
  }
  // The team may be smaller than asked for; its parts then stay zero.
  parallel(threads, [&](int thread, int team) {
    if (a.grad_x) pack_weight(plan, thread, team);
    if (!a.grad_weight) return;
    const Range mine = share(parts * weights, thread, team);
    memset(plan.grad_weight + mine.begin, 0, static_cast<size_t>(mine.end - mine.begin) * sizeof(float));
  });
  parallel(threads, [&](int thread, int team) {
    const Range mine = share(windows, thread, team);
    const int64_t all = plan.unit_groups * p.group_out;
    float* own_weights = a.grad_weight && !by_channels ? plan.grad_weight + thread * weights : nullptr;
    double* own_biases = a.grad_bias ? plan.grad_bias + thread * p.out_channels : nullptr;
    if (a.grad_x || own_weights || own_biases)
      run_strips(plan, {mine.begin, mine.end, 0, plan.units, 0, all, a.grad_x != nullptr, own_weights, own_biases});
    if (!by_channels) return;
    const int64_t blocks = plan.unit_groups > 1 ? 1 : divide_up(p.group_out, kBlock);
    const Range items = share(plan.units * blocks, thread, team);
    for (int64_t at = items.begin; at < items.end;) {
      const int64_t unit = at / blocks, end = least(items.end, (unit + 1) * blocks);
      const int64_t k_end = plan.unit_groups > 1 ? all : least((end - unit * blocks) * kBlock, all);
      run_strips(plan, {0, windows, unit, unit + 1, at % blocks * kBlock, k_end, false, plan.grad_weight, nullptr});
      at = end;
    }
  });
  if (a.grad_weight)
    parallel(threads, [&](int thread, int team) { store_weight_gradient(plan, parts, thread, team); });
  if (a.grad_bias) p.dtype == INTERFUSE_FLOAT32 ? store_bias<float>(plan, threads) : store_bias<uint16_t>(plan, threads);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
