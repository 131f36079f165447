// The direct convolution with neighbouring columns in a vector's lanes: for few output channels (which would leave
// lanes empty the other way round: depthwise, small groups, first layers of small networks) and for short sums over
// wide images, where results in rows spare the transposition into NCHW. Compiled once per ISA.
#include "common/conv_pool.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "cpu/conv_pool_columns.h"
#include "cpu/conv_pool_direct.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// ---- the tile: rows x vectors of columns x channels -----------------------------------------------------------------

constexpr int kMostRows = 2, kMostChannels = 6, kMostColumnVectors = 4;
constexpr bool tile_fits(int rows, int vectors, int channels) {
  const int pixels = rows * vectors, kept = pixels < channels ? pixels : channels;
  return pixels * channels <= (kRegisters >= 32 ? 24 : 12) && pixels * channels + kept + 1 <= kRegisters;
}

// sums[channel][row][column] = bias + sum over k of x[row * row_step + offsets[k] + column] * weight[k][channel].
// The bias is the weight's first step.
using ColumnTile = void (*)(const float* x, int64_t row_step, const int32_t* offsets, int64_t depth,
                            const float* weight, float* sums, int64_t channel_step, int64_t pitch);

template <int Rows, int Vectors, int Channels>
void column_tile(const float* x, int64_t row_step, const int32_t* offsets, int64_t depth, const float* weight,
                 float* sums, int64_t channel_step, int64_t pitch) {
  constexpr int kPixels = Rows * Vectors;
  Vec sum[kPixels][Channels];
#pragma GCC unroll 16
  for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 16
    for (int m = 0; m < Channels; ++m) sum[i][m] = splat(weight[m]);
  weight += Channels;
  for (int64_t k = 0; k < depth; ++k, weight += Channels) {
    const float* at = x + offsets[k];
    if constexpr (kPixels >= Channels) {
      Vec w[Channels];
#pragma GCC unroll 16
      for (int m = 0; m < Channels; ++m) w[m] = splat(weight[m]);
#pragma GCC unroll 16
      for (int i = 0; i < kPixels; ++i) {
        const Vec v = load(at + i / Vectors * row_step + i % Vectors * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < Channels; ++m) sum[i][m] = multiply_add(v, w[m], sum[i][m]);
      }
    } else {
      Vec v[kPixels];
#pragma GCC unroll 16
      for (int i = 0; i < kPixels; ++i) v[i] = load(at + i / Vectors * row_step + i % Vectors * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < Channels; ++m) {
        const Vec w = splat(weight[m]);
#pragma GCC unroll 16
        for (int i = 0; i < kPixels; ++i) sum[i][m] = multiply_add(v[i], w, sum[i][m]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < Channels; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < kPixels; ++i)
      store(sums + m * channel_step + i / Vectors * pitch + i % Vectors * kLanes, sum[i][m]);
}

template <int Rows, int Vectors, int Channels>
constexpr ColumnTile column_tile_or_none() {
  if constexpr (tile_fits(Rows, Vectors, Channels))
    return column_tile<Rows, Vectors, Channels>;
  else
    return nullptr;
}
#define INTERFUSE_TILES(r, m)                                                                       \
  {                                                                                                 \
    column_tile_or_none<r, 1, m>(), column_tile_or_none<r, 2, m>(), column_tile_or_none<r, 3, m>(), \
        column_tile_or_none<r, 4, m>()                                                              \
  }
#define INTERFUSE_ALL_TILES(r)                                                                                         \
  {                                                                                                                    \
    INTERFUSE_TILES(r, 1), INTERFUSE_TILES(r, 2), INTERFUSE_TILES(r, 3), INTERFUSE_TILES(r, 4), INTERFUSE_TILES(r, 5), \
        INTERFUSE_TILES(r, 6)                                                                                          \
  }
constexpr ColumnTile kColumnTiles[kMostRows][kMostChannels][kMostColumnVectors] = {INTERFUSE_ALL_TILES(1),
                                                                                   INTERFUSE_ALL_TILES(2)};
#undef INTERFUSE_TILES
#undef INTERFUSE_ALL_TILES

int most_column_vectors(int rows, int channels) {
  int vectors = kMostColumnVectors;
  while (vectors > 1 && !tile_fits(rows, vectors, channels)) --vectors;
  return vectors;
}

// ---- the plan -------------------------------------------------------------------------------------------------------

struct Plan {
  ConvPool p;
  int64_t depth, blocks;  // steps of the reduction; blocks of output channels per group, as equal as they can be
  Cut cut;
  int64_t rows;           // output rows that are finished at a time
  PlanarCopy copy;
  int64_t copy_count, channel_step, row_count;  // floats of working memory
  Range channels(int64_t block) const { return share(p.group_out, static_cast<int>(block), static_cast<int>(blocks)); }
};

constexpr int64_t kColumnCopyBytes = 192 << 10, kColumnSumsBytes = 24 << 10;

INTERFUSE_INLINE int64_t vectors_of(int64_t columns) { return divide_up(columns, kLanes) * kLanes; }

PlanarCopy planar_copy(const ConvPool& p, const Triple& conv) {
  const Triple in = input_extents(p, conv);
  PlanarCopy copy;
  copy.phases = p.stride.w;
  // Whole vectors of columns from the last tap on.
  copy.pitch = vectors_of(conv.w) + (p.kernel.w - 1) * p.dilation.w / p.stride.w + 1;
  copy.s.w = 1;
  copy.s.h = copy.phases * copy.pitch;
  copy.s.d = in.h * copy.s.h;
  copy.s.c = (divide_up(in.d * copy.s.d, 16) | 1) * 16;  // an odd number of lines: channels spread over the cache's sets
  return copy;
}

Plan make_plan(const ConvPool& problem, int threads) {
  Plan plan{};
  plan.p = problem;
  const ConvPool& p = plan.p;
  plan.depth = p.group_in * p.kernel.volume();
  plan.blocks = divide_up(p.group_out, kMostChannels);
  plan.cut = cut_outputs(p, threads, plan.blocks, false, [&](const Triple& outs) {
    return planar_copy(p, conv_extents(p, outs)).s.c * p.group_in * 4 <= kColumnCopyBytes;
  });
  const Triple conv = conv_extents(p, plan.cut.box);
  plan.copy = planar_copy(p, conv);
  plan.copy_count = plan.copy.s.c * p.group_in + kLanes;
  const int64_t channels = divide_up(p.group_out, plan.blocks);
  auto sums = [&](int64_t rows) {
    const Triple part = conv_extents(p, {1, rows, plan.cut.box.w});
    return part.d * part.h * vectors_of(part.w);
  };
  plan.rows = 1;
  while (plan.rows < plan.cut.box.h && sums(plan.rows + 1) * channels * 4 <= kColumnSumsBytes) ++plan.rows;
  plan.channel_step = sums(plan.rows);
  plan.row_count = vectors_of(plan.cut.box.w) + kLanes;
  return plan;
}

// Floats behind the sums that the pooling's last vector may read.
int64_t slack(const ConvPool& p) { return kLanes * p.window_stride.w + p.window.w + kLanes; }

// ---- the drive ------------------------------------------------------------------------------------------------------

void fill_offsets(const Plan& plan, int32_t* offsets) {
  const ConvPool& p = plan.p;
  const Strides& s = plan.copy.s;
  for (int64_t c = 0; c < p.group_in; ++c)
    for (int64_t i = 0; i < p.kernel.d; ++i)
      for (int64_t j = 0; j < p.kernel.h; ++j)
        for (int64_t l = 0; l < p.kernel.w; ++l) {
          const int64_t w = l * p.dilation.w;
          *offsets++ = static_cast<int32_t>(c * s.c + i * p.dilation.d * s.d + j * p.dilation.h * s.h +
                                            w % plan.copy.phases * plan.copy.pitch + w / plan.copy.phases);
        }
}

// One group's weights as [block][bias, then k][channel].
template <class T>
void pack(const Plan& plan, const ConvPoolForward& a, int64_t group, float* packed) {
  const ConvPool& p = plan.p;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    const Range own = plan.channels(block);
    const T* weight = static_cast<const T*>(a.weight) + (group * p.group_out + own.begin) * plan.depth;
    const T* bias = a.bias ? static_cast<const T*>(a.bias) + group * p.group_out + own.begin : nullptr;
    const int64_t channels = own.end - own.begin;
    for (int64_t m = 0; m < channels; ++m) *packed++ = bias ? to_float(bias[m]) : 0.f;
    for (int64_t c = 0; c < p.group_in; ++c)
      for (int64_t tap = 0; tap < p.kernel.volume(); ++tap)
        for (int64_t m = 0; m < channels; ++m)
          *packed++ = to_float(weight[m * plan.depth + c * p.ws.c + tap * p.ws.tap]);
  }
}

struct Work {
  float *copy, *sums;
  ColumnScratch scratch;
};

void convolve(const Plan& plan, const int32_t* offsets, const float* origin, const float* weight, int channels,
              const Columns& sums, int64_t channel_step) {
  const ConvPool& p = plan.p;
  const Strides& s = plan.copy.s;
  const Box& box = sums.box;
  const int64_t vectors = sums.pitch / kLanes;
  for (int64_t d = box.from.d; d < box.to.d; ++d)
    for (int64_t h = box.from.h; h < box.to.h;) {
      const int rows = box.to.h - h >= 2 ? 2 : 1;
      const int wide = most_column_vectors(rows, channels);
      const float* x = origin + (d - box.from.d) * p.stride.d * s.d + (h - box.from.h) * p.stride.h * s.h;
      float* to = sums.row(d, h);
      const int64_t tiles = divide_up(vectors, wide);
      for (int64_t t = 0, v = 0; t < tiles; ++t) {
        const int64_t next = (t + 1) * vectors / tiles;
        kColumnTiles[rows - 1][channels - 1][next - v - 1](x + v * kLanes, p.stride.h * s.h, offsets, plan.depth,
                                                           weight, to + v * kLanes, channel_step, sums.pitch);
        v = next;
      }
      h += rows;
    }
}

template <class T>
void run_job(const Plan& plan, const ConvPoolForward& a, const float* packed, const int32_t* offsets, const Job& job,
             const Work& work) {
  const ConvPool& p = plan.p;
  const Box whole = conv_box(p, job.out);
  const Triple own = first_owned(p, job.out);
  const T* x = static_cast<const T*>(a.x) + job.image * p.xs.n + job.group * p.group_in * p.xs.c;
  copy_planar(p, x, input_begin(p, whole.from), input_extents(p, whole.size()), work.copy, plan.copy);
  const Range blocks = share(plan.blocks, static_cast<int>(job.share), static_cast<int>(plan.cut.shares));
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const Range mine = plan.channels(block);
    const int channels = static_cast<int>(mine.end - mine.begin);
    const float* weight = packed + (job.group * p.group_out + mine.begin) * (plan.depth + 1);
    Box part = job.out;
    for (int64_t d = job.out.from.d; d < job.out.to.d; ++d)
      for (int64_t h = job.out.from.h; h < job.out.to.h; h = part.to.h) {
        part.from.d = d, part.to.d = d + 1;
        part.from.h = h, part.to.h = least(job.out.to.h, h + plan.rows);
        Columns sums{work.sums, conv_box(p, part), 0};
        sums.pitch = vectors_of(sums.box.to.w - sums.box.from.w);
        const float* origin = work.copy + (sums.box.from.d - whole.from.d) * p.stride.d * plan.copy.s.d +
                              (sums.box.from.h - whole.from.h) * p.stride.h * plan.copy.s.h;
        convolve(plan, offsets, origin, weight, channels, sums, plan.channel_step);
        for (int m = 0; m < channels; ++m, sums.data += plan.channel_step)
          finish_columns<T>(p, a, job.image, job.group * p.group_out + mine.begin + m, sums, part, own, work.scratch);
      }
  }
}

template <class T>
void forward(const ConvPool& p, const ConvPoolForward& a, int threads) {
  const Plan plan = make_plan(p, threads);
  const int64_t offset_floats = vectors_of(plan.depth);
  float* memory = scratch_floats(Slot::pack, offset_floats + p.out_channels * (plan.depth + 1));
  int32_t* offsets = reinterpret_cast<int32_t*>(memory);
  float* packed = memory + offset_floats;
  fill_offsets(plan, offsets);
  for (int64_t group = 0; group < p.groups; ++group)
    pack<T>(plan, a, group, packed + group * p.group_out * (plan.depth + 1));
  const int64_t jobs = plan.cut.jobs(p);
  parallel(static_cast<int>(least(threads, jobs)), [&](int thread, int count) {
    const int64_t channels = divide_up(p.group_out, plan.blocks), activated = keeps_activated(p) ? plan.channel_step : 0;
    const int64_t sums = channels * plan.channel_step + slack(p);
    float* memory = scratch_floats(Slot::rows, sums + activated + slack(p) + 3 * plan.row_count);
    Work work;
    work.sums = memory;
    work.scratch.activated = memory + sums;
    work.scratch.value = work.scratch.activated + activated + slack(p);
    work.scratch.index = work.scratch.value + plan.row_count;
    work.scratch.pre = work.scratch.index + plan.row_count;
    work.copy = scratch_floats(Slot::tiles, plan.copy_count);
    const Range mine = share(jobs, thread, count);
    for (int64_t job = mine.begin; job < mine.end; ++job)
      run_job<T>(plan, a, packed, offsets, job_at(p, plan.cut, job), work);
  });
}

}  // namespace

void conv_pool_columns(const ConvPool& p, const ConvPoolForward& a, int threads) {
  p.dtype == INTERFUSE_FLOAT32 ? forward<float>(p, a, threads) : forward<uint16_t>(p, a, threads);
}

double conv_pool_columns_cost(const ConvPool& p) {
  const int64_t blocks = divide_up(p.group_out, kMostChannels);
  const int channels = static_cast<int>(divide_up(p.group_out, blocks)), rows = p.conv.h > 1 ? 2 : 1;
  const int64_t vectors = divide_up(p.conv.w, kLanes);
  const int64_t tiles = divide_up(vectors, most_column_vectors(rows, channels));
  const double pixels = static_cast<double>(rows) * static_cast<double>(vectors) / static_cast<double>(tiles);
  // A load of columns mostly straddles two lines of cache.
  const double products = 0.5 * pixels * channels, loads = 0.5 * (1.9 * pixels + channels);
  const double step = most_of(products, loads, 4.0) + 0.05 * (pixels + channels);
  // Into channels-last memory a row goes element by element, each to a line of its own.
  const double pooled = static_cast<double>(p.out.volume()) / static_cast<double>(p.conv.volume());
  const double scattered =
      p.channels_last && p.out_channels > 1 ? 2 * pooled * static_cast<double>(p.conv.w * p.group_out) : 0;
  return step * static_cast<double>(tiles * blocks) / rows +
         scattered / static_cast<double>(p.group_in * p.kernel.volume());
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
