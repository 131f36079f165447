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

// One inference call of a chain of layers as it was made once; see ConvPoolCall. A layer is (weight, bias, scale,
// arguments), and its arguments must be equal to the first call's.
class LinearCall {
 public:
  static constexpr Py_ssize_t kArguments = 3;
  static constexpr const char* kDoc = "run takes inputs, layers and threads";

  LinearCall(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types, const py::list& descs,
             const py::tuple& inputs, const py::list& layers, const py::tuple& size, const py::tuple& strides)
      : like_(exchange, watchers, types), held_(descs), size_(size), strides_(strides) {
    if (inputs.empty() || layers.empty() || descs.size() != layers.size())
      throw py::value_error("linear: a call is made of at least one input, and of a LinearDesc for each of its layers.");
    for (const py::handle& desc : descs) plans_.push_back(desc.cast<const LinearDesc&>().plan());
    for (const py::handle& x : inputs) inputs_.push_back(like_.describe(py::reinterpret_borrow<py::object>(x)));
    descs[0].cast<const LinearDesc&>().pointers<void>(std::vector<uintptr_t>(inputs.size()));  // throws where these are too few
    for (const py::handle& given : layers) {
      const py::tuple layer = py::reinterpret_borrow<py::tuple>(given);
      layers_.push_back({{like_.describe(layer[0]), like_.describe(layer[1]), like_.describe(layer[2])}, layer[3]});
    }
  }

  PyObject* run(PyObject* const* args, int threads) const {
    if (const int watched = like_.watched()) return watched < 0 ? nullptr : Py_NewRef(Py_None);
    if (!(PyTuple_CheckExact(args[0]) || PyList_CheckExact(args[0])) || !PyList_CheckExact(args[1])) Py_RETURN_NONE;
    if (PySequence_Fast_GET_SIZE(args[0]) != static_cast<Py_ssize_t>(inputs_.size()) ||
        PyList_GET_SIZE(args[1]) != static_cast<Py_ssize_t>(layers_.size()))
      Py_RETURN_NONE;
    PyObject* const* given = PySequence_Fast_ITEMS(args[0]);
    std::vector<void*> from(inputs_.size());
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const int fits = like_.address(given[i], inputs_[i], &from[i]);
      if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
    }
    std::vector<interfuse_linear_weights> weights(layers_.size());
    for (size_t i = 0; i < layers_.size(); ++i) {
      PyObject* const layer = PyList_GET_ITEM(args[1], static_cast<Py_ssize_t>(i));
      if (!PyTuple_CheckExact(layer) || PyTuple_GET_SIZE(layer) != 4) Py_RETURN_NONE;
      void* data[3];
      for (int k = 0; k < 3; ++k) {
        const int fits = like_.address(PyTuple_GET_ITEM(layer, k), layers_[i].expected[k], &data[k]);
        if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
      }
      const int same = PyObject_RichCompareBool(PyTuple_GET_ITEM(layer, 3), layers_[i].arguments.ptr(), Py_EQ);
      if (same != 1) return same < 0 ? nullptr : Py_NewRef(Py_None);
      weights[i] = {data[0], static_cast<const float*>(data[2]), data[1]};
    }
    void* to;
    py::object y = like_.make(given[0], size_, strides_, &to);
    if (!y) return nullptr;
    interfuse_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = interfuse_linear_chain(plans_.data(), weights.data(), static_cast<int32_t>(plans_.size()), from.data(), to, threads);
    Py_END_ALLOW_THREADS;
    return succeeded(status) ? y.release().ptr() : nullptr;
  }

 private:
  struct Layer {
    Likeness::Tensor expected[3];
    py::object arguments;
  };
  Likeness like_;
  py::list held_;
  py::tuple size_, strides_;
  std::vector<const interfuse_linear*> plans_;
  std::vector<Likeness::Tensor> inputs_;
  std::vector<Layer> layers_;
};

py::object linear_call(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types,
                       const py::list& descs, const py::tuple& inputs, const py::list& layers, const py::tuple& size,
                       const py::tuple& strides) {
  return callable_of(std::make_unique<LinearCall>(exchange, watchers, types, descs, inputs, layers, size, strides));
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
  m.def("linear_call", &linear_call, py::arg("exchange"), py::arg("watchers"), py::arg("types"), py::arg("descs"),
        py::arg("inputs"), py::arg("layers"), py::arg("size"), py::arg("strides"));
  m.def("linear_backward", &linear_backward, py::arg("desc"), py::arg("grad_y"), py::arg("inputs"), py::arg("weight"),
        py::arg("y"), py::arg("pre"), py::arg("grad_inputs"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::arg("threads"));
}

}  // namespace bind
}  // namespace interfuse
