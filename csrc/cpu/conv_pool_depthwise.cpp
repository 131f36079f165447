// The direct convolution of one channel by one filter (depthwise), with channels in a vector's lanes. There is no sum
// over channels, so each load of x serves one product: what counts is that x is read once, in whole vectors, whatever
// its layout. Compiled once per ISA.
//
// The outputs are cut into boxes and the channels into panels, whose sums are formed and finished a few rows at a time.
// Channels-last float32 is read in place; else what a box and a panel need of x is copied once, with the padding filled
// in, bfloat16 widened and NCHW transposed.
#include "common/conv_pool.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "common/transpose.h"
#include "cpu/conv_pool_channels.h"
#include "cpu/conv_pool_direct.h"
#include "cpu/conv_pool_pack.h"
#include "cpu/conv_pool_view.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// ---- the tile: neighbouring pixels of one vector of channels
// ---------------------------------------------------------

constexpr int kMostPixels = kRegisters >= 32 ? 14 : 8;

// sums[q * sums_step] = start + sum over k of x[q * step + offsets[k]] * weight[k * weight_step].
using DepthwiseTile = void (*)(const float* x, int64_t step, const int32_t* offsets, int64_t taps, const float* weight,
                               int64_t weight_step, const float* start, float* sums, int64_t sums_step);

template <int Pixels>
void depthwise_tile(const float* x, int64_t step, const int32_t* offsets, int64_t taps, const float* weight,
                    int64_t weight_step, const float* start, float* sums, int64_t sums_step) {
  Vec sum[Pixels];
#pragma GCC unroll 16
  for (int q = 0; q < Pixels; ++q) sum[q] = load(start);
  for (int64_t k = 0; k < taps; ++k) {
    const float* at = x + offsets[k];
    const Vec w = load(weight + k * weight_step);
#pragma GCC unroll 16
    for (int q = 0; q < Pixels; ++q) sum[q] = multiply_add(load(at + q * step), w, sum[q]);
  }
#pragma GCC unroll 16
  for (int q = 0; q < Pixels; ++q) store(sums + q * sums_step, sum[q]);
}

template <int Pixels>
constexpr DepthwiseTile tile_or_none() {
  if constexpr (Pixels <= kMostPixels)
    return depthwise_tile<Pixels>;
  else
    return nullptr;
}
constexpr DepthwiseTile kDepthwiseTiles[] = {
    nullptr,           tile_or_none<1>(), tile_or_none<2>(),  tile_or_none<3>(),  tile_or_none<4>(),
    tile_or_none<5>(), tile_or_none<6>(), tile_or_none<7>(),  tile_or_none<8>(),  tile_or_none<9>(),
    tile_or_none<10>(), tile_or_none<11>(), tile_or_none<12>(), tile_or_none<13>(), tile_or_none<14>()};

// ---- the plan -------------------------------------------------------------------------------------------------------

struct Plan {
  ConvPool p;
  ConvPool jobs;   // the same with the panels of channels in the place of the groups
  bool copies;
  int vectors;     // per panel
  int64_t taps;
  Cut cut;
  int64_t rows;    // output rows that are finished at a time
  Strides view;    // of x, or of the copy: [d][h][w][lanes]
  int64_t copy_count, sums_count, row_count;  // floats of working memory
  int64_t lanes() const { return vectors * kLanes; }
  int64_t panels() const { return jobs.groups; }
  int channels(int64_t panel) const { return static_cast<int>(least(lanes(), p.out_channels - panel * lanes())); }
};

constexpr int64_t kDepthwiseCopyBytes = 160 << 10, kDepthwiseSumsBytes = 16 << 10;

// Without the third dimension the taps that lie inside are neighbours in the order of the weights.
bool reads_in_place(const ConvPool& p) {
  const int64_t reach = (p.kernel.h - 1) * p.dilation.h * p.xs.h + (p.kernel.w - 1) * p.dilation.w * p.xs.w;
  return p.dtype == INTERFUSE_FLOAT32 && p.xs.c == 1 && p.out_channels % kLanes == 0 && p.kernel.d == 1 &&
         reach <= INT32_MAX;
}

Strides copy_strides(const Triple& in, int64_t lanes) { return {1, in.h * in.w * lanes, in.w * lanes, lanes}; }

Plan make_plan(const ConvPool& p, int threads) {
  Plan plan{};
  plan.p = plan.jobs = p;
  plan.copies = !reads_in_place(p);
  // In place whole pixels stream best, if that leaves panels to share out.
  const int64_t needed = divide_up(p.out_channels, kLanes);
  plan.vectors = static_cast<int>(least(needed, plan.copies ? 2 : needed <= 8 ? 8 : 4));
  plan.taps = p.kernel.volume();
  plan.jobs.groups = divide_up(p.out_channels, plan.lanes());
  auto input = [&](const Triple& outs) { return input_extents(p, conv_extents(p, outs)); };
  plan.cut = cut_outputs(plan.jobs, threads, 1, false, [&](const Triple& outs) {
    return input(outs).volume() * plan.lanes() * 4 <= kDepthwiseCopyBytes;
  });
  const Triple in = input(plan.cut.box);
  plan.view = plan.copies ? copy_strides(in, plan.lanes()) : Strides{1, p.xs.d, p.xs.h, p.xs.w};
  plan.copy_count = plan.copies ? in.volume() * plan.lanes() : 0;
  auto sums = [&](int64_t rows) { return conv_extents(p, {1, rows, plan.cut.box.w}).volume() * plan.lanes(); };
  plan.rows = 1;
  while (plan.rows < plan.cut.box.h && sums(plan.rows + 1) * 4 <= kDepthwiseSumsBytes) ++plan.rows;
  plan.sums_count = sums(plan.rows);
  plan.row_count = 3 * plan.cut.box.w * plan.lanes();
  return plan;
}

// ---- the copy -------------------------------------------------------------------------------------------------------

// `pixels` pixels of `channels` channels to [pixel][lanes]; the last vector's lanes without a channel become zero.
template <class T>
void copy_pixels(const T* from, int64_t channel_step, int64_t pixel_step, int64_t pixels, int channels, int64_t lanes,
                 float* to) {
  const int64_t vectors = divide_up(channels, kLanes);
  if (channel_step == 1) {
    for (int64_t i = 0; i < pixels; ++i, from += pixel_step, to += lanes)
      for (int v = 0; v < vectors; ++v) store(to + v * kLanes, load_some(from + v * kLanes, channels - v * kLanes));
    return;
  }
  for (int v = 0; v < vectors; ++v) {
    const int rows = static_cast<int>(least(kLanes, channels - v * kLanes));
    for (int64_t i = 0; i < pixels; i += kLanes) {
      const int count = static_cast<int>(least(kLanes, pixels - i));
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        const T* at = from + (v * kLanes + j) * channel_step + i * pixel_step;
        if (j >= rows) {
          block[j] = zero();
        } else if (pixel_step == 1) {
          block[j] = load_some(at, count);
        } else {
          float lane[kLanes] = {};
          for (int l = 0; l < count; ++l) lane[l] = to_float(at[l * pixel_step]);
          block[j] = load(lane);
        }
      }
      transpose(block);
      for (int j = 0; j < count; ++j) store(to + (i + j) * lanes + v * kLanes, block[j]);
    }
  }
}

// Positions [from, from + size) of one image; `x` is its first element of the panel's first channel.
template <class T>
void copy_panel(const Plan& plan, const T* x, const Triple& from, const Triple& size, int channels, float* to) {
  const ConvPool& p = plan.p;
  const int64_t lanes = plan.lanes();
  const Span span = span_of(from.w, size.w, p.in.w);
  for (int64_t d = 0; d < size.d; ++d)
    for (int64_t h = 0; h < size.h; ++h) {
      float* row = to + d * plan.view.d + h * plan.view.h;
      const int64_t xd = from.d + d, xh = from.h + h;
      if (xd < 0 || xd >= p.in.d || xh < 0 || xh >= p.in.h) {
        fill_zero(row, size.w * lanes);
        continue;
      }
      fill_zero(row, span.left * lanes);
      copy_pixels(x + xd * p.xs.d + xh * p.xs.h + (from.w + span.left) * p.xs.w, p.xs.c, p.xs.w, span.inside, channels,
                  lanes, row + span.left * lanes);
      fill_zero(row + (span.left + span.inside) * lanes, span.right * lanes);
    }
}

// ---- the drive ------------------------------------------------------------------------------------------------------

struct Shared {
  const float *packed, *bias;  // per panel: [tap][lane], and [lane]
  const int32_t* offsets;      // of the taps, in the copy
};

// The taps of one axis that meet the input, for the pixel whose first tap is at `from`.
INTERFUSE_INLINE Range taps_inside(int64_t from, int64_t taps, int64_t dilation, int64_t extent) {
  const int64_t begin = from < 0 ? least(taps, divide_up(-from, dilation)) : 0;
  return {begin, from < extent ? greatest(begin, least(taps, divide_up(extent - from, dilation))) : begin};
}

// One vector of channels of one row of pixels. `x`: the first tap of the first pixel.
struct Row {
  const float *x, *weight, *bias;
  float* sums;
  int64_t sums_step;
};

// Pixels [from, to) of the row, with `taps` taps from the first one on.
void run_tiles(const Plan& plan, const int32_t* offsets, int64_t first, int64_t taps, const Row& row, int64_t from,
               int64_t to) {
  const int64_t lanes = plan.lanes(), step = plan.p.stride.w * plan.view.w, width = to - from,
                tiles = divide_up(width, kMostPixels);
  for (int64_t t = 0, w = 0; t < tiles; ++t) {
    const int64_t next = (t + 1) * width / tiles;
    kDepthwiseTiles[next - w](row.x + (from + w) * step, step, offsets + first, taps, row.weight + first * lanes, lanes,
                              row.bias, row.sums + (from + w) * row.sums_step, row.sums_step);
    w = next;
  }
}

// In place: the taps that fall into the padding are left out, at the row's ends pixel by pixel.
void run_clipped(const Plan& plan, const int32_t* offsets, const Row& row, int64_t in_h, int64_t in_w, int64_t width) {
  const ConvPool& p = plan.p;
  const int64_t lanes = plan.lanes(), step = p.stride.w * plan.view.w;
  const Range rows = taps_inside(in_h, p.kernel.h, p.dilation.h, p.in.h);
  const auto across = [&](int64_t w) { return taps_inside(in_w + w * p.stride.w, p.kernel.w, p.dilation.w, p.in.w); };
  const auto whole = [&](int64_t w) { return across(w).begin == 0 && across(w).end == p.kernel.w; };
  int64_t left = 0, right = width;
  while (left < width && !whole(left)) ++left;
  while (right > left && !whole(right - 1)) --right;
  if (right > left)
    run_tiles(plan, offsets, rows.begin * p.kernel.w, (rows.end - rows.begin) * p.kernel.w, row, left, right);
  for (int64_t w = 0; w < width; ++w) {
    if (w == left) w = right;
    if (w == width) break;
    const Range taps = across(w);
    const float* start = row.bias;
    float* sums = row.sums + w * row.sums_step;
    store(sums, load(start));
    for (int64_t j = rows.begin; j < rows.end; ++j, start = sums) {
      const int64_t first = j * p.kernel.w + taps.begin;
      kDepthwiseTiles[1](row.x + w * step, 0, offsets + first, taps.end - taps.begin, row.weight + first * lanes, lanes,
                         start, sums, row.sums_step);
    }
  }
}

// Rows from `first` on. `x`: the first tap of the box's first pixel.
void convolve(const Plan& plan, const Shared& shared, int64_t panel, const float* x, const Sums& sums, int64_t first) {
  const ConvPool& p = plan.p;
  const Box& box = sums.box;
  const int64_t lanes = plan.lanes(), width = box.to.w - box.from.w;
  const Triple in = input_begin(p, box.from);
  for (int64_t d = box.from.d; d < box.to.d; ++d)
    for (int64_t h = first; h < box.to.h; ++h)
      for (int v = 0; v * kLanes < sums.lanes; ++v) {
        const int64_t down = (h - box.from.h) * p.stride.h;
        const Row row{x + (d - box.from.d) * p.stride.d * plan.view.d + down * plan.view.h + v * kLanes,
                      shared.packed + panel * plan.taps * lanes + v * kLanes, shared.bias + panel * lanes + v * kLanes,
                      sums.at(d, h, box.from.w) + v * kLanes, sums.lanes};
        if (plan.copies)
          run_tiles(plan, shared.offsets, 0, plan.taps, row, 0, width);
        else
          run_clipped(plan, shared.offsets, row, in.h + down, in.w, width);
      }
}

template <class T>
void run_job(const Plan& plan, const ConvPoolForward& a, const Shared& shared, const Job& job, float* copy,
             const PartsWork& work) {
  const ConvPool& p = plan.p;
  const int64_t begin = job.group * plan.lanes();
  const int channels = plan.channels(job.group);
  const Box conv = conv_box(p, job.out);
  const Triple from = input_begin(p, conv.from);
  const T* x = static_cast<const T*>(a.x) + job.image * p.xs.n + begin * p.xs.c;
  if (plan.copies) copy_panel(plan, x, from, input_extents(p, conv.size()), channels, copy);
  // In place means float32. The first tap may lie in the padding, where nothing is read.
  const float* first_tap =
      plan.copies ? copy : reinterpret_cast<const float*>(x) + from.d * p.xs.d + from.h * p.xs.h + from.w * p.xs.w;
  const Panel panel{job.image, begin, static_cast<int>(divide_up(channels, kLanes)), channels};
  finish_in_parts<T>(p, a, panel, job.out, plan.rows, true, work, [&](const Sums& sums, int64_t first) {
    convolve(plan, shared, job.group,
             first_tap + (sums.box.from.d - conv.from.d) * p.stride.d * plan.view.d +
                 (sums.box.from.h - conv.from.h) * p.stride.h * plan.view.h,
             sums, first);
  });
}

void fill_offsets(const Plan& plan, int32_t* offsets) {
  const ConvPool& p = plan.p;
  for (int64_t i = 0; i < p.kernel.d; ++i)
    for (int64_t j = 0; j < p.kernel.h; ++j)
      for (int64_t l = 0; l < p.kernel.w; ++l)
        *offsets++ = static_cast<int32_t>(i * p.dilation.d * plan.view.d + j * p.dilation.h * plan.view.h +
                                          l * p.dilation.w * plan.view.w);
}

template <class T>
void forward(const ConvPool& p, const ConvPoolForward& a, int threads) {
  const Plan plan = make_plan(p, threads);
  const int64_t lanes = plan.lanes(), panels = plan.panels();
  const int64_t offset_floats = divide_up(plan.taps, kLanes) * kLanes;
  float* memory = scratch_floats(Slot::pack, offset_floats + panels * (plan.taps + 1) * lanes);
  int32_t* offsets = reinterpret_cast<int32_t*>(memory);
  float* bias = memory + offset_floats;
  float* packed = bias + panels * lanes;
  fill_offsets(plan, offsets);
  for (int64_t i = 0; i < panels; ++i) {
    const T* from = a.bias ? static_cast<const T*>(a.bias) + i * lanes : nullptr;
    for (int64_t j = 0; j < lanes; ++j) bias[i * lanes + j] = from && j < plan.channels(i) ? to_float(from[j]) : 0.f;
    pack_panel({1, plan.taps, 1}, static_cast<const T*>(a.weight) + i * lanes * plan.taps, plan.vectors,
               plan.channels(i), packed + i * plan.taps * lanes);
  }
  const Shared shared{packed, bias, offsets};
  const int64_t jobs = plan.cut.jobs(plan.jobs);
  parallel(static_cast<int>(least(threads, jobs)), [&](int thread, int count) {
    const int64_t activated = keeps_activated(p) ? plan.sums_count : 0;
    PartsWork work;
    work.sums = scratch_floats(Slot::rows, plan.sums_count + activated + plan.row_count);
    work.activated = work.sums + plan.sums_count;
    work.row = work.activated + activated;
    float* copy = scratch_floats(Slot::tiles, plan.copy_count);
    const Range mine = share(jobs, thread, count);
    for (int64_t job = mine.begin; job < mine.end; ++job)
      run_job<T>(plan, a, shared, job_at(plan.jobs, plan.cut, job), copy, work);
  });
}

}  // namespace

void conv_pool_depthwise(const ConvPool& p, const ConvPoolForward& a, int threads) {
  p.dtype == INTERFUSE_FLOAT32 ? forward<float>(p, a, threads) : forward<uint16_t>(p, a, threads);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
