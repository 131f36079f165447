#include "bind/bind.h"

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
}

}  // namespace bind
}  // namespace interfuse
