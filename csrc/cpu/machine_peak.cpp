// The two loops behind the measured machine peak. Compiled once per ISA.
#include "common/machine_peak.h"
#include "common/simd.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// Two units times a latency of four or five cycles: twelve chains keep them busy, and sixteen registers hold them.
constexpr int kChains = 12;

int64_t multiply_add_rounds(int64_t rounds, float* sink) {
  // Read through volatile, or the compiler would know the limit of a = a / 2 + 1 / 2.
  volatile float half = 0.5f;
  const Vec factor = splat(half), summand = splat(half);
  Vec chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = splat(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < kChains; ++i) chain[i] = multiply_add(chain[i], factor, summand);
  Vec total = zero();
  for (int i = 0; i < kChains; ++i) total += chain[i];
  *sink = sum_lanes(total);
  return rounds * kChains * kLanes * 2;
}

void read(const float* from, int64_t count, float* sink) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  for (int64_t at = 0; at + 4 * kLanes <= count; at += 4 * kLanes)
    for (int i = 0; i < 4; ++i) sums[i] += load(from + at + i * kLanes);
  *sink = sum_lanes(sums[0] + sums[1] + sums[2] + sums[3]);
}

}  // namespace

extern const PeakKernels peak_kernels;
const PeakKernels peak_kernels = {multiply_add_rounds, read};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
