#include "bind/bind.h"

namespace interfuse {
namespace bind {
namespace {

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

}  // namespace

void rnn(py::module_& m) {
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

}  // namespace bind
}  // namespace interfuse
