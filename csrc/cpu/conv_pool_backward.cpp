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
#include "cpu/conv_pool_winograd.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int64_t kTileBytes = 30 << 10;           // of x, beside lists and sums in a first-level cache of 32 or 48 KiB
constexpr int64_t kPartialFloats = 8 << 20;        // of all threads' weight gradients together
constexpr int64_t kGradientFloats = 64 << 10;      // of a strip whose pixels are all written out
constexpr int64_t kPlanesFloats = 32 << 10;        // of a strip's planes of x, and of grad_x, about
constexpr int64_t kLeastWindows = 64;              // of such a strip
constexpr int64_t kPointFloats = (int64_t(768) << 10) / 4;  // of a strip in Winograd's points
constexpr int64_t kLeastTiles = 48;                // of such a strip: each reads and writes all the weight's points
// Transforming, clearing and summing the weight's points must pay: so many tiles to a thread at least, and more where
// the points do not fit into the cache (measured: 64 channels break even at 25, 128 at 120, 256 below 500).
constexpr int64_t kLeastTilesOfThread = 32, kPointsPerTile = 5000;
constexpr int64_t kLeastPixels = 256;              // of such a strip, so that loading the sums does not count


void set(int64_t to[3], const Triple& t) { to[0] = t.d, to[1] = t.h, to[2] = t.w; }

// Patches of x that are a few vectors long, and enough output channels that share one: building it must pay. Windows
// lie side by side, so that each pixel is in one at most.
bool takes_patches(const ConvPool& p) {
  const bool side_by_side = p.window_stride.d == p.window.d && p.window_stride.h == p.window.h &&
                            p.window_stride.w == p.window.w && p.window_pad.d == 0 && p.window_pad.h == 0 &&
                            p.window_pad.w == 0;
  return side_by_side && p.groups == 1 && 2 * p.group_in <= kLanes && p.group_out >= 16 &&
         p.group_in * p.kernel.volume() <= kMostPatchVectors * kLanes;
}

// Sparse only behind a max pool that leaves less than a third of the pixels: per nonzero its kernels need about twice
// the time of the dense ones. With few channels most of a vector of channels would be empty, and planes win unless the
// pool leaves very little.
Method choose_method(const ConvPool& p) {
  const bool sparse = p.pool == INTERFUSE_POOL_MAX && 3 * p.out.volume() <= p.conv.volume();
  const int64_t vectors = divide_up(p.group_in, kLanes);
  if (sparse && takes_patches(p)) return Method::patches;
  if (sparse)
    return 5 * p.group_in * p.conv.volume() < 6 * vectors * kLanes * p.out.volume() ? Method::planes : Method::sparse;
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
  plan.strip_steps = least(greatest(pixels / per_step, 1), steps);
  plan.strip_steps = divide_up(steps, divide_up(steps, plan.strip_steps));
  plan.strip_images = plan.strip_steps < steps ? 1 : greatest(least(pixels / (per_step * steps), images), 1);
}

// What every method needs to know; its parts are `window` large.
void set_windows(BackwardPlan& plan, const Triple& count, const Triple& window, const Triple& window_stride,
                 const Triple& window_pad) {
  set(plan.count, count), set(plan.window, window), set(plan.window_stride, window_stride),
      set(plan.window_pad, window_pad);
  plan.axis = plan.count[1] > 1 ? 1 : plan.count[0] > plan.count[2] ? 0 : 2;
}

BackwardPlan make_plan(const ConvPool& p, const ConvPoolBackward& a, Method method) {
  BackwardPlan plan{};
  plan.p = &p;
  plan.a = &a;
  plan.method = method;
  const bool sparse = method == Method::sparse, planes = method == Method::planes, patches = method == Method::patches;
  set(plan.in, p.in), set(plan.conv, p.conv), set(plan.kernel, p.kernel);
  set(plan.stride, p.stride), set(plan.dilation, p.dilation), set(plan.pad, p.pad_lo);
  plan.uncovered_columns =
      p.window_stride.w > p.window.w || (p.out.w - 1) * p.window_stride.w - p.window_pad.w + p.window.w < p.conv.w;
  plan.taps = p.kernel.volume();
  plan.unit_groups = planes ? least(greatest(kLanes / greatest(p.group_in, p.group_out), 1), p.groups) : 1;
  plan.units = divide_up(p.groups, plan.unit_groups);
  const Triple one{1, 1, 1}, none{0, 0, 0};
  if (method == Method::winograd) {
    const Triple tile{winograd_depth_tile(p), 4, 4};
    const auto tiles = [](int64_t conv, int64_t out, int64_t window, int64_t size) {
      return divide_up(least(conv, out * window), size);
    };
    // With pooling, pixels behind the last window have no gradient.
    set_windows(plan,
                {tiles(p.conv.d, p.out.d, p.window.d, tile.d), tiles(p.conv.h, p.out.h, p.window.h, 4),
                 tiles(p.conv.w, p.out.w, p.window.w, 4)},
                tile, tile, none);
    plan.depth_points = p.kernel.d == 1 ? 1 : static_cast<int>(tile.d) + 2;
    plan.chunks = 1;
    plan.lanes = divide_up(p.group_in, kLanes) * kLanes;
    plan.k_padded = divide_up(p.group_out, kLanes) * kLanes;
    plan.panel = panel_width(plan.lanes);
    choose_strip(plan, p.batch, greatest(kPointFloats / (36 * (plan.lanes + plan.k_padded)), kLeastTiles));
    return plan;
  }
  plan.lanes = p.group_in > kLanes && divide_up(p.group_in, kLanes) % 2 == 0 ? 2 * kLanes : kLanes;
  plan.chunks = plan.in_planes() ? 1 : divide_up(p.group_in, plan.lanes);
  plan.k_padded = method == Method::dense ? divide_up(p.group_out, kBlock) * kBlock : p.group_out;
  if (sparse) {
    set_windows(plan, p.out, p.window, p.window_stride, p.window_pad);
    choose_tile(plan, p.batch);
  } else if (patches) {
    plan.patch = divide_up(p.group_in * plan.taps, kLanes) * kLanes;
    set_windows(plan, p.out, p.window, p.window_stride, none);
    choose_strip(plan, p.batch,
                 greatest(kPlanesFloats / (p.group_in * p.stride.volume() * p.window.volume()), kLeastWindows));
  } else {
    set_windows(plan, p.conv, one, one, none);
    const int64_t channels = plan.unit_groups * (p.group_out + (planes ? p.group_in : 0));
    choose_strip(plan, p.batch, greatest(kGradientFloats / channels, kLeastPixels));
  }
  return plan;
}

// Where a pixel lies in a strip takes 32 bits: of bytes in the sparse lists, of floats in the dense ones. The strip of
// a very large tensor, whole along two axes, may not fit; planes count in 64.
bool offsets_fit(const BackwardPlan& plan) {
  if (plan.method == Method::sparse)
    return largest_strip_floats(plan) <= INT32_MAX / static_cast<int64_t>(sizeof(float));
  return plan.method != Method::dense || largest_strip_floats(plan) <= INT32_MAX;
}

BackwardPlan make_direct_plan(const ConvPool& p, const ConvPoolBackward& a) {
  const BackwardPlan plan = make_plan(p, a, choose_method(p));
  return offsets_fit(plan) ? plan : make_plan(p, a, Method::planes);
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

// Is every thread's own weight gradient too much memory?
bool sums_by_channels(const BackwardPlan& plan) {
  return plan.a->grad_weight && plan.a->threads > 1 && plan.a->threads * plan.weight_floats() > kPartialFloats;
}

bool takes_winograd(const BackwardPlan& plan) {
  const int64_t tiles = plan.p->batch * plan.count[0] * plan.count[1] * plan.count[2];
  const int64_t least_tiles = greatest(kLeastTilesOfThread, plan.weight_floats() / plan.p->groups / kPointsPerTile);
  return tiles >= least_tiles * plan.a->threads && !sums_by_channels(plan);
}

BackwardPlan choose_plan(const ConvPool& p, const ConvPoolBackward& a) {
  if (winograd_has_gradients(p)) {
    const BackwardPlan plan = make_plan(p, a, Method::winograd);
    if (takes_winograd(plan)) return plan;
  }
  return make_direct_plan(p, a);
}

void run_plan(BackwardPlan& plan) {
  const ConvPool& p = *plan.p;
  const ConvPoolBackward& a = *plan.a;
  const int64_t weights = plan.weight_floats(), windows = p.batch * plan.count[plan.axis];
  const int threads = a.threads;
  const bool by_channels = sums_by_channels(plan);
  const int parts = by_channels ? 1 : threads;
  if (a.grad_x) plan.packed_weight = scratch_floats(Slot::pack, weights);
  if (a.grad_weight) plan.grad_weight = scratch_floats(Slot::weight, parts * weights);
  if (a.grad_bias) {
    plan.grad_bias =
        static_cast<double*>(scratch(Slot::other, static_cast<size_t>(threads * p.out_channels) * sizeof(double)));
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
  if (a.grad_bias)
    p.dtype == INTERFUSE_FLOAT32 ? store_bias<float>(plan, threads) : store_bias<uint16_t>(plan, threads);
}

}  // namespace

void conv_pool_backward(const ConvPool& p, const ConvPoolBackward& a) {
  if (p.batch == 0) {
    zero_fill(a.grad_weight, p.out_channels * p.group_in * p.kernel.volume(), p.dtype);
    zero_fill(a.grad_bias, p.out_channels, p.dtype);
    return;
  }
  BackwardPlan plan = choose_plan(p, a);
  uint8_t broken = 0;
  plan.broken = &broken;
  run_plan(plan);
  // A NaN or an infinity spreads over its whole Winograd tile, and large values overflow in the transforms. Whatever is
  // not finite reaches a result, and the other methods do it all again as torch would.
  if (!broken) return;
  plan = make_direct_plan(p, a);
  run_plan(plan);
}

const char* conv_pool_backward_method(const ConvPool& p, const ConvPoolBackward& a) {
  switch (choose_plan(p, a).method) {
    case Method::sparse: return "sparse";
    case Method::dense: return "dense";
    case Method::planes: return "planes";
    case Method::patches: return "patches";
    default: return "winograd";
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
