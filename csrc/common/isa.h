// Which compiled copy of the kernels runs on this machine.
#pragma once

namespace interfuse {

enum class Isa { baseline, avx2, avx512 };

Isa chosen_isa();  // decided at the first call: the best that was compiled, that the CPU has, and that INTERFUSE_ISA allows
const char* isa_name(Isa isa);

}  // namespace interfuse

// Declares `extern const Type name` in each ISA's namespace and picks(name) the one for this machine.
#if defined(INTERFUSE_HAVE_X86_ISAS)
#define INTERFUSE_FOR_EACH_ISA(DECLARE) DECLARE(baseline) DECLARE(avx2) DECLARE(avx512)
#define INTERFUSE_PICK(name)                                                                        \
  (::interfuse::chosen_isa() == ::interfuse::Isa::avx512 ? &::interfuse::avx512::name               \
                                                         : ::interfuse::chosen_isa() == ::interfuse::Isa::avx2 \
                                                               ? &::interfuse::avx2::name           \
                                                               : &::interfuse::baseline::name)
#else
#define INTERFUSE_FOR_EACH_ISA(DECLARE) DECLARE(baseline)
#define INTERFUSE_PICK(name) (&::interfuse::baseline::name)
#endif
