// When the matrix units take a conv_pool problem. Compiled once: nothing here depends on the instruction set.
#include "common/conv_pool.h"
#include "common/matrix_units.h"

namespace interfuse {
namespace {

constexpr int64_t kSide = 16, kDepth = 32;  // of the units' tiles: filters or columns, terms of a sum
constexpr int64_t kMostChannels = 8;
constexpr int64_t kMostSteps = 64;          // the weight's pieces, 6 KiB a step and 32 filters, stay in a cache
// Of the units' work, what is not spent on zeros. (Measured: a video of one channel, with 0.28, takes 1.25 times as long
// as on the vector units.)
constexpr double kLeastUse = 0.3;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

double use(const ConvPool& p) {
  const double sum = static_cast<double>(p.group_in * p.kernel.h * p.kernel.w) / (matrix_chunks(p) * kDepth);
  const double filters = static_cast<double>(p.group_out) / round_up(p.group_out, 2 * kSide);
  return sum * filters * static_cast<double>(p.conv.w) / round_up(p.conv.w, kSide);
}

}  // namespace

int64_t matrix_chunks(const ConvPool& p) {
  return round_up((p.group_in * p.kernel.h + 1) / 2 * p.kernel.w, kSide) / kSide;
}

std::string matrix_why_not(const ConvPool& p) {
  if (!matrix_units()) return "this processor has no matrix units for bfloat16, or INTERFUSE_ISA forbids them.";
  if (p.highest) return "the precision is 'highest', which allows float32's own products only.";
  if (p.dtype != INTERFUSE_FLOAT32 || p.channels_last || p.groups != 1)
    return "the matrix units' kernel takes contiguous float32 tensors and one group.";
  if (p.group_in > kMostChannels) return "the matrix units' kernel is for first layers, of up to 8 input channels.";
  if (p.stride.volume() != 1 || p.dilation.h != 1 || p.dilation.w != 1)
    return "the convolution has a stride or a dilation; the matrix units' kernel takes neither.";
  if (p.pre_count() > 0 || p.needs_preactivation())
    return "the gradient needs the value before the activation; the matrix units' kernel keeps none.";
  if (p.pool != INTERFUSE_POOL_NONE) {
    const Triple &size = p.window, &step = p.window_stride, &pad = p.window_pad;
    const bool halves = p.pool == INTERFUSE_POOL_MAX && size.d <= 2 && size.h == 2 && size.w == 2 && step.d == size.d &&
                        step.h == 2 && step.w == 2 && pad.d == 0 && pad.h == 0 && pad.w == 0;
    if (!halves || (p.activation == INTERFUSE_LEAKY_RELU && p.slope < 0))
      return "the pooling is not a maximum over windows of 2 side by side behind an activation that never decreases.";
    if (p.out.d * size.d > p.conv.d || p.out.h * 2 > p.conv.h || p.out.w * 2 > p.conv.w)
      return "the last pooling window reaches beyond the convolution.";
  }
  if (p.conv.h < 2) return "the convolution has a single row; the matrix units' kernel takes two at a time.";
  if (p.kernel.d > kMostMatrixSlices || p.kernel.w > kSide || p.kernel.d * matrix_chunks(p) > kMostSteps)
    return "the kernel is larger than what the matrix units' kernel keeps in a cache.";
  if (use(p) < kLeastUse) return "filters, columns or the kernel would leave most of the matrix units' tiles empty.";
  return "";
}

}  // namespace interfuse
