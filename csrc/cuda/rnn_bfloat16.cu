// The recurrent kernels in bfloat16.
#include "cuda/rnn_launch.h"

namespace interfuse {
namespace cuda {
INTERFUSE_DEFINE_LAUNCHES(bfloat16, BFloat16)
}  // namespace cuda
}  // namespace interfuse
