// Gradients where most of the convolution's pixels have one: blocked matrix products, kernel tap by kernel tap,
// straight on the strip's packed buffers (nothing is copied into columns).
#include "cpu/conv_pool_backward.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

constexpr int kMostVectors = 2;                            // of a chunk
constexpr int kPixels = kRegisters == 32 ? 12 : 6;         // times two vectors: 24 (12) accumulators
constexpr int64_t kPixelBlock = 64;                        // its gradients and its x stay in the first-level cache

typedef void (*WeightKernel)(const float*, const int32_t*, int64_t, const float*, float*, int64_t);
typedef void (*InputKernel)(const float*, int64_t, const int32_t*, int64_t, const float*, float*);

// sums[k][lane] += gradient[pixel][k] * x[pixel][lane], for kBlock output channels and V vectors.
template <int V>
void weight_kernel(const float* gradient, const int32_t* offsets, int64_t pixels, const float* x, float* sums,
                   int64_t sums_step) {
  Vec s[kBlock][V] = {};
  for (int64_t i = 0; i < pixels; ++i, gradient += kBlock) {
    const float* at = x + offsets[i];
    Vec xs[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) xs[v] = load(at + v * kLanes);
#pragma GCC unroll 8
    for (int k = 0; k < kBlock; ++k)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) s[k][v] = multiply_add(splat(gradient[k]), xs[v], s[k][v]);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kBlock; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* to = sums + k * sums_step + v * kLanes;
      store(to, load(to) + s[k][v]);
    }
}

// grad_x[pixel][lane] += gradient[k][pixel] * weight[k][lane], for M pixels and all output channels of the blocks.
template <int M, int V>
void input_kernel(const float* gradient, int64_t block_step, const int32_t* offsets, int64_t k_blocks,
                  const float* weight, float* grad_x) {
  Vec s[M][V] = {};
  for (int64_t block = 0; block < k_blocks; ++block, gradient += block_step)
    for (int k = 0; k < kBlock; ++k, weight += V * kLanes) {
      Vec w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) s[m][v] = multiply_add(splat(gradient[m * kBlock + k]), w[v], s[m][v]);
    }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* to = grad_x + offsets[m] + v * kLanes;
      store(to, load(to) + s[m][v]);
    }
}

constexpr WeightKernel kWeightKernels[kMostVectors] = {weight_kernel<1>, weight_kernel<2>};
constexpr InputKernel kInputKernels[kMostVectors][4] = {
    {input_kernel<kPixels, 1>, input_kernel<kPixels / 2, 1>, input_kernel<2, 1>, input_kernel<1, 1>},
    {input_kernel<kPixels, 2>, input_kernel<kPixels / 2, 2>, input_kernel<2, 2>, input_kernel<1, 2>}};
constexpr int kPixelCounts[4] = {kPixels, kPixels / 2, 2, 1};

int64_t tap_offset(const BackwardPlan& plan, const Strip& strip, int64_t tap) {
  const int64_t w = tap % plan.kernel[2], h = tap / plan.kernel[2] % plan.kernel[1],
                d = tap / plan.kernel[2] / plan.kernel[1];
  return d * plan.dilation[0] * strip.step[0] + h * plan.dilation[1] * strip.step[1] +
         w * plan.dilation[2] * strip.step[2];
}

}  // namespace

void dense_weight_gradient(const BackwardPlan& plan, const Strip& strip, const float* gradient, const int32_t* offsets,
                           int64_t pixels, int64_t k_blocks, const float* x, float* sums) {
  const WeightKernel kernel = kWeightKernels[plan.lanes / kLanes - 1];
  const int64_t sums_step = plan.taps * plan.lanes;
  for (int64_t first = 0; first < pixels; first += kPixelBlock) {
    const int64_t count = pixels - first < kPixelBlock ? pixels - first : kPixelBlock;
    for (int64_t tap = 0; tap < plan.taps; ++tap)
      for (int64_t block = 0; block < k_blocks; ++block)
        kernel(gradient + (block * pixels + first) * kBlock, offsets + first, count, x + tap_offset(plan, strip, tap),
               sums + block * kBlock * sums_step + tap * plan.lanes, sums_step);
  }
}

void dense_input_gradient(const BackwardPlan& plan, const Strip& strip, const float* gradient, const int32_t* offsets,
                          int64_t pixels, int64_t k_blocks, const float* weight, float* grad_x) {
  const InputKernel* kernels = kInputKernels[plan.lanes / kLanes - 1];
  for (int64_t tap = 0; tap < plan.taps; ++tap, weight += k_blocks * kBlock * plan.lanes) {
    float* to = grad_x + tap_offset(plan, strip, tap);
    int64_t first = 0;
    for (int size = 0; size < 4; ++size)
      for (; pixels - first >= kPixelCounts[size]; first += kPixelCounts[size])
        kernels[size](gradient + first * kBlock, pixels * kBlock, offsets + first, k_blocks, weight, to);
  }
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
