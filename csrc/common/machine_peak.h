// What the machine can do at best, for the roofline that benchmarks stand beside: measured, not looked up.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace interfuse {

struct MachinePeak {
  double operations;  // float32 operations a second (a multiply-add is two)
  double bytes;       // bytes a second read from memory
};

// Takes about a third of a second and 256 MiB.
MachinePeak measure_machine_peak(int threads);

// What one instruction set offers: work that nothing but the arithmetic units, or the memory, holds up.
struct PeakKernels {
  int64_t (*multiply_add)(int64_t rounds, float* sink);           // returns the operations done
  void (*read)(const float* from, int64_t count, float* sink);
};

#define INTERFUSE_DECLARE(isa) \
  namespace isa {              \
  extern const PeakKernels peak_kernels; \
  }
INTERFUSE_FOR_EACH_ISA(INTERFUSE_DECLARE)
#undef INTERFUSE_DECLARE

}  // namespace interfuse
