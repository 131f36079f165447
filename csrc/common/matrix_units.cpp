#include "common/matrix_units.h"

#include <cstdlib>

#include "common/isa.h"

#if defined(INTERFUSE_HAVE_X86_ISAS) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace interfuse {
namespace {

bool detect() {
#if defined(INTERFUSE_HAVE_X86_ISAS) && defined(__linux__)
  if (chosen_isa() != Isa::avx512 || std::getenv("INTERFUSE_ISA")) return false;
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;  // of CPUID leaf 7's EDX
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBfloat16 | kTiles)) != (kBfloat16 | kTiles)) return false;
  constexpr unsigned kRounding = 1u << 5;  // of its subleaf 1's EAX: vectors rounded to bfloat16
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kRounding)) return false;
  // ARCH_REQ_XCOMP_PERM for the tiles' data; a Linux that does not know them refuses.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

}  // namespace

bool matrix_units() {
  static const bool usable = detect();
  return usable;
}

}  // namespace interfuse
