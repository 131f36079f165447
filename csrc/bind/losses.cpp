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

// Addresses of input, target, weight, pos_weight, grad_loss, loss and grad; 0 for what is not there.
void elementwise_loss(const std::string& kind, const std::string& dtype, const std::string& reduction, int64_t rows,
                      int64_t columns, const std::array<int64_t, 2>& weight_strides,
                      const std::array<int64_t, 2>& pos_weight_strides, const std::array<uintptr_t, 7>& tensors, int threads) {
  const char* const op = "elementwise_loss";
  interfuse_elementwise_loss_spec spec{};
  spec.loss = one_of(op, "kind", kind, {"bce_with_logits", "mse"});
  spec.dtype = one_of(op, "dtype", dtype, {"float32", "bfloat16"});
  spec.reduction = one_of(op, "reduction", reduction, {"none", "mean", "sum"});
  spec.rows = rows, spec.columns = columns;
  for (int i = 0; i < 2; ++i)
    spec.weight_strides[i] = weight_strides[i], spec.pos_weight_strides[i] = pos_weight_strides[i];
  const interfuse_elementwise_loss_tensors in = {at<void>(tensors[0]), at<void>(tensors[1]), at<float>(tensors[2]),
                                                 at<float>(tensors[3])};
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_elementwise_loss(&spec, &in, at<float>(tensors[4]), at<float>(tensors[5]), at<void>(tensors[6]), threads);
  }
  raise(status);
}

interfuse_contrastive_spec contrastive_spec(const std::string& dtype, int64_t rows, int64_t columns, double margin) {
  return {one_of("contrastive", "dtype", dtype, {"float32", "bfloat16"}), rows, columns, static_cast<float>(margin)};
}

// Addresses of the two matrices, target, loss and slope.
void contrastive_loss(const std::string& dtype, int64_t rows, int64_t columns, double margin,
                      const std::array<uintptr_t, 5>& tensors, int threads) {
  const interfuse_contrastive_spec spec = contrastive_spec(dtype, rows, columns, margin);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_contrastive_forward(&spec, at<void>(tensors[0]), at<void>(tensors[1]), at<float>(tensors[2]),
                                           at<float>(tensors[3]), at<float>(tensors[4]), threads);
  }
  raise(status);
}

// Addresses of the two matrices, slope, grad_loss, and the gradients of the two.
void contrastive_loss_backward(const std::string& dtype, int64_t rows, int64_t columns,
                               const std::array<uintptr_t, 6>& tensors, int threads) {
  const interfuse_contrastive_spec spec = contrastive_spec(dtype, rows, columns, 0);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_contrastive_backward(&spec, at<void>(tensors[0]), at<void>(tensors[1]), at<float>(tensors[2]),
                                            at<float>(tensors[3]), at<void>(tensors[4]), at<void>(tensors[5]), threads);
  }
  raise(status);
}

interfuse_info_nce_spec info_nce_spec(const std::string& dtype, const std::string& reduction, bool symmetric, bool normalize,
                                      int64_t rows, int64_t features, double temperature) {
  return {one_of("info_nce", "dtype", dtype, {"float32", "bfloat16"}),
          one_of("info_nce", "reduction", reduction, {"none", "mean", "sum"}),
          symmetric, normalize, rows, features, static_cast<float>(temperature)};
}

// Addresses of the two matrices, the loss, both directions' logarithms and losses, and what is kept.
void info_nce(const std::string& dtype, const std::string& reduction, bool symmetric, bool normalize, int64_t rows,
              int64_t features, double temperature, const std::array<uintptr_t, 8>& tensors, int threads) {
  const interfuse_info_nce_spec spec = info_nce_spec(dtype, reduction, symmetric, normalize, rows, features, temperature);
  const interfuse_info_nce_sums sums = {at<float>(tensors[3]), at<float>(tensors[4]), at<float>(tensors[5]), at<float>(tensors[6])};
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_info_nce_forward(&spec, at<void>(tensors[0]), at<void>(tensors[1]), at<float>(tensors[2]), &sums,
                                        at<float>(tensors[7]), threads);
  }
  raise(status);
}

// Addresses of the two matrices, both directions' logarithms and losses, what was kept, grad_loss and the gradients.
// Returns the gradient by the temperature where that is wanted, else 0.
double info_nce_backward(const std::string& dtype, const std::string& reduction, bool symmetric, bool normalize, int64_t rows,
                         int64_t features, double temperature, const std::array<uintptr_t, 10>& tensors, bool by_temperature,
                         int threads) {
  const interfuse_info_nce_spec spec = info_nce_spec(dtype, reduction, symmetric, normalize, rows, features, temperature);
  const interfuse_info_nce_sums sums = {at<float>(tensors[2]), at<float>(tensors[3]), at<float>(tensors[4]), at<float>(tensors[5])};
  double along = 0;
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_info_nce_backward(&spec, at<void>(tensors[0]), at<void>(tensors[1]), &sums, at<float>(tensors[6]),
                                         at<float>(tensors[7]), at<void>(tensors[8]), at<void>(tensors[9]),
                                         by_temperature ? &along : nullptr, threads);
  }
  raise(status);
  return -along / temperature;
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
  m.def("elementwise_loss", &elementwise_loss, py::arg("kind"), py::arg("dtype"), py::arg("reduction"), py::arg("rows"),
        py::arg("columns"), py::arg("weight_strides"), py::arg("pos_weight_strides"), py::arg("tensors"), py::arg("threads"));
  m.def("contrastive_loss", &contrastive_loss, py::arg("dtype"), py::arg("rows"), py::arg("columns"), py::arg("margin"),
        py::arg("tensors"), py::arg("threads"));
  m.def("contrastive_loss_backward", &contrastive_loss_backward, py::arg("dtype"), py::arg("rows"), py::arg("columns"),
        py::arg("tensors"), py::arg("threads"));
  m.def("info_nce", &info_nce, py::arg("dtype"), py::arg("reduction"), py::arg("symmetric"), py::arg("normalize"),
        py::arg("rows"), py::arg("features"), py::arg("temperature"), py::arg("tensors"), py::arg("threads"));
  m.def("info_nce_backward", &info_nce_backward, py::arg("dtype"), py::arg("reduction"), py::arg("symmetric"),
        py::arg("normalize"), py::arg("rows"), py::arg("features"), py::arg("temperature"), py::arg("tensors"),
        py::arg("by_temperature"), py::arg("threads"));
}

}  // namespace bind
}  // namespace interfuse
