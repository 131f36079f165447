// conv_pool's entry on NVIDIA GPUs: checks, grid, launch.
#include <cuda_runtime.h>

#include "common/error.h"
#include "cuda/device.h"
#include "cuda/conv_pool_kernel.h"
#include "interfuse_cuda.h"

namespace interfuse {
namespace cuda {
namespace {

// Grid dimensions y and z end at 65,535, x at 2^31 - 1.
constexpr int64_t kMostX = 0x7fffffff, kMostYZ = 65535;

template <class T>
void launch(const ConvPool& p, const void* x, const void* weight, const void* bias, void* y, uint8_t* index, void* pre,
            cudaStream_t stream) {
  const int64_t columns = (p.batch * p.out.volume() + kTile - 1) / kTile, rows = (p.group_out + kTile - 1) / kTile;
  if (columns > kMostX || rows > kMostYZ || p.groups > kMostYZ)
    invalid(
        "conv_pool: %lld output tiles, %lld channel tiles and %lld groups do not fit a CUDA grid (at most %lld, %lld "
        "and "
        "%lld); split the batch or the groups.",
        (long long)columns, (long long)rows, (long long)p.groups, (long long)kMostX, (long long)kMostYZ,
        (long long)kMostYZ);
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(rows), static_cast<unsigned>(p.groups));
  conv_pool_forward<T><<<grid, kThreads, 0, stream>>>(
      p, static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(y),
      p.index_count() ? index : nullptr, p.pre_count() ? static_cast<T*>(pre) : nullptr);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) invalid("conv_pool: the CUDA launch failed: %s.", cudaGetErrorString(error));
}

}  // namespace
}  // namespace cuda
}  // namespace interfuse

extern "C" {

int32_t interfuse_cuda_devices(void) {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* interfuse_cuda_last_error(void) { return interfuse_last_error(); }

interfuse_status interfuse_cuda_conv_pool_forward(const interfuse_conv_pool_spec* spec, const void* x,
                                                  const void* weight, const void* bias, void* y, uint8_t* index,
                                                  void* pre, void* stream) {
  using namespace interfuse;
  return guarded([&] {
    if (!spec) invalid("conv_pool: forward was given no spec; fill one in after interfuse_conv_pool_defaults.");
    const ConvPool p = checked_conv_pool(*spec);
    if (p.batch == 0) return;
    if (!x || !weight || !y)
      invalid("conv_pool: forward was given a null pointer for x, weight or y; all three are needed.");
    if ((p.index_count() && !index) || (p.pre_count() && !pre))
      invalid("conv_pool: this spec saves for backward; pass index and pre.");
    if (interfuse_cuda_devices() == 0)
      invalid("conv_pool: there is no CUDA device (or no driver) on this machine; use the CPU library there.");
    if (p.dtype == INTERFUSE_FLOAT32)
      cuda::launch<float>(p, x, weight, bias, y, index, pre, static_cast<cudaStream_t>(stream));
    else
      cuda::launch<cuda::BFloat16>(p, x, weight, bias, y, index, pre, static_cast<cudaStream_t>(stream));
  });
}

}  // extern "C"
