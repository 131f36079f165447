// conv_pool on the CPU without Winograd: simplifies the problem and chooses a family of kernels. Compiled once per ISA.
#include "common/conv_pool.h"
#include "common/simd.h"
#include "cpu/conv_pool_direct.h"
#include "cpu/conv_pool_geometry.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr double kWorkPerThread = 1e6;  // multiply-adds worth waking a thread for

// A 1x1 convolution without pooling sees a row of pixels, whatever their shape was.
void merge_axes(ConvPool& p) {
  const bool pointwise =
      p.kernel.volume() == 1 && p.stride.volume() == 1 && p.pool == INTERFUSE_POOL_NONE && !padded(p);
  if (!pointwise) return;
  if (p.xs.h != p.in.w * p.xs.w && p.in.h > 1) return;
  if (p.xs.d != p.in.h * p.in.w * p.xs.w && p.in.d > 1) return;
  int64_t pixels = p.in.volume();
  if (p.channels_last && (p.batch == 1 || p.xs.n == pixels * p.xs.w)) pixels *= p.batch, p.batch = 1;
  p.in = p.conv = p.out = {1, 1, pixels};
}

// Where every image gives one pixel, the images are the pixels of a row. Dense y then looks channels-last.
bool merge_images(ConvPool& p) {
  if (p.conv.volume() != 1 || p.pool != INTERFUSE_POOL_NONE || padded(p) || p.dtype != INTERFUSE_FLOAT32 ||
      p.batch == 1)
    return false;
  p.conv.w = p.out.w = p.batch;
  p.batch = 1;
  p.channels_last = true;
  return true;
}

// An axis of one element along w leaves rows of one pixel: the next axis takes its place.
void shift_axes(ConvPool& p) {
  for (int axis = 0; axis < 2; ++axis) {
    if (p.in.w != 1 || p.kernel.w != 1 || p.pad_lo.w || p.pad_hi.w || p.window.w != 1 || p.window_pad.w) return;
    Triple* const sizes[] = {&p.in, &p.kernel, &p.stride, &p.dilation, &p.conv, &p.window, &p.window_stride, &p.out};
    Triple* const pads[] = {&p.pad_lo, &p.pad_hi, &p.window_pad};
    for (Triple* t : sizes) *t = {1, t->d, t->h};
    for (Triple* t : pads) *t = {0, t->d, t->h};
    p.xs.w = p.xs.h, p.xs.h = p.xs.d, p.xs.d = 0;
  }
}

void direct(const ConvPool& problem, const ConvPoolForward& a) {
  ConvPool p = problem;
  const double work = static_cast<double>(p.conv_count()) * static_cast<double>(p.group_in * p.kernel.volume());
  const int threads = static_cast<int>(least(a.threads, 1 + static_cast<int64_t>(work / kWorkPerThread)));
  if (merge_images(p)) return conv_pool_channels(p, a, threads, p.xs.n);
  merge_axes(p);
  shift_axes(p);
  if (p.group_in == 1 && p.group_out == 1 && 2 * p.groups >= kLanes) return conv_pool_depthwise(p, a, threads);
  if (conv_pool_columns_cost(p) < conv_pool_channels_cost(p)) return conv_pool_columns(p, a, threads);
  conv_pool_channels(p, a, threads, 0);
}

}  // namespace

void conv_pool_matrix(const ConvPool&, const ConvPoolForward&);
void conv_pool_winograd(const ConvPool&, const ConvPoolForward&);
void conv_pool_backward(const ConvPool&, const ConvPoolBackward&);
const char* conv_pool_backward_method(const ConvPool&, const ConvPoolBackward&);

extern const ConvPoolKernels conv_pool_kernels;
const ConvPoolKernels conv_pool_kernels = {conv_pool_matrix, direct, conv_pool_winograd, conv_pool_backward,
                                           conv_pool_backward_method};

void redo_broken(const ConvPool& p, const ConvPoolForward& a, const uint8_t* broken) {
  const int64_t element = p.dtype == INTERFUSE_FLOAT32 ? 4 : 2;
  ConvPool one = p;
  one.batch = 1;
  for (int64_t n = 0; n < p.batch; ++n) {
    if (!broken[n]) continue;
    const auto at = [&](const void* pointer, int64_t per_image, int64_t size) {
      return static_cast<char*>(const_cast<void*>(pointer)) + (pointer ? n * per_image * size : 0);
    };
    ConvPoolForward image = a;
    image.x = at(a.x, p.xs.n, element);
    image.y = at(a.y, one.y_count(), element);
    image.index = reinterpret_cast<uint8_t*>(at(a.index, one.index_count(), 1));
    image.pre = at(a.pre, one.pre_count(), element);
    direct(one, image);
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
