// The Python binding: passes pointers. What they point to was checked on the Python side (dtype, device, shape,
// strides); what the numbers say is checked by the core.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "common/dlpack.h"
#include "common/machine_peak.h"
#include "interfuse.h"

namespace py = pybind11;

namespace {

void raise(interfuse_status status) {
  if (status == INTERFUSE_OK) return;
  const char* message = interfuse_last_error();
  switch (status) {
    case INTERFUSE_INVALID: throw py::value_error(message);
    case INTERFUSE_OUT_OF_MEMORY: PyErr_SetString(PyExc_MemoryError, message); throw py::error_already_set();
    default: throw std::runtime_error(message);
  }
}

using Sizes = std::vector<int64_t>;

// Python's lists have one entry per spatial dimension; the core's arrays have three, filled from the right.
void fill(const char* name, const Sizes& from, int spatial, int64_t* to) {
  if (static_cast<int>(from.size()) != spatial)
    throw py::value_error("conv_pool: " + std::string(name) + " has " + std::to_string(from.size()) + " entries; " +
                          std::to_string(spatial) + " are needed, one per spatial dimension.");
  for (int axis = 0; axis < spatial; ++axis) to[3 - spatial + axis] = from[axis];
}

int32_t one_of(const char* op, const char* name, const std::string& value, std::initializer_list<const char*> names) {
  int32_t at = 0;
  for (const char* candidate : names) {
    if (value == candidate) return at;
    ++at;
  }
  std::string allowed;
  for (const char* candidate : names) allowed += (allowed.empty() ? "'" : ", '") + std::string(candidate) + "'";
  throw py::value_error(std::string(op) + ": " + name + " is '" + value + "'; allowed are " + allowed + ".");
}

class ConvPoolDesc {
 public:
  ConvPoolDesc(int spatial, const std::string& dtype, bool channels_last, int64_t batch, int64_t in_channels,
               int64_t out_channels, int64_t groups, const Sizes& input, const Sizes& kernel, const Sizes& stride,
               const Sizes& padding, const Sizes& dilation, const Sizes& x_strides, const std::string& activation,
               double negative_slope, const std::string& pool, const Sizes& pool_size, const Sizes& pool_stride,
               const Sizes& pool_padding, bool ceil_mode, bool count_include_pad, const std::string& precision, bool save)
      : spatial_(spatial) {
    if (spatial < 1 || spatial > 3)
      throw py::value_error("conv_pool: spatial is " + std::to_string(spatial) + "; 1, 2 and 3 dimensions are supported.");
    if (static_cast<int>(padding.size()) != 2 * spatial)
      throw py::value_error("conv_pool: padding has " + std::to_string(padding.size()) + " entries; " +
                            std::to_string(2 * spatial) + " are needed, (low, high) per spatial dimension.");
    if (x_strides.size() != 5)
      throw py::value_error("conv_pool: x_strides has " + std::to_string(x_strides.size()) +
                            " entries; 5 are needed: batch, channel, depth, height, width.");
    interfuse_conv_pool_spec spec;
    interfuse_conv_pool_defaults(&spec);
    spec.dtype = one_of("conv_pool", "dtype", dtype, {"float32", "bfloat16"});
    spec.channels_last = channels_last;
    spec.batch = batch, spec.in_channels = in_channels, spec.out_channels = out_channels, spec.groups = groups;
    fill("input", input, spatial, spec.input);
    fill("kernel", kernel, spatial, spec.kernel);
    fill("stride", stride, spatial, spec.stride);
    fill("dilation", dilation, spatial, spec.dilation);
    for (int axis = 0; axis < spatial; ++axis) {
      spec.padding_lo[3 - spatial + axis] = padding[2 * axis];
      spec.padding_hi[3 - spatial + axis] = padding[2 * axis + 1];
    }
    for (int axis = 0; axis < 5; ++axis) spec.x_strides[axis] = x_strides[axis];
    spec.activation = one_of("conv_pool", "activation", activation,
                             {"none", "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"});
    spec.negative_slope = static_cast<float>(negative_slope);
    spec.pool = one_of("conv_pool", "pool", pool, {"none", "max", "avg"});
    if (spec.pool != INTERFUSE_POOL_NONE) {
      fill("pool_size", pool_size, spatial, spec.pool_size);
      fill("pool_stride", pool_stride, spatial, spec.pool_stride);
      fill("pool_padding", pool_padding, spatial, spec.pool_padding);
    }
    spec.ceil_mode = ceil_mode, spec.count_include_pad = count_include_pad;
    spec.precision = one_of("conv_pool", "precision", precision, {"default", "highest"});
    spec.save = save;
    raise(interfuse_conv_pool_create(&spec, &plan_));
  }
  ~ConvPoolDesc() { interfuse_conv_pool_destroy(plan_); }
  ConvPoolDesc(const ConvPoolDesc&) = delete;
  ConvPoolDesc& operator=(const ConvPoolDesc&) = delete;

  const interfuse_conv_pool* plan() const { return plan_; }
  Sizes conv_sizes() const { return sizes().first; }
  Sizes out_sizes() const { return sizes().second; }

 private:
  std::pair<Sizes, Sizes> sizes() const {
    int64_t conv[3], out[3];
    interfuse_conv_pool_sizes(plan_, conv, out);
    return {Sizes(conv + 3 - spatial_, conv + 3), Sizes(out + 3 - spatial_, out + 3)};
  }
  int spatial_;
  interfuse_conv_pool* plan_ = nullptr;
};

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void conv_pool_forward(const ConvPoolDesc& desc, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t y,
                       uintptr_t index, uintptr_t pre, int threads) {
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_conv_pool_forward(desc.plan(), at<void>(x), at<void>(weight), at<void>(bias), at<void>(y),
                                         at<uint8_t>(index), at<void>(pre), threads);
  }
  raise(status);
}

void conv_pool_backward(const ConvPoolDesc& desc, uintptr_t grad_y, uintptr_t x, uintptr_t weight, uintptr_t y,
                        uintptr_t index, uintptr_t pre, uintptr_t grad_x, uintptr_t grad_weight, uintptr_t grad_bias,
                        int threads) {
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_conv_pool_backward(desc.plan(), at<void>(grad_y), at<void>(x), at<void>(weight), at<void>(y),
                                          at<uint8_t>(index), at<void>(pre), at<void>(grad_x), at<void>(grad_weight),
                                          at<void>(grad_bias), threads);
  }
  raise(status);
}

// What the tensors of one inference call were like. Made again, they are compared here: through DLPack's exchange table
// that takes a fifth of the time of asking each tensor for its shape, strides, dtype, device and address in Python.
// Every error is a Python exception that is set, and null or -1 returned: a vectorcall passes no C++ exceptions on.
class Likeness {
 public:
  struct Tensor {
    int32_t ndim = 0;  // 0: no tensor
    uint8_t code = 0, bits = 0;
    Sizes shape, strides;
    bool fits(const interfuse::DLTensor& t) const {
      return t.device_type == interfuse::kDLCPU && t.ndim == ndim && t.dtype.code == code && t.dtype.bits == bits &&
             !memcmp(t.shape, shape.data(), shape.size() * sizeof(int64_t)) &&
             !memcmp(t.strides, strides.data(), strides.size() * sizeof(int64_t));
    }
  };

  Likeness(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types) : watchers_(watchers), types_(types) {
    const auto* api = static_cast<const interfuse::DLPackExchangeAPI*>(
        PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->version.major != interfuse::kDLPackMajor || !api->dltensor_from_py_object_no_sync)
      throw py::value_error("interfuse: the exchange table has DLPack's version " + std::to_string(api->version.major) +
                            " or no dltensor_from_py_object_no_sync; version 1 with it is needed.");
    view_ = api->dltensor_from_py_object_no_sync;
  }

  Tensor describe(const py::object& tensor) const {
    if (tensor.is_none()) return {};
    interfuse::DLTensor t;
    if (view_(tensor.ptr(), &t) != 0) throw py::error_already_set();
    return {t.ndim, t.dtype.code, t.dtype.bits, Sizes(t.shape, t.shape + t.ndim), Sizes(t.strides, t.strides + t.ndim)};
  }

  // Whether one of the watchers returns something true; -1 with an exception set.
  int watched() const {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watchers_.ptr()); ++i)
      if (const int watches = is_true(PyObject_CallNoArgs(PyTuple_GET_ITEM(watchers_.ptr(), i)))) return watches;
    return 0;
  }

  // 1 and the address, 0 where the tensor is not as expected (or a lazy negation), -1 with an exception set.
  int address(PyObject* tensor, const Tensor& expected, void** data) const {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    *data = nullptr;
    if (tensor == Py_None || expected.ndim == 0) return tensor == Py_None && expected.ndim == 0;
    const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    if (type != PyTuple_GET_ITEM(types_.ptr(), 0) && type != PyTuple_GET_ITEM(types_.ptr(), 1)) return 0;
    interfuse::DLTensor t;
    if (view_(tensor, &t) != 0) {  // a sparse one, for example
      PyErr_Clear();
      return 0;
    }
    if (!expected.fits(t)) return 0;
    *data = static_cast<char*>(t.data) + t.byte_offset;
    const int negated = is_true(PyObject_VectorcallMethod(is_neg, &tensor, 1, nullptr));
    return negated < 0 ? -1 : !negated;
  }

  // A new tensor beside another, and its address; null with an exception set.
  py::object make(PyObject* beside, const py::handle& size, const py::handle& strides, void** data) const {
    static PyObject* const new_empty_strided = PyUnicode_InternFromString("new_empty_strided");
    PyObject* const made_from[] = {beside, size.ptr(), strides.ptr()};
    py::object made = py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(new_empty_strided, made_from, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    interfuse::DLTensor t;
    if (!made || view_(made.ptr(), &t) != 0) return {};
    *data = t.data;
    return made;
  }

 private:
  // Of a new reference, which it takes: 1, 0, or -1 with an exception set.
  static int is_true(PyObject* result) {
    if (!result) return -1;
    const int value = PyObject_IsTrue(result);
    Py_DECREF(result);
    return value;
  }

  py::tuple watchers_, types_;
  int (*view_)(void*, interfuse::DLTensor*) = nullptr;
};

// Whether the core succeeded; otherwise its exception is set.
bool succeeded(interfuse_status status) {
  if (status == INTERFUSE_OK) return true;
  PyObject* kind = status == INTERFUSE_INVALID         ? PyExc_ValueError
                   : status == INTERFUSE_OUT_OF_MEMORY ? PyExc_MemoryError
                                                       : PyExc_RuntimeError;
  PyErr_SetString(kind, interfuse_last_error());
  return false;
}

// The `run` of a call as a callable of its own, which owns the call. It is Python's own vectorcall and not pybind11's
// dispatch, which would take most of the time that is gained.
template <class Call>
py::object callable_of(std::unique_ptr<Call> call) {
  static PyMethodDef run = {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
                                       static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>(
                                           [](PyObject* self, PyObject* const* args, Py_ssize_t count) -> PyObject* {
                                             const auto* made = static_cast<const Call*>(PyCapsule_GetPointer(self, nullptr));
                                             if (!made) return nullptr;
                                             if (count != Call::kArguments)
                                               return PyErr_Format(PyExc_TypeError, "%s; got %zd arguments.", Call::kDoc, count);
                                             const long threads = PyLong_AsLong(args[count - 1]);
                                             if (threads == -1 && PyErr_Occurred()) return nullptr;
                                             try {
                                               return made->run(args, static_cast<int>(threads));
                                             } catch (const std::bad_alloc&) {
                                               return PyErr_NoMemory();
                                             }
                                           }))),
                            METH_FASTCALL, Call::kDoc};
  const py::capsule owner(call.get(), [](void* made) { delete static_cast<Call*>(made); });
  call.release();
  return py::reinterpret_steal<py::object>(PyCFunction_New(&run, owner.ptr()));
}

// One inference call of conv_pool as it was made once. run gives the output, or None where a watcher returns something
// true or one of the tensors is not like the one of the first call.
class ConvPoolCall {
 public:
  static constexpr Py_ssize_t kArguments = 4;
  static constexpr const char* kDoc = "run takes x, weight, bias and threads";

  ConvPoolCall(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types, const py::object& desc,
               const py::object& x, const py::object& weight, const py::object& bias, const py::tuple& size,
               const py::tuple& strides)
      : like_(exchange, watchers, types), held_(desc), size_(size), strides_(strides),
        desc_(desc.cast<const ConvPoolDesc&>()), expected_{like_.describe(x), like_.describe(weight), like_.describe(bias)} {}

  PyObject* run(PyObject* const* args, int threads) const {
    void *data[3], *to;
    if (const int watched = like_.watched()) return watched < 0 ? nullptr : Py_NewRef(Py_None);
    for (int i = 0; i < 3; ++i) {
      const int fits = like_.address(args[i], expected_[i], &data[i]);
      if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
    }
    py::object y = like_.make(args[0], size_, strides_, &to);
    if (!y) return nullptr;
    interfuse_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = interfuse_conv_pool_forward(desc_.plan(), data[0], data[1], data[2], to, nullptr, nullptr, threads);
    Py_END_ALLOW_THREADS;
    return succeeded(status) ? y.release().ptr() : nullptr;
  }

 private:
  Likeness like_;
  py::object held_;
  py::tuple size_, strides_;
  const ConvPoolDesc& desc_;
  Likeness::Tensor expected_[3];
};

py::object conv_pool_call(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types,
                          const py::object& desc, const py::object& x, const py::object& weight, const py::object& bias,
                          const py::tuple& size, const py::tuple& strides) {
  return callable_of(std::make_unique<ConvPoolCall>(exchange, watchers, types, desc, x, weight, bias, size, strides));
}

class RnnDesc {
 public:
  RnnDesc(const std::string& cell, int directions, bool bias, bool save, const std::string& weight_dtype,
          bool batch_first, int64_t batch, int64_t steps, int64_t input_size, int64_t hidden_size, int64_t proj_size,
          int64_t layers, const std::array<int64_t, 2>& x_strides, int64_t vocabulary) {
    interfuse_rnn_spec spec;
    interfuse_rnn_defaults(&spec);
    spec.cell = one_of("rnn", "cell", cell, {"rnn_tanh", "rnn_relu", "lstm", "gru"});
    spec.directions = directions, spec.bias = bias, spec.save = save, spec.batch_first = batch_first;
    spec.weight_dtype = one_of("rnn", "weight_dtype", weight_dtype, {"float32", "bfloat16"});
    spec.batch = batch, spec.steps = steps, spec.input_size = input_size, spec.hidden_size = hidden_size;
    spec.proj_size = proj_size, spec.layers = layers, spec.vocabulary = vocabulary;
    spec.x_strides[0] = x_strides[0], spec.x_strides[1] = x_strides[1];
    raise(interfuse_rnn_create(&spec, &plan_));
    weights_ = static_cast<size_t>(layers * directions);
  }
  ~RnnDesc() { interfuse_rnn_destroy(plan_); }
  RnnDesc(const RnnDesc&) = delete;
  RnnDesc& operator=(const RnnDesc&) = delete;

  const interfuse_rnn* plan() const { return plan_; }
  int64_t reserve() const { return interfuse_rnn_reserve(plan_); }

  // Five addresses for each layer and direction, 0 where there is none.
  std::vector<interfuse_rnn_weights> weights(const std::vector<uintptr_t>& addresses) const {
    if (addresses.size() != 5 * weights_)
      throw py::value_error("rnn: " + std::to_string(addresses.size()) + " weight addresses were given; " +
                            std::to_string(5 * weights_) + " are needed: w_ih, w_hh, b_ih, b_hh, w_hr (0 for none) of each "
                            "layer and direction.");
    std::vector<interfuse_rnn_weights> all(weights_);
    for (size_t i = 0; i < weights_; ++i) {
      const uintptr_t* from = addresses.data() + 5 * i;
      all[i] = {at<float>(from[0]), at<float>(from[1]), at<float>(from[2]), at<float>(from[3]), at<float>(from[4])};
    }
    return all;
  }

 private:
  interfuse_rnn* plan_ = nullptr;
  size_t weights_ = 0;
};

interfuse_rnn_sequences sequences(uintptr_t x, uintptr_t ids, uintptr_t lengths, uintptr_t h0, uintptr_t c0) {
  return {at<const float>(x), at<const int64_t>(ids), at<const int64_t>(lengths), at<const float>(h0),
          at<const float>(c0)};
}

void rnn_forward(const RnnDesc& desc, uintptr_t x, uintptr_t ids, uintptr_t lengths, uintptr_t h0, uintptr_t c0,
                 const std::vector<uintptr_t>& weights, uintptr_t y, uintptr_t hn, uintptr_t cn, uintptr_t reserve,
                 int threads) {
  const auto all = desc.weights(weights);
  const interfuse_rnn_sequences in = sequences(x, ids, lengths, h0, c0);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_rnn_forward(desc.plan(), &in, all.data(), at<float>(y), at<float>(hn), at<float>(cn),
                                   at<float>(reserve), threads);
  }
  raise(status);
}

void rnn_backward(const RnnDesc& desc, uintptr_t x, uintptr_t ids, uintptr_t lengths, uintptr_t h0, uintptr_t c0,
                  const std::vector<uintptr_t>& weights, uintptr_t reserve, uintptr_t grad_y, uintptr_t grad_hn,
                  uintptr_t grad_cn, uintptr_t grad_x, uintptr_t grad_h0, uintptr_t grad_c0,
                  const std::vector<uintptr_t>& grad_weights, int threads) {
  const auto all = desc.weights(weights), grads = desc.weights(grad_weights);
  const interfuse_rnn_sequences in = sequences(x, ids, lengths, h0, c0);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_rnn_backward(desc.plan(), &in, all.data(), at<float>(reserve), at<float>(grad_y),
                                    at<float>(grad_hn), at<float>(grad_cn), at<float>(grad_x), at<float>(grad_h0),
                                    at<float>(grad_c0), grads.data(), threads);
  }
  raise(status);
}

// One inference call of rnn as it was made once; see ConvPoolCall. run gives (y, hn, cn), cn None but for the LSTM.
class RnnCall {
 public:
  static constexpr Py_ssize_t kArguments = 7;
  static constexpr const char* kDoc = "run takes x, table, lengths, h0, c0, weights and threads";

  RnnCall(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types, const py::object& desc,
          const py::tuple& given, const py::sequence& weights, const std::vector<int>& places, const py::tuple& outputs)
      : like_(exchange, watchers, types), held_(desc), desc_(desc.cast<const RnnDesc&>()), places_(places), outputs_(outputs) {
    for (size_t i = 0; i < 5; ++i) expected_[i] = like_.describe(given[i]);
    for (const py::handle& w : weights) weights_.push_back(like_.describe(py::reinterpret_borrow<py::object>(w)));
    if (weights_.empty() || outputs.size() != 3)
      throw py::value_error("rnn: a call is made of at least one weight and of sizes and strides of y, hn and cn.");
    desc_.weights(std::vector<uintptr_t>(places.size()));  // throws where these are not as many as run will need
  }

  PyObject* run(PyObject* const* args, int threads) const {
    void *data[5], *to[3] = {};
    if (const int watched = like_.watched()) return watched < 0 ? nullptr : Py_NewRef(Py_None);
    for (int i = 0; i < 5; ++i) {
      const int fits = like_.address(args[i], expected_[i], &data[i]);
      if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
    }
    if (!PyList_CheckExact(args[5]) || PyList_GET_SIZE(args[5]) != static_cast<Py_ssize_t>(weights_.size()))
      Py_RETURN_NONE;
    PyObject* const* weights = PySequence_Fast_ITEMS(args[5]);
    std::vector<uintptr_t> addresses(weights_.size() + 1);
    for (size_t i = 0; i < weights_.size(); ++i) {
      void* address;
      const int fits = like_.address(weights[i], weights_[i], &address);
      if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
      addresses[i] = reinterpret_cast<uintptr_t>(address);
    }
    std::vector<uintptr_t> placed;  // those that are not there count from the end, where a 0 stands
    for (const int place : places_) placed.push_back(place < 0 ? addresses.back() : addresses[place]);
    py::object made[3];
    for (int i = 0; i < 3; ++i) {
      const py::handle output = PyTuple_GET_ITEM(outputs_.ptr(), i);
      made[i] = output.is_none() ? py::none()
                                 : like_.make(weights[0], PyTuple_GET_ITEM(output.ptr(), 0), PyTuple_GET_ITEM(output.ptr(), 1), &to[i]);
      if (!made[i]) return nullptr;
    }
    const interfuse_rnn_sequences in = {
        static_cast<const float*>(data[1] ? data[1] : data[0]), data[1] ? static_cast<const int64_t*>(data[0]) : nullptr,
        static_cast<const int64_t*>(data[2]), static_cast<const float*>(data[3]), static_cast<const float*>(data[4])};
    const auto all = desc_.weights(placed);
    interfuse_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = interfuse_rnn_forward(desc_.plan(), &in, all.data(), static_cast<float*>(to[0]), static_cast<float*>(to[1]),
                                   static_cast<float*>(to[2]), nullptr, threads);
    Py_END_ALLOW_THREADS;
    return succeeded(status) ? PyTuple_Pack(3, made[0].ptr(), made[1].ptr(), made[2].ptr()) : nullptr;
  }

 private:
  Likeness like_;
  py::object held_;
  const RnnDesc& desc_;
  std::vector<int> places_;
  py::tuple outputs_;
  Likeness::Tensor expected_[5];
  std::vector<Likeness::Tensor> weights_;
};

py::object rnn_call(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types, const py::object& desc,
                    const py::tuple& given, const py::list& weights, const std::vector<int>& places,
                    const py::tuple& outputs) {
  return callable_of(std::make_unique<RnnCall>(exchange, watchers, types, desc, given, weights, places, outputs));
}

py::dict info() {
  py::dict d;
  d["version"] = interfuse_version();
  d["isa"] = interfuse_isa();
#if defined(INTERFUSE_HAVE_X86_ISAS)
  d["isas"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
  d["isas"] = std::vector<std::string>{"baseline"};
#endif
  d["compiler"] = std::string(INTERFUSE_COMPILER);
  d["openmp"] = _OPENMP;
#if defined(INTERFUSE_HAVE_CUDA)
  d["cuda_built"] = true;
#else
  d["cuda_built"] = false;
#endif
  return d;
}

py::dict machine_peak(int threads) {
  interfuse::MachinePeak peak;
  {
    py::gil_scoped_release release;
    peak = interfuse::measure_machine_peak(threads);
  }
  py::dict d;
  d["operations"] = peak.operations;
  d["bytes"] = peak.bytes;
  return d;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "interfuse's native core, bound by pointers; use interfuse.ops instead.";
  m.def("info", &info);
  m.def("machine_peak", &machine_peak, py::arg("threads"),
        "Float32 operations and bytes read a second that this machine reaches at best, measured in about 0.3 s.");
  py::class_<ConvPoolDesc>(m, "ConvPoolDesc")
      .def(py::init<int, const std::string&, bool, int64_t, int64_t, int64_t, int64_t, const Sizes&, const Sizes&,
                    const Sizes&, const Sizes&, const Sizes&, const Sizes&, const std::string&, double,
                    const std::string&, const Sizes&, const Sizes&, const Sizes&, bool, bool, const std::string&, bool>(),
           py::arg("spatial"), py::arg("dtype"), py::arg("channels_last"), py::arg("batch"), py::arg("in_channels"),
           py::arg("out_channels"), py::arg("groups"), py::arg("input"), py::arg("kernel"), py::arg("stride"),
           py::arg("padding"), py::arg("dilation"), py::arg("x_strides"), py::arg("activation"),
           py::arg("negative_slope"), py::arg("pool"), py::arg("pool_size"), py::arg("pool_stride"),
           py::arg("pool_padding"), py::arg("ceil_mode"), py::arg("count_include_pad"), py::arg("precision"),
           py::arg("save"))
      .def_property_readonly("conv_sizes", &ConvPoolDesc::conv_sizes)
      .def_property_readonly("out_sizes", &ConvPoolDesc::out_sizes)
      .def_property_readonly("algorithm", [](const ConvPoolDesc& d) { return interfuse_conv_pool_algorithm(d.plan()); })
      .def_property_readonly("why", [](const ConvPoolDesc& d) { return interfuse_conv_pool_why(d.plan()); });
  m.def("conv_pool_forward", &conv_pool_forward, py::arg("desc"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("y"), py::arg("index"), py::arg("pre"), py::arg("threads"));
  m.def("conv_pool_backward", &conv_pool_backward, py::arg("desc"), py::arg("grad_y"), py::arg("x"), py::arg("weight"),
        py::arg("y"), py::arg("index"), py::arg("pre"), py::arg("grad_x"), py::arg("grad_weight"),
        py::arg("grad_bias"), py::arg("threads"));
  m.def("conv_pool_call", &conv_pool_call, py::arg("exchange"), py::arg("watchers"), py::arg("types"),
        py::arg("desc"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("size"), py::arg("strides"));
  py::class_<RnnDesc>(m, "RnnDesc")
      .def(py::init<const std::string&, int, bool, bool, const std::string&, bool, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int64_t, const std::array<int64_t, 2>&, int64_t>(),
           py::arg("cell"), py::arg("directions"), py::arg("bias"), py::arg("save"), py::arg("weight_dtype"),
           py::arg("batch_first"), py::arg("batch"), py::arg("steps"), py::arg("input_size"), py::arg("hidden_size"),
           py::arg("proj_size"), py::arg("layers"), py::arg("x_strides"), py::arg("vocabulary"))
      .def_property_readonly("reserve", &RnnDesc::reserve);
  m.def("rnn_forward", &rnn_forward, py::arg("desc"), py::arg("x"), py::arg("ids"), py::arg("lengths"), py::arg("h0"),
        py::arg("c0"), py::arg("weights"), py::arg("y"), py::arg("hn"), py::arg("cn"), py::arg("reserve"),
        py::arg("threads"));
  m.def("rnn_call", &rnn_call, py::arg("exchange"), py::arg("watchers"), py::arg("types"), py::arg("desc"),
        py::arg("given"), py::arg("weights"), py::arg("places"), py::arg("outputs"));
  m.def("rnn_backward", &rnn_backward, py::arg("desc"), py::arg("x"), py::arg("ids"), py::arg("lengths"), py::arg("h0"),
        py::arg("c0"), py::arg("weights"), py::arg("reserve"), py::arg("grad_y"), py::arg("grad_hn"),
        py::arg("grad_cn"), py::arg("grad_x"), py::arg("grad_h0"), py::arg("grad_c0"), py::arg("grad_weights"),
        py::arg("threads"));
}
