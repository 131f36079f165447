// The losses' C API: checks, and what a loss is divided by.
#include "common/losses.h"

#include "common/error.h"
#include "common/parallel.h"

namespace interfuse {
namespace {

void check(const CrossEntropy& call) {
  const interfuse_cross_entropy_spec& s = call.spec;
  check_range("cross_entropy", "dtype", s.dtype, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16);
  check_range("cross_entropy", "reduction", s.reduction, INTERFUSE_REDUCE_NONE, INTERFUSE_REDUCE_SUM);
  check_range("cross_entropy", "rows", s.rows, 0, kMostElements);
  check_range("cross_entropy", "classes", s.classes, 1, INT32_MAX);
  check_range("cross_entropy", "features", s.features, 1, INT32_MAX);
  check_range("cross_entropy", "input_row_stride", s.input_row_stride, 0, kMostElements);
  if (!(s.label_smoothing >= 0 && s.label_smoothing <= 1))
    invalid("cross_entropy: label_smoothing is %g; allowed is 0 to 1.", static_cast<double>(s.label_smoothing));
  if (s.features > kMostElements / s.classes || (s.rows && s.classes > kMostElements / s.rows))
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

// rows and columns of a pair of tensors.
void check_matrix(const char* op, int32_t dtype, int64_t rows, int64_t columns) {
  check_range(op, "dtype", dtype, INTERFUSE_FLOAT32, INTERFUSE_BFLOAT16);
  check_range(op, "rows", rows, 0, kMostElements);
  check_range(op, "columns", columns, 0, kMostElements);
  if (rows && columns > kMostElements / rows)
    invalid("%s: %lld rows of %lld columns are too large together; split the rows.", op, (long long)rows, (long long)columns);
}

void check(const interfuse_elementwise_loss_spec& s) {
  const char* const op = "elementwise_loss";
  check_range(op, "loss", s.loss, INTERFUSE_LOSS_BCE_WITH_LOGITS, INTERFUSE_LOSS_MSE);
  check_range(op, "reduction", s.reduction, INTERFUSE_REDUCE_NONE, INTERFUSE_REDUCE_SUM);
  check_matrix(op, s.dtype, s.rows, s.columns);
  for (const int64_t* strides : {s.weight_strides, s.pos_weight_strides}) {
    check_range(op, "the row stride of a weight", strides[0], 0, kMostElements);
    check_range(op, "the column stride of a weight", strides[1], 0, 1);
  }
}

void check(const interfuse_info_nce_spec& s) {
  const char* const op = "info_nce";
  check_range(op, "reduction", s.reduction, INTERFUSE_REDUCE_NONE, INTERFUSE_REDUCE_SUM);
  check_matrix(op, s.dtype, s.rows, s.features);
  check_range(op, "features", s.features, 1, kMostElements);
  if (s.rows && s.rows > kMostElements / s.rows)
    invalid("%s: the similarities of %lld rows are too many; split the rows.", op, (long long)s.rows);
  if (!(s.temperature > 0 && s.temperature <= 3.4e38f))
    invalid("%s: the temperature is %g; it must be a finite number above 0.", op, static_cast<double>(s.temperature));
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

interfuse_status interfuse_elementwise_loss(const interfuse_elementwise_loss_spec* spec,
                                            const interfuse_elementwise_loss_tensors* tensors, const float* grad_loss,
                                            float* loss, void* grad, int32_t threads) {
  return interfuse::guarded([&] {
    if (!spec || !tensors) invalid("elementwise_loss: a null pointer was given for spec or tensors; both are needed.");
    interfuse::check(*spec);
    const int64_t count = spec->rows * spec->columns;
    if (count && (!tensors->input || !tensors->target))
      invalid("elementwise_loss: a null pointer was given for input or target; both are needed.");
    interfuse::Elementwise call{*spec, tensors->input, tensors->target, tensors->weight, tensors->pos_weight, grad_loss,
                                loss, grad, 1.f, interfuse::usable_threads(threads)};
    if (spec->reduction == INTERFUSE_REDUCE_MEAN) call.scale = 1.f / static_cast<float>(count);
    INTERFUSE_PICK(pair_loss_kernels)->elementwise(call);
  });
}

interfuse_status interfuse_contrastive_forward(const interfuse_contrastive_spec* spec, const void* a, const void* b,
                                               const float* target, float* loss, float* slope, int32_t threads) {
  return interfuse::guarded([&] {
    if (!spec) invalid("contrastive: forward was given no spec.");
    interfuse::check_matrix("contrastive", spec->dtype, spec->rows, spec->columns);
    if (!(spec->margin >= 0)) invalid("contrastive: the margin is %g; allowed is 0 and above.", static_cast<double>(spec->margin));
    if (spec->rows && (!target || !loss || (spec->columns && (!a || !b))))
      invalid("contrastive: forward was given a null pointer for a, b, target or loss; all are needed.");
    INTERFUSE_PICK(pair_loss_kernels)->contrastive({*spec, a, b, target, loss, slope, interfuse::usable_threads(threads)});
  });
}

interfuse_status interfuse_contrastive_backward(const interfuse_contrastive_spec* spec, const void* a, const void* b,
                                                const float* slope, const float* grad_loss, void* grad_a, void* grad_b,
                                                int32_t threads) {
  return interfuse::guarded([&] {
    if (!spec) invalid("contrastive: backward was given no spec.");
    interfuse::check_matrix("contrastive", spec->dtype, spec->rows, spec->columns);
    if (spec->rows && (!slope || !grad_loss || (spec->columns && (!a || !b))))
      invalid("contrastive: backward was given a null pointer for a, b, slope or grad_loss; all are needed.");
    INTERFUSE_PICK(pair_loss_kernels)->contrastive_backward(
        {*spec, a, b, slope, grad_loss, grad_a, grad_b, interfuse::usable_threads(threads)});
  });
}

interfuse_status interfuse_info_nce_forward(const interfuse_info_nce_spec* spec, const void* a, const void* b, float* loss,
                                            const interfuse_info_nce_sums* sums, float* kept, int32_t threads) {
  return interfuse::guarded([&] {
    if (!spec || !sums) invalid("info_nce: forward was given a null pointer for spec or sums; both are needed.");
    interfuse::check(*spec);
    if (!loss && (spec->rows || spec->reduction != INTERFUSE_REDUCE_NONE))
      invalid("info_nce: forward was given no place for the loss.");
    if (spec->rows && (!a || !b || !sums->lse || !sums->loss || (spec->symmetric && (!sums->other_lse || !sums->other_loss))))
      invalid("info_nce: forward was given a null pointer for a, b or sums; all are needed.");
    if (!spec->rows && !loss) return;
    INTERFUSE_PICK(info_nce_kernels)->info_nce({*spec, a, b, nullptr, loss, {{sums->lse, sums->other_lse}, {sums->loss, sums->other_loss}},
                                                kept, nullptr, nullptr, nullptr, interfuse::usable_threads(threads)});
  });
}

interfuse_status interfuse_info_nce_backward(const interfuse_info_nce_spec* spec, const void* a, const void* b,
                                             const interfuse_info_nce_sums* sums, const float* kept, const float* grad_loss,
                                             void* grad_a, void* grad_b, double* along, int32_t threads) {
  return interfuse::guarded([&] {
    if (!spec || !sums) invalid("info_nce: backward was given a null pointer for spec or sums; both are needed.");
    interfuse::check(*spec);
    if (spec->rows && (!a || !b || !grad_loss || !sums->lse || (spec->symmetric && !sums->other_lse)))
      invalid("info_nce: backward was given a null pointer for a, b, grad_loss or sums; all are needed.");
    INTERFUSE_PICK(info_nce_kernels)->info_nce({*spec, a, b, grad_loss, nullptr, {{sums->lse, sums->other_lse}, {sums->loss, sums->other_loss}},
                                                const_cast<float*>(kept), grad_a, grad_b, along, interfuse::usable_threads(threads)});
  });
}

}  // extern "C"
