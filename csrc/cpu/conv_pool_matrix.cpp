// First layers (few input channels) with max pooling or none on the processor's matrix units, in float32 and with
// float32's error: see split_product.h for the pieces and their products. Compiled once per ISA.
//
// One factor is the weight, cut once: sixteen filters by 32 terms of the sum. The other is x. There a tile's lines are
// pairs of terms for sixteen neighbouring columns, and the terms of one slice of the kernel, (row, channel, column), must
// lie one pitch apart. So a strip of x is copied as lines of pairs: item j is row j / channels of channel
// j % channels, a line holds items j and j + 1 of the same column, once for every column of the kernel,
//
//   [piece][slice][parity of j][j / 2][column of the kernel][column]
//
// and the terms of a row of results start at item (row * channels): nothing is repeated per row of the kernel or per
// slice. Slices take turns in the copy, as results go along the depth.
//
// An infinity or a NaN gives a NaN in some piece, and so does what bfloat16 rounds to infinity; such images are done again
// by the direct kernel.
#include "common/content_hash.h"
#include "common/conv_pool.h"
#include "common/pack_cache.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/conv_pool_direct.h"
#include "cpu/split_product.h"

#if defined(INTERFUSE_SPLIT_PRODUCT)
#include "cpu/conv_pool_winograd_pool.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

using split::kDepth;
using split::kSide;
using split::kWide;

constexpr int kPieces = 3;
constexpr int64_t kPiece = split::kTile;                   // numbers of a tile
constexpr int64_t kStep = 2 * kPieces * kPiece;            // of a pair of panels' step
constexpr int64_t kSumsOfSlice = 4 * kSide * kSide;        // two panels of filters by two rows of columns
constexpr int64_t kStripWords = (int64_t(768) << 10) / 4;  // of x in pieces, in the second-level cache
constexpr double kWorkPerThread = 1e6;                     // multiply-adds worth waking a thread for
constexpr double kHalo = 0.5;                              // what a strip costs beside its rows, in units of two

struct Plan {
  int64_t chunks, steps, pairs;  // steps of a slice and of the whole sum, 32 terms each; pairs of panels of filters
  int64_t units, strips;         // of two rows of the convolution in a strip, at most; strips of an image
  int64_t all_units;             // of an image
  int64_t window, slices;        // slices of the convolution that are pooled together, of x that they see
  int64_t columns, blocks;       // words of a line, blocks of sixteen columns of the convolution
  int64_t parity, slice, piece;  // distances in the copy, in words
};


// Slices or rows of x that `count` neighbouring results see.
int64_t seen_slices(const ConvPool& p, int64_t count) { return count + (p.kernel.d - 1) * p.dilation.d; }
int64_t seen_rows(const ConvPool& p, int64_t units) { return 2 * units + p.kernel.h - 1; }

Plan make_plan(const ConvPool& p, int threads) {
  Plan plan{};
  const bool pooled = p.pool != INTERFUSE_POOL_NONE;
  plan.chunks = matrix_chunks(p);
  plan.steps = p.kernel.d * plan.chunks;
  plan.pairs = divide_up(p.group_out, kWide);
  plan.window = p.window.d;
  plan.slices = seen_slices(p, plan.window);
  plan.blocks = divide_up(pooled ? p.out.w * 2 : p.conv.w, kSide);
  plan.columns = (plan.blocks | 1) * kSide;  // an odd number of cache's lines: a tile's lines spread over its sets
  plan.all_units = pooled ? p.out.h : divide_up(p.conv.h, 2);
  // Items of a strip, and the zeros that fill the last tile.
  const auto parity = [&](int64_t units) {
    const int64_t copied = divide_up(seen_rows(p, units) * p.group_in, 2) * p.kernel.w;
    const int64_t read = (2 * units - 1) * p.group_in / 2 * p.kernel.w + plan.chunks * kSide;
    return greatest(copied, read) * plan.columns;
  };
  const int64_t parities = p.group_in % 2 ? 2 : 1;
  int64_t fitting = 1;
  while (fitting < plan.all_units && kPieces * plan.slices * parities * parity(fitting + 1) <= kStripWords) ++fitting;
  // Equal strips, whose number suits the threads.
  const int64_t fewest = divide_up(plan.all_units, fitting);
  double best = 0;
  for (int64_t strips = fewest; strips <= least(plan.all_units, fewest + 8); ++strips) {
    const double turns = static_cast<double>(divide_up(p.batch * strips, threads));
    const double cost = turns * (static_cast<double>(divide_up(plan.all_units, strips)) + kHalo);
    if (plan.strips == 0 || cost < best) best = cost, plan.strips = strips;
  }
  plan.units = divide_up(plan.all_units, plan.strips);
  plan.strips = divide_up(plan.all_units, plan.units);
  plan.parity = parity(plan.units);
  plan.slice = parities * plan.parity;
  plan.piece = plan.slices * plan.slice;
  return plan;
}

// ---- pieces -------------------------------------------------------------------------------------------------------

// Rounded to bfloat16, `first` in the lower half. Machines with matrix units have the instruction.
INTERFUSE_INLINE __m512i rounded(Vec first, Vec second) {
  __m512i both;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(first), "v"(second));
  return both;
}

// A line's words: pairs of pieces, the high ones first.
INTERFUSE_INLINE void cut_pairs(Vec first, Vec second, __m512i* words) {
  alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(kPairs);
  unrolled<kPieces>([&](int i) __attribute__((always_inline)) {
    words[i] = _mm512_maskz_permutexvar_epi16(0xffffffffu, pairs, rounded(first, second));  // GCC warns of the plain form
    first -= (Vec)((IVec)words[i] << 16);
    second -= (Vec)_mm512_and_si512(words[i], _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  });
}

// ---- the weight: [pair of panels][step][piece][panel][filter][term] -------------------------------------------------

struct PackJob {
  const ConvPool& p;
  const Plan& plan;
  const ConvPoolForward& a;
};

void fill_pack(void* context, void* data) {
  const PackJob& job = *static_cast<const PackJob*>(context);
  const ConvPool& p = job.p;
  const int64_t terms = job.plan.steps * kDepth;
  parallel(job.a.threads, [&](int thread, int threads) {
    float* const filter = scratch_floats(Slot::rows, terms);
    const Range mine = share(job.plan.pairs * kWide, thread, threads);
    for (int64_t k = mine.begin; k < mine.end; ++k) {
      memset(filter, 0, static_cast<size_t>(terms) * sizeof(float));
      const float* const from = static_cast<const float*>(job.a.weight) + k * p.group_in * p.kernel.volume();
      for (int64_t c = 0; k < p.group_out && c < p.group_in; ++c)
        for (int64_t tap = 0; tap < p.kernel.volume(); ++tap) {
          const int64_t d = tap / (p.kernel.h * p.kernel.w), h = tap / p.kernel.w % p.kernel.h, w = tap % p.kernel.w;
          const int64_t item = h * p.group_in + c, line = item / 2 * p.kernel.w + w;
          filter[(d * job.plan.chunks * kSide + line) * 2 + item % 2] = from[c * p.ws.c + tap * p.ws.tap];
        }
      uint16_t* to = static_cast<uint16_t*>(data) + k / kWide * job.plan.steps * kStep + k / kSide % 2 * kPiece +
                     k % kSide * kDepth;
      for (int64_t at = 0; at < terms; at += kDepth, to += kStep) {
        Vec first = load(filter + at), second = load(filter + at + kLanes);
        for (int i = 0; i < kPieces; ++i) {
          uint16_t* const piece = to + 2 * i * kPiece;
          _mm512_storeu_si512(piece, rounded(first, second));
          first -= load(piece), second -= load(piece + kLanes);
        }
      }
    }
  });
}

PackKey pack_key(const ConvPool& p, const ConvPoolForward& a) {
  uint64_t kind = 0x6d6174726978u + kLanes;
  for (int64_t part : {p.ws.c, p.group_in, p.group_out, p.kernel.d, p.kernel.h, p.kernel.w})
    kind = hash_mix(kind ^ static_cast<uint64_t>(part));
  return {a.weight, kind, content_hash(a.weight, p.out_channels * p.group_in * p.kernel.volume() * 4, a.threads)};
}

// ---- the strip of x -------------------------------------------------------------------------------------------------

struct Strip {
  int64_t image, begin, end;  // units of rows
  uint32_t* words;
  uint16_t* inside;           // of each vector of columns, which lie in the image
};

INTERFUSE_INLINE unsigned lanes_from_to(int64_t begin, int64_t end) {
  const int64_t low = least(greatest(begin, 0), kLanes), high = least(greatest(end, 0), kLanes);
  return ((1u << high) - 1u) & ~((1u << low) - 1u);
}

// Slice d of x, counted from the padding on.
void copy_slice(const ConvPool& p, const ConvPoolForward& a, const Plan& plan, const Strip& strip, int64_t d) {
  const int64_t items = seen_rows(p, strip.end - strip.begin) * p.group_in, step = p.group_in % 2 ? 1 : 2;
  const int64_t slice = d - p.pad_lo.d, kernel = p.kernel.w, first_row = strip.begin * 2 - p.pad_lo.h;
  const float* const x = static_cast<const float*>(a.x) + strip.image * p.xs.n + slice * p.xs.d - p.pad_lo.w;
  uint32_t* const to = strip.words + d % plan.slices * plan.slice;
  const auto row = [&](int64_t item, unsigned* lanes) __attribute__((always_inline)) {
    const int64_t h = first_row + item / p.group_in;
    const bool inside = item < items && slice >= 0 && slice < p.in.d && h >= 0 && h < p.in.h;
    *lanes = inside ? 0xffffu : 0;
    return x + item % p.group_in * p.xs.c + h * p.xs.h;
  };
  for (int64_t i = 0; i < items; i += step) {
    unsigned lanes, other_lanes;
    const float *const from = row(i, &lanes), *const other = row(i + 1, &other_lanes);
    uint32_t* const line = to + i % 2 * plan.parity + i / 2 * kernel * plan.columns;
    for (int64_t w = 0; w < plan.columns + kernel - 1; w += kLanes) {
      const unsigned inside = strip.inside[w / kLanes];
      __m512i words[kPieces];
      cut_pairs((Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes & inside), from + w),
                (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>(other_lanes & inside), other + w), words);
      const bool whole = w >= kernel - 1 && w + kLanes <= plan.columns;
      for (int64_t s = 0; s < kernel; ++s) {
        uint32_t* const place = line + s * plan.columns + w - s;
        if (whole)
          for (int i = 0; i < kPieces; ++i) _mm512_storeu_si512(place + i * plan.piece, words[i]);
        else {
          // What falls into the line of the kernel's column s.
          const auto own = static_cast<__mmask16>(lanes_from_to(s - w, plan.columns + s - w));
          for (int i = 0; i < kPieces; ++i) _mm512_mask_storeu_epi32(place + i * plan.piece, own, words[i]);
        }
      }
    }
  }
  // Lines of a tile beyond the kernel's count nothing, but must be finite.
  for (int64_t parity = 0; parity < 3 - step; ++parity) {
    const int64_t full = (items - parity + 1) / 2 * kernel * plan.columns;
    for (int i = 0; i < kPieces; ++i)
      memset(to + i * plan.piece + parity * plan.parity + full, 0, static_cast<size_t>(plan.parity - full) * 4);
  }
}

// ---- the products ---------------------------------------------------------------------------------------------------

// sums = two panels of filters times the sixteen columns at `first` and those at `second`, over all steps; offsets: where
// the kernel's slices begin.
void multiply(const ConvPool& p, const Plan& plan, const uint16_t* weight, const int64_t* offsets, const uint32_t* first,
              const uint32_t* second, float* sums) {
#define INTERFUSE_TILES(a, b, from, other, pitch) \
  asm volatile("tileloadd (%0,%2,1), %%tmm" #a "\n\ttileloadd (%1,%2,1), %%tmm" #b ::"r"(from), "r"(other), "r"(pitch))
#define INTERFUSE_WEIGHT(i) \
  INTERFUSE_TILES(4, 5, weight + 2 * (i) * kPiece, weight + (2 * (i) + 1) * kPiece, int64_t(64))
#define INTERFUSE_INPUT(i) INTERFUSE_TILES(6, 7, a + (i) * plan.piece, b + (i) * plan.piece, plan.columns * 4)
#define INTERFUSE_MULTIPLY()                                                              \
  asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t" \
               "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::)
  split::clear_sums();
  for (int64_t d = 0; d < p.kernel.d; ++d)
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk, weight += kStep) {
      const int64_t at = offsets[d] + chunk * kSide * plan.columns;
      const uint32_t *const a = first + at, *const b = second + at;
      INTERFUSE_WEIGHT(0);
      INTERFUSE_INPUT(2);
      INTERFUSE_MULTIPLY();
      INTERFUSE_INPUT(1);
      INTERFUSE_MULTIPLY();
      INTERFUSE_WEIGHT(1);
      INTERFUSE_MULTIPLY();
      INTERFUSE_INPUT(0);
      INTERFUSE_MULTIPLY();
      INTERFUSE_WEIGHT(0);
      INTERFUSE_MULTIPLY();
      INTERFUSE_WEIGHT(2);
      INTERFUSE_MULTIPLY();
    }
  split::store_sums(sums);
#undef INTERFUSE_TILES
#undef INTERFUSE_WEIGHT
#undef INTERFUSE_INPUT
#undef INTERFUSE_MULTIPLY
}

// ---- the outputs ----------------------------------------------------------------------------------------------------

struct Block {
  const ConvPool& p;
  const ConvPoolForward& a;
  const TileFinish& t;
  int64_t image, depth, unit, column;  // the slice of outputs, the two rows and the sixteen columns of the convolution
};

// Two filters at a time: eight windows of the first, eight of the second.
template <bool Index>
INTERFUSE_INLINE Vec finish_pooled(const Block& b, const float* sums, int64_t first_filter, Vec check) {
  alignas(64) static constexpr int32_t kEven[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const __m512i even = _mm512_load_si512(kEven), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const ConvPool& p = b.p;
  const float* const bias = static_cast<const float*>(b.a.bias);
  const int64_t plane = p.out.volume(), column = b.column / 2;
  const int64_t at = (b.depth * p.out.h + b.unit) * p.out.w + column;
  const unsigned inside = (1u << least(p.out.w - column, kLanes / 2)) - 1u;
  float* const y = static_cast<float*>(b.a.y);
  for (int64_t f = 0; f < least(kSide, p.group_out - first_filter); f += 2) {
    Winner best{};
    for (int64_t d = 0; d < p.window.d; ++d) {
      const float* const from = sums + d * kSumsOfSlice + f * kSide;
      Winner rows[2];
      unrolled<2>([&](int r) __attribute__((always_inline)) {
        const float* const row = from + r * kSide * kSide;
        const __m512 one = (__m512)load(row), other = (__m512)load(row + kSide);
        const Vec left = (Vec)_mm512_permutex2var_ps(one, even, other), right = (Vec)_mm512_permutex2var_ps(one, odd, other);
        check = finite_check(right, finite_check(left, check));
        rows[r] = better<Index>({left, IVec{}}, {right, IVec{}}, 1);
      });
      const Winner slice = better<Index>(rows[0], rows[1], 2);
      best = d == 0 ? slice : better<Index>(best, slice, 4);
    }
    const int64_t filter = first_filter + f;
    const bool two = filter + 1 < p.group_out;
    Vec value = best.value;
    if (bias) {
      const __m512 own = _mm512_set1_ps(bias[filter]), other = _mm512_set1_ps(bias[two ? filter + 1 : filter]);
      value += (Vec)_mm512_mask_blend_ps(0xff00, own, other);
    }
    value = activate_tile(b.t.f, value);
    const int64_t to = (b.image * p.out_channels + filter) * plane + at;
    const __mmask16 low = static_cast<__mmask16>(inside), high = static_cast<__mmask16>(two ? inside << 8 : 0);
    _mm512_mask_storeu_ps(y + to, low, (__m512)value);
    _mm512_mask_storeu_ps(y + to + plane - kLanes / 2, high, (__m512)value);
    if constexpr (Index) {
      const __m128i place = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)index_of(b.t, value, best.place));
      _mm_mask_storeu_epi8(b.a.index + to, low, place);
      _mm_mask_storeu_epi8(b.a.index + to + plane - kLanes / 2, high, place);
    }
  }
  return check;
}

INTERFUSE_INLINE Vec finish_rows(const Block& b, const float* sums, int64_t first_filter, Vec check) {
  const ConvPool& p = b.p;
  const float* const bias = static_cast<const float*>(b.a.bias);
  const int count = static_cast<int>(least(p.conv.w - b.column, kLanes));
  for (int64_t f = 0; f < least(kSide, p.group_out - first_filter); ++f) {
    const int64_t filter = first_filter + f;
    const Vec start = splat(bias ? bias[filter] : 0.f);
    for (int64_t r = 0; r < least(2, p.conv.h - b.unit * 2); ++r) {
      const Vec sum = load(sums + (r * kSide + f) * kSide);
      check = finite_check(sum, check);
      const int64_t row = ((b.image * p.out_channels + filter) * p.conv.d + b.depth) * p.conv.h + b.unit * 2 + r;
      store_first(static_cast<float*>(b.a.y) + row * p.conv.w + b.column, activate_tile(b.t.f, start + sum), count);
    }
  }
  return check;
}

// One slice of outputs of a strip.
template <Finish Kind, bool Index>
Vec run_slice(const ConvPool& p, const ConvPoolForward& a, const Plan& plan, const TileFinish& t, const uint16_t* weight,
              const Strip& strip, int64_t depth, Vec check) {
  alignas(64) float sums[2 * kSumsOfSlice];
  int64_t offsets[2][kMostMatrixSlices];
  for (int64_t i = 0; i < plan.window; ++i)
    for (int64_t d = 0; d < p.kernel.d; ++d)
      offsets[i][d] = (depth * plan.window + i + d * p.dilation.d) % plan.slices * plan.slice;
  const auto row = [&](int64_t h) __attribute__((always_inline)) {
    const int64_t item = h * p.group_in;
    return strip.words + item % 2 * plan.parity + item / 2 * p.kernel.w * plan.columns;
  };
  for (int64_t unit = strip.begin; unit < strip.end; ++unit) {
    const uint32_t *const first = row((unit - strip.begin) * 2), *const second = row((unit - strip.begin) * 2 + 1);
    for (int64_t column = 0; column < plan.blocks * kSide; column += kSide)
      for (int64_t pair = 0; pair < plan.pairs; ++pair) {
        for (int64_t i = 0; i < plan.window; ++i)
          multiply(p, plan, weight + pair * plan.steps * kStep, offsets[i], first + column, second + column,
                   sums + i * kSumsOfSlice);
        const Block to{p, a, t, strip.image, depth, unit, column};
        for (int64_t panel = 0; panel < 2; ++panel) {
          const float* const own = sums + panel * 2 * kSide * kSide;
          const int64_t filter = pair * kWide + panel * kSide;
          if constexpr (Kind == Finish::plain) check = finish_rows(to, own, filter, check);
          else check = finish_pooled<Index>(to, own, filter, check);
        }
      }
  }
  return check;
}

}  // namespace

void conv_pool_matrix(const ConvPool& p, const ConvPoolForward& call) {
  ConvPoolForward a = call;
  const double work = static_cast<double>(p.conv_count()) * static_cast<double>(p.group_in * p.kernel.volume());
  a.threads = static_cast<int>(least(a.threads, 1 + static_cast<int64_t>(work / kWorkPerThread)));
  const Plan plan = make_plan(p, a.threads);
  PackJob filling{p, plan, a};
  const Pack pack(pack_key(p, a), static_cast<size_t>(plan.pairs * plan.steps * kStep) * 2, fill_pack, &filling);
  const uint16_t* const weight = static_cast<const uint16_t*>(pack.data());
  uint8_t* const broken = static_cast<uint8_t*>(scratch(Slot::flags, static_cast<size_t>(p.batch)));
  memset(broken, 0, static_cast<size_t>(p.batch));
  const TileFinish t = tile_finish(p);
  const auto run = t.kind == Finish::plain ? run_slice<Finish::plain, false>
                   : t.index               ? run_slice<Finish::max2x2, true>
                                           : run_slice<Finish::max2x2, false>;
  parallel(a.threads, [&](int thread, int threads) {
    const int64_t vectors = plan.columns / kLanes + divide_up(p.kernel.w, kLanes);
    Strip strip{};
    strip.words = static_cast<uint32_t*>(scratch(Slot::tiles, static_cast<size_t>(kPieces * plan.piece) * 4));
    strip.inside = static_cast<uint16_t*>(scratch(Slot::rows, static_cast<size_t>(vectors) * 2));
    for (int64_t i = 0; i < vectors; ++i)
      strip.inside[i] = static_cast<uint16_t>(lanes_from_to(p.pad_lo.w - i * kLanes, p.in.w + p.pad_lo.w - i * kLanes));
    const split::Tiles tiles;
    const Range mine = share(p.batch * plan.strips, thread, threads);
    for (int64_t at = mine.begin; at < mine.end; ++at) {
      strip.image = at / plan.strips, strip.begin = at % plan.strips * plan.units;
      strip.end = least(strip.begin + plan.units, plan.all_units);
      int64_t copied = 0;
      Vec check = zero();
      for (int64_t depth = 0; depth < p.out.d; ++depth) {
        for (; copied < depth * plan.window + plan.slices; ++copied) copy_slice(p, a, plan, strip, copied);
        check = run(p, a, plan, t, weight, strip, depth, check);
      }
      if (any_nan(check, kLanes)) __atomic_store_n(broken + strip.image, uint8_t(1), __ATOMIC_RELAXED);
    }
  });
  redo_broken(p, call, broken);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#else

namespace interfuse {
namespace INTERFUSE_ISA {

void conv_pool_matrix(const ConvPool& p, const ConvPoolForward& a) { conv_pool_kernels.direct(p, a); }

}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#endif
