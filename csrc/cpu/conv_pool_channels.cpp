// The direct convolution with output channels in a vector's lanes. Compiled once per ISA.
//
// The outputs are cut into boxes. For each box and each panel of output channels the convolution's sums go to a small
// working memory, tile by tile, and are pooled, activated and stored from there while they are in cache.
#include "common/content_hash.h"
#include "common/conv_pool.h"
#include "common/pack_cache.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/conv_pool_channels.h"
#include "cpu/conv_pool_channels_tile.h"
#include "cpu/conv_pool_direct.h"
#include "cpu/conv_pool_pack.h"
#include "cpu/conv_pool_view.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// ---- the plan -------------------------------------------------------------------------------------------------------

struct Plan {
  ConvPool p;
  int64_t pixel_step;   // in x, from one pixel of the convolution to the next along w
  bool copies;          // x is read through a copy
  int vectors;          // per panel
  int64_t panels;       // per group
  int64_t depth_block;  // steps of the reduction whose weights stay in L1
  ReductionOrder order;
  Cut cut;
  int64_t rows;         // output rows that are finished at a time
  Strides view;         // of the copy, or of x
  int64_t copy_count, sums_count, row_count;  // floats of working memory
  int64_t panel_size() const { return order.depth() * vectors * kLanes; }
  bool one_block() const { return depth_block >= order.depth(); }
};

constexpr int64_t kWeightBytes = 20 << 10;  // of a block of weights: it stays in L1 beside what a tile reads of x
constexpr int64_t kCopyBytes = 320 << 10;   // of the copied part of x: half of a small L2 together with the sums
constexpr int64_t kSumsBytes = 160 << 10;
constexpr int64_t kNearBytes = 24 << 10;    // of the sums, where they can stay in L1
constexpr int64_t kMostPages = 128;         // that a tile reads from at a time: more than the TLB holds

// Cycles of one step of the reduction over a row, from measurements: products, then loads.
double row_cost(int64_t width, int vectors) {
  const int64_t tiles = tile_count(width, vectors), small = width / tiles, large = width % tiles;
  auto cost = [&](int64_t q) {
    return most_of(4, 0.5 * static_cast<double>(q * vectors), 0) + 0.1 * static_cast<double>(q + vectors);
  };
  return static_cast<double>(large) * cost(small + 1) + static_cast<double>(tiles - large) * cost(small);
}

double group_cost(const ConvPool& p, int vectors) {
  const int64_t needed = divide_up(p.group_out, kLanes), whole = needed / vectors, rest = needed % vectors;
  return static_cast<double>(whole) * row_cost(p.conv.w, vectors) +
         (rest ? row_cost(p.conv.w, static_cast<int>(rest)) : 0);
}

int choose_vectors(const ConvPool& p) {
  int best = 1;
  for (int v = 2; v <= kMostVectors; ++v)
    if (group_cost(p, v) < group_cost(p, best)) best = v;
  return best;
}

// In place where nothing has to be filled in or widened, every offset fits the table, and the channels of a tile do
// not all fall on the same few sets of the cache.
bool reads_in_place(const ConvPool& p) {
  if (padded(p) || p.dtype != INTERFUSE_FLOAT32) return false;
  const int64_t reach = (p.group_in - 1) * p.xs.c + (p.kernel.d - 1) * p.dilation.d * p.xs.d +
                        (p.kernel.h - 1) * p.dilation.h * p.xs.h + (p.kernel.w - 1) * p.dilation.w * p.xs.w;
  if (reach > INT32_MAX) return false;
  if (p.xs.c != 1 && p.group_in > kMostPages && p.xs.c * 4 >= 2048) return false;
  return p.xs.c == 1 || p.group_in < 8 || (p.xs.c * 4) % 4096 >= 64;
}

Strides copy_strides(const ConvPool& p, const Triple& conv) {
  const Triple in = input_extents(p, conv);
  Strides s;
  if (p.xs.c == 1) {
    s.c = 1, s.w = p.group_in;
    s.h = in.w * s.w, s.d = in.h * s.h;
    return s;
  }
  s.w = 1, s.h = in.w, s.d = in.h * s.h;
  s.c = (divide_up(in.d * s.d, 16) | 1) * 16;  // an odd number of lines: channels spread over the cache's sets
  return s;
}
int64_t copy_floats(const ConvPool& p, const Triple& conv) {
  const Strides s = copy_strides(p, conv);
  return p.xs.c == 1 ? input_extents(p, conv).d * s.d : p.group_in * s.c;
}

Plan make_plan(const ConvPool& problem, int threads, int64_t pixel_step) {
  Plan plan{};
  plan.p = problem;
  const ConvPool& p = plan.p;
  plan.copies = pixel_step == 0 && !reads_in_place(p);
  plan.order = {p.group_in, p.kernel.volume(), p.xs.c == 1 ? kLanes : 1, p.ws.c == 1};
  plan.vectors = choose_vectors(p);
  plan.panels = divide_up(p.group_out, plan.vectors * kLanes);
  const int lanes = plan.vectors * kLanes;
  const int64_t depth = plan.order.depth();
  plan.depth_block = divide_up(depth, divide_up(depth, kWeightBytes / (lanes * 4)));
  // Shares of the panels, not of the pixels, where there are few pixels and many weights.
  const bool heavy = p.group_out * depth > p.group_in * p.in.volume();
  plan.cut = cut_outputs(p, threads, plan.panels, heavy, [&](const Triple& outs) {
    const Triple conv = conv_extents(p, outs);
    // Rows of planes are stored whole; channels-last ones may as well be cut to where the sums stay near.
    if (p.channels_last && plan.one_block() && outs.h == 1 && conv.w * lanes * 4 > 2 * kNearBytes) return false;
    return copy_floats(p, conv) * 4 <= kCopyBytes && (plan.one_block() || conv.volume() * lanes * 4 <= kSumsBytes);
  });

  // With one block of weights the sums of a few rows are finished while they are in L1.
  plan.rows = plan.cut.box.h;
  if (plan.one_block()) {
    const Triple one = conv_extents(p, {1, 1, plan.cut.box.w});
    auto near = [&](int64_t rows) {
      return one.d * conv_extent(rows, p.window_stride.h, p.window.h, p.conv.h) * one.w * lanes * 4 <= kNearBytes;
    };
    plan.rows = 1;
    while (plan.rows < plan.cut.box.h && near(plan.rows + 1)) ++plan.rows;
  }
  const Triple conv = conv_extents(p, plan.cut.box);
  plan.copy_count = plan.copies ? copy_floats(p, conv) : 0;
  plan.view = plan.copies ? copy_strides(p, conv) : Strides{p.xs.c, p.xs.d, p.xs.h, p.xs.w};
  plan.pixel_step = pixel_step ? pixel_step : p.stride.w * plan.view.w;
  const Triple part = plan.one_block() ? conv_extents(p, {1, plan.rows, plan.cut.box.w}) : conv;
  plan.sums_count = part.volume() * lanes;
  plan.row_count = 3 * plan.cut.box.w * lanes;
  return plan;
}

// ---- the drive ------------------------------------------------------------------------------------------------------

struct Shared {
  const float* packed;     // panels of all groups
  const float* bias;
  const int32_t* offsets;  // of the steps of the reduction
};

// The working memory of a thread.
struct Work {
  float* copy;
  PartsWork parts;
};

// Sums of the convolution's pixels in `box`, rows [first, box.to.h) of it; earlier rows are there already.
void convolve(const Plan& plan, const Shared& shared, const float* origin, const float* packed, const float* bias,
              int vectors, const Sums& sums, int64_t first) {
  const ConvPool& p = plan.p;
  const Box& box = sums.box;
  const int lanes = vectors * kLanes;
  const int64_t depth = plan.order.depth(), width = box.to.w - box.from.w;
  const int64_t tiles = tile_count(width, vectors), small = width / tiles, large = width % tiles;
  const Tile big = kTiles[vectors - 1][large ? small + 1 : small], less = kTiles[vectors - 1][small];
  for (int64_t begin = 0; begin < depth; begin += plan.depth_block) {
    const int64_t steps = least(plan.depth_block, depth - begin);
    const float* weight = packed + begin * lanes;
    for (int64_t d = box.from.d; d < box.to.d; ++d)
      for (int64_t h = first; h < box.to.h; ++h) {
        const float* x =
            origin + (d - box.from.d) * p.stride.d * plan.view.d + (h - box.from.h) * p.stride.h * plan.view.h;
        float* to = sums.at(d, h, box.from.w);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t pixels = t < large ? small + 1 : small;
          const Tile run = t < large ? big : less;
          run(x, plan.pixel_step, shared.offsets + begin, steps, weight, begin ? to : bias, begin ? lanes : 0, to);
          x += pixels * plan.pixel_step, to += pixels * lanes;
        }
      }
  }
}

template <class T>
void run_job(const Plan& plan, const ConvPoolForward& a, const Shared& shared, const Job& job, const Work& work) {
  const ConvPool& p = plan.p;
  const Box conv = conv_box(p, job.out);
  const Triple from = input_begin(p, conv.from);
  const T* x = static_cast<const T*>(a.x) + job.image * p.xs.n + job.group * p.group_in * p.xs.c;
  const float* origin = work.copy;
  if (!plan.copies) {
    // In place means float32 without padding, so the pixels along w are pixel_step apart from the first one on.
    origin = reinterpret_cast<const float*>(x) + from.d * p.xs.d + from.h * p.xs.h + conv.from.w * plan.pixel_step;
  } else if (p.xs.c == 1) {
    copy_interleaved(p, x, from, input_extents(p, conv.size()), work.copy, plan.view);
  } else {
    copy_planar(p, x, from, input_extents(p, conv.size()), work.copy, {plan.view, 1, plan.view.h});
  }
  const Range panels = share(plan.panels, static_cast<int>(job.share), static_cast<int>(plan.cut.shares));
  for (int64_t i = panels.begin; i < panels.end; ++i) {
    const int64_t begin = i * plan.vectors * kLanes, channels = least(plan.vectors * kLanes, p.group_out - begin);
    const Panel panel{job.image, job.group * p.group_out + begin, static_cast<int>(divide_up(channels, kLanes)),
                      static_cast<int>(channels)};
    const int64_t which = job.group * plan.panels + i;
    finish_in_parts<T>(p, a, panel, job.out, plan.rows, plan.one_block(), work.parts,
                       [&](const Sums& sums, int64_t first) {
                         const float* at = origin + (sums.box.from.d - conv.from.d) * p.stride.d * plan.view.d +
                                           (sums.box.from.h - conv.from.h) * p.stride.h * plan.view.h;
                         convolve(plan, shared, at, shared.packed + which * plan.panel_size(),
                                  shared.bias + which * plan.vectors * kLanes, panel.vectors, sums, first);
                       });
  }
}

template <class T>
void pack(const Plan& plan, const ConvPoolForward& a, float* packed, int64_t which) {
  const ConvPool& p = plan.p;
  const int64_t begin = which % plan.panels * plan.vectors * kLanes, first = which / plan.panels * p.group_out + begin;
  const int64_t channels = least(plan.vectors * kLanes, p.group_out - begin);
  pack_panel(plan.order, static_cast<const T*>(a.weight) + first * plan.order.depth(),
             static_cast<int>(divide_up(channels, kLanes)), channels, packed + which * plan.panel_size());
}

// A small weight is packed for every call; looking for a pack of it would take as long.
constexpr int64_t kCachedFloats = 16 << 10;

struct PackJob {
  const Plan& plan;
  const ConvPoolForward& a;
  int threads;
};
template <class T>
void fill_pack(void* context, void* data) {
  const PackJob& job = *static_cast<const PackJob*>(context);
  parallel(job.threads, [&](int thread, int threads) {
    const Range mine = share(job.plan.panels * job.plan.p.groups, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) pack<T>(job.plan, job.a, static_cast<float*>(data), i);
  });
}

PackKey pack_key(const Plan& plan, const ConvPoolForward& a, int threads) {
  const ConvPool& p = plan.p;
  const int64_t bytes = p.out_channels * plan.order.depth() * (p.dtype == INTERFUSE_FLOAT32 ? 4 : 2);
  uint64_t kind = 0x6368616e6e656c73u + kLanes;
  const int64_t parts[] = {p.dtype,
                           p.groups,
                           p.group_out,
                           plan.vectors,
                           plan.order.channels,
                           plan.order.taps,
                           plan.order.channel_block,
                           plan.order.taps_outside};
  for (int64_t part : parts) kind = hash_mix(kind ^ static_cast<uint64_t>(part));
  return {a.weight, kind, content_hash(a.weight, bytes, threads)};
}

void fill_offsets(const Plan& plan, int32_t* offsets) {
  const ConvPool& p = plan.p;
  const Strides& s = plan.view;
  for (int64_t begin = 0; begin < p.group_in; begin += plan.order.channel_block) {
    const int64_t end = least(p.group_in, begin + plan.order.channel_block);
    for (int64_t i = 0; i < p.kernel.d; ++i)
      for (int64_t j = 0; j < p.kernel.h; ++j)
        for (int64_t l = 0; l < p.kernel.w; ++l)
          for (int64_t c = begin; c < end; ++c)
            *offsets++ = static_cast<int32_t>(c * s.c + i * p.dilation.d * s.d + j * p.dilation.h * s.h +
                                              l * p.dilation.w * s.w);
  }
}

template <class T>
void fill_bias(const Plan& plan, const ConvPoolForward& a, float* bias) {
  const ConvPool& p = plan.p;
  const T* from = static_cast<const T*>(a.bias);
  const int64_t step = plan.panels * plan.vectors * kLanes;
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t i = 0; i < step; ++i)
      bias[group * step + i] = from && i < p.group_out ? to_float(from[group * p.group_out + i]) : 0.f;
}

template <class T>
void run_jobs(const Plan& plan, const ConvPoolForward& a, const Shared& shared, int threads) {
  const ConvPool& p = plan.p;
  const int64_t jobs = plan.cut.jobs(p);
  parallel(static_cast<int>(least(threads, jobs)), [&](int thread, int count) {
    const int64_t activated = keeps_activated(p) ? plan.sums_count : 0;
    Work work;
    work.parts.sums = scratch_floats(Slot::rows, plan.sums_count + activated + plan.row_count);
    work.parts.activated = work.parts.sums + plan.sums_count;
    work.parts.row = work.parts.activated + activated;
    work.copy = plan.copies ? scratch_floats(Slot::tiles, plan.copy_count) : nullptr;
    const Range mine = share(jobs, thread, count);
    for (int64_t job = mine.begin; job < mine.end; ++job) run_job<T>(plan, a, shared, job_at(p, plan.cut, job), work);
  });
}

template <class T>
void forward(const ConvPool& problem, const ConvPoolForward& a, int threads, int64_t pixel_step) {
  const Plan plan = make_plan(problem, threads, pixel_step);
  const ConvPool& p = plan.p;
  const int64_t panels = plan.panels * p.groups, weight_floats = panels * plan.panel_size();
  const int64_t offset_floats = divide_up(plan.order.depth(), 16) * 16, bias_floats = panels * plan.vectors * kLanes;
  const bool cached = weight_floats > kCachedFloats;
  float* memory = scratch_floats(Slot::pack, offset_floats + bias_floats + (cached ? 0 : weight_floats));
  int32_t* offsets = reinterpret_cast<int32_t*>(memory);
  float* bias = memory + offset_floats;
  fill_offsets(plan, offsets);
  fill_bias<T>(plan, a, bias);
  if (cached) {
    PackJob job{plan, a, threads};
    const Pack weight(pack_key(plan, a, threads), static_cast<size_t>(weight_floats) * sizeof(float), fill_pack<T>,
                      &job);
    return run_jobs<T>(plan, a, {static_cast<const float*>(weight.data()), bias, offsets}, threads);
  }
  float* packed = bias + bias_floats;
  for (int64_t i = 0; i < panels; ++i) pack<T>(plan, a, packed, i);
  run_jobs<T>(plan, a, {packed, bias, offsets}, threads);
}

}  // namespace

void conv_pool_channels(const ConvPool& p, const ConvPoolForward& a, int threads, int64_t pixel_step) {
  p.dtype == INTERFUSE_FLOAT32 ? forward<float>(p, a, threads, pixel_step)
                               : forward<uint16_t>(p, a, threads, pixel_step);
}

double conv_pool_channels_cost(const ConvPool& p) { return group_cost(p, choose_vectors(p)); }

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
