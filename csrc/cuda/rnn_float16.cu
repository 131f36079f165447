// The recurrent kernels in float16.
#include "cuda/rnn_launch.h"

namespace interfuse {
namespace cuda {
INTERFUSE_DEFINE_LAUNCHES(float16, Float16)
}  // namespace cuda
}  // namespace interfuse
