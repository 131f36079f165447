// Whether this process may use the processor's matrix units (AMX with bfloat16).
#pragma once

namespace interfuse {

// Decided at the first call, which asks Linux for the permission that their large registers need. An INTERFUSE_ISA that
// names another instruction set leaves them alone.
bool matrix_units();

}  // namespace interfuse
