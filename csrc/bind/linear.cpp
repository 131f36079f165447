#include "bind/bind.h"

namespace interfuse {
namespace bind {
namespace {

class LinearDesc {
 public:
  LinearDesc(const std::string& dtype, const std::string& weight_dtype, int64_t rows, int64_t out_features,
             const Sizes& widths, const Sizes& row_strides, const std::string& activation, double negative_slope, bool save)
      : inputs_(widths.size()) {
    if (row_strides.size() != widths.size())
      throw py::value_error("linear: " + std::to_string(widths.size()) + " widths and " + std::to_string(row_strides.size()) +
                            " row strides were given; each input has one of both.");
    interfuse_linear_spec spec;
    interfuse_linear_defaults(&spec);
    spec.dtype = one_of("linear", "dtype", dtype, {"float32", "bfloat16"});
    spec.weight_dtype = one_of("linear", "weight_dtype", weight_dtype, {"float32", "bfloat16", "int8"});
    spec.rows = rows, spec.out_features = out_features;
    spec.inputs = static_cast<int32_t>(widths.size()), spec.widths = widths.data(), spec.row_strides = row_strides.data();
    spec.activation = one_of("linear", "activation", activation,
                             {"none", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softmax"});
    spec.negative_slope = static_cast<float>(negative_slope), spec.save = save;
    raise(interfuse_linear_create(&spec, &plan_));
  }
  ~LinearDesc() { interfuse_linear_destroy(plan_); }
  LinearDesc(const LinearDesc&) = delete;
  LinearDesc& operator=(const LinearDesc&) = delete;

  const interfuse_linear* plan() const { return plan_; }

  // The addresses as pointers, one for each input.
  template <class T>
  std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) const {
    if (addresses.size() != inputs_)
      throw py::value_error("linear: " + std::to_string(addresses.size()) + " input addresses were given; this plan has " +
                            std::to_string(inputs_) + " inputs.");
    std::vector<T*> all;
    for (const uintptr_t address : addresses) all.push_back(at<T>(address));
    return all;
  }

 private:
  interfuse_linear* plan_ = nullptr;
  size_t inputs_;
};

void linear_forward(const LinearDesc& desc, const std::vector<uintptr_t>& inputs, uintptr_t weight, uintptr_t scale,
                    uintptr_t bias, uintptr_t y, uintptr_t pre, int threads) {
  const auto from = desc.pointers<const void>(inputs);
  const interfuse_linear_weights weights{at<void>(weight), at<float>(scale), at<void>(bias)};
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_linear_forward(desc.plan(), from.data(), &weights, at<void>(y), at<void>(pre), threads);
  }
  raise(status);
}

void linear_chain(const std::vector<const LinearDesc*>& descs, const std::vector<uintptr_t>& inputs,
                  const std::vector<std::array<uintptr_t, 3>>& weights, uintptr_t y, int threads) {
  if (descs.empty() || descs.size() != weights.size())
    throw py::value_error("linear: a chain needs (weight, scale, bias) for each of its layers; got " +
                          std::to_string(descs.size()) + " layers and " + std::to_string(weights.size()) + " of these.");
  std::vector<const interfuse_linear*> plans;
  std::vector<interfuse_linear_weights> all;
  for (const LinearDesc* desc : descs) {
    if (!desc) throw py::value_error("linear: a layer of the chain is None; pass a LinearDesc for each layer.");
    plans.push_back(desc->plan());
  }
  for (const auto& w : weights) all.push_back({at<void>(w[0]), at<float>(w[1]), at<void>(w[2])});
  const auto from = descs[0]->pointers<const void>(inputs);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_linear_chain(plans.data(), all.data(), static_cast<int32_t>(plans.size()), from.data(), at<void>(y),
                                    threads);
  }
  raise(status);
}

void linear_backward(const LinearDesc& desc, uintptr_t grad_y, const std::vector<uintptr_t>& inputs, uintptr_t weight,
                     uintptr_t y, uintptr_t pre, const std::vector<uintptr_t>& grad_inputs, uintptr_t grad_weight,
                     uintptr_t grad_bias, int threads) {
  const auto from = desc.pointers<const void>(inputs);
  const auto to = desc.pointers<void>(grad_inputs);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_linear_backward(desc.plan(), at<void>(grad_y), from.data(), at<void>(weight), at<void>(y),
                                       at<void>(pre), to.data(), at<void>(grad_weight), at<void>(grad_bias), threads);
  }
  raise(status);
}

}  // namespace

void linear(py::module_& m) {
  py::class_<LinearDesc>(m, "LinearDesc")
      .def(py::init<const std::string&, const std::string&, int64_t, int64_t, const Sizes&, const Sizes&, const std::string&,
                    double, bool>(),
           py::arg("dtype"), py::arg("weight_dtype"), py::arg("rows"), py::arg("out_features"), py::arg("widths"),
           py::arg("row_strides"), py::arg("activation"), py::arg("negative_slope"), py::arg("save"));
  m.def("linear_forward", &linear_forward, py::arg("desc"), py::arg("inputs"), py::arg("weight"), py::arg("scale"),
        py::arg("bias"), py::arg("y"), py::arg("pre"), py::arg("threads"));
  m.def("linear_chain", &linear_chain, py::arg("descs"), py::arg("inputs"), py::arg("weights"), py::arg("y"),
        py::arg("threads"));
  m.def("linear_backward", &linear_backward, py::arg("desc"), py::arg("grad_y"), py::arg("inputs"), py::arg("weight"),
        py::arg("y"), py::arg("pre"), py::arg("grad_inputs"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::arg("threads"));
}

}  // namespace bind
}  // namespace interfuse
