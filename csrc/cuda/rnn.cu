// The device that rnn's entries plan for.
#include "cuda/rnn_launch.h"

namespace interfuse {
namespace cuda {
namespace {

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  succeed(cudaDeviceGetAttribute(&value, what, device), "asking about the device");
  return value;
}

}  // namespace

interfuse_cuda_device current_device() {
  if (interfuse_cuda_devices() == 0)
    invalid("rnn: there is no CUDA device (or no driver) on this machine; use the CPU library there.");
  int device = 0;
  succeed(cudaGetDevice(&device), "asking for the device");
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

}  // namespace cuda
}  // namespace interfuse
