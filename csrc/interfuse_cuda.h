/* interfuse on NVIDIA GPUs: the CUDA C++ kernels' public C API, in the library interfuse_cuda.
 *
 * The library loads on a machine without a GPU or a driver; interfuse_cuda_devices() then says 0.
 * Pointers are device pointers; work is enqueued on the given stream and nothing waits for it.
 */
#ifndef INTERFUSE_CUDA_H
#define INTERFUSE_CUDA_H

#include "interfuse.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How many devices the driver offers; 0 without a driver. */
INTERFUSE_API int32_t interfuse_cuda_devices(void);

/* The failure of this library's last call on this thread, as a full sentence. */
INTERFUSE_API const char* interfuse_cuda_last_error(void);

/* As interfuse_conv_pool_create and _forward in one, on `stream` (a cudaStream_t) of the current device. */
INTERFUSE_API interfuse_status interfuse_cuda_conv_pool_forward(const interfuse_conv_pool_spec* spec, const void* x,
                                                                const void* weight, const void* bias, void* y,
                                                                uint8_t* index, void* pre, void* stream);

#ifdef __cplusplus
}
#endif
#endif
