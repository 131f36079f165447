// conv_pool's C API: chooses the kernel for a checked problem and says why.
#include <memory>
#include <string>

#include "common/conv_pool.h"
#include "common/error.h"
#include "common/parallel.h"

using interfuse::ConvPool;
using interfuse::ConvPoolForward;
using interfuse::ConvPoolKernels;

namespace {

// The kernels for a forward call, the fastest first. The first whose why_not is empty runs; the last takes everything.
struct Algorithm {
  const char* name;
  std::string (*why_not)(const ConvPool&);
  void (*ConvPoolKernels::*run)(const ConvPool&, const ConvPoolForward&);
};
const Algorithm algorithms[] = {
    {"winograd", interfuse::winograd_why_not, &ConvPoolKernels::winograd},
    {"matrix", interfuse::matrix_why_not, &ConvPoolKernels::matrix},
    {"direct", [](const ConvPool&) { return std::string(); }, &ConvPoolKernels::direct},
};

}  // namespace

struct interfuse_conv_pool {
  ConvPool problem;
  const interfuse::ConvPoolKernels* kernels;
  const Algorithm* algorithm;
  std::string why;
};

extern "C" {

void interfuse_conv_pool_defaults(interfuse_conv_pool_spec* spec) {
  *spec = interfuse_conv_pool_spec{};
  spec->groups = 1;
  spec->negative_slope = 0.01f;
  spec->count_include_pad = 1;
  for (int axis = 0; axis < 3; ++axis)
    spec->input[axis] = spec->kernel[axis] = spec->stride[axis] = spec->dilation[axis] = spec->pool_size[axis] =
        spec->pool_stride[axis] = 1;
}

interfuse_status interfuse_conv_pool_create(const interfuse_conv_pool_spec* spec, interfuse_conv_pool** plan) {
  return interfuse::guarded([&] {
    if (!spec || !plan)
      interfuse::invalid("conv_pool: create was given a null pointer; pass a spec and a place for the plan.");
    auto made = std::make_unique<interfuse_conv_pool>();
    made->problem = interfuse::checked_conv_pool(*spec);
    made->kernels = INTERFUSE_PICK(conv_pool_kernels);
    made->algorithm = algorithms;
    for (;; ++made->algorithm) {
      const std::string reason = made->algorithm->why_not(made->problem);
      if (reason.empty()) break;
      made->why += (made->why.empty() ? "" : " ") + std::string("Not ") + made->algorithm->name + ": " + reason;
    }
    if (made->why.empty())
      made->why = std::string("The first in the table, ") + made->algorithm->name + ", takes this problem.";
    *plan = made.release();
  });
}

void interfuse_conv_pool_destroy(interfuse_conv_pool* plan) { delete plan; }

void interfuse_conv_pool_sizes(const interfuse_conv_pool* plan, int64_t conv[3], int64_t out[3]) {
  const ConvPool& p = plan->problem;
  conv[0] = p.conv.d, conv[1] = p.conv.h, conv[2] = p.conv.w;
  out[0] = p.out.d, out[1] = p.out.h, out[2] = p.out.w;
}

void interfuse_conv_pool_saved(const interfuse_conv_pool* plan, int64_t* index, int64_t* pre) {
  *index = plan->problem.index_count();
  *pre = plan->problem.pre_count();
}

const char* interfuse_conv_pool_algorithm(const interfuse_conv_pool* plan) { return plan->algorithm->name; }
const char* interfuse_conv_pool_why(const interfuse_conv_pool* plan) { return plan->why.c_str(); }

interfuse_status interfuse_conv_pool_forward(const interfuse_conv_pool* plan, const void* x, const void* weight,
                                             const void* bias, void* y, uint8_t* index, void* pre, int32_t threads) {
  return interfuse::guarded([&] {
    if (!plan) interfuse::invalid("conv_pool: forward was given no plan; make one with interfuse_conv_pool_create.");
    const ConvPool& p = plan->problem;
    if (p.batch == 0) return;
    if (!x || !weight || !y)
      interfuse::invalid("conv_pool: forward was given a null pointer for x, weight or y; all three are needed.");
    if ((p.index_count() && !index) || (p.pre_count() && !pre))
      interfuse::invalid(
          "conv_pool: this plan saves for backward; pass index and pre as large as interfuse_conv_pool_saved says.");
    (plan->kernels->*plan->algorithm->run)(p, {x, weight, bias, y, index, pre, interfuse::usable_threads(threads)});
  });
}

interfuse_status interfuse_conv_pool_backward(const interfuse_conv_pool* plan, const void* grad_y, const void* x,
                                              const void* weight, const void* y, const uint8_t* index, const void* pre,
                                              void* grad_x, void* grad_weight, void* grad_bias, int32_t threads) {
  return interfuse::guarded([&] {
    if (!plan) interfuse::invalid("conv_pool: backward was given no plan; make one with interfuse_conv_pool_create.");
    const ConvPool& p = plan->problem;
    if (!p.save) interfuse::invalid("conv_pool: backward needs a plan with save = 1, the one its forward ran with.");
    if (p.batch > 0) {
      if (!grad_y || (grad_weight && !x) || (grad_x && !weight))
        interfuse::invalid(
            "conv_pool: backward was given a null pointer; "
            "grad_y, x (for grad_weight) and weight (for grad_x) are needed.");
      if ((p.index_count() && !index) || (p.pre_count() && !pre) || (p.backward_reads_y() && !y))
        interfuse::invalid(
            "conv_pool: backward was not given what forward saved; pass its index, pre and, for this activation, y.");
    }
    plan->kernels->backward(p, {grad_y, x, weight, y, index, pre, grad_x, grad_weight, grad_bias,
                                interfuse::usable_threads(threads)});
  });
}

}  // extern "C"
