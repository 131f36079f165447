// The recurrent kernels in float32 throughout.
#include "cuda/rnn_launch.h"

namespace interfuse {
namespace cuda {
INTERFUSE_DEFINE_LAUNCHES(float32, float)
}  // namespace cuda
}  // namespace interfuse
