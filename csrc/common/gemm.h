// The register tile that every matrix product here is made of, in float32. Per-ISA (see simd.h).
//
//   tile[r][v] = start(r, v) + sum over k of a(r, k) * b(k, v);   finish(r, v, tile[r][v])
//
// a is read one float at a time and broadcast, b is read as whole vectors. Rows x Vectors accumulators stay in
// registers over the whole depth, so a tile needs Rows * Vectors + Vectors + 1 registers. Two fused multiply-adds
// start per cycle and each takes four or five, so eight to ten accumulators hide the latency; more than that only
// save loads: a step costs Rows + Vectors loads for Rows * Vectors multiply-adds, and two loads start per cycle.
#pragma once

#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {

// Accumulators that fit beside a few vectors of b and one broadcast; without fused multiply-add the product needs a
// register too.
#if defined(__x86_64__) && !defined(__FMA__)
constexpr int kGemmAccumulators = 8;
#else
constexpr int kGemmAccumulators = kRegisters == 32 ? 24 : 12;
#endif

// The rows that fill the registers beside `vectors` (1 to 4) vectors of b: 24x1 12x2 8x3 6x4 with 32 registers,
// 12x1 6x2 4x3 3x4 with 16.
constexpr int gemm_tile_rows(int vectors) { return kGemmAccumulators / vectors; }

// Calls body with 0, 1, ... Count - 1, unrolled while the function is inlined: an array that is indexed by a loop
// variable at that point would be put in memory, not in registers.
template <int At, int Count, class Body>
INTERFUSE_INLINE void unrolled_from(Body&& body) {
  if constexpr (At < Count) {
    body(At);
    unrolled_from<At + 1, Count>(body);
  }
}
template <int Count, class Body>
INTERFUSE_INLINE void unrolled(Body&& body) {
  unrolled_from<0, Count>(body);
}

// a(r, k) lies at a[r * a_row + k * a_step], vector v of b(k) at b[k * b_step + v * kLanes]. Pass literals for a_row
// and a_step where they are known: the addresses then fold into the instructions.
// InOrder forbids the compiler to mix the steps: where a_row is large, GCC otherwise loads several steps' values ahead and
// spills accumulators.
template <int Rows, int Vectors, bool InOrder = false, class Start, class Finish>
INTERFUSE_INLINE void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                int64_t b_step, Start&& start, Finish&& finish) {
  Vec tile[Rows][Vectors];
  unrolled<Rows>([&](int r) __attribute__((always_inline)) {
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) { tile[r][v] = start(r, v); });
  });
  const auto step = [&](int64_t k) __attribute__((always_inline)) {
    Vec columns[Vectors];
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) { columns[v] = load(b + k * b_step + v * kLanes); });
    unrolled<Rows>([&](int r) __attribute__((always_inline)) {
      const Vec value = splat(a[r * a_row + k * a_step]);
      unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
        tile[r][v] = multiply_add(value, columns[v], tile[r][v]);
      });
    });
  };
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    unrolled<4>([&](int i) __attribute__((always_inline)) {
      step(i);
      if constexpr (InOrder) asm("" : "+r"(a), "+r"(b));
    });
    a += 4 * a_step, b += 4 * b_step;
    // The compiler must not see that the next step's loads follow from this one's: GCC would start them early, in
    // registers that the tile needs, and spill.
    asm("" : "+r"(a), "+r"(b));
  }
  for (; k < depth; ++k) {
    step(0);
    a += a_step, b += b_step;
  }
  unrolled<Rows>([&](int r) __attribute__((always_inline)) {
    unrolled<Vectors>([&](int v) __attribute__((always_inline)) { finish(r, v, tile[r][v]); });
  });
}

// The plain form: c[r][v] = or += the product; rows of c are c_row floats apart.
template <int Rows, int Vectors, bool Add, bool InOrder = false>
INTERFUSE_INLINE void gemm_tile_store(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
                                      int64_t b_step, float* c, int64_t c_row) {
  gemm_tile<Rows, Vectors, InOrder>(
      depth, a, a_row, a_step, b, b_step,
      [&](int r, int v) __attribute__((always_inline)) { return Add ? load(c + r * c_row + v * kLanes) : zero(); },
      [&](int r, int v, Vec sum) __attribute__((always_inline)) { store(c + r * c_row + v * kLanes, sum); });
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
