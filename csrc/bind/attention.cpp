#include "bind/bind.h"
#include "common/attention_block.h"

namespace interfuse {
namespace bind {
namespace {

class AttentionDesc {
 public:
  using Strides = std::array<int64_t, 3>;
  AttentionDesc(const std::string& dtype, const std::string& mask, bool causal, double scale, int64_t batch, int64_t heads,
                int64_t kv_heads, int64_t queries, int64_t keys, int64_t head_dim, int64_t value_dim, const Strides& q,
                const Strides& k, const Strides& v, const Strides& y, const Strides& mask_strides, const Strides& grad_q,
                const Strides& grad_k, const Strides& grad_v) {
    interfuse_attention_defaults(&spec_);
    spec_.dtype = one_of("attention", "dtype", dtype, {"float32", "bfloat16"});
    spec_.mask = one_of("attention", "mask", mask, {"none", "boolean", "additive"});
    spec_.causal = causal, spec_.scale = static_cast<float>(scale);
    spec_.batch = batch, spec_.heads = heads, spec_.kv_heads = kv_heads, spec_.queries = queries, spec_.keys = keys;
    spec_.head_dim = head_dim, spec_.value_dim = value_dim;
    for (int axis = 0; axis < 3; ++axis) {
      spec_.q_strides[axis] = q[axis], spec_.k_strides[axis] = k[axis], spec_.v_strides[axis] = v[axis];
      spec_.y_strides[axis] = y[axis], spec_.mask_strides[axis] = mask_strides[axis];
      spec_.grad_q_strides[axis] = grad_q[axis], spec_.grad_k_strides[axis] = grad_k[axis];
      spec_.grad_v_strides[axis] = grad_v[axis];
    }
    raise(interfuse_attention_check(&spec_));
  }
  const interfuse_attention_spec* spec() const { return &spec_; }

 private:
  interfuse_attention_spec spec_;
};

using Addresses = std::array<uintptr_t, 6>;  // of q, k, v, mask, q_lengths and kv_lengths

interfuse_attention_inputs attention_inputs(const Addresses& from) {
  return {at<const void>(from[0]), at<const void>(from[1]), at<const void>(from[2]), at<const void>(from[3]),
          at<const int64_t>(from[4]), at<const int64_t>(from[5])};
}

void attention_forward(const AttentionDesc& desc, const Addresses& inputs, uintptr_t y, uintptr_t lse, uintptr_t weights,
                       int threads) {
  const interfuse_attention_inputs in = attention_inputs(inputs);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_attention_forward(desc.spec(), &in, at<void>(y), at<float>(lse), at<void>(weights), threads);
  }
  raise(status);
}

void attention_backward(const AttentionDesc& desc, const Addresses& inputs, uintptr_t y, uintptr_t lse, uintptr_t grad_y,
                        uintptr_t grad_q, uintptr_t grad_k, uintptr_t grad_v, int threads) {
  const interfuse_attention_inputs in = attention_inputs(inputs);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_attention_backward(desc.spec(), &in, at<void>(y), at<float>(lse), at<void>(grad_y), at<void>(grad_q),
                                          at<void>(grad_k), at<void>(grad_v), threads);
  }
  raise(status);
}

interfuse_attention_pool_spec attention_pool_spec(const std::string& dtype, const std::array<int64_t, 4>& sizes,
                                                  const std::array<int64_t, 4>& strides) {
  return {one_of("attention_pool", "dtype", dtype, {"float32", "bfloat16"}), sizes[0], sizes[1], sizes[2], sizes[3],
          {strides[0], strides[1]}, {strides[2], strides[3]}};
}

void attention_pool_forward(const std::string& dtype, const std::array<int64_t, 4>& sizes,
                            const std::array<int64_t, 4>& strides, uintptr_t x, uintptr_t hidden, uintptr_t context,
                            uintptr_t lengths, uintptr_t y, uintptr_t weights, int threads) {
  const interfuse_attention_pool_spec spec = attention_pool_spec(dtype, sizes, strides);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_attention_pool_forward(&spec, at<void>(x), at<void>(hidden), at<void>(context),
                                              at<const int64_t>(lengths), at<void>(y), at<void>(weights), threads);
  }
  raise(status);
}

void attention_pool_backward(const std::string& dtype, const std::array<int64_t, 4>& sizes,
                             const std::array<int64_t, 4>& strides, uintptr_t x, uintptr_t hidden, uintptr_t context,
                             uintptr_t lengths, uintptr_t grad_y, uintptr_t grad_weights, uintptr_t grad_x,
                             uintptr_t grad_hidden, uintptr_t grad_context, int threads) {
  const interfuse_attention_pool_spec spec = attention_pool_spec(dtype, sizes, strides);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_attention_pool_backward(&spec, at<void>(x), at<void>(hidden), at<void>(context),
                                               at<const int64_t>(lengths), at<void>(grad_y), at<void>(grad_weights),
                                               at<void>(grad_x), at<void>(grad_hidden), at<float>(grad_context), threads);
  }
  raise(status);
}

class AttentionBlockDesc {
 public:
  // batch, heads, kv_heads, queries, keys, head_dim, query_dim, context_dim, out_dim
  using BlockSizes = std::array<int64_t, 9>;
  AttentionBlockDesc(const std::string& mask, bool causal, double scale, const BlockSizes& sizes, int64_t query_row,
                     int64_t context_row, const std::array<int64_t, 3>& mask_strides) {
    const interfuse_attention_block_spec spec{
        one_of("attention_block", "mask", mask, {"none", "boolean", "additive"}), causal, static_cast<float>(scale), sizes[0],
        sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], query_row, context_row,
        {mask_strides[0], mask_strides[1], mask_strides[2]}};
    raise(interfuse_attention_block_create(&spec, &plan_));
  }
  ~AttentionBlockDesc() { interfuse_attention_block_destroy(plan_); }
  AttentionBlockDesc(const AttentionBlockDesc&) = delete;
  AttentionBlockDesc& operator=(const AttentionBlockDesc&) = delete;
  const interfuse_attention_block* plan() const { return plan_; }

 private:
  interfuse_attention_block* plan_ = nullptr;
};

using BlockAddresses = std::array<uintptr_t, 12>;  // in the order of interfuse_attention_block_tensors

interfuse_attention_block_tensors block_tensors(const BlockAddresses& a) {
  return {at<const float>(a[0]), at<const float>(a[1]), at<const void>(a[2]), at<const int64_t>(a[3]),
          at<const float>(a[4]), at<const float>(a[5]), at<const float>(a[6]), at<const float>(a[7]),
          at<const float>(a[8]), at<const float>(a[9]), at<const float>(a[10]), at<const float>(a[11])};
}

void attention_block_forward(const AttentionBlockDesc& desc, const BlockAddresses& tensors, uintptr_t y, int threads) {
  const interfuse_attention_block_tensors from = block_tensors(tensors);
  interfuse_status status;
  {
    py::gil_scoped_release release;
    status = interfuse_attention_block_forward(desc.plan(), &from, at<float>(y), threads);
  }
  raise(status);
}

// One call of a block as it was made once; see ConvPoolCall. `places` says for each address of the block which of the
// tensors it lies in (-1: none) and how many floats from its start. The first tensor is the query.
class AttentionBlockCall {
 public:
  static constexpr Py_ssize_t kArguments = 2;
  static constexpr const char* kDoc = "run takes tensors and threads";
  using Places = std::array<std::pair<int, int64_t>, 12>;

  AttentionBlockCall(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types, const py::object& desc,
                     const py::tuple& tensors, const Places& places, const py::tuple& size, const py::tuple& strides)
      : like_(exchange, watchers, types), desc_(desc), plan_(desc.cast<const AttentionBlockDesc&>().plan()), places_(places),
        size_(size), strides_(strides) {
    for (const py::handle& t : tensors) tensors_.push_back(like_.describe(py::reinterpret_borrow<py::object>(t)));
    for (const auto& place : places)
      if (place.first >= static_cast<int>(tensors_.size()))
        throw py::value_error("attention_block: a place is in tensor " + std::to_string(place.first) + "; the call has " +
                              std::to_string(tensors_.size()) + " tensors.");
  }

  PyObject* run(PyObject* const* args, int threads) const {
    if (const int watched = like_.watched()) return watched < 0 ? nullptr : Py_NewRef(Py_None);
    if (!PyTuple_CheckExact(args[0]) || PyTuple_GET_SIZE(args[0]) != static_cast<Py_ssize_t>(tensors_.size())) Py_RETURN_NONE;
    std::vector<void*> data(tensors_.size());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const int fits = like_.address(PyTuple_GET_ITEM(args[0], static_cast<Py_ssize_t>(i)), tensors_[i], &data[i]);
      if (fits != 1) return fits < 0 ? nullptr : Py_NewRef(Py_None);
    }
    BlockAddresses addresses{};
    for (size_t i = 0; i < places_.size(); ++i) {
      const auto [tensor, offset] = places_[i];
      if (tensor >= 0 && data[static_cast<size_t>(tensor)])
        addresses[i] = reinterpret_cast<uintptr_t>(static_cast<float*>(data[static_cast<size_t>(tensor)]) + offset);
    }
    const interfuse_attention_block_tensors from = block_tensors(addresses);
    void* to;
    py::object y = like_.make(PyTuple_GET_ITEM(args[0], 0), size_, strides_, &to);
    if (!y) return nullptr;
    interfuse_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = interfuse_attention_block_forward(plan_, &from, static_cast<float*>(to), threads);
    Py_END_ALLOW_THREADS;
    return succeeded(status) ? y.release().ptr() : nullptr;
  }

 private:
  Likeness like_;
  py::object desc_;
  const interfuse_attention_block* plan_;
  Places places_;
  py::tuple size_, strides_;
  std::vector<Likeness::Tensor> tensors_;
};

py::object attention_block_call(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types,
                                const py::object& desc, const py::tuple& tensors, const AttentionBlockCall::Places& places,
                                const py::tuple& size, const py::tuple& strides) {
  return callable_of(std::make_unique<AttentionBlockCall>(exchange, watchers, types, desc, tensors, places, size, strides));
}

}  // namespace

void attention(py::module_& m) {
  py::class_<AttentionDesc>(m, "AttentionDesc")
      .def(py::init<const std::string&, const std::string&, bool, double, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, const AttentionDesc::Strides&, const AttentionDesc::Strides&, const AttentionDesc::Strides&,
                    const AttentionDesc::Strides&, const AttentionDesc::Strides&, const AttentionDesc::Strides&,
                    const AttentionDesc::Strides&, const AttentionDesc::Strides&>(),
           py::arg("dtype"), py::arg("mask"), py::arg("causal"), py::arg("scale"), py::arg("batch"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("queries"), py::arg("keys"), py::arg("head_dim"), py::arg("value_dim"), py::arg("q"),
           py::arg("k"), py::arg("v"), py::arg("y"), py::arg("mask_strides"), py::arg("grad_q"), py::arg("grad_k"),
           py::arg("grad_v"));
  m.def("attention_forward", &attention_forward, py::arg("desc"), py::arg("inputs"), py::arg("y"), py::arg("lse"),
        py::arg("weights"), py::arg("threads"));
  m.def("attention_backward", &attention_backward, py::arg("desc"), py::arg("inputs"), py::arg("y"), py::arg("lse"),
        py::arg("grad_y"), py::arg("grad_q"), py::arg("grad_k"), py::arg("grad_v"), py::arg("threads"));
  m.def("attention_pool_forward", &attention_pool_forward, py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
        py::arg("x"), py::arg("hidden"), py::arg("context"), py::arg("lengths"), py::arg("y"), py::arg("weights"),
        py::arg("threads"));
  m.def("attention_pool_backward", &attention_pool_backward, py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
        py::arg("x"), py::arg("hidden"), py::arg("context"), py::arg("lengths"), py::arg("grad_y"), py::arg("grad_weights"),
        py::arg("grad_x"), py::arg("grad_hidden"), py::arg("grad_context"), py::arg("threads"));
  py::class_<AttentionBlockDesc>(m, "AttentionBlockDesc")
      .def(py::init<const std::string&, bool, double, const AttentionBlockDesc::BlockSizes&, int64_t, int64_t,
                    const std::array<int64_t, 3>&>(),
           py::arg("mask"), py::arg("causal"), py::arg("scale"), py::arg("sizes"), py::arg("query_row"), py::arg("context_row"),
           py::arg("mask_strides"));
  m.def("attention_block_forward", &attention_block_forward, py::arg("desc"), py::arg("tensors"), py::arg("y"),
        py::arg("threads"));
  m.def("attention_block_call", &attention_block_call, py::arg("exchange"), py::arg("watchers"), py::arg("types"),
        py::arg("desc"), py::arg("tensors"), py::arg("places"), py::arg("size"), py::arg("strides"));
}

}  // namespace bind
}  // namespace interfuse
