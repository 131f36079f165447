// rnn's CUDA kernels behind their own entries, executed on the CPU.
#pragma once

#include "cuda/rnn_team.h"
#include "tests/emulate.h"

namespace interfuse_test {

extern emulate::Order emulated_order;

}  // namespace interfuse_test
