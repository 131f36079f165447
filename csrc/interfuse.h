/* interfuse: fused kernels for multimodal models. The public C API; an embedder includes only this file.
 *
 * The library knows nothing of torch or Python: pointers, sizes and strides go in, results come out.
 * Every function that can fail returns an interfuse_status; interfuse_last_error() then holds a full sentence
 * (what was given, what is allowed, what to do), valid until the calling thread's next interfuse call.
 * All functions may be called from several threads at once.
 */
#ifndef INTERFUSE_H
#define INTERFUSE_H

#include <stdint.h>

#if defined(_WIN32)
#define INTERFUSE_API __declspec(dllexport)
#else
#define INTERFUSE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum interfuse_status {
  INTERFUSE_OK = 0,
  INTERFUSE_INVALID = 1,      /* an argument breaks a rule that the message states */
  INTERFUSE_OUT_OF_MEMORY = 2,
  INTERFUSE_INTERNAL = 3
} interfuse_status;

typedef enum interfuse_dtype {
  INTERFUSE_FLOAT32 = 0,
  INTERFUSE_BFLOAT16 = 1,
  INTERFUSE_INT8 = 2 /* of linear's weight alone */
} interfuse_dtype;

typedef enum interfuse_activation {
  INTERFUSE_NONE = 0,
  INTERFUSE_RELU = 1,
  INTERFUSE_LEAKY_RELU = 2,
  INTERFUSE_GELU = 3,
  INTERFUSE_GELU_TANH = 4,
  INTERFUSE_SILU = 5,
  INTERFUSE_TANH = 6,
  INTERFUSE_SIGMOID = 7,
  INTERFUSE_SOFTMAX = 8 /* over a row; of linear alone */
} interfuse_activation;

typedef enum interfuse_pool { INTERFUSE_POOL_NONE = 0, INTERFUSE_POOL_MAX = 1, INTERFUSE_POOL_AVG = 2 } interfuse_pool;

typedef enum interfuse_precision {
  INTERFUSE_PRECISION_DEFAULT = 0, /* Winograd allowed: relative error below 1e-5 in float32 */
  INTERFUSE_PRECISION_HIGHEST = 1  /* sums of products only */
} interfuse_precision;

INTERFUSE_API const char* interfuse_version(void);
/* The instruction set that was chosen at load ("baseline", "avx2", "avx512"); the environment variable
 * INTERFUSE_ISA, read once, forces a lower one. */
INTERFUSE_API const char* interfuse_isa(void);
INTERFUSE_API const char* interfuse_last_error(void);

/* ---- conv_pool: pool(activation(convolution(x, weight) + bias)) in one, two or three dimensions ------------- */

/* Arrays of three are (depth, height, width). Fewer dimensions fill from the right, and the unused ones keep
 * size 1, kernel 1, stride 1, dilation 1, padding 0: interfuse_conv_pool_defaults() sets them so. */
typedef struct interfuse_conv_pool_spec {
  int32_t dtype;         /* interfuse_dtype of every tensor but the index */
  int32_t channels_last; /* 0: x has unit stride along width; 1: along channels. The outputs follow. */
  int32_t weight_channels_last; /* 0: the weight is dense (out, in, kernel...); 1: (out, kernel..., in) */
  int64_t batch, in_channels, out_channels, groups;
  int64_t input[3], kernel[3], stride[3], dilation[3], padding_lo[3], padding_hi[3];
  int64_t x_strides[5]; /* of (batch, channel, depth, height, width), in elements; all zero means dense */
  int32_t activation;   /* interfuse_activation */
  float negative_slope; /* of leaky_relu */
  int32_t pool;         /* interfuse_pool */
  int64_t pool_size[3], pool_stride[3], pool_padding[3];
  int32_t ceil_mode, count_include_pad;
  int32_t precision; /* interfuse_precision */
  int32_t save;      /* 1: forward also writes what backward needs */
} interfuse_conv_pool_spec;

typedef struct interfuse_conv_pool interfuse_conv_pool; /* a checked problem with its kernel chosen */

INTERFUSE_API void interfuse_conv_pool_defaults(interfuse_conv_pool_spec* spec);
INTERFUSE_API interfuse_status interfuse_conv_pool_create(const interfuse_conv_pool_spec* spec,
                                                          interfuse_conv_pool** plan);
INTERFUSE_API void interfuse_conv_pool_destroy(interfuse_conv_pool* plan);

/* Sizes of the convolution's result and of y, as (depth, height, width). */
INTERFUSE_API void interfuse_conv_pool_sizes(const interfuse_conv_pool* plan, int64_t conv[3], int64_t out[3]);
/* Elements that forward writes to index and to pre; 0 where the plan needs none. */
INTERFUSE_API void interfuse_conv_pool_saved(const interfuse_conv_pool* plan, int64_t* index, int64_t* pre);
/* Which kernel runs, and a sentence on why it and not a faster one. */
INTERFUSE_API const char* interfuse_conv_pool_algorithm(const interfuse_conv_pool* plan);
INTERFUSE_API const char* interfuse_conv_pool_why(const interfuse_conv_pool* plan);

/* x as the plan's strides say; weight, in the order that the spec names, and bias (or NULL) dense;
 * y, index and pre dense in x's layout. index and pre may be NULL where interfuse_conv_pool_saved says 0.
 * threads: at most so many; 0 means OpenMP's own default. */
INTERFUSE_API interfuse_status interfuse_conv_pool_forward(const interfuse_conv_pool* plan, const void* x,
                                                           const void* weight, const void* bias, void* y,
                                                           uint8_t* index, void* pre, int32_t threads);

/* The gradients asked for (NULL: not wanted) from what a forward with save = 1 left. y is read where the gradient
 * of the activation follows from its value (relu without pooling, leaky_relu, tanh, sigmoid) and may be NULL
 * elsewhere. grad_x is dense in x's layout; grad_weight and grad_bias are as weight and bias. */
INTERFUSE_API interfuse_status interfuse_conv_pool_backward(const interfuse_conv_pool* plan, const void* grad_y,
                                                            const void* x, const void* weight, const void* y,
                                                            const uint8_t* index, const void* pre, void* grad_x,
                                                            void* grad_weight, void* grad_bias, int32_t threads);

/* ---- rnn: a stack of recurrent layers over a whole batch of sequences ---------------------------------------- */

typedef enum interfuse_cell {
  INTERFUSE_RNN_TANH = 0,
  INTERFUSE_RNN_RELU = 1,
  INTERFUSE_LSTM = 2,
  INTERFUSE_GRU = 3
} interfuse_cell;

/* Gates stand in the weights as in torch: LSTM input, forget, cell, output; GRU reset, update, new. */
typedef struct interfuse_rnn_spec {
  int32_t cell;       /* interfuse_cell */
  int32_t directions; /* 1, or 2: the second runs from each sequence's end */
  int32_t bias;
  int32_t save;         /* 1: forward also writes what backward needs */
  int32_t weight_dtype; /* INTERFUSE_BFLOAT16: the recurrent weights are rounded to bfloat16 (inference only) */
  int32_t batch_first;  /* layout of y: (batch, steps, ...) or (steps, batch, ...) */
  int64_t batch, steps, input_size, hidden_size;
  int64_t proj_size; /* of the LSTM with projections, or 0 */
  int64_t layers;
  int64_t x_strides[2]; /* of (steps, batch), in elements; the last axis has stride 1 */
  int64_t vocabulary;   /* 0: x holds floats. Else x is a table of so many rows of input_size, chosen by ids */
} interfuse_rnn_spec;

typedef struct interfuse_rnn interfuse_rnn;

/* The parameters of one layer and direction, as torch keeps them; bias pointers NULL without bias, w_hr NULL without
 * projection. For gradients: NULL where not wanted. */
typedef struct interfuse_rnn_weights {
  float *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
} interfuse_rnn_weights;

typedef struct interfuse_rnn_sequences {
  const float* x;         /* the input, or the embedding table */
  const int64_t* ids;     /* with a vocabulary: row numbers, with x_strides */
  const int64_t* lengths; /* of each sequence, 0 to steps; NULL: all have every step */
  const float *h0, *c0;   /* (layers * directions, batch, size), or NULL for zeros */
} interfuse_rnn_sequences;

INTERFUSE_API void interfuse_rnn_defaults(interfuse_rnn_spec* spec);
INTERFUSE_API interfuse_status interfuse_rnn_create(const interfuse_rnn_spec* spec, interfuse_rnn** plan);
INTERFUSE_API void interfuse_rnn_destroy(interfuse_rnn* plan);
/* Floats that forward with save = 1 writes to reserve. */
INTERFUSE_API int64_t interfuse_rnn_reserve(const interfuse_rnn* plan);

/* y (steps, batch, directions * size) is zero beyond a sequence's length; hn and cn are the states at its end. */
INTERFUSE_API interfuse_status interfuse_rnn_forward(const interfuse_rnn* plan, const interfuse_rnn_sequences* sequences,
                                                     const interfuse_rnn_weights* weights, float* y, float* hn, float* cn,
                                                     float* reserve, int32_t threads);

/* grad_x is (steps, batch, input_size) dense in y's layout (with a vocabulary: of the rows that were chosen). Any
 * gradient may be NULL; an incoming one that is NULL counts as zero. */
INTERFUSE_API interfuse_status interfuse_rnn_backward(const interfuse_rnn* plan, const interfuse_rnn_sequences* sequences,
                                                      const interfuse_rnn_weights* weights, const float* reserve,
                                                      const float* grad_y, const float* grad_hn, const float* grad_cn,
                                                      float* grad_x, float* grad_h0, float* grad_c0,
                                                      const interfuse_rnn_weights* grad_weights, int32_t threads);

/* ---- linear: activation(sum over i of x_i W_i^T + bias), the inputs never concatenated ----------------------- */

typedef struct interfuse_linear_spec {
  int32_t dtype;        /* interfuse_dtype of every tensor but the weight: float32 or bfloat16 */
  int32_t weight_dtype; /* as dtype; with save = 0 also another, or int8 */
  int64_t rows, out_features;
  int32_t inputs;             /* how many */
  const int64_t* widths;      /* of each input */
  const int64_t* row_strides; /* of each input, in elements; along a row the stride is 1 */
  int32_t activation;         /* interfuse_activation */
  float negative_slope;       /* of leaky_relu */
  int32_t save;               /* 1: forward also writes what backward needs */
} interfuse_linear_spec;

typedef struct interfuse_linear interfuse_linear;

/* weight is (out_features, sum of widths) and dense, as torch keeps it. scale, for int8 alone, has one float for each
 * output: the weight is scale times the integers. bias has one element for each output, or is NULL. */
typedef struct interfuse_linear_weights {
  const void* weight;
  const float* scale;
  const void* bias;
} interfuse_linear_weights;

INTERFUSE_API void interfuse_linear_defaults(interfuse_linear_spec* spec);
INTERFUSE_API interfuse_status interfuse_linear_create(const interfuse_linear_spec* spec, interfuse_linear** plan);
INTERFUSE_API void interfuse_linear_destroy(interfuse_linear* plan);
/* Elements that forward writes to pre; 0 where the plan needs none. */
INTERFUSE_API int64_t interfuse_linear_saved(const interfuse_linear* plan);

/* y and pre (or NULL where interfuse_linear_saved says 0) are (rows, out_features) and dense. */
INTERFUSE_API interfuse_status interfuse_linear_forward(const interfuse_linear* plan, const void* const* inputs,
                                                        const interfuse_linear_weights* weights, void* y, void* pre,
                                                        int32_t threads);

/* Layers one after the other: each takes what the one before gave, as its only input and dense. The values between stay
 * in the core. */
INTERFUSE_API interfuse_status interfuse_linear_chain(const interfuse_linear* const* plans,
                                                      const interfuse_linear_weights* weights, int32_t layers,
                                                      const void* const* inputs, void* y, int32_t threads);

/* The gradients asked for (NULL: not wanted), dense, from what a forward with save = 1 left. y is read where the gradient
 * of the activation follows from its value (relu, leaky_relu, tanh, sigmoid, softmax) and may be NULL elsewhere. */
INTERFUSE_API interfuse_status interfuse_linear_backward(const interfuse_linear* plan, const void* grad_y,
                                                         const void* const* inputs, const void* weight, const void* y,
                                                         const void* pre, void* const* grad_inputs, void* grad_weight,
                                                         void* grad_bias, int32_t threads);

/* ---- attention: softmax(scale * q k^T + mask) v of projected heads ------------------------------------------- */

typedef enum interfuse_mask {
  INTERFUSE_MASK_NONE = 0,
  INTERFUSE_MASK_BOOLEAN = 1, /* bytes: a key is attended to where its byte is not 0 */
  INTERFUSE_MASK_ADDITIVE = 2 /* of the tensors' dtype, added to the scaled scores */
} interfuse_mask;

/* Strides are those of (batch, head, row), in elements; the last axis is dense. Query head h reads key and value head
 * h / (heads / kv_heads). */
typedef struct interfuse_attention_spec {
  int32_t dtype;  /* interfuse_dtype of every tensor but lse, lengths and a boolean mask */
  int32_t mask;   /* interfuse_mask */
  int32_t causal; /* 1: query i reads keys 0 to i alone */
  float scale;
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  int64_t q_strides[3], k_strides[3], v_strides[3], y_strides[3];
  int64_t mask_strides[3];                                           /* of (batch, head, query); 0 repeats */
  int64_t grad_q_strides[3], grad_k_strides[3], grad_v_strides[3]; /* read by backward; grad_y has y's strides */
} interfuse_attention_spec;

typedef struct interfuse_attention_inputs {
  const void *q, *k, *v;
  const void* mask;          /* NULL without a mask */
  const int64_t* q_lengths;  /* of each batch entry, 0 to queries; NULL: all. Rows beyond give zeros */
  const int64_t* kv_lengths; /* of each batch entry, 0 to keys; NULL: all */
} interfuse_attention_inputs;

INTERFUSE_API void interfuse_attention_defaults(interfuse_attention_spec* spec);
/* Whether the spec can run: what forward and backward check too, before anything is read. */
INTERFUSE_API interfuse_status interfuse_attention_check(const interfuse_attention_spec* spec);
/* A row that attends to nothing gives zeros. lse (batch, heads, queries) is the logarithm of each row's sum of
 * exponentials, which backward needs, or NULL; weights (batch, heads, queries, keys) dense, or NULL. */
INTERFUSE_API interfuse_status interfuse_attention_forward(const interfuse_attention_spec* spec,
                                                           const interfuse_attention_inputs* inputs, void* y, float* lse,
                                                           void* weights, int32_t threads);
INTERFUSE_API interfuse_status interfuse_attention_backward(const interfuse_attention_spec* spec,
                                                            const interfuse_attention_inputs* inputs, const void* y,
                                                            const float* lse, const void* grad_y, void* grad_q,
                                                            void* grad_k, void* grad_v, int32_t threads);

/* Attention pooling: y = sum over t of softmax(context . tanh(hidden[t])) x[t], for each sequence of the batch.
 * x (batch, steps, width) and hidden (batch, steps, hidden) have strides of (batch, step); the rest is dense. */
typedef struct interfuse_attention_pool_spec {
  int32_t dtype;
  int64_t batch, steps, width, hidden;
  int64_t x_strides[2], hidden_strides[2];
} interfuse_attention_pool_spec;

/* lengths: 0 to steps, or NULL. y (batch, width), weights (batch, steps): zeros beyond the length. */
INTERFUSE_API interfuse_status interfuse_attention_pool_forward(const interfuse_attention_pool_spec* spec, const void* x,
                                                                const void* hidden, const void* context,
                                                                const int64_t* lengths, void* y, void* weights,
                                                                int32_t threads);
/* grad_y as y and grad_weights as weights, or NULL for zeros. grad_x and grad_hidden are dense; grad_context
 * (batch, hidden) in float32 is to be summed over the batch. A gradient that is not wanted is NULL. */
INTERFUSE_API interfuse_status interfuse_attention_pool_backward(const interfuse_attention_pool_spec* spec, const void* x,
                                                                 const void* hidden, const void* context,
                                                                 const int64_t* lengths, const void* grad_y,
                                                                 const void* grad_weights, void* grad_x,
                                                                 void* grad_hidden, float* grad_context,
                                                                 int32_t threads);

/* ---- losses --------------------------------------------------------------------------------------------- */

typedef enum interfuse_reduction { INTERFUSE_REDUCE_NONE = 0, INTERFUSE_REDUCE_MEAN = 1, INTERFUSE_REDUCE_SUM = 2 } interfuse_reduction;

/* Cross-entropy of input weight^T + bias with labels, whose logits never exist for more than some rows at a time. */
typedef struct interfuse_cross_entropy_spec {
  int32_t dtype; /* interfuse_dtype of input, weight, bias and their gradients */
  int32_t reduction; /* interfuse_reduction; a mean is over the labels' class weights */
  int64_t rows, classes, features;
  int64_t input_row_stride; /* in elements; weight is dense */
  int64_t ignore_index;     /* a label of rows that do not count */
  float label_smoothing;    /* 0 to 1 */
} interfuse_cross_entropy_spec;

typedef struct interfuse_cross_entropy_tensors {
  const void* input;         /* (rows, features) */
  const void* weight;        /* (classes, features) */
  const void* bias;          /* (classes), or NULL */
  const float* class_weight; /* (classes), or NULL: all one */
  const int64_t* target;     /* (rows): classes, or ignore_index */
} interfuse_cross_entropy_tensors;

/* Dense, of the tensors' shapes and dtype; NULL where not wanted. */
typedef struct interfuse_cross_entropy_gradients {
  void *input, *weight, *bias;
} interfuse_cross_entropy_gradients;

/* loss is one float, or with reduction none one for each row. lse (rows), the logarithms of the sums of exponentials, is
 * what backward needs, or NULL. With gradients (or NULL), those of the loss itself are computed along with it: three
 * products of the size of the logits, where backward does four in all. Only for a reduction to one number. */
INTERFUSE_API interfuse_status interfuse_cross_entropy_forward(const interfuse_cross_entropy_spec* spec,
                                                               const interfuse_cross_entropy_tensors* tensors, float* loss,
                                                               float* lse, const interfuse_cross_entropy_gradients* gradients,
                                                               int32_t threads);
/* grad_loss is of loss's shape, lse from a forward of the same spec and tensors. */
INTERFUSE_API interfuse_status interfuse_cross_entropy_backward(const interfuse_cross_entropy_spec* spec,
                                                                const interfuse_cross_entropy_tensors* tensors,
                                                                const float* lse, const float* grad_loss,
                                                                const interfuse_cross_entropy_gradients* gradients,
                                                                int32_t threads);

/* Losses element by element: binary cross-entropy of logits, and the squared error. */
typedef enum interfuse_elementwise_loss_kind { INTERFUSE_LOSS_BCE_WITH_LOGITS = 0, INTERFUSE_LOSS_MSE = 1 } interfuse_elementwise_loss_kind;

typedef struct interfuse_elementwise_loss_spec {
  int32_t loss;      /* interfuse_elementwise_loss_kind */
  int32_t dtype;     /* interfuse_dtype of input, target and grad */
  int32_t reduction; /* interfuse_reduction; a mean is over all elements */
  int64_t rows, columns;         /* of input and target, which are dense */
  int64_t weight_strides[2];     /* of (row, column), in elements; that of the column is 0 or 1 */
  int64_t pos_weight_strides[2]; /* the same */
} interfuse_elementwise_loss_spec;

typedef struct interfuse_elementwise_loss_tensors {
  const void *input, *target;
  const float *weight, *pos_weight; /* or NULL: all one. pos_weight, of targets of one, is for binary cross-entropy */
} interfuse_elementwise_loss_tensors;

/* In one pass: loss (one float, or with reduction none one for each element) and grad, the gradient of input; each may be
 * NULL. grad_loss is of loss's shape; NULL: ones. */
INTERFUSE_API interfuse_status interfuse_elementwise_loss(const interfuse_elementwise_loss_spec* spec,
                                                          const interfuse_elementwise_loss_tensors* tensors,
                                                          const float* grad_loss, float* loss, void* grad, int32_t threads);

/* Contrastive loss of pairs of rows: (target d^2 + (1 - target) max(0, margin - d)^2) / 2, d their distance. */
typedef struct interfuse_contrastive_spec {
  int32_t dtype; /* interfuse_dtype of the rows and their gradients */
  int64_t rows, columns;
  float margin;
} interfuse_contrastive_spec;

/* a and b (rows, columns) dense; target, loss and slope (rows). slope is what backward needs, or NULL. */
INTERFUSE_API interfuse_status interfuse_contrastive_forward(const interfuse_contrastive_spec* spec, const void* a,
                                                             const void* b, const float* target, float* loss, float* slope,
                                                             int32_t threads);
/* The gradients asked for (NULL: not wanted), dense. At distance 0 they are 0. */
INTERFUSE_API interfuse_status interfuse_contrastive_backward(const interfuse_contrastive_spec* spec, const void* a,
                                                              const void* b, const float* slope, const float* grad_loss,
                                                              void* grad_a, void* grad_b, int32_t threads);

/* InfoNCE: row i of a chooses row i of b among all rows of b, by cross-entropy of their products over the temperature. */
typedef struct interfuse_info_nce_spec {
  int32_t dtype;     /* interfuse_dtype of the rows and their gradients */
  int32_t reduction; /* interfuse_reduction, over the rows */
  int32_t symmetric; /* the mean of this and of b's rows choosing among a's */
  int32_t normalize; /* rows are divided by their lengths first */
  int64_t rows, features;
  float temperature; /* above 0 */
} interfuse_info_nce_spec;

/* Of each row, what backward needs: the logarithm of the sum of exponentials, and the loss, in either direction; those of
 * the other direction are NULL where the loss is not symmetric. */
typedef struct interfuse_info_nce_sums {
  float *lse, *other_lse, *loss, *other_loss;
} interfuse_info_nce_sums;

/* loss is one float, or with reduction none one for each row; sums are written. kept is NULL, so that the matrix of
 * similarities never exists and backward computes its blocks again, or room for rows * (rows + rows / 16 + 64) floats,
 * which backward then reads. */
INTERFUSE_API interfuse_status interfuse_info_nce_forward(const interfuse_info_nce_spec* spec, const void* a, const void* b,
                                                          float* loss, const interfuse_info_nce_sums* sums, float* kept,
                                                          int32_t threads);
/* The gradients asked for (NULL: not wanted), dense. along, or NULL, receives the gradient by the temperature times minus
 * the temperature. The losses of sums may be NULL: they then follow from the rest, with fewer digits where they are small. */
INTERFUSE_API interfuse_status interfuse_info_nce_backward(const interfuse_info_nce_spec* spec, const void* a, const void* b,
                                                           const interfuse_info_nce_sums* sums, const float* kept,
                                                           const float* grad_loss, void* grad_a, void* grad_b, double* along,
                                                           int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
