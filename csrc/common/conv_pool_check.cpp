// What a conv_pool problem must fulfil, and the sizes that follow from it. Every back end of the core calls this.
#include "common/conv_pool.h"

#include <initializer_list>

#include "common/error.h"

namespace interfuse {
namespace {

constexpr int64_t kMost = int64_t(1) << 48;  // elements; products of checked sizes then stay far from overflow

Triple triple(const int64_t v[3]) { return {v[0], v[1], v[2]}; }

int64_t checked_product(const char* what, std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t factor : factors) {
    if (factor < 0 || (factor > 0 && product > kMost / factor))
      invalid("conv_pool: %s would have more than 2^48 elements; split the batch.", what);
    product *= factor;
  }
  return product;
}

const char* axis_name(int axis) {
  static const char* names[] = {"depth", "height", "width"};
  return names[axis];
}

int64_t convolved(const interfuse_conv_pool_spec& s, int axis) {
  int64_t reach = s.dilation[axis] * (s.kernel[axis] - 1) + 1;
  int64_t padded = s.input[axis] + s.padding_lo[axis] + s.padding_hi[axis];
  if (padded < reach)
    invalid(
        "conv_pool: the kernel reaches over %lld elements along %s, but the padded input has %lld; use a larger input, "
        "more padding, or a smaller kernel or dilation.",
        (long long)reach, axis_name(axis), (long long)padded);
  return (padded - reach) / s.stride[axis] + 1;
}

// torch's pooling size: with ceil_mode the last window must still start inside the input or its left padding.
int64_t pooled(const interfuse_conv_pool_spec& s, int axis, int64_t size) {
  int64_t window = s.pool_size[axis], step = s.pool_stride[axis], pad = s.pool_padding[axis];
  int64_t slack = size + 2 * pad - window;
  int64_t count = slack < 0 && !s.ceil_mode ? 0 : (slack + (s.ceil_mode ? step - 1 : 0)) / step + 1;
  if (s.ceil_mode && slack + step - 1 < 0) count = 0;
  if (s.ceil_mode && (count - 1) * step >= size + pad) --count;
  if (count < 1)
    invalid(
        "conv_pool: the convolution gives %lld elements along %s, too few for a pooling window of %lld with padding "
        "%lld; use a larger input or a smaller window.",
        (long long)size, axis_name(axis), (long long)window, (long long)pad);
  return count;
}

void check_scalars(const interfuse_conv_pool_spec& s) {
  check_range("conv_pool", "dtype", s.dtype, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16);
  check_range("conv_pool", "activation", s.activation, INTERFUSE_NONE, INTERFUSE_SIGMOID);
  check_range("conv_pool", "pool", s.pool, INTERFUSE_POOL_NONE, INTERFUSE_POOL_AVG);
  check_range("conv_pool", "precision", s.precision, INTERFUSE_PRECISION_DEFAULT, INTERFUSE_PRECISION_HIGHEST);
  check_range("conv_pool", "batch", s.batch, 0, kMost);
  check_range("conv_pool", "in_channels", s.in_channels, 1, INT32_MAX);
  check_range("conv_pool", "out_channels", s.out_channels, 1, INT32_MAX);
  check_range("conv_pool", "groups", s.groups, 1, INT32_MAX);
  if (s.in_channels % s.groups || s.out_channels % s.groups)
    invalid(
        "conv_pool: %lld input and %lld output channels cannot be split into %lld groups; "
        "both must be multiples of groups.",
        (long long)s.in_channels, (long long)s.out_channels, (long long)s.groups);
  for (int axis = 0; axis < 3; ++axis) {
    check_range("conv_pool", "an input size", s.input[axis], 1, INT32_MAX);
    check_range("conv_pool", "a kernel size", s.kernel[axis], 1, INT32_MAX);
    check_range("conv_pool", "a stride", s.stride[axis], 1, INT32_MAX);
    check_range("conv_pool", "a dilation", s.dilation[axis], 1, INT32_MAX);
    check_range("conv_pool", "a padding", s.padding_lo[axis], 0, INT32_MAX);
    check_range("conv_pool", "a padding", s.padding_hi[axis], 0, INT32_MAX);
    if (s.pool == INTERFUSE_POOL_NONE) continue;
    check_range("conv_pool", "a pool_size", s.pool_size[axis], 1, INT32_MAX);
    check_range("conv_pool", "a pool_stride", s.pool_stride[axis], 1, INT32_MAX);
    check_range("conv_pool", "a pool_padding", s.pool_padding[axis], 0, s.pool_size[axis] / 2);
  }
}

}  // namespace

ConvPool checked_conv_pool(const interfuse_conv_pool_spec& s) {
  check_scalars(s);
  ConvPool p{};
  p.batch = s.batch;
  p.in_channels = s.in_channels;
  p.out_channels = s.out_channels;
  p.groups = s.groups;
  p.group_in = s.in_channels / s.groups;
  p.group_out = s.out_channels / s.groups;
  p.in = triple(s.input);
  p.kernel = triple(s.kernel);
  p.stride = triple(s.stride);
  p.dilation = triple(s.dilation);
  p.pad_lo = triple(s.padding_lo);
  p.pad_hi = triple(s.padding_hi);
  p.conv = {convolved(s, 0), convolved(s, 1), convolved(s, 2)};
  p.pool = s.pool;
  p.window = p.window_stride = {1, 1, 1};
  p.out = p.conv;
  if (s.pool != INTERFUSE_POOL_NONE) {
    p.window = triple(s.pool_size);
    p.window_stride = triple(s.pool_stride);
    p.window_pad = triple(s.pool_padding);
    p.out = {pooled(s, 0, p.conv.d), pooled(s, 1, p.conv.h), pooled(s, 2, p.conv.w)};
  }
  p.dtype = s.dtype;
  p.activation = s.activation;
  p.slope = s.negative_slope;
  p.channels_last = s.channels_last != 0;
  p.ceil_mode = s.ceil_mode != 0;
  p.count_include_pad = s.count_include_pad != 0;
  p.highest = s.precision == INTERFUSE_PRECISION_HIGHEST;
  p.save = s.save != 0;

  checked_product("the input", {p.batch, p.in_channels, p.in.d, p.in.h, p.in.w});
  checked_product("the convolution", {p.batch, p.out_channels, p.conv.d, p.conv.h, p.conv.w});
  checked_product("the output", {p.batch, p.out_channels, p.out.d, p.out.h, p.out.w});
  checked_product("the weight", {p.out_channels, p.group_in, p.kernel.d, p.kernel.h, p.kernel.w});
  if (p.save && p.pool == INTERFUSE_POOL_MAX &&
      checked_product("the pooling window", {p.window.d, p.window.h, p.window.w}) > 255)
    invalid("conv_pool: a max-pooling window of %lld elements does not fit the 8-bit index that the gradient needs; "
            "at most 255 are allowed.",
            (long long)p.window.volume());

  p.ws.c = s.weight_channels_last ? 1 : p.kernel.volume();
  p.ws.tap = s.weight_channels_last ? p.group_in : 1;

  const int64_t* xs = s.x_strides;
  bool dense = !xs[0] && !xs[1] && !xs[2] && !xs[3] && !xs[4];
  if (!dense)
    p.xs = {xs[0], xs[1], xs[2], xs[3], xs[4]};
  else if (p.channels_last)
    p.xs = {p.in.volume() * p.in_channels, 1, p.in.h * p.in.w * p.in_channels, p.in.w * p.in_channels, p.in_channels};
  else
    p.xs = {p.in.volume() * p.in_channels, p.in.volume(), p.in.h * p.in.w, p.in.w, 1};
  if (p.in_channels == 1) p.xs.c = 1;  // the stride of an axis with one element says nothing
  if (p.in.w == 1) p.xs.w = 1;
  const int64_t unit = p.channels_last ? p.xs.c : p.xs.w;
  if (unit != 1)
    invalid("conv_pool: x has stride %lld along its %s axis; the %s layout needs 1 there. Make x contiguous first.",
            (long long)unit, p.channels_last ? "channel" : "width", p.channels_last ? "channels-last" : "contiguous");
  return p;
}

}  // namespace interfuse
