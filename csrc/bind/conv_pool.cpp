#include "bind/bind.h"

namespace interfuse {
namespace bind {
namespace {

// Python's lists have one entry per spatial dimension; the core's arrays have three, filled from the right.
void fill(const char* name, const Sizes& from, int spatial, int64_t* to) {
  if (static_cast<int>(from.size()) != spatial)
    throw py::value_error("conv_pool: " + std::string(name) + " has " + std::to_string(from.size()) + " entries; " +
                          std::to_string(spatial) + " are needed, one per spatial dimension.");
  for (int axis = 0; axis < spatial; ++axis) to[3 - spatial + axis] = from[axis];
}

class ConvPoolDesc {
 public:
  ConvPoolDesc(int spatial, const std::string& dtype, bool channels_last, bool weight_channels_last, int64_t batch,
               int64_t in_channels, int64_t out_channels, int64_t groups, const Sizes& input, const Sizes& kernel,
               const Sizes& stride, const Sizes& padding, const Sizes& dilation, const Sizes& x_strides,
               const std::string& activation, double negative_slope, const std::string& pool, const Sizes& pool_size,
               const Sizes& pool_stride, const Sizes& pool_padding, bool ceil_mode, bool count_include_pad,
               const std::string& precision, bool save)
      : spatial_(spatial) {
    if (spatial < 1 || spatial > 3)
      throw py::value_error("conv_pool: spatial is " + std::to_string(spatial) +
                            "; 1, 2 and 3 dimensions are supported.");
    if (static_cast<int>(padding.size()) != 2 * spatial)
      throw py::value_error("conv_pool: padding has " + std::to_string(padding.size()) + " entries; " +
                            std::to_string(2 * spatial) + " are needed, (low, high) per spatial dimension.");
    if (x_strides.size() != 5)
      throw py::value_error("conv_pool: x_strides has " + std::to_string(x_strides.size()) +
                            " entries; 5 are needed: batch, channel, depth, height, width.");
    interfuse_conv_pool_spec spec;
    interfuse_conv_pool_defaults(&spec);
    spec.dtype = one_of("conv_pool", "dtype", dtype, {"float32", "bfloat16"});
    spec.channels_last = channels_last, spec.weight_channels_last = weight_channels_last;
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

// One inference call of conv_pool as it was made once. run gives the output, or None where a watcher returns something
// true or one of the tensors is not like the one of the first call.
class ConvPoolCall {
 public:
  static constexpr Py_ssize_t kArguments = 4;
  static constexpr const char* kDoc = "run takes x, weight, bias and threads";

  ConvPoolCall(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types, const py::object& desc,
               const py::object& x, const py::object& weight, const py::object& bias, const py::tuple& size,
               const py::tuple& strides)
      : like_(exchange, watchers, types),
        held_(desc),
        size_(size),
        strides_(strides),
        desc_(desc.cast<const ConvPoolDesc&>()),
        expected_{like_.describe(x), like_.describe(weight), like_.describe(bias)} {}

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

}  // namespace

void conv_pool(py::module_& m) {
  py::class_<ConvPoolDesc>(m, "ConvPoolDesc")
      .def(py::init<int, const std::string&, bool, bool, int64_t, int64_t, int64_t, int64_t, const Sizes&, const Sizes&,
                    const Sizes&, const Sizes&, const Sizes&, const Sizes&, const std::string&, double,
                    const std::string&, const Sizes&, const Sizes&, const Sizes&, bool, bool, const std::string&,
                    bool>(),
           py::arg("spatial"), py::arg("dtype"), py::arg("channels_last"), py::arg("weight_channels_last"),
           py::arg("batch"), py::arg("in_channels"), py::arg("out_channels"), py::arg("groups"), py::arg("input"),
           py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("x_strides"),
           py::arg("activation"), py::arg("negative_slope"), py::arg("pool"), py::arg("pool_size"),
           py::arg("pool_stride"), py::arg("pool_padding"), py::arg("ceil_mode"), py::arg("count_include_pad"),
           py::arg("precision"), py::arg("save"))
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
}

}  // namespace bind
}  // namespace interfuse
