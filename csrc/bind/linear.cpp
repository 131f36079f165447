#include <algorithm>

#include "bind/bind.h"
#include "common/scratch.h"

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

// What makes a module's call the same as that of its forward's kernel: its very type, that type's forward, and nobody's
// hooks, its own or those of all modules (torch_state.is_untouched asks the same in Python, at three times the price).
class Untouched {
 public:
  struct Layer {
    PyObject *weight, *bias, *scale, *activation, *slope;  // borrowed from the module
  };

  explicit Untouched(const py::tuple& given) : kind_(given[0]), forward_(given[1]), hooks_(given[2].cast<py::tuple>()), held_(given[3]) {}

  // 1 and the layer, 0 where it is to be called in another way, -1 with an exception set.
  int layer(PyObject* module, Layer& found) const {
    static PyObject* const no_forward = PyUnicode_InternFromString("forward");
    static PyObject* const names[] = {PyUnicode_InternFromString("weight"), PyUnicode_InternFromString("bias"),
                                      PyUnicode_InternFromString("scale"), PyUnicode_InternFromString("activation"),
                                      PyUnicode_InternFromString("negative_slope")};
    static PyObject* const own[] = {
        PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
        PyUnicode_InternFromString("_backward_hooks"), PyUnicode_InternFromString("_backward_pre_hooks")};
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind_.ptr()) return 0;
    const py::object state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    const py::object forward = py::reinterpret_steal<py::object>(PyObject_GetAttr(kind_.ptr(), no_forward));
    if (!state || !forward) return -1;
    const auto at = [](PyObject* dict, PyObject* name) { return PyDict_GetItemWithError(dict, name); };
    if (forward.ptr() != forward_.ptr() || at(state.ptr(), no_forward)) return 0;
    for (PyObject* const name : own)
      if (!is_empty(at(state.ptr(), name))) return 0;
    for (const py::handle& all : hooks_)
      if (!is_empty(all.ptr())) return 0;
    PyObject* const held = at(state.ptr(), held_.ptr());
    if (!held || !PyDict_Check(held)) return 0;
    PyObject* const scale = at(held, names[2]);
    found = {at(held, names[0]), at(held, names[1]), scale ? scale : Py_None, at(state.ptr(), names[3]), at(state.ptr(), names[4])};
    return found.weight && found.bias && found.activation && found.slope;
  }

 private:
  static bool is_empty(PyObject* dict) { return dict && PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0; }

  py::object kind_, forward_;
  py::tuple hooks_;
  py::object held_;  // the name of the module's dictionary that its tensors are in
};

// One inference call of a chain of layers as it was made once; see ConvPoolCall. A layer is (weight, bias, scale,
// arguments), and its arguments must be equal to the first call's; or all layers are the values of a dictionary of modules.
class LinearCall {
 public:
  static constexpr Py_ssize_t kArguments = 3;
  static constexpr const char* kDoc = "run takes inputs, layers and threads";

  LinearCall(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types, const py::list& descs,
             const py::tuple& inputs, const py::list& layers, const py::tuple& size, const py::tuple& strides,
             const py::tuple& untouched)
      : like_(exchange, watchers, types), untouched_(untouched), held_(descs), size_(size), strides_(strides) {
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
    const bool modules = PyDict_CheckExact(args[1]);
    if (!(PyTuple_CheckExact(args[0]) || PyList_CheckExact(args[0])) || !(modules || PyList_CheckExact(args[1]))) Py_RETURN_NONE;
    if (PySequence_Fast_GET_SIZE(args[0]) != static_cast<Py_ssize_t>(inputs_.size()) ||
        (modules ? PyDict_GET_SIZE(args[1]) : PyList_GET_SIZE(args[1])) != static_cast<Py_ssize_t>(layers_.size()))
      Py_RETURN_NONE;
    PyObject* const* given = PySequence_Fast_ITEMS(args[0]);
    std::vector<void*> from(inputs_.size());
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const int fits = like_.address(given[i], inputs_[i], &from[i]);
      if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
    }
    std::vector<interfuse_linear_weights> weights(layers_.size());
    Py_ssize_t place = 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
      PyObject* layer = nullptr;
      if (modules) PyDict_Next(args[1], &place, nullptr, &layer);
      else layer = PyList_GET_ITEM(args[1], static_cast<Py_ssize_t>(i));
      const int fits = modules ? module_fits(layer, layers_[i], weights[i]) : layer_fits(layer, layers_[i], weights[i]);
      if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
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

  int layer_fits(PyObject* layer, const Layer& expected, interfuse_linear_weights& weights) const {
    if (!PyTuple_CheckExact(layer) || PyTuple_GET_SIZE(layer) != 4) return 0;
    void* data[3];
    for (int k = 0; k < 3; ++k)
      if (const int fits = like_.address(PyTuple_GET_ITEM(layer, k), expected.expected[k], &data[k]); fits != 1) return fits;
    weights = {data[0], static_cast<const float*>(data[2]), data[1]};
    return PyObject_RichCompareBool(PyTuple_GET_ITEM(layer, 3), expected.arguments.ptr(), Py_EQ);
  }

  // A module's arguments are its activation, its slope and no backend.
  int module_fits(PyObject* module, const Layer& expected, interfuse_linear_weights& weights) const {
    Untouched::Layer found;
    if (const int plain = untouched_.layer(module, found); plain != 1) return plain;
    PyObject* const arguments = expected.arguments.ptr();
    if (!PyTuple_CheckExact(arguments) || PyTuple_GET_SIZE(arguments) != 3 || PyTuple_GET_ITEM(arguments, 2) != Py_None) return 0;
    void *weight, *bias, *scale;
    if (const int fits = like_.address(found.weight, expected.expected[0], &weight); fits != 1) return fits;
    if (const int fits = like_.address(found.bias, expected.expected[1], &bias); fits != 1) return fits;
    if (const int fits = like_.address(found.scale, expected.expected[2], &scale); fits != 1) return fits;
    weights = {weight, static_cast<const float*>(scale), bias};
    const int same = PyObject_RichCompareBool(found.activation, PyTuple_GET_ITEM(arguments, 0), Py_EQ);
    return same != 1 ? same : PyObject_RichCompareBool(found.slope, PyTuple_GET_ITEM(arguments, 1), Py_EQ);
  }

  Likeness like_;
  Untouched untouched_;
  py::list held_;
  py::tuple size_, strides_;
  std::vector<const interfuse_linear*> plans_;
  std::vector<Likeness::Tensor> inputs_;
  std::vector<Layer> layers_;
};

py::object linear_call(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types,
                       const py::list& descs, const py::tuple& inputs, const py::list& layers, const py::tuple& size,
                       const py::tuple& strides, const py::tuple& untouched) {
  return callable_of(std::make_unique<LinearCall>(exchange, watchers, types, descs, inputs, layers, size, strides, untouched));
}

// A training step of a chain of layers as it was made once, forward and backward; see LinearCall.
struct LinearTraining {
  Likeness like;
  py::list held;  // the plans' owners
  std::vector<const interfuse_linear*> plans;
  std::vector<Likeness::Tensor> inputs;
  struct Layer {
    Likeness::Tensor weight, bias, y;
    py::tuple size, strides;  // of y
    py::object arguments;
    bool keeps_y, keeps_pre;
  };
  std::vector<Layer> layers;
  struct Gradient {
    Likeness::Tensor like;
    py::tuple size, strides;
  };
  std::vector<Gradient> gradients;  // inputs, then each layer's weight and bias

  // The addresses of inputs and of each layer's weight and bias; 1, 0 where they are others than before, -1 as an exception.
  template <class Get>
  int addresses(Get&& get, std::vector<void*>& from, std::vector<interfuse_linear_weights>& weights) const {
    size_t at = 0;
    for (size_t i = 0; i < inputs.size(); ++i)
      if (const int fits = like.address(get(at++), inputs[i], &from[i]); fits != 1) return fits;
    for (size_t i = 0; i < layers.size(); ++i) {
      void *weight, *bias;
      if (const int fits = like.address(get(at++), layers[i].weight, &weight); fits != 1) return fits;
      if (const int fits = like.address(get(at++), layers[i].bias, &bias); fits != 1) return fits;
      weights[i] = {weight, nullptr, bias};
    }
    return 1;
  }
};

// run(inputs and each layer's weight and bias, the layers' arguments, threads): a list of what each layer gives, and one of
// the values before an activation that backward reads; None where the call is another one than before.
class LinearTrainingForward {
 public:
  static constexpr Py_ssize_t kArguments = 3;
  static constexpr const char* kDoc = "run takes tensors, the layers' arguments and threads";
  explicit LinearTrainingForward(std::shared_ptr<LinearTraining> made) : made_(std::move(made)) {}

  PyObject* run(PyObject* const* args, int threads) const {
    const LinearTraining& t = *made_;
    if (const int watched = t.like.watched()) return watched < 0 ? nullptr : Py_NewRef(Py_None);
    const size_t layers = t.layers.size();
    if (!PyTuple_CheckExact(args[0]) || !PyTuple_CheckExact(args[1]) ||
        PyTuple_GET_SIZE(args[0]) != static_cast<Py_ssize_t>(t.inputs.size() + 2 * layers) ||
        PyTuple_GET_SIZE(args[1]) != static_cast<Py_ssize_t>(layers))
      Py_RETURN_NONE;
    std::vector<void*> from(t.inputs.size());
    std::vector<interfuse_linear_weights> weights(layers);
    const int fits = t.addresses([&](size_t i) { return PyTuple_GET_ITEM(args[0], static_cast<Py_ssize_t>(i)); }, from, weights);
    if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
    std::vector<void*> ys(layers), pres(layers);
    py::list made(0), kept(0);
    for (size_t i = 0; i < layers; ++i) {
      const auto& layer = t.layers[i];
      const int same = PyObject_RichCompareBool(PyTuple_GET_ITEM(args[1], static_cast<Py_ssize_t>(i)), layer.arguments.ptr(), Py_EQ);
      if (same != 1) return same < 0 ? nullptr : Py_NewRef(Py_None);
      const py::object y = t.like.make_kept(PyTuple_GET_ITEM(args[0], 0), layer.y, layer.size, layer.strides, &ys[i]);
      if (!y) return nullptr;
      made.append(y);
      if (!layer.keeps_pre) continue;
      const py::object pre = t.like.make_kept(PyTuple_GET_ITEM(args[0], 0), layer.y, layer.size, layer.strides, &pres[i]);
      if (!pre) return nullptr;
      kept.append(pre);
    }
    interfuse_status status = INTERFUSE_OK;
    Py_BEGIN_ALLOW_THREADS;
    for (size_t i = 0; i < layers && status == INTERFUSE_OK; ++i)
      status = interfuse_linear_forward(t.plans[i], i ? &ys[i - 1] : from.data(), &weights[i], ys[i], pres[i], threads);
    Py_END_ALLOW_THREADS;
    return succeeded(status) ? py::make_tuple(made, kept).release().ptr() : nullptr;
  }

 private:
  std::shared_ptr<LinearTraining> made_;
};

// run(the gradient of the last output, what the forward took and then what it kept, which gradients are wanted, threads): the gradients in the order of what the forward took; None where a tensor is another one than it was.
class LinearTrainingBackward {
 public:
  static constexpr Py_ssize_t kArguments = 4;
  static constexpr const char* kDoc = "run takes the output's gradient, the saved tensors, a mask and threads";
  explicit LinearTrainingBackward(std::shared_ptr<LinearTraining> made) : made_(std::move(made)) {}

  PyObject* run(PyObject* const* args, int threads) const {
    const LinearTraining& t = *made_;
    if (const int watched = t.like.watched()) return watched < 0 ? nullptr : Py_NewRef(Py_None);
    const size_t layers = t.layers.size(), inputs = t.inputs.size(), taken = inputs + 2 * layers;
    if (!PyTuple_CheckExact(args[1]) || !PyTuple_CheckExact(args[2]) || PyTuple_GET_SIZE(args[2]) != static_cast<Py_ssize_t>(taken))
      Py_RETURN_NONE;
    const Py_ssize_t given = PyTuple_GET_SIZE(args[1]);
    Py_ssize_t next = static_cast<Py_ssize_t>(taken);
    // Behind what forward took come the outputs that are kept, and then what the activations need.
    std::vector<void*> from(inputs), ys(layers), pres(layers);
    std::vector<interfuse_linear_weights> weights(layers);
    if (given < next) Py_RETURN_NONE;
    int fits = t.addresses([&](size_t i) { return PyTuple_GET_ITEM(args[1], static_cast<Py_ssize_t>(i)); }, from, weights);
    for (int kind = 0; kind < 2; ++kind)
      for (size_t i = 0; i < layers && fits == 1; ++i) {
        if (!(kind ? t.layers[i].keeps_pre : t.layers[i].keeps_y)) continue;
        if (next == given) Py_RETURN_NONE;
        fits = t.like.address(PyTuple_GET_ITEM(args[1], next++), t.layers[i].y, kind ? &pres[i] : &ys[i]);
      }
    void* grad;
    if (fits == 1) fits = t.like.address(args[0], t.layers.back().y, &grad);
    if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
    py::list found(taken);
    std::vector<void*> to(taken);
    size_t first = layers;  // the first layer that something is wanted of; the gradients of the inputs are the first one's
    for (size_t i = taken; i-- > 0;) {
      if (PyTuple_GET_ITEM(args[2], static_cast<Py_ssize_t>(i)) == Py_True) {
        const auto& gradient = t.gradients[i];
        const py::object made = t.like.make_kept(args[0], gradient.like, gradient.size, gradient.strides, &to[i]);
        if (!made) return nullptr;
        found[i] = made;
        first = i < inputs ? 0 : (i - inputs) / 2;
        continue;
      }
      found[i] = py::none();
    }
    interfuse_status status = INTERFUSE_OK;
    Py_BEGIN_ALLOW_THREADS;
    status = backward(t, first, grad, from, weights, ys, pres, to, threads);
    Py_END_ALLOW_THREADS;
    return succeeded(status) ? found.release().ptr() : nullptr;
  }

 private:
  static interfuse_status backward(const LinearTraining& t, size_t first, const void* grad, const std::vector<void*>& from,
                                   const std::vector<interfuse_linear_weights>& weights, const std::vector<void*>& ys,
                                   const std::vector<void*>& pres, const std::vector<void*>& to, int threads) {
    size_t widest = 0;
    for (const auto& layer : t.layers) widest = std::max(widest, layer.y.bytes());
    widest = (widest + 63) / 64 * 64;
    char* between = nullptr;
    if (first + 1 < t.layers.size()) {
      try {
        between = static_cast<char*>(interfuse::scratch(interfuse::Slot::between, 2 * widest));
      } catch (const std::bad_alloc&) {
        return INTERFUSE_OUT_OF_MEMORY;
      }
    }
    const size_t inputs = from.size();
    for (size_t i = t.layers.size(); i-- > first;) {
      void* const below = i > first ? between + (i % 2) * widest : nullptr;
      const interfuse_status status = interfuse_linear_backward(
          t.plans[i], grad, i ? &ys[i - 1] : from.data(), weights[i].weight, ys[i], pres[i], i ? &below : to.data(),
          to[inputs + 2 * i], to[inputs + 2 * i + 1], threads);
      if (status != INTERFUSE_OK) return status;
      grad = below;
    }
    return INTERFUSE_OK;
  }

  std::shared_ptr<LinearTraining> made_;
};

// Forward and backward of a training step. A layer is (weight, bias, arguments, keeps_y, size and strides of its output).
py::tuple linear_training(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types, const py::list& descs,
                          const py::tuple& inputs, const py::list& layers) {
  if (inputs.empty() || layers.empty() || descs.size() != layers.size())
    throw py::value_error("linear: a training step is made of at least one input, and of a LinearDesc for each of its layers.");
  auto made = std::make_shared<LinearTraining>(LinearTraining{Likeness(exchange, watchers, types), descs, {}, {}, {}, {}});
  const auto dense = [&](Likeness::Tensor t) {
    int64_t step = 1;
    for (size_t i = t.shape.size(); i-- > 0;) {
      t.strides[i] = step;
      step *= std::max<int64_t>(t.shape[i], 1);
    }
    const py::tuple size(py::cast(t.shape)), strides(py::cast(t.strides));
    made->gradients.push_back({std::move(t), size, strides});
  };
  for (const py::handle& x : inputs) made->inputs.push_back(made->like.describe(py::reinterpret_borrow<py::object>(x)));
  for (const auto& x : made->inputs) dense(x);
  descs[0].cast<const LinearDesc&>().pointers<void>(std::vector<uintptr_t>(inputs.size()));  // throws where these are too few
  for (size_t i = 0; i < layers.size(); ++i) {
    const interfuse_linear* const plan = descs[i].cast<const LinearDesc&>().plan();
    const py::tuple layer = layers[i].cast<py::tuple>();
    const auto size = layer[4].cast<py::tuple>(), strides = layer[5].cast<py::tuple>();
    const auto weight = made->like.describe(layer[0]);
    const Likeness::Tensor y{static_cast<int32_t>(size.size()), weight.code, weight.bits, size.cast<Sizes>(), strides.cast<Sizes>()};
    made->plans.push_back(plan);
    made->layers.push_back({weight, made->like.describe(layer[1]), y, size, strides, layer[2], layer[3].cast<bool>(),
                            interfuse_linear_saved(plan) > 0});
    dense(weight), dense(made->layers.back().bias);
  }
  return py::make_tuple(callable_of(std::make_unique<LinearTrainingForward>(made)),
                        callable_of(std::make_unique<LinearTrainingBackward>(made)));
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
        py::arg("inputs"), py::arg("layers"), py::arg("size"), py::arg("strides"), py::arg("untouched"));
  m.def("linear_training", &linear_training, py::arg("exchange"), py::arg("watchers"), py::arg("types"), py::arg("descs"),
        py::arg("inputs"), py::arg("layers"));
  m.def("linear_backward", &linear_backward, py::arg("desc"), py::arg("grad_y"), py::arg("inputs"), py::arg("weight"),
        py::arg("y"), py::arg("pre"), py::arg("grad_inputs"), py::arg("grad_weight"), py::arg("grad_bias"),
        py::arg("threads"));
}

}  // namespace bind
}  // namespace interfuse
