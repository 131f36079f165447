// The recurrent kernels in float32 whose products are TF32.
#include "cuda/rnn_launch.h"

namespace interfuse {
namespace cuda {
INTERFUSE_DEFINE_LAUNCHES(tf32, float)
}  // namespace cuda
}  // namespace interfuse
