// What the kernels need of CUDA, so that the same source also compiles for the host: nvcc takes the words as they are,
// csrc/tests/emulate.h gives them a meaning on the CPU before a kernel's header is included.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#define INTERFUSE_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define INTERFUSE_DEVICE __device__ __forceinline__
// Arrays indexed by an unrolled loop stay in registers.
#define INTERFUSE_UNROLL _Pragma("unroll")
#define INTERFUSE_ROLLED _Pragma("unroll 1")
#define INTERFUSE_SHARED(type, name) __shared__ type name

namespace interfuse {
namespace cuda {
using BFloat16 = __nv_bfloat16;
INTERFUSE_DEVICE float to_float(float value) { return value; }
INTERFUSE_DEVICE float to_float(BFloat16 value) { return __bfloat162float(value); }
INTERFUSE_DEVICE void put(float* p, float value) { *p = value; }
INTERFUSE_DEVICE void put(BFloat16* p, float value) { *p = __float2bfloat16_rn(value); }
}  // namespace cuda
}  // namespace interfuse
#endif
