/* The core from C, without Python or torch: one convolution with ReLU and 2x2 max pooling.
 *
 *   cmake -S . -B build && cmake --build build && cmake --install build --prefix PREFIX
 *   cmake -S examples/embed -B build/embed -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build/embed
 *   build/embed/embed
 */
#include <interfuse.h>

#include <stdio.h>

int main(void) {
  interfuse_conv_pool_spec spec;
  interfuse_conv_pool_defaults(&spec);
  spec.batch = 1;
  spec.in_channels = 1;
  spec.out_channels = 2;
  spec.input[1] = spec.input[2] = 4;
  spec.kernel[1] = spec.kernel[2] = 3;
  spec.padding_lo[1] = spec.padding_lo[2] = spec.padding_hi[1] = spec.padding_hi[2] = 1;
  spec.activation = INTERFUSE_RELU;
  spec.pool = INTERFUSE_POOL_MAX;
  spec.pool_size[1] = spec.pool_size[2] = spec.pool_stride[1] = spec.pool_stride[2] = 2;

  interfuse_conv_pool* plan;
  if (interfuse_conv_pool_create(&spec, &plan) != INTERFUSE_OK) {
    fprintf(stderr, "%s\n", interfuse_last_error());
    return 1;
  }

  float x[16], weight[18] = {0}, y[8];
  const float bias[2] = {0.0f, 100.0f};
  for (int i = 0; i < 16; ++i) x[i] = (float)i;
  weight[4] = 1.0f;      /* the first kernel copies its centre */
  weight[9 + 4] = -2.0f; /* the second gives 100 - 2 x */

  int status = interfuse_conv_pool_forward(plan, x, weight, bias, y, NULL, NULL, 0);
  interfuse_conv_pool_destroy(plan);
  if (status != INTERFUSE_OK) {
    fprintf(stderr, "%s\n", interfuse_last_error());
    return 1;
  }
  printf("interfuse %s (%s):", interfuse_version(), interfuse_isa());
  for (int i = 0; i < 8; ++i) printf(" %g", (double)y[i]);
  printf("\n"); /* 5 7 13 15 100 96 84 80 */
  return 0;
}
