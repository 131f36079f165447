#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "interfuse.h"

namespace interfuse {
namespace {

Isa detect() {
  Isa best = Isa::baseline;
#if defined(INTERFUSE_HAVE_X86_ISAS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Isa::avx512;
#endif
  const char* forced = std::getenv("INTERFUSE_ISA");
  if (forced)
    for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
      if (!std::strcmp(forced, isa_name(isa)) && isa < best) best = isa;
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

Isa chosen_isa() {
  static const Isa isa = detect();
  return isa;
}

}  // namespace interfuse

extern "C" const char* interfuse_isa(void) { return interfuse::isa_name(interfuse::chosen_isa()); }
extern "C" const char* interfuse_version(void) { return INTERFUSE_VERSION; }
