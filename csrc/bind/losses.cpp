#include "bind/bind.h"

namespace interfuse {
namespace bind {
namespace {

// Addresses; 0 for what is not there. Input, weight, bias, class weights (float32) and targets (int64) in this order.
using CrossEntropyTensors = std::array<uintptr_t, 5>;
using Three = std::array<uintptr_t, 3>;

class CrossEntropyDesc {
 public:
  CrossEntropyDesc(const std::string& dtype, int64_t rows, int64_t classes, int64_t features, int64_t input_row_stride,
                   const std::string& reduction, int64_t ignore_index, double label_smoothing) {
    spec.dtype = one_of("cross_entropy", "dtype", dtype, {"float32", "bfloat16"});
    spec.reduction = one_of("cross_entropy", "reduction", reduction, {"none", "mean", "sum"});
    spec.rows = rows, spec.classes = classes, spec.features = features, spec.input_row_stride = input_row_stride;
    spec.ignore_index = ignore_index, spec.label_smoothing = static_cast<float>(label_smoothing);
  }
  interfuse_cross_entropy_spec spec{};
};

interfuse_cross_entropy_tensors tensors_of(const CrossEntropyTensors& given) {
  return {at<void>(given[0]), at<void>(given[1]), at<void>(given[2]), at<float>(given[3]), at<int64_t>(given[4])};
}

void cross_entropy_forward(const CrossEntropyDesc& desc, const CrossEntropyTensors& tensors, uintptr_t loss, uintptr_t lse,
                           const Three& gradients, int threads) {
  const interfuse_cross_entropy_tensors in = tensors_of(tensors);
  const interfuse_cross_entropy_gradients grads = {at<void>(gradients[0]), at<void>(gradients[1]), at<void>(gradients[2])};
  const bool wanted = gradients[0] || gradients[1] || gradients[2];
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_cross_entropy_forward(&desc.spec, &in, at<float>(loss), at<float>(lse), wanted ? &grads : nullptr, threads);
  }
  raise(status);
}

void cross_entropy_backward(const CrossEntropyDesc& desc, const CrossEntropyTensors& tensors, uintptr_t lse,
                            uintptr_t grad_loss, const Three& gradients, int threads) {
  const interfuse_cross_entropy_tensors in = tensors_of(tensors);
  const interfuse_cross_entropy_gradients grads = {at<void>(gradients[0]), at<void>(gradients[1]), at<void>(gradients[2])};
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_cross_entropy_backward(&desc.spec, &in, at<float>(lse), at<float>(grad_loss), &grads, threads);
  }
  raise(status);
}

}  // namespace

void losses(py::module_& m) {
  py::class_<CrossEntropyDesc>(m, "CrossEntropyDesc")
      .def(py::init<const std::string&, int64_t, int64_t, int64_t, int64_t, const std::string&, int64_t, double>(),
           py::arg("dtype"), py::arg("rows"), py::arg("classes"), py::arg("features"), py::arg("input_row_stride"),
           py::arg("reduction"), py::arg("ignore_index"), py::arg("label_smoothing"));
  m.def("cross_entropy_forward", &cross_entropy_forward, py::arg("desc"), py::arg("tensors"), py::arg("loss"),
        py::arg("lse"), py::arg("gradients"), py::arg("threads"));
  m.def("cross_entropy_backward", &cross_entropy_backward, py::arg("desc"), py::arg("tensors"), py::arg("lse"),
        py::arg("grad_loss"), py::arg("gradients"), py::arg("threads"));
}

}  // namespace bind
}  // namespace interfuse
