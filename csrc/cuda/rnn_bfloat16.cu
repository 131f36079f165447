// The recurrent kernels in bfloat16.
#include "cuda/rnn_launch.h"

namespace interfuse {
namespace cuda {
INTERFUSE_DEFINE(bfloat16, BFloat16)
}  // namespace cuda
}  // namespace interfuse
