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

/* ---- rnn: the recurrence of one layer, both directions at a time ------------------------------------------------
 * Weights stay on the chip for the whole sequence, divided among a team of blocks. What comes before it (the product of
 * the inputs with their weights) and after it (the weights' gradients) are products over all tokens: the caller's. */

enum { INTERFUSE_FLOAT16 = 2 }; /* beside interfuse_dtype */

typedef struct interfuse_cuda_rnn_spec {
  int32_t cell;       /* interfuse_cell */
  int32_t dtype;      /* INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16 or INTERFUSE_FLOAT16 */
  int32_t tf32;       /* 1: products of float32 may round their factors to TF32 */
  int32_t directions; /* 1, or 2: the second runs from each sequence's end */
  int64_t batch, steps, hidden_size;
  int64_t token_strides[2]; /* of (step, sequence): a token's number is step * [0] + sequence * [1] */
  int64_t part[2];          /* the steps [0] to [1] - 1 alone; {0, 0}: all. For one direction. */
} interfuse_cuda_rnn_spec;

/* How the work would be shared out on a device, or on one that is described here. */
typedef struct interfuse_cuda_rnn_team {
  int32_t cluster;      /* blocks that hand over states through their shared memory */
  int32_t clusters;     /* that make a team, and do so through global memory */
  int32_t threads;      /* of a block */
  int32_t columns;      /* sequences of a team */
  int64_t teams;        /* that run at a time */
  int64_t shared_bytes; /* of a block */
  int64_t workspace_bytes;
} interfuse_cuda_rnn_team;

typedef struct interfuse_cuda_device {
  int32_t compute_capability; /* 90 for 9.0 */
  int32_t multiprocessors;
  int64_t shared_bytes; /* that a block may ask for */
} interfuse_cuda_device;

/* `device` NULL: the current one. Needs no device otherwise. */
INTERFUSE_API interfuse_status interfuse_cuda_rnn_plan(const interfuse_cuda_rnn_spec* spec, int32_t backward,
                                                       const interfuse_cuda_device* device,
                                                       interfuse_cuda_rnn_team* team);

/* The steps may come in parts, one launch after the other, so that another layer works on a part that is done while the
 * next is under way: from the first part to the last forwards, from the last to the first backwards. All parts get the
 * same arrays, of all steps, and the same workspace; the results are those of one launch, to the bit.
 *
 * Tensors are numbered by token, then direction. States (directions, batch, hidden) may be NULL, which is zero;
 * lengths (batch) NULL: all have every step. Where no step comes, y and grads are not written. */
typedef struct interfuse_cuda_rnn_forward_arrays {
  const float* pre; /* (tokens, directions, gates, hidden): the inputs' part of the gates, biases included */
  const void* w_hh; /* (directions, gates, hidden, hidden) */
  const void* b_hn; /* (directions, hidden): a GRU's recurrent bias of its new gate, or NULL */
  const void *h0, *c0;
  const int64_t* lengths;
  void *y, *hn, *cn;
  void* gates;  /* (tokens, directions, 4, hidden), or NULL: nothing is saved for backward */
  float* state; /* (tokens, directions, hidden): an LSTM's c */
  float* carry; /* (batch, hidden), where the steps come in parts: what goes from one part to the next in float32 */
} interfuse_cuda_rnn_forward_arrays;

typedef struct interfuse_cuda_rnn_backward_arrays {
  const void *grad_y, *grad_hn, *grad_cn; /* each may be NULL */
  const void *w_hh, *h0, *c0;
  const int64_t* lengths;
  const void *y, *gates;
  const float* state;
  void* grads; /* (tokens, directions, slots, hidden) before the gates: LSTM i f g o, GRU n r z n', RNN one */
  void *grad_h0, *grad_c0; /* or NULL */
  float* carry;            /* (2, batch, hidden), where the steps come in parts */
} interfuse_cuda_rnn_backward_arrays;

/* `workspace`: workspace_bytes of device memory from interfuse_cuda_rnn_plan, free again once the stream has passed. */
INTERFUSE_API interfuse_status interfuse_cuda_rnn_forward(const interfuse_cuda_rnn_spec* spec,
                                                          const interfuse_cuda_rnn_forward_arrays* arrays,
                                                          void* workspace, void* stream);
INTERFUSE_API interfuse_status interfuse_cuda_rnn_backward(const interfuse_cuda_rnn_spec* spec,
                                                           const interfuse_cuda_rnn_backward_arrays* arrays,
                                                           void* workspace, void* stream);

#ifdef __cplusplus
}
#endif
#endif
