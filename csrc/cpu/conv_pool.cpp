// conv_pool on the CPU without Winograd: plans a problem and drives the tiles over it. Compiled once per ISA.
//
// The outputs are cut into boxes. For each box and each panel of output channels the convolution's sums go to a small
// working memory, tile by tile, and are pooled, activated and stored from there while they are in cache.
#include <math.h>

#include "common/activation.h"
#include "common/conv_pool.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/conv_pool_finish.h"
#include "cpu/conv_pool_pack.h"
#include "cpu/conv_pool_tile.h"
#include "cpu/conv_pool_view.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// ---- the plan -------------------------------------------------------------------------------------------------------

struct Plan {
  ConvPool p;           // the problem, perhaps with axes merged
  int64_t pixel_w;      // step in x from one pixel of the convolution to the next along w
  bool copies;          // x is read through a copy
  int vectors;          // per panel
  int64_t panels;       // per group
  int64_t depth_block;  // steps of the reduction whose weights stay in L1
  ReductionOrder order;
  Triple box;           // outputs of a box at most
  Triple boxes;         // how many along each axis
  int64_t rows;         // output rows that are finished at a time
  Strides copy;         // of the copy
  int64_t copy_count, sums_count, row_count;  // floats of working memory
  int64_t splits;       // parts into which the panels are dealt
  int64_t jobs() const { return splits * p.batch * p.groups * boxes.volume(); }
  int64_t panel_size() const { return (order.depth() + 1) * vectors * kLanes; }
};

constexpr int64_t kWeightBytes = 20 << 10;   // of a block of weights: it stays in L1 beside what a tile reads of x
constexpr int64_t kCopyBytes = 320 << 10;    // of the copied part of x: half of a small L2 together with the sums
constexpr int64_t kSumsBytes = 160 << 10;
constexpr int64_t kNearBytes = 24 << 10;     // of the sums, where they can stay in L1
constexpr double kWorkPerThread = 1e6;       // multiply-adds worth waking a thread for

INTERFUSE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The convolution's pixels under outputs [from, to) of one axis, and the input under those.
INTERFUSE_INLINE int64_t conv_begin(int64_t from, int64_t stride, int64_t pad) { return most(0, from * stride - pad); }
INTERFUSE_INLINE int64_t conv_end(int64_t to, int64_t stride, int64_t pad, int64_t window, int64_t size) {
  return least(size, (to - 1) * stride - pad + window);
}
INTERFUSE_INLINE Box conv_box(const ConvPool& p, const Box& out) {
  Box box;
  box.from = {conv_begin(out.from.d, p.window_stride.d, p.window_pad.d), conv_begin(out.from.h, p.window_stride.h, p.window_pad.h),
              conv_begin(out.from.w, p.window_stride.w, p.window_pad.w)};
  box.to = {conv_end(out.to.d, p.window_stride.d, p.window_pad.d, p.window.d, p.conv.d),
            conv_end(out.to.h, p.window_stride.h, p.window_pad.h, p.window.h, p.conv.h),
            conv_end(out.to.w, p.window_stride.w, p.window_pad.w, p.window.w, p.conv.w)};
  return box;
}
// Most pixels of the convolution under `count` outputs.
INTERFUSE_INLINE int64_t conv_extent(int64_t count, int64_t stride, int64_t window, int64_t size) {
  return least(size, (count - 1) * stride + window);
}
INTERFUSE_INLINE Triple conv_extents(const ConvPool& p, const Triple& outs) {
  return {conv_extent(outs.d, p.window_stride.d, p.window.d, p.conv.d), conv_extent(outs.h, p.window_stride.h, p.window.h, p.conv.h),
          conv_extent(outs.w, p.window_stride.w, p.window.w, p.conv.w)};
}
INTERFUSE_INLINE Triple input_extents(const ConvPool& p, const Triple& conv) {
  return {(conv.d - 1) * p.stride.d + (p.kernel.d - 1) * p.dilation.d + 1, (conv.h - 1) * p.stride.h + (p.kernel.h - 1) * p.dilation.h + 1,
          (conv.w - 1) * p.stride.w + (p.kernel.w - 1) * p.dilation.w + 1};
}

bool padded(const ConvPool& p) {
  return p.pad_lo.d || p.pad_lo.h || p.pad_lo.w || p.pad_hi.d || p.pad_hi.h || p.pad_hi.w;
}

// A 1x1 convolution without pooling sees a row of pixels, whatever their shape was.
void merge_axes(ConvPool& p) {
  const bool pointwise = p.kernel.volume() == 1 && p.stride.volume() == 1 && p.pool == INTERFUSE_POOL_NONE && !padded(p);
  if (!pointwise) return;
  if (p.xs.h != p.in.w * p.xs.w && p.in.h > 1) return;
  if (p.xs.d != p.in.h * p.in.w * p.xs.w && p.in.d > 1) return;
  int64_t pixels = p.in.volume();
  if (p.channels_last && (p.batch == 1 || p.xs.n == pixels * p.xs.w)) pixels *= p.batch, p.batch = 1;
  p.in = p.conv = p.out = {1, 1, pixels};
}

// Where every image gives one pixel, the images are the pixels of a row. Dense y then looks channels-last.
bool merge_images(ConvPool& p) {
  if (p.conv.volume() != 1 || p.pool != INTERFUSE_POOL_NONE || padded(p) || p.dtype != INTERFUSE_FLOAT32 || p.batch == 1) return false;
  p.conv.w = p.out.w = p.batch;
  p.batch = 1;
  p.channels_last = true;
  return true;
}

// An axis of one element along w leaves rows of one pixel: the next axis takes its place.
void shift_axes(ConvPool& p) {
  for (int axis = 0; axis < 2; ++axis) {
    if (p.in.w != 1 || p.kernel.w != 1 || p.pad_lo.w || p.pad_hi.w || p.window.w != 1 || p.window_pad.w || p.out.w != 1) return;
    auto shift = [](Triple& t, int64_t fill) { t = {fill, t.d, t.h}; };
    for (Triple* t : {&p.in, &p.kernel, &p.stride, &p.dilation, &p.conv, &p.window, &p.window_stride, &p.out}) shift(*t, 1);
    for (Triple* t : {&p.pad_lo, &p.pad_hi, &p.window_pad}) shift(*t, 0);
    p.xs.w = p.xs.h, p.xs.h = p.xs.d, p.xs.d = 0;
  }
}

// Cycles of one step of the reduction over a row, from measurements: products, then loads.
double row_cost(int64_t width, int vectors) {
  const int64_t tiles = tile_count(width, vectors), small = width / tiles, large = width % tiles;
  auto cost = [&](int64_t q) {
    const double products = 0.5 * static_cast<double>(q * vectors);
    return (products < 4 ? 4 : products) + 0.1 * static_cast<double>(q + vectors);
  };
  return static_cast<double>(large) * cost(small + 1) + static_cast<double>(tiles - large) * cost(small);
}

int choose_vectors(const ConvPool& p, int64_t width) {
  const int64_t needed = ceil_div(p.group_out, kLanes);
  int best = 1;
  double best_cost = 0;
  for (int v = 1; v <= kMostVectors; ++v) {
    const int64_t whole = needed / v, rest = needed % v;
    const double cost = static_cast<double>(whole) * row_cost(width, v) + (rest ? row_cost(width, static_cast<int>(rest)) : 0);
    if (v == 1 || cost < best_cost) best = v, best_cost = cost;
  }
  return best;
}

// In place where nothing has to be filled in or widened, every offset fits the table, and the channels of a tile do
// not all fall on the same few sets of the cache.
bool reads_in_place(const ConvPool& p) {
  if (padded(p) || p.dtype != INTERFUSE_FLOAT32) return false;
  const int64_t reach = (p.group_in - 1) * p.xs.c + (p.kernel.d - 1) * p.dilation.d * p.xs.d +
                        (p.kernel.h - 1) * p.dilation.h * p.xs.h + (p.kernel.w - 1) * p.dilation.w * p.xs.w;
  if (reach > INT32_MAX) return false;
  return p.xs.c == 1 || p.group_in < 8 || (p.xs.c * 4) % 4096 >= 64;
}

int64_t copy_floats(const ConvPool& p, const Triple& conv, bool interleaved, Strides* s) {
  const Triple in = input_extents(p, conv);
  Strides made;
  if (interleaved) {
    made.c = 1, made.w = p.group_in;
    made.h = in.w * made.w, made.d = in.h * made.h;
    if (s) *s = made;
    return in.d * made.d;
  }
  made.w = 1, made.h = in.w, made.d = in.h * made.h;
  made.c = (ceil_div(in.d * made.d, 16) | 1) * 16;  // an odd number of lines: channels spread over the cache's sets
  if (s) *s = made;
  return p.group_in * made.c;
}

void choose_boxes(Plan& plan, int threads) {
  const ConvPool& p = plan.p;
  const bool interleaved = p.xs.c == 1;
  const int lanes = plan.vectors * kLanes;
  const bool one_block = plan.depth_block >= plan.order.depth();
  auto fits = [&](const Triple& outs) {
    const Triple conv = conv_extents(p, outs);
    if (copy_floats(p, conv, interleaved, nullptr) * 4 > kCopyBytes) return false;
    return one_block || conv.volume() * lanes * 4 <= kSumsBytes;
  };
  Triple box = {1, 1, p.out.w};
  while (box.w > 64 && !fits(box)) box.w = ceil_div(box.w, 2);
  auto grow = [&](int64_t& axis, int64_t most_of_it) {
    while (axis < most_of_it) {
      const int64_t before = axis;
      axis = least(most_of_it, axis * 2);
      if (fits(box)) continue;
      axis = before;
      break;
    }
  };
  grow(box.h, p.out.h);
  if (box.h == p.out.h) grow(box.d, p.out.d);
  Triple boxes = {ceil_div(p.out.d, box.d), ceil_div(p.out.h, box.h), ceil_div(p.out.w, box.w)};

  // Enough boxes for every thread, or shares of the panels: those of few pixels and many weights.
  plan.splits = 1;
  const int64_t outer = p.batch * p.groups;
  auto uneven = [&] { const int64_t jobs = outer * boxes.volume(); return jobs < 8 * threads && jobs % threads != 0; };
  if (threads > 1 && uneven()) {
    const int64_t weights = p.group_out * plan.order.depth(), inputs = p.group_in * p.in.volume();
    if (plan.panels >= 2 * threads && weights > inputs) {
      plan.splits = threads;
    } else {
      int64_t* count = &boxes.h;
      int64_t size = p.out.h;
      if (p.out.h < 2 * threads && p.out.d > 1) count = &boxes.d, size = p.out.d;
      if (p.out.h < 2 * threads && p.out.d < 2 * threads && p.out.w > 64) count = &boxes.w, size = p.out.w;
      while (uneven() && *count < size) ++*count;
      if (uneven() && plan.panels >= threads) plan.splits = threads;
    }
  }
  box = {ceil_div(p.out.d, boxes.d), ceil_div(p.out.h, boxes.h), ceil_div(p.out.w, boxes.w)};
  plan.box = box;
  plan.boxes = {ceil_div(p.out.d, box.d), ceil_div(p.out.h, box.h), ceil_div(p.out.w, box.w)};

  // With one block of weights the sums of a few rows are finished while they are in L1.
  plan.rows = box.h;
  if (one_block) {
    const Triple one = conv_extents(p, {1, 1, box.w});
    const int64_t row_bytes = one.d * one.w * lanes * 4;
    plan.rows = 1;
    while (plan.rows < box.h && conv_extent(plan.rows + 1, p.window_stride.h, p.window.h, p.conv.h) * row_bytes <= kNearBytes) ++plan.rows;
  }
  const Triple conv = conv_extents(p, box);
  plan.copy_count = plan.copies ? copy_floats(p, conv, interleaved, &plan.copy) : 0;
  const Triple part = one_block ? conv_extents(p, {1, plan.rows, box.w}) : conv;
  plan.sums_count = part.volume() * lanes;
  plan.row_count = 3 * box.w * lanes;
}

Plan make_plan(const ConvPool& problem, int threads) {
  Plan plan{};
  plan.p = problem;
  ConvPool& p = plan.p;
  bool images = merge_images(p);
  plan.pixel_w = p.xs.n;
  if (!images) {
    merge_axes(p);
    shift_axes(p);
  }
  plan.copies = !images && !reads_in_place(p);
  const bool interleaved = p.xs.c == 1;
  plan.order = {p.group_in, p.kernel.volume(), interleaved ? kLanes : 1};
  plan.vectors = choose_vectors(p, p.conv.w);
  plan.panels = ceil_div(p.group_out, plan.vectors * kLanes);
  const int64_t depth = plan.order.depth(), most_steps = kWeightBytes / (plan.vectors * kLanes * 4);
  plan.depth_block = ceil_div(depth, ceil_div(depth, most_steps));
  choose_boxes(plan, threads);
  if (!images) plan.pixel_w = p.stride.w * (plan.copies ? plan.copy.w : p.xs.w);
  return plan;
}

// ---- the drive ------------------------------------------------------------------------------------------------------

struct Shared {
  const float* packed;      // panels of all groups
  const int32_t* offsets;   // of the steps of the reduction
  Strides x;                // of what the tiles read
};

// The working memory of a thread.
struct Work {
  float *copy, *sums, *activated, *row;
};

// Sums of the convolution's pixels in `box`, rows [first, box.to.h) of it; earlier rows are there already.
void convolve(const Plan& plan, const Shared& shared, const float* origin, const float* panel, int vectors, const Sums& sums,
              int64_t first) {
  const ConvPool& p = plan.p;
  const Box& box = sums.box;
  const int lanes = vectors * kLanes;
  const int64_t depth = plan.order.depth(), width = box.to.w - box.from.w;
  const int64_t tiles = tile_count(width, vectors), small = width / tiles, large = width % tiles;
  const Tile big = kTiles[vectors - 1][large ? small + 1 : small], less = kTiles[vectors - 1][small];
  for (int64_t begin = 0; begin < depth; begin += plan.depth_block) {
    const int64_t steps = least(plan.depth_block, depth - begin);
    const float* weight = panel + (begin + 1) * lanes;
    for (int64_t d = box.from.d; d < box.to.d; ++d)
      for (int64_t h = first; h < box.to.h; ++h) {
        const float* x = origin + (d - box.from.d) * p.stride.d * shared.x.d + (h - box.from.h) * p.stride.h * shared.x.h;
        float* to = sums.at(d, h, box.from.w);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t pixels = t < large ? small + 1 : small;
          const Tile run = t < large ? big : less;
          run(x, plan.pixel_w, shared.offsets + begin, steps, weight, begin ? to : panel, begin ? lanes : 0, to);
          x += pixels * plan.pixel_w, to += pixels * lanes;
        }
      }
  }
}

// One box and one panel: convolve and finish a few rows at a time.
template <class T>
void run_panel(const Plan& plan, const ConvPoolForward& a, const Shared& shared, const float* origin, const Box& out,
               const Triple& own, const Panel& panel, const float* packed, const Work& work) {
  const ConvPool& p = plan.p;
  const bool one_block = plan.depth_block >= plan.order.depth();
  const Box whole = conv_box(p, out);
  Box part = out;
  for (int64_t d = out.from.d; d < out.to.d; d = part.to.d) {
    part.from.d = d, part.to.d = one_block ? d + 1 : out.to.d;
    int64_t have = -1;  // rows of the convolution up to here are in the working memory
    Box before{};
    for (int64_t h = out.from.h; h < out.to.h; h = part.to.h) {
      part.from.h = h, part.to.h = least(out.to.h, h + plan.rows);
      const Sums sums{work.sums, conv_box(p, part), panel.lanes()};
      const Box& box = sums.box;
      // Overlapping windows: the last rows of the part before are the first of this one.
      const bool overlap = have > box.from.h;
      if (overlap) {
        const int64_t row = (box.to.w - box.from.w) * panel.lanes();
        const int64_t kept = have - box.from.h, old_rows = before.to.h - before.from.h, new_rows = box.to.h - box.from.h;
        for (int64_t i = 0; i < box.to.d - box.from.d; ++i)
          memmove(work.sums + i * new_rows * row, work.sums + (i * old_rows + (box.from.h - before.from.h)) * row,
                  static_cast<size_t>(kept * row) * sizeof(float));
      }
      const float* at = origin + (box.from.d - whole.from.d) * p.stride.d * shared.x.d + (box.from.h - whole.from.h) * p.stride.h * shared.x.h;
      convolve(plan, shared, at, packed, panel.vectors, sums, overlap ? have : box.from.h);
      finish<T>(p, a, panel, sums, part, own, {work.row, work.activated});
      have = box.to.h;
      before = box;
    }
  }
}

template <class T>
void run_job(const Plan& plan, const ConvPoolForward& a, const Shared& shared, int64_t job, const Work& work) {
  const ConvPool& p = plan.p;
  const int64_t split = job / (plan.jobs() / plan.splits);
  int64_t rest = job % (plan.jobs() / plan.splits);
  Triple at;
  at.w = rest % plan.boxes.w, rest /= plan.boxes.w;
  at.h = rest % plan.boxes.h, rest /= plan.boxes.h;
  at.d = rest % plan.boxes.d, rest /= plan.boxes.d;
  const int64_t group = rest % p.groups, image = rest / p.groups;
  const Triple& size = plan.box;
  Box out;
  out.from = {at.d * size.d, at.h * size.h, at.w * size.w};
  out.to = {least(p.out.d, out.from.d + size.d), least(p.out.h, out.from.h + size.h), least(p.out.w, out.from.w + size.w)};
  const Box conv = conv_box(p, out);
  auto owned = [](int64_t from, int64_t stride, int64_t pad, int64_t window, int64_t extent) {
    return from == 0 ? int64_t(0) : conv_end(from, stride, pad, window, extent);
  };
  const Triple own = {owned(out.from.d, p.window_stride.d, p.window_pad.d, p.window.d, p.conv.d),
                      owned(out.from.h, p.window_stride.h, p.window_pad.h, p.window.h, p.conv.h),
                      owned(out.from.w, p.window_stride.w, p.window_pad.w, p.window.w, p.conv.w)};

  const T* x = static_cast<const T*>(a.x) + image * p.xs.n + group * p.group_in * p.xs.c;
  const Triple from = {conv.from.d * p.stride.d - p.pad_lo.d, conv.from.h * p.stride.h - p.pad_lo.h,
                       conv.from.w * p.stride.w - p.pad_lo.w};
  const float* origin;
  if (plan.copies) {
    copy_part(p, x, from, input_extents(p, conv.size()), work.copy, plan.copy);
    origin = work.copy;
  } else {
    // In place means float32 without padding, so the pixels along w are pixel_w apart from the first one on.
    origin = reinterpret_cast<const float*>(x) + from.d * p.xs.d + from.h * p.xs.h + conv.from.w * plan.pixel_w;
  }

  const Range panels = share(plan.panels, static_cast<int>(split), static_cast<int>(plan.splits));
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    const int64_t begin = i * plan.vectors * kLanes, channels = least(plan.vectors * kLanes, p.group_out - begin);
    const Panel panel{image, group * p.group_out + begin, static_cast<int>(ceil_div(channels, kLanes)), static_cast<int>(channels)};
    run_panel<T>(plan, a, shared, origin, out, own, panel, shared.packed + (group * plan.panels + i) * plan.panel_size(), work);
  }
}

template <class T>
void pack(const Plan& plan, const ConvPoolForward& a, float* packed, int64_t which) {
  const ConvPool& p = plan.p;
  const int64_t begin = which % plan.panels * plan.vectors * kLanes, first = which / plan.panels * p.group_out + begin;
  const int64_t channels = least(plan.vectors * kLanes, p.group_out - begin);
  const T* bias = a.bias ? static_cast<const T*>(a.bias) + first : nullptr;
  pack_panel(plan.order, static_cast<const T*>(a.weight) + first * plan.order.depth(), bias,
             static_cast<int>(ceil_div(channels, kLanes)), channels, packed + which * plan.panel_size());
}

void fill_offsets(const Plan& plan, const Strides& s, int32_t* offsets) {
  const ConvPool& p = plan.p;
  for (int64_t begin = 0; begin < p.group_in; begin += plan.order.channel_block) {
    const int64_t end = least(p.group_in, begin + plan.order.channel_block);
    for (int64_t i = 0; i < p.kernel.d; ++i)
      for (int64_t j = 0; j < p.kernel.h; ++j)
        for (int64_t l = 0; l < p.kernel.w; ++l)
          for (int64_t c = begin; c < end; ++c)
            *offsets++ = static_cast<int32_t>(c * s.c + i * p.dilation.d * s.d + j * p.dilation.h * s.h + l * p.dilation.w * s.w);
  }
}

template <class T>
void forward(const ConvPool& problem, const ConvPoolForward& a) {
  const double work = static_cast<double>(problem.conv_count()) * static_cast<double>(problem.group_in * problem.kernel.volume());
  const int threads = static_cast<int>(least(a.threads, 1 + static_cast<int64_t>(work / kWorkPerThread)));
  const Plan plan = make_plan(problem, threads);
  const ConvPool& p = plan.p;
  const int64_t panels = plan.panels * p.groups;
  const int64_t offset_floats = ceil_div(plan.order.depth(), 16) * 16;
  float* memory = scratch_floats(Slot::pack, offset_floats + panels * plan.panel_size());
  int32_t* offsets = reinterpret_cast<int32_t*>(memory);
  float* packed = memory + offset_floats;
  const Shared shared{packed, offsets, plan.copies ? plan.copy : Strides{p.xs.c, p.xs.d, p.xs.h, p.xs.w}};
  fill_offsets(plan, shared.x, offsets);
  auto pack_share = [&](int thread, int count) {
    const Range mine = share(panels, thread, count);
    for (int64_t i = mine.begin; i < mine.end; ++i) pack<T>(plan, a, packed, i);
  };
  // A second region costs more than packing a small weight alone.
  const bool pack_together = panels * plan.panel_size() > (64 << 10) / 4 && threads > 1;
  if (pack_together)
    parallel(threads, [&](int thread, int count) { pack_share(thread, count); });
  else
    pack_share(0, 1);
  parallel(static_cast<int>(least(threads, plan.jobs())), [&](int thread, int count) {
    const int64_t activated = keeps_activated(p) ? plan.sums_count : 0;
    Work work;
    work.sums = scratch_floats(Slot::rows, plan.sums_count + activated + plan.row_count);
    work.activated = work.sums + plan.sums_count;
    work.row = work.activated + activated;
    work.copy = plan.copies ? scratch_floats(Slot::tiles, plan.copy_count) : nullptr;
    const Range mine = share(plan.jobs(), thread, count);
    for (int64_t job = mine.begin; job < mine.end; ++job) run_job<T>(plan, a, shared, job, work);
  });
}

void direct(const ConvPool& p, const ConvPoolForward& a) {
  p.dtype == INTERFUSE_FLOAT32 ? forward<float>(p, a) : forward<uint16_t>(p, a);
}

}  // namespace

void conv_pool_winograd(const ConvPool&, const ConvPoolForward&);
void conv_pool_backward(const ConvPool&, const ConvPoolBackward&);

extern const ConvPoolKernels conv_pool_kernels;
const ConvPoolKernels conv_pool_kernels = {direct, conv_pool_winograd, conv_pool_backward};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
