// Products of float32 matrices on the processor's matrix units (AMX), which multiply bfloat16 and add up in float32, at
// sixteen times the rate of the vector units. Per-ISA (see simd.h); INTERFUSE_SPLIT_PRODUCT says whether it is there.
//
// A float's 24 significant bits are cut into three of eight, each a bfloat16: x = high + middle + low, exactly. Six of
// the nine products of pieces are added up; the three left out are below 2^-24 of the result together, what rounding it
// costs. Numbers under 2^-110 lose bits of their pieces. An infinity or a NaN gives a NaN in some piece, so whoever
// multiplies looks at the results and computes those that are not finite again in another way.
//
// One factor is cut once and kept ("kept"), in panels of sixteen of its rows or columns. The other one passes by
// ("streamed"): the vector units cut the next part of it while the matrix units multiply this one.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"
#include "common/transpose.h"

#if defined(__AVX512BW__) && defined(__linux__)
#define INTERFUSE_SPLIT_PRODUCT 1

namespace interfuse {
namespace INTERFUSE_ISA {
namespace split {

constexpr int64_t kSide = 16;            // rows and columns of a tile
constexpr int64_t kDepth = 32;           // a step: what one instruction adds up
constexpr int64_t kTile = kSide * kDepth;  // bfloat16 numbers; 1 KiB
constexpr int64_t kStep = 3 * kTile;     // a panel's step: a tile of each piece
constexpr int64_t kSteps = 4;            // added up by the matrix units before their sums join the rest
constexpr int64_t kWide = 2 * kSide;     // two panels of either factor make four tiles of sums
constexpr int64_t kPanel = kSteps * kStep;       // streamed at a time
constexpr int64_t kStreamed = 4 * kPanel;        // two panels that are multiplied and two that are being cut
constexpr int64_t kSums = kWide * kWide;
// Bytes of the kept factor that stay in the second-level cache; in parts, the streamed one comes from further away each time
// and takes more room beside it.
constexpr int64_t kKept = 768 << 10, kKeptInParts = 384 << 10;

INTERFUSE_INLINE int64_t steps_of(int64_t depth) { return divide_up(depth, kDepth); }
INTERFUSE_INLINE int64_t panels_of(int64_t count) { return divide_up(count, kWide) * 2; }

struct Shapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The registers' shapes, for as long as it lives: a thread that is switched away saves and restores 8 KiB meanwhile.
class Tiles {
 public:
  INTERFUSE_INLINE explicit Tiles(const Shapes& shapes = {}) {
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  INTERFUSE_INLINE ~Tiles() { asm volatile("tilerelease" ::); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

struct Pieces {
  __m512i bits[3];  // in the upper halves of the lanes
};

INTERFUSE_INLINE Pieces pieces(Vec x) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  Pieces p;
  p.bits[0] = _mm512_and_si512((__m512i)x, upper);
  const Vec rest = x - (Vec)p.bits[0];
  p.bits[1] = _mm512_and_si512((__m512i)rest, upper);
  p.bits[2] = (__m512i)(rest - (Vec)p.bits[1]);
  return p;
}

// 32 numbers along the depth, one row of each piece's tile.
INTERFUSE_INLINE void store_along(const Pieces& a, const Pieces& b, uint16_t* to) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper = _mm512_load_si512(kUpper);
  for (int i = 0; i < 3; ++i)
    _mm512_store_si512(to + i * kTile, _mm512_permutex2var_epi16(a.bits[i], upper, b.bits[i]));
}
INTERFUSE_INLINE void cut_along(Vec first, Vec second, uint16_t* to) { store_along(pieces(first), pieces(second), to); }

// What there is of 32 numbers when `left` are left, perhaps none, and zeros for the others.
template <class T>
INTERFUSE_INLINE void cut_some(const T* from, int64_t left, uint16_t* to, float factor = 1) {
  cut_along(load_some(from, left) * factor, left > kLanes ? load_some(from + kLanes, left - kLanes) * factor : zero(), to);
}

// All of a kept factor's rows, as panels; those from `rows` to `high` become zeros.
INTERFUSE_INLINE void cut_rows(const float* from, int64_t stride, int64_t rows, int64_t high, int64_t depth, uint16_t* to,
                               float factor = 1) {
  const int64_t steps = steps_of(depth);
  for (int64_t r = 0; r < high; ++r)
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t left = r < rows ? depth - step * kDepth : 0;
      uint16_t* const line = to + (r / kSide * steps + step) * kStep + r % kSide * kDepth;
      cut_some(from + (left ? r * stride + step * kDepth : 0), left, line, factor);
    }
}

// Two neighbours in depth, sixteen numbers across: the second factor has them in pairs.
INTERFUSE_INLINE void store_across(const Pieces& a, const Pieces& b, uint16_t* to) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int i = 0; i < 3; ++i)
    _mm512_store_si512(to + i * kTile, _mm512_or_si512(_mm512_srli_epi32(a.bits[i], 16), _mm512_and_si512(b.bits[i], upper)));
}
INTERFUSE_INLINE void cut_across(Vec first, Vec second, uint16_t* to) { store_across(pieces(first), pieces(second), to); }

// A step of a panel cut along turned into one of the second factor's: its pairs, transposed.
INTERFUSE_INLINE void turn(uint16_t* step) {
  for (int i = 0; i < 3; ++i) {
    float* const tile = reinterpret_cast<float*>(step + i * kTile);
    Vec rows[kLanes];
    for (int r = 0; r < kLanes; ++r) rows[r] = load(tile + r * kLanes);
    transpose(rows);
    for (int r = 0; r < kLanes; ++r) store(tile + r * kLanes, rows[r]);
  }
}

// The four tiles of sums that the matrix units hold: panel i of a times panel j of b in number 2 i + j.
INTERFUSE_INLINE void clear_sums() {
  asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
}
INTERFUSE_INLINE void load_sums(const float* sums) {
  asm volatile("tileloadd (%0,%1,1), %%tmm0\n\ttileloadd (%2,%1,1), %%tmm1\n\t"
               "tileloadd (%3,%1,1), %%tmm2\n\ttileloadd (%4,%1,1), %%tmm3" ::"r"(sums),
               "r"(int64_t(64)), "r"(sums + kSide * kSide), "r"(sums + 2 * kSide * kSide), "r"(sums + 3 * kSide * kSide)
               : "memory");
}
INTERFUSE_INLINE void store_sums(float* sums) {
  asm volatile("tilestored %%tmm0, (%0,%1,1)\n\ttilestored %%tmm1, (%2,%1,1)\n\t"
               "tilestored %%tmm2, (%3,%1,1)\n\ttilestored %%tmm3, (%4,%1,1)" ::"r"(sums),
               "r"(int64_t(64)), "r"(sums + kSide * kSide), "r"(sums + 2 * kSide * kSide), "r"(sums + 3 * kSide * kSide)
               : "memory");
}

// Adds one step. work() is called six times.
template <class Work>
INTERFUSE_INLINE void multiply_step(const uint16_t* a, int64_t a_panel, const uint16_t* b, int64_t b_panel, Work&& work) {
#define INTERFUSE_TILES(first, second, panel, from)                                            \
  asm volatile("tileloadd (%0,%2,1), %%tmm" #first "\n\ttileloadd (%1,%2,1), %%tmm" #second ::"r"(from), \
               "r"((from) + (panel)), "r"(int64_t(64)))
#define INTERFUSE_MULTIPLY()                                                            \
  asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t" \
               "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::)
  INTERFUSE_TILES(4, 5, a_panel, a);
  INTERFUSE_TILES(6, 7, b_panel, b + 2 * kTile);
  INTERFUSE_MULTIPLY();
  work();
  INTERFUSE_TILES(6, 7, b_panel, b + kTile);
  INTERFUSE_MULTIPLY();
  work();
  INTERFUSE_TILES(4, 5, a_panel, a + kTile);
  INTERFUSE_MULTIPLY();
  work();
  INTERFUSE_TILES(6, 7, b_panel, b);
  INTERFUSE_MULTIPLY();
  work();
  INTERFUSE_TILES(4, 5, a_panel, a);
  INTERFUSE_MULTIPLY();
  work();
  INTERFUSE_TILES(4, 5, a_panel, a + 2 * kTile);
  INTERFUSE_MULTIPLY();
  work();
#undef INTERFUSE_TILES
#undef INTERFUSE_MULTIPLY
}

// sums = two panels of a times two of b over `steps` steps.
template <class Work>
INTERFUSE_INLINE void multiply(const uint16_t* a, int64_t a_panel, const uint16_t* b, int64_t b_panel, int64_t steps,
                               float* sums, Work&& work) {
  clear_sums();
  for (int64_t s = 0; s < steps; ++s, a += kStep, b += kStep) multiply_step(a, a_panel, b, b_panel, work);
  store_sums(sums);
}

// sums[i] = the panel a, of at most sixteen lines, times the panel b[i] from its step `first` on: four of them. work() is
// called three times a step.
template <class Work>
INTERFUSE_INLINE void multiply_few(const uint16_t* a, const uint16_t* const* b, int64_t first, int64_t steps, float* sums,
                                   Work&& work) {
#define INTERFUSE_LOAD(tile, from) asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"(int64_t(64)))
#define INTERFUSE_ADD(piece, sum) "tdpbf16ps %%tmm7, %%tmm" #piece ", %%tmm" #sum "\n\t"
#define INTERFUSE_FOUR(piece, ADDED)                                             \
  INTERFUSE_LOAD(7, b[0] + at + (piece) * kTile); asm volatile(ADDED(0) ::);     \
  INTERFUSE_LOAD(7, b[1] + at + (piece) * kTile); asm volatile(ADDED(1) ::);     \
  INTERFUSE_LOAD(7, b[2] + at + (piece) * kTile); asm volatile(ADDED(2) ::);     \
  INTERFUSE_LOAD(7, b[3] + at + (piece) * kTile); asm volatile(ADDED(3) ::)
#define INTERFUSE_LOW(sum) INTERFUSE_ADD(4, sum)
#define INTERFUSE_MIDDLE(sum) INTERFUSE_ADD(5, sum) INTERFUSE_ADD(4, sum)
#define INTERFUSE_HIGH(sum) INTERFUSE_ADD(6, sum) INTERFUSE_ADD(5, sum) INTERFUSE_ADD(4, sum)
  clear_sums();
  for (int64_t s = 0; s < steps; ++s, a += kStep) {
    const int64_t at = (first + s) * kStep;
    INTERFUSE_LOAD(4, a);
    INTERFUSE_LOAD(5, a + kTile);
    INTERFUSE_LOAD(6, a + 2 * kTile);
    INTERFUSE_FOUR(2, INTERFUSE_LOW);
    work();
    INTERFUSE_FOUR(1, INTERFUSE_MIDDLE);
    work();
    INTERFUSE_FOUR(0, INTERFUSE_HIGH);
    work();
  }
  store_sums(sums);
#undef INTERFUSE_LOAD
#undef INTERFUSE_ADD
#undef INTERFUSE_FOUR
#undef INTERFUSE_LOW
#undef INTERFUSE_MIDDLE
#undef INTERFUSE_HIGH
}

struct Product {
  const uint16_t* kept;  // panels, `steps` steps each; of multiply_in_turn, part()
  int64_t steps;
  Range pairs;      // of the kept factor's panels
  Range blocks;     // of the streamed factor's rows or columns, 32 each
  uint16_t* streamed;  // room for kStreamed numbers
  float* sums;         // and for room_for_sums()
  // Steps of the kept panels that stay in the cache while the streamed factor passes.
  int64_t part() const {
    const int64_t step = (pairs.end - pairs.begin) * 4 * kStep;
    return steps * step <= kKept ? steps : greatest(kKeptInParts / step / kSteps * kSteps, kSteps);
  }
  bool in_parts() const { return steps > part(); }
  // In parts, all sums wait for the next part.
  int64_t room_for_sums() const { return ((pairs.end - pairs.begin) * (in_parts() ? blocks.end - blocks.begin : 1) + 1) * kSums; }
};

// sums = or += fresh ones.
INTERFUSE_INLINE void join_sums(float* sums, const float* fresh, bool first) {
  if (first)
    for (int64_t i = 0; i < kSums; i += kLanes) store(sums + i, load(fresh + i));
  else
    for (int64_t i = 0; i < kSums; i += kLanes) store(sums + i, load(sums + i) + load(fresh + i));
}

// Where in the streamed factor: the part of the depth, the block of rows or columns, the step.
struct Place {
  int64_t part, block, step;
};

// The place `steps` further on: along the depth of a part, then the next block, then the next part.
INTERFUSE_INLINE Place after(const Product& p, int64_t part, Place at, int64_t steps) {
  at.step += steps;
  if (at.step < least(at.part + part, p.steps)) return at;
  if (++at.block == p.blocks.end) at.part += part, at.block = p.blocks.begin;
  at.step = at.part;
  return at;
}

// One pair of kept panels: each step is multiplied once only, so the next one is cut meanwhile, and both fit in the
// first-level cache beside what passes through it.
template <bool StreamedFirst, bool InTurn, class Cut, class Take, class Keep>
INTERFUSE_INLINE void multiply_pair(const Product& p, int64_t part, Cut&& cut, Take&& take, Keep&& keep) {
  const int64_t kept_steps = InTurn ? part : p.steps;
  constexpr int64_t kLines = (kWide - 1) / 6 + 1;
  float* const fresh = p.sums + p.room_for_sums() - kSums;
  uint16_t *now = p.streamed, *later = p.streamed + 2 * kStep;
  const auto cut_lines = [&](const Place& at, int64_t& line, int64_t lines, uint16_t* to) __attribute__((always_inline)) {
    for (; lines > 0 && line < kWide; --lines, ++line)
      cut(at.block, at.step, 1, line, to + line / kSide * kStep + line % kSide * kDepth);
  };
  Place at{0, p.blocks.begin, 0};
  int64_t line = 0, held = 0;
  cut_lines(at, line, kWide, now);
  while (at.part < p.steps) {
    const Place next = after(p, part, at, 1);
    line = next.part < p.steps ? 0 : kWide;
    if (InTurn && at.block == p.blocks.begin && at.step == at.part) keep(at.part, least(part, p.steps - at.part));
    if (held == 0) clear_sums();
    const uint16_t* const kept = p.kept + (p.pairs.begin * 2 * kept_steps + at.step - (InTurn ? at.part : 0)) * kStep;
    const auto work = [&]() __attribute__((always_inline)) { cut_lines(next, line, kLines, later); };
    if constexpr (StreamedFirst) multiply_step(now, kStep, kept, kept_steps * kStep, work);
    else multiply_step(kept, kept_steps * kStep, now, kStep, work);
    const bool last = at.step + 1 == p.steps;
    // The same sums as multiply_all makes: of the first two times kSteps one.
    const bool full = (at.step + 1) % kSteps == 0 && at.step + 1 != kSteps;
    ++held;
    if (full || last || next.block != at.block || next.part != at.part) {
      store_sums(fresh);
      float* const sums = p.sums + (p.in_parts() ? at.block - p.blocks.begin : 0) * kSums;
      join_sums(sums, fresh, at.step < held);
      held = 0;
      if (last) take(at.block, p.pairs.begin, sums);
    }
    uint16_t* const other = now;
    now = later, later = other;
    at = next;
  }
}

template <bool StreamedFirst, bool InTurn, class Cut, class Take, class Keep>
INTERFUSE_INLINE void multiply_parts(const Product& p, Cut&& cut, Take&& take, Keep&& keep) {
  const int64_t pairs = p.pairs.end - p.pairs.begin, blocks = p.blocks.end - p.blocks.begin, part = p.part();
  if (pairs <= 0 || blocks <= 0) return;
  const Tiles tiles;
  if (pairs == 1) return multiply_pair<StreamedFirst, InTurn>(p, part, cut, take, keep);
  const int64_t kept_steps = InTurn ? part : p.steps;
  const bool in_parts = p.in_parts();
  float* const fresh = p.sums + p.room_for_sums() - kSums;
  const auto count_of = [&](const Place& at) { return least(least(at.part + part, p.steps) - at.step, kSteps); };
  const auto cut_lines = [&](const Place& at, int64_t count, int64_t& line, int64_t lines, uint16_t* to) __attribute__((always_inline)) {
    for (; lines > 0 && line < kWide; --lines, ++line)
      cut(at.block, at.step, count, line, to + line / kSide * kPanel + line % kSide * kDepth);
  };
  Place at{0, p.blocks.begin, 0};
  int64_t line = 0;
  cut_lines(at, count_of(at), line, kWide, p.streamed);
  uint16_t *now = p.streamed, *later = p.streamed + 2 * kPanel;
  while (at.part < p.steps) {
    const Place next = after(p, part, at, kSteps);
    const int64_t count = count_of(at), coming = next.part < p.steps ? count_of(next) : 0;
    const int64_t each = (kWide - 1) / (6 * count * pairs) + 1;
    // Of the first two times kSteps the matrix units make one sum.
    const bool first = at.step == 0, second = at.step == kSteps, last = at.step + count == p.steps;
    line = coming ? 0 : kWide;
    if (InTurn && at.block == p.blocks.begin && at.step == at.part) keep(at.part, least(part, p.steps - at.part));
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const uint16_t* kept = p.kept + ((p.pairs.begin + pair) * 2 * kept_steps + at.step - (InTurn ? at.part : 0)) * kStep;
      const uint16_t* streamed = now;
      float* const sums = p.sums + ((in_parts ? (at.block - p.blocks.begin) * pairs : 0) + pair) * kSums;
      const auto work = [&]() __attribute__((always_inline)) { cut_lines(next, coming, line, each, later); };
      second ? load_sums(sums) : clear_sums();
      for (int64_t s = 0; s < count; ++s, kept += kStep, streamed += kStep) {
        if constexpr (StreamedFirst) multiply_step(streamed, kPanel, kept, kept_steps * kStep, work);
        else multiply_step(kept, kept_steps * kStep, streamed, kPanel, work);
      }
      const bool joins = !first && !second;
      store_sums(joins ? fresh : sums);
      if (joins) join_sums(sums, fresh, false);
      if (last) take(at.block, p.pairs.begin + pair, sums);
    }
    cut_lines(next, coming, line, kWide, later);
    uint16_t* const other = now;
    now = later, later = other;
    at = next;
  }
}

// cut(block, step, count, line, to): line 0 to 31 of `count` steps of the streamed factor, kStep apart, as cut_along
// writes them.
// take(block, pair, sums): four tiles of results. StreamedFirst: the streamed factor gives the results' rows.
template <bool StreamedFirst, class Cut, class Take>
INTERFUSE_INLINE void multiply_all(const Product& p, Cut&& cut, Take&& take) {
  multiply_parts<StreamedFirst, false>(p, cut, take, [](int64_t, int64_t) __attribute__((always_inline)) {});
}

// The same, of a kept factor that is cut a part at a time, when it is multiplied, so that it need not leave the cache.
// keep(step, count): these steps of all its panels, part() steps each.
template <bool StreamedFirst, class Keep, class Cut, class Take>
INTERFUSE_INLINE void multiply_in_turn(const Product& p, Keep&& keep, Cut&& cut, Take&& take) {
  multiply_parts<StreamedFirst, true>(p, cut, take, keep);
}

// Whether all of these are finite; adds to `other` what only NaN and infinities leave.
INTERFUSE_INLINE void look(Vec v, IVec& other) { other |= (IVec)((v - v) != zero()); }
INTERFUSE_INLINE bool any(IVec lanes) { return _mm512_movepi32_mask((__m512i)lanes) != 0; }

}  // namespace split
}  // namespace INTERFUSE_ISA
}  // namespace interfuse

#endif
