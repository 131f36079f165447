// The losses' C API: checks, and what a loss is divided by.
#include "common/losses.h"

#include "common/error.h"
#include "common/parallel.h"

namespace interfuse {
namespace {

constexpr int64_t kMost = int64_t(1) << 40;

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    invalid("cross_entropy: %s is %lld; allowed is %lld to %lld.", name, (long long)value, (long long)least, (long long)most);
}

void check(const CrossEntropy& call) {
  const interfuse_cross_entropy_spec& s = call.spec;
  check_range("dtype", s.dtype, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16);
  check_range("reduction", s.reduction, INTERFUSE_REDUCE_NONE, INTERFUSE_REDUCE_SUM);
  check_range("rows", s.rows, 0, kMost);
  check_range("classes", s.classes, 1, INT32_MAX);
  check_range("features", s.features, 1, INT32_MAX);
  check_range("input_row_stride", s.input_row_stride, 0, kMost);
  if (!(s.label_smoothing >= 0 && s.label_smoothing <= 1))
    invalid("cross_entropy: label_smoothing is %g; allowed is 0 to 1.", static_cast<double>(s.label_smoothing));
  if (s.features > kMost / s.classes || (s.rows && s.classes > kMost / s.rows))
    invalid("cross_entropy: %lld rows, %lld classes and %lld features are too large together; split the rows.",
            (long long)s.rows, (long long)s.classes, (long long)s.features);
  if (!call.in.weight || (s.rows && (!call.in.input || !call.in.target)))
    invalid("cross_entropy: a null pointer was given for input, weight or target; all three are needed.");
  for (int64_t r = 0; r < s.rows; ++r) {
    const int64_t target = call.in.target[r];
    if (target != s.ignore_index && (target < 0 || target >= s.classes))
      invalid("cross_entropy: the target of row %lld is %lld; allowed are 0 to %lld, and %lld for rows that do not count.",
              (long long)r, (long long)target, (long long)(s.classes - 1), (long long)s.ignore_index);
  }
}

// The sums of weights that a mean and label smoothing need.
void add_up_weights(CrossEntropy& call) {
  double all = static_cast<double>(call.spec.classes), labels = 0;
  if (call.in.class_weight) {
    all = 0;
    for (int64_t j = 0; j < call.spec.classes; ++j) all += call.in.class_weight[j];
  }
  if (call.spec.reduction == INTERFUSE_REDUCE_MEAN) {
    for (int64_t r = 0; r < call.spec.rows; ++r)
      if (call.in.target[r] != call.spec.ignore_index) labels += call.class_weight(call.in.target[r]);
  } else {
    labels = 1;
  }
  call.weights = static_cast<float>(all), call.denominator = static_cast<float>(labels);
}

void run(CrossEntropy& call, const interfuse_cross_entropy_gradients* gradients, int32_t threads) {
  check(call);
  add_up_weights(call);
  if (gradients) call.grads = *gradients;
  call.threads = usable_threads(threads);
  INTERFUSE_PICK(loss_kernels)->cross_entropy(call);
}

}  // namespace
}  // namespace interfuse

using interfuse::invalid;

extern "C" {

interfuse_status interfuse_cross_entropy_forward(const interfuse_cross_entropy_spec* spec,
                                                 const interfuse_cross_entropy_tensors* tensors, float* loss, float* lse,
                                                 const interfuse_cross_entropy_gradients* gradients, int32_t threads) {
  return interfuse::guarded([&] {
    if (!spec || !tensors || (!loss && (spec->rows || spec->reduction != INTERFUSE_REDUCE_NONE)))
      invalid("cross_entropy: forward was given a null pointer for spec, tensors or loss.");
    interfuse::CrossEntropy call{};
    call.spec = *spec, call.in = *tensors, call.loss = loss, call.lse_out = lse;
    if (gradients && spec->reduction == INTERFUSE_REDUCE_NONE)
      invalid("cross_entropy: gradients come with the loss only where that is one number; use reduction mean or sum, or backward.");
    interfuse::run(call, gradients, threads);
  });
}

interfuse_status interfuse_cross_entropy_backward(const interfuse_cross_entropy_spec* spec,
                                                  const interfuse_cross_entropy_tensors* tensors, const float* lse,
                                                  const float* grad_loss, const interfuse_cross_entropy_gradients* gradients,
                                                  int32_t threads) {
  return interfuse::guarded([&] {
    if (!spec || !tensors || !gradients || (spec->rows && (!lse || !grad_loss)))
      invalid("cross_entropy: backward was given a null pointer for spec, tensors, lse, grad_loss or gradients.");
    interfuse::CrossEntropy call{};
    call.spec = *spec, call.in = *tensors, call.lse = lse, call.grad_loss = grad_loss;
    interfuse::run(call, gradients, threads);
  });
}

}  // extern "C"
