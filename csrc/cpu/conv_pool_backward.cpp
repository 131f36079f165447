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
constexpr int64_t kGradientFloats = 64 << 10;      // of a dense strip
constexpr int64_t kLeastPixels = 256;              // of a dense strip, so that loading the sums does not count

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void set(int64_t to[3], const Triple& t) { to[0] = t.d, to[1] = t.h, to[2] = t.w; }

// Only behind a max pool that leaves less than a third of the pixels: per nonzero the sparse kernels need about twice
// the time of the dense ones.
bool mostly_zero(const ConvPool& p) { return p.pool == INTERFUSE_POOL_MAX && 3 * p.out.volume() <= p.conv.volume(); }

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

void choose_dense_strip(BackwardPlan& plan, int64_t images) {
  const int64_t steps = plan.count[plan.axis], per_step = plan.count[0] * plan.count[1] * plan.count[2] / steps;
  const int64_t pixels = most(kGradientFloats / plan.k_padded, kLeastPixels);
  plan.strip_steps = least(most(pixels / per_step, 1), steps);
  plan.strip_steps = divide_up(steps, divide_up(steps, plan.strip_steps));
  plan.strip_images = plan.strip_steps < steps ? 1 : most(least(pixels / (per_step * steps), images), 1);
}

BackwardPlan make_plan(const ConvPool& p, const ConvPoolBackward& a) {
  BackwardPlan plan{};
  plan.p = &p;
  plan.a = &a;
  plan.sparse = mostly_zero(p);
  set(plan.in, p.in), set(plan.conv, p.conv), set(plan.kernel, p.kernel);
  set(plan.stride, p.stride), set(plan.dilation, p.dilation), set(plan.pad, p.pad_lo);
  set(plan.count, plan.sparse ? p.out : p.conv);
  const Triple one{1, 1, 1}, none{0, 0, 0};
  set(plan.window, plan.sparse ? p.window : one);
  set(plan.window_stride, plan.sparse ? p.window_stride : one);
  set(plan.window_pad, plan.sparse ? p.window_pad : none);
  plan.uncovered_columns = p.window_stride.w > p.window.w || (p.out.w - 1) * p.window_stride.w - p.window_pad.w + p.window.w < p.conv.w;
  plan.axis = plan.count[1] > 1 ? 1 : plan.count[0] > plan.count[2] ? 0 : 2;
  plan.taps = p.kernel.volume();
  plan.lanes = p.group_in > kLanes && divide_up(p.group_in, kLanes) % 2 == 0 ? 2 * kLanes : kLanes;
  plan.chunks = divide_up(p.group_in, plan.lanes);
  plan.k_padded = plan.sparse ? p.group_out : divide_up(p.group_out, kBlock) * kBlock;
  plan.sparse ? choose_tile(plan, p.batch) : choose_dense_strip(plan, p.batch);
  return plan;
}

Strip make_strip(const BackwardPlan& plan, int64_t image, int64_t images, int64_t begin, int64_t end) {
  Strip s;
  s.image = image, s.images = images, s.begin = begin, s.end = end;
  for (int i = 0; i < 3; ++i) {
    s.lo[i] = i == plan.axis ? plan.touch_begin(begin) : 0;
    s.size[i] = (i == plan.axis ? plan.touch_end(end - 1) : (plan.conv[i] - 1) * plan.stride[i] + plan.reach(i)) - s.lo[i];
  }
  s.step[2] = plan.lanes;
  s.step[1] = s.size[2] * s.step[2];
  s.step[0] = s.size[1] * s.step[1];
  s.image_step = s.size[0] * s.step[0];
  s.floats = images * s.image_step;
  return s;
}

// One thread's way through its windows.
class Worker {
 public:
  Worker(const BackwardPlan& plan, bool grad_x, float* grad_weight, double* grad_bias)
      : plan_(plan), p_(*plan.p), grad_x_(grad_x), grad_weight_(grad_weight), grad_bias_(grad_bias) {}

  // Output channels k_begin..k_end of a group; all of them where the gradient of x is wanted.
  void run(int64_t group, int64_t k_begin, int64_t k_end, Range windows) {
    group_ = group, k_begin_ = k_begin, k_end_ = k_end;
    allocate();
    const int64_t steps = plan_.count[plan_.axis];
    for (int64_t at = windows.begin; at < windows.end;) {
      const int64_t image = at / steps, begin = at % steps;
      if (begin == 0 && plan_.strip_images > 1 && windows.end - at >= steps) {
        const int64_t images = least(plan_.strip_images, (windows.end - at) / steps);
        first_row_ = carried_ = 0;
        strip(make_strip(plan_, image, images, 0, steps), true);
        at += images * steps;
        continue;
      }
      const int64_t end = least(steps, begin + windows.end - at);
      part_of_image(image, begin, end);
      at += end - begin;
    }
  }

 private:
  void part_of_image(int64_t image, int64_t begin, int64_t end) {
    first_row_ = begin == 0 ? 0 : plan_.touch_begin(begin);
    int64_t again = begin;  // windows of the thread before that reach into our rows
    while (grad_x_ && again > 0 && plan_.touch_end(again - 1) > first_row_) --again;
    carried_ = 0;
    for (int64_t at = again; at < end;) {
      const int64_t stop = least(at + plan_.strip_steps, at < begin ? begin : end);
      strip(make_strip(plan_, image, 1, at, stop), at >= begin);
      at = stop;
    }
  }

  void allocate() {
    const Strip s = largest_strip();
    const int64_t pixels = s.images * volume(s);
    const int64_t channels = divide_up(k_end_ - k_begin_, kBlock) * kBlock;
    x_ = scratch_floats(Slot::tiles, s.floats);
    if (grad_x_) {
      const int64_t carried = s.floats / s.size[plan_.axis] * carry_rows();
      dx_ = scratch_floats(Slot::gradient, s.floats + plan_.chunks * carried);
      carry_ = dx_ + s.floats;
      carry_step_ = carried;
    }
    const int64_t row = 2 * most(most(plan_.conv[2], p_.out.w), p_.group_out) + kLanes;
    if (plan_.sparse) {
      const Tiles tiles = tiles_of(plan_, s);
      const int64_t lists = tiles.total * channels;
      entries_ = static_cast<SparseGradient*>(scratch(Slot::products, static_cast<size_t>(lists * tiles.windows) * sizeof(SparseGradient)));
      row_ = scratch_floats(Slot::rows, row + lists);
      counts_ = reinterpret_cast<int32_t*>(row_ + row);
    } else {
      dense_ = scratch_floats(Slot::products, channels * pixels);
      row_ = scratch_floats(Slot::rows, row + pixels);
      offsets_ = reinterpret_cast<int32_t*>(row_ + row);
    }
  }

  // Room for every strip: as if neither padding nor the end of the axis cut it short.
  Strip largest_strip() const {
    Strip s = make_strip(plan_, 0, plan_.strip_images, 0, plan_.strip_steps);
    const int i = plan_.axis;
    const int64_t size = s.size[i];
    s.size[i] = ((plan_.strip_steps - 1) * plan_.window_stride[i] + plan_.window[i] - 1) * plan_.stride[i] + plan_.reach(i);
    s.floats = s.floats / size * s.size[i];
    return s;
  }
  int64_t carry_rows() const {
    const int i = plan_.axis;
    return most(0, (plan_.window[i] - 1 - plan_.window_stride[i]) * plan_.stride[i] + plan_.reach(i));
  }
  int64_t volume(const Strip& s) const {
    int64_t windows = s.end - s.begin;
    for (int i = 0; i < 3; ++i)
      if (i != plan_.axis) windows *= plan_.count[i];
    return windows;
  }

  void strip(const Strip& s, bool ours) {
    const bool weights = ours && grad_weight_, biases = ours && grad_bias_;
    if (!weights && !biases && !grad_x_) return;
    const int64_t channels = k_end_ - k_begin_;
    Tiles tiles{};
    const int64_t pixels = s.images * volume(s);
    if (plan_.sparse) {
      tiles = tiles_of(plan_, s);
      list_gradients(plan_, s, tiles, group_, k_begin_, k_end_, entries_, counts_, row_);
      if (biases) sum_lists(tiles);
    } else {
      dense_gradients(plan_, s, group_, k_begin_, k_end_, dense_, row_);
      find_offsets(s);
      if (biases) sum_pixels(pixels);
    }
    const int64_t blocks = divide_up(channels, kBlock), chunk_floats = plan_.k_padded * plan_.taps * plan_.lanes;
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const int64_t channel = group_ * p_.group_in + chunk * plan_.lanes;
      const int64_t in_channels = least(plan_.lanes, p_.group_in - chunk * plan_.lanes);
      const int64_t base = (group_ * plan_.chunks + chunk) * chunk_floats;
      if (weights) {
        pack_input(plan_, s, channel, in_channels, x_);
        float* sums = grad_weight_ + base + k_begin_ * plan_.taps * plan_.lanes;
        plan_.sparse ? sparse_weight_gradient(plan_, s, tiles, entries_, counts_, channels, x_, sums)
                     : dense_weight_gradient(plan_, s, dense_, offsets_, pixels, blocks, x_, sums);
      }
      if (grad_x_) {
        float* carry = carry_ + chunk * carry_step_;
        resume(s, carry);
        plan_.sparse ? sparse_input_gradient(plan_, s, tiles, entries_, counts_, channels, plan_.packed_weight + base, dx_)
                     : dense_input_gradient(plan_, s, dense_, offsets_, pixels, blocks, plan_.packed_weight + base, dx_);
        store_input_gradient(plan_, s, channel, in_channels, most(finished_begin(s), first_row_), finished_end(s), dx_);
        suspend(s, carry);
      }
    }
    carried_ = most(s.lo[plan_.axis] + s.size[plan_.axis] - finished_end(s), 0);
  }

  // The rows that no later strip adds to.
  int64_t finished_begin(const Strip& s) const { return s.begin == 0 ? 0 : s.lo[plan_.axis]; }
  int64_t finished_end(const Strip& s) const {
    return s.end == plan_.count[plan_.axis] ? plan_.in[plan_.axis] + plan_.pad[plan_.axis] : plan_.touch_begin(s.end);
  }

  // Rows of the strips' axis, from `row` on, `rows` of them, between a strip's buffer and a dense one.
  template <class Copy>
  void each_slab(const Strip& s, int64_t row, int64_t rows, Copy&& copy) {
    int64_t outer = s.images, inner = plan_.lanes;
    for (int i = 0; i < plan_.axis; ++i) outer *= s.size[i];
    for (int i = plan_.axis + 1; i < 3; ++i) inner *= s.size[i];
    for (int64_t i = 0; i < outer; ++i)
      copy(dx_ + (i * s.size[plan_.axis] + row) * inner, i * rows * inner, static_cast<size_t>(rows * inner) * sizeof(float));
  }
  // Zeros, but for the rows that the strip before already added to.
  void resume(const Strip& s, const float* carry) {
    memset(dx_, 0, static_cast<size_t>(s.floats) * sizeof(float));
    each_slab(s, 0, least(carried_, s.size[plan_.axis]), [&](float* at, int64_t offset, size_t bytes) { memcpy(at, carry + offset, bytes); });
  }
  void suspend(const Strip& s, float* carry) {
    if (s.end == plan_.count[plan_.axis]) return;
    const int64_t rows = s.lo[plan_.axis] + s.size[plan_.axis] - finished_end(s);
    if (rows > 0)
      each_slab(s, s.size[plan_.axis] - rows, rows, [&](float* at, int64_t offset, size_t bytes) { memcpy(carry + offset, at, bytes); });
  }

  void find_offsets(const Strip& s) {
    int64_t begin[3], end[3], at = 0;
    for (int i = 0; i < 3; ++i) {
      begin[i] = i == plan_.axis ? s.begin : 0;
      end[i] = i == plan_.axis ? s.end : plan_.count[i];
    }
    for (int64_t n = 0; n < s.images; ++n)
      for (int64_t d = begin[0]; d < end[0]; ++d)
        for (int64_t h = begin[1]; h < end[1]; ++h)
          for (int64_t w = begin[2]; w < end[2]; ++w)
            offsets_[at++] = static_cast<int32_t>(n * s.image_step + (d * plan_.stride[0] - s.lo[0]) * s.step[0] +
                                                  (h * plan_.stride[1] - s.lo[1]) * s.step[1] +
                                                  (w * plan_.stride[2] - s.lo[2]) * s.step[2]);
  }

  double* biases() const { return grad_bias_ + group_ * p_.group_out + k_begin_; }
  void sum_lists(const Tiles& tiles) {
    const int64_t channels = k_end_ - k_begin_;
    for (int64_t list = 0; list < tiles.total * channels; ++list) {
      float sum = 0;
      for (int32_t i = 0; i < counts_[list]; ++i) sum += entries_[list * tiles.windows + i].value;
      biases()[list % channels] += sum;
    }
  }
  void sum_pixels(int64_t pixels) {
    for (int64_t block = 0; block * kBlock < k_end_ - k_begin_; ++block) {
      float sums[kBlock] = {};
      for (int64_t i = 0; i < pixels; ++i)
        for (int k = 0; k < kBlock; ++k) sums[k] += dense_[(block * pixels + i) * kBlock + k];
      for (int64_t k = 0; k < kBlock && block * kBlock + k < k_end_ - k_begin_; ++k) biases()[block * kBlock + k] += sums[k];
    }
  }

  const BackwardPlan& plan_;
  const ConvPool& p_;
  const bool grad_x_;
  float* const grad_weight_;
  double* const grad_bias_;
  int64_t group_ = 0, k_begin_ = 0, k_end_ = 0;
  int64_t first_row_ = 0, carried_ = 0;  // ours begin there; rows of the strip before that wait in the carry
  float *x_ = nullptr, *dx_ = nullptr, *carry_ = nullptr, *dense_ = nullptr, *row_ = nullptr;
  int64_t carry_step_ = 0;
  SparseGradient* entries_ = nullptr;
  int32_t *counts_ = nullptr, *offsets_ = nullptr;
};

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
    Worker worker(plan, a.grad_x != nullptr, a.grad_weight && !by_channels ? plan.grad_weight + thread * weights : nullptr,
                  a.grad_bias ? plan.grad_bias + thread * p.out_channels : nullptr);
    for (int64_t group = 0; group < p.groups; ++group) worker.run(group, 0, p.group_out, share(windows, thread, team));
    if (!by_channels) return;
    Worker weights_only(plan, false, plan.grad_weight, nullptr);
    const int64_t blocks = divide_up(p.group_out, kBlock);
    const Range mine = share(p.groups * blocks, thread, team);
    for (int64_t at = mine.begin; at < mine.end;) {
      const int64_t group = at / blocks, end = least(mine.end, (group + 1) * blocks);
      weights_only.run(group, at % blocks * kBlock, least((end - group * blocks) * kBlock, p.group_out), {0, windows});
      at = end;
    }
  });
  if (a.grad_weight)
    parallel(threads, [&](int thread, int team) { store_weight_gradient(plan, parts, thread, team); });
  if (a.grad_bias) p.dtype == INTERFUSE_FLOAT32 ? store_bias<float>(plan, threads) : store_bias<uint16_t>(plan, threads);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
