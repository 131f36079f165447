// Stands in for a device: rnn's launches run under emulate.h. Linked into the C++ tests, and with rnn's entries a library
// of its own, which the Python tests load in the CUDA library's place. Device pointers are then pointers.
#include "tests/emulated_rnn.h"

#include "cuda/rnn_kernel.h"

namespace interfuse_test {
emulate::Order emulated_order = emulate::Order::shuffled;
}

namespace interfuse {
namespace cuda {
namespace {

using interfuse_test::emulated_order;

template <class Kind, class Arrays, class Kernel>
void run(const RnnLaunch& given, const Arrays& arrays, Kernel kernel) {
  const RnnTeam& team = given.team;
  std::memset(given.workspace + team.flags_at(given.walk.directions), 0, static_cast<size_t>(team.flags_bytes()));
  emulate::launch_together(static_cast<unsigned>(team.teams * team.blocks()), static_cast<unsigned>(32 * team.warps()),
                           static_cast<unsigned>(team.cluster), emulated_order,
                           [&] { kernel(given.walk, team, arrays, given.workspace); });
}

template <class Kind, int kGates>
void run_of(const RnnLaunch& given, const RnnForwardArrays& arrays) {
  run<Kind>(given, arrays, given.team.column_tiles == 1 ? rnn_forward<Kind, kGates, 1> : rnn_forward<Kind, kGates, 2>);
}

template <class Kind, int kGates>
void run_of(const RnnLaunch& given, const RnnBackwardArrays& arrays) {
  run<Kind>(given, arrays, given.team.column_tiles == 1 ? rnn_backward<Kind, kGates, 1> : rnn_backward<Kind, kGates, 2>);
}

template <class Kind, class Arrays>
void launch(const RnnLaunch& given, bool backward, const void* w_hh, const Arrays& arrays) {
  const int64_t threads = given.walk.directions * given.team.fragments() * 32, block = 32 * kWarps;
  if (given.first(backward))
    emulate::launch({static_cast<unsigned>((threads + block - 1) / block), 1, 1}, static_cast<unsigned>(block),
                    emulated_order, [&] { rnn_pack<Kind>(given.walk, given.team, backward, w_hh, given.workspace); });
  if (given.walk.gates == 4) return run_of<Kind, 4>(given, arrays);
  if (given.walk.gates == 3) return run_of<Kind, 3>(given, arrays);
  run_of<Kind, 1>(given, arrays);
}

}  // namespace

INTERFUSE_DEFINE_LAUNCHES(bfloat16, BFloat16)
INTERFUSE_DEFINE_LAUNCHES(float16, Float16)
INTERFUSE_DEFINE_LAUNCHES(tf32, float)
INTERFUSE_DEFINE_LAUNCHES(float32, float)

// What an H200 says of itself.
interfuse_cuda_device current_device() { return {90, 132, 227 << 10}; }

}  // namespace cuda
}  // namespace interfuse

#if defined(INTERFUSE_EMULATED_LIBRARY)
extern "C" {
int32_t interfuse_cuda_devices(void) { return 1; }
const char* interfuse_cuda_last_error(void) { return interfuse_last_error(); }
}
#endif
