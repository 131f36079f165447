#include "bind/bind.h"

namespace interfuse {
namespace bind {
namespace {

// A tensor and its block, which goes back with it.
struct Managed {
  DLManagedTensorVersioned tensor;
  KeptBlock block;
  Sizes shape, strides;
};

void give_back(DLManagedTensorVersioned* tensor) {
  Managed* const managed = static_cast<Managed*>(tensor->manager_ctx);
  give_kept(managed->block);
  delete managed;
}

py::object kept_empty(const py::capsule& exchange, const Sizes& shape, const Sizes& strides, int code, int bits) {
  if (shape.size() != strides.size())
    throw py::value_error("interfuse: " + std::to_string(shape.size()) + " sizes and " + std::to_string(strides.size()) +
                          " strides were given; each dimension has one of both.");
  void* data;
  py::object made = kept_tensor(exchange_table(exchange), shape, strides, static_cast<uint8_t>(code),
                                static_cast<uint8_t>(bits), &data);
  if (!made) throw py::error_already_set();
  return made;
}

py::dict state() {
  const KeptState now = kept_state();
  py::dict d;
  d["live"] = now.live, d["idle"] = now.idle, d["limit"] = now.limit, d["fresh"] = now.fresh, d["again"] = now.again;
  return d;
}

}  // namespace

const DLPackExchangeAPI* exchange_table(const py::capsule& exchange) {
  const auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->version.major != kDLPackMajor || !api->dltensor_from_py_object_no_sync || !api->managed_tensor_to_py_object_no_sync)
    throw py::value_error("interfuse: the exchange table has DLPack's version " + std::to_string(api->version.major) +
                          " or lacks dltensor_from_py_object_no_sync or managed_tensor_to_py_object_no_sync; version 1 "
                          "with both is needed.");
  return api;
}

py::object kept_tensor(const DLPackExchangeAPI* api, const Sizes& shape, const Sizes& strides, uint8_t code, uint8_t bits,
                       void** data) {
  size_t bytes = bits / 8;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  auto managed = std::make_unique<Managed>(Managed{{}, {}, shape, strides});
  try {
    managed->block = take_kept(bytes);
  } catch (const std::bad_alloc&) {
    PyErr_Format(PyExc_MemoryError,
                 "interfuse: the system has no memory for a tensor of %zu bytes, though all idle memory was given back to it; "
                 "use a smaller batch, or a machine with more memory.",
                 bytes);
    return {};
  }
  DLManagedTensorVersioned& tensor = managed->tensor;
  tensor.version = {kDLPackMajor, 0};
  tensor.manager_ctx = managed.get();
  tensor.deleter = give_back;
  tensor.dl_tensor = {managed->block.data,      kDLCPU, 0, static_cast<int32_t>(shape.size()), {code, bits, 1},
                      managed->shape.data(), managed->strides.data(), 0};
  *data = managed->block.data;
  void* made = nullptr;
  if (api->managed_tensor_to_py_object_no_sync(&tensor, &made) != 0) {
    give_kept(managed->block);
    return {};
  }
  managed.release();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
}

void memory(py::module_& m) {
  m.def("kept_from", [] { return kKeptFrom; });
  m.def("kept_empty", &kept_empty, py::arg("exchange"), py::arg("shape"), py::arg("strides"), py::arg("code"), py::arg("bits"));
  m.def("kept_state", &state);
  m.def("release_kept", &release_kept);
  m.def("set_kept_limit", &set_kept_limit, py::arg("bytes"));
}

}  // namespace bind
}  // namespace interfuse
