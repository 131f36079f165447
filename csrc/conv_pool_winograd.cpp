// When Winograd takes a conv_pool problem. Compiled once: nothing here depends on the instruction set.
#include <cstdarg>
#include <cstdio>

#include "common/conv_pool.h"

namespace interfuse {
namespace {

std::string sentence(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string sentence(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return text;
}

const char* axis_name(int axis) {
  static const char* names[] = {"depth", "height", "width"};
  return names[axis];
}

int64_t along(const Triple& t, int axis) { return axis == 0 ? t.d : axis == 1 ? t.h : t.w; }

}  // namespace

int winograd_depth_tile(const ConvPool& p) {
  if (p.kernel.d == 1) return 1;
  if (p.window.d == 4) return 4;
  // F(2x4x4) takes 144 products for 2 slices of results, F(4x4x4) 216 for 4; at a tie the smaller error wins.
  const int64_t depth = p.out.d * p.window.d < p.conv.d ? p.out.d * p.window.d : p.conv.d;
  return (depth + 3) / 4 * 216 < (depth + 1) / 2 * 144 ? 4 : 2;
}

std::string winograd_why_not(const ConvPool& p) {
  if (p.highest) return "the precision is 'highest', which allows sums of products only.";
  for (int axis = 0; axis < 3; ++axis) {
    const long long kernel = along(p.kernel, axis), stride = along(p.stride, axis), dilation = along(p.dilation, axis);
    if (kernel != 3 && !(axis == 0 && kernel == 1))
      return sentence("the kernel has size %lld along %s; 3x3 and 3x3x3 are supported.", kernel, axis_name(axis));
    if (stride != 1 || dilation != 1)
      return sentence("the convolution has stride %lld and dilation %lld along %s; both must be 1.", stride, dilation,
                      axis_name(axis));
  }
  const long long most_depth = p.kernel.d == 1 ? 1 : 4;
  for (int axis = 0; axis < 3 && p.pool != INTERFUSE_POOL_NONE; ++axis) {
    const long long window = along(p.window, axis), step = along(p.window_stride, axis),
                    pad = along(p.window_pad, axis);
    const long long tile = axis == 0 ? most_depth : 4;
    if (window > tile || tile % window != 0 || step != window || pad != 0)
      return sentence(
          "the pooling window has size %lld, stride %lld and padding %lld along %s; whole windows must fill a tile of "
          "%lld, "
          "so size and stride must be the same divisor of it, without padding.",
          window, step, pad, axis_name(axis), tile);
  }
  if (p.group_in < 16 || p.group_out < 16)
    return sentence(
        "a group has %lld input and %lld output channels; below 16 the transforms cost more than the products saved.",
        (long long)p.group_in, (long long)p.group_out);
  // Each tile of results reads all the weights, and transformed they are four times as many. (Measured: 512 channels on
  // 7x7, batch 1, takes 1.6 to 6 times as long as the direct sum; 256 channels on 14x14 is a tie.)
  const long long tiles = p.batch * ((p.conv.d + 3) / 4) * ((p.conv.h + 3) / 4) * ((p.conv.w + 3) / 4);
  if (tiles < 16 && p.group_in * p.group_out >= (1 << 14))
    return sentence(
        "the whole batch has %lld tiles of results for %lld by %lld channels; below 16 reading the transformed weights "
        "costs more than the products saved.",
        tiles, (long long)p.group_in, (long long)p.group_out);
  return "";
}

bool winograd_has_gradients(const ConvPool& p) {
  if (!winograd_why_not(p).empty()) return false;
  return p.pool == INTERFUSE_POOL_NONE ||
         (p.pool == INTERFUSE_POOL_MAX && p.window.d <= 2 && p.window.h == 2 && p.window.w == 2);
}

}  // namespace interfuse
