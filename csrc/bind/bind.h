// What the bindings of all ops share: errors, pointers, and the short way of a call made again.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "common/dlpack.h"
#include "common/kept.h"
#include "interfuse.h"

namespace py = pybind11;

namespace interfuse {
namespace bind {

inline void raise(interfuse_status status) {
  if (status == INTERFUSE_OK) return;
  const char* message = interfuse_last_error();
  switch (status) {
    case INTERFUSE_INVALID: throw py::value_error(message);
    case INTERFUSE_OUT_OF_MEMORY: PyErr_SetString(PyExc_MemoryError, message); throw py::error_already_set();
    default: throw std::runtime_error(message);
  }
}

using Sizes = std::vector<int64_t>;

inline int32_t one_of(const char* op, const char* name, const std::string& value, std::initializer_list<const char*> names) {
  int32_t at = 0;
  for (const char* candidate : names) {
    if (value == candidate) return at;
    ++at;
  }
  std::string allowed;
  for (const char* candidate : names) allowed += (allowed.empty() ? "'" : ", '") + std::string(candidate) + "'";
  throw py::value_error(std::string(op) + ": " + name + " is '" + value + "'; allowed are " + allowed + ".");
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The table of an exchange capsule; throws where its version is another one.
const DLPackExchangeAPI* exchange_table(const py::capsule& exchange);

// A new tensor in kept memory (common/kept.h) and its address; null with an exception set.
py::object kept_tensor(const DLPackExchangeAPI* api, const Sizes& shape, const Sizes& strides, uint8_t code, uint8_t bits,
                       void** data);

// What the tensors of one inference call were like. Made again, they are compared here: through DLPack's exchange table
// that takes a fifth of the time of asking each tensor for its shape, strides, dtype, device and address in Python.
// Every error is a Python exception that is set, and null or -1 returned: a vectorcall passes no C++ exceptions on.
class Likeness {
 public:
  struct Tensor {
    int32_t ndim = 0;  // 0: no tensor
    uint8_t code = 0, bits = 0;
    Sizes shape, strides;
    size_t bytes() const {
      size_t count = bits / 8;
      for (const int64_t size : shape) count *= static_cast<size_t>(size);
      return count;
    }
    bool fits(const interfuse::DLTensor& t) const {
      return t.device_type == interfuse::kDLCPU && t.ndim == ndim && t.dtype.code == code && t.dtype.bits == bits &&
             !memcmp(t.shape, shape.data(), shape.size() * sizeof(int64_t)) &&
             !memcmp(t.strides, strides.data(), strides.size() * sizeof(int64_t));
    }
  };

  Likeness(const py::capsule& exchange, const py::tuple& watchers, const py::tuple& types)
      : watchers_(watchers), types_(types), api_(exchange_table(exchange)) {}

  Tensor describe(const py::object& tensor) const {
    if (tensor.is_none()) return {};
    interfuse::DLTensor t;
    if (api_->dltensor_from_py_object_no_sync(tensor.ptr(), &t) != 0) throw py::error_already_set();
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
    if (api_->dltensor_from_py_object_no_sync(tensor, &t) != 0) {  // a sparse one, for example
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
    if (!made || api_->dltensor_from_py_object_no_sync(made.ptr(), &t) != 0) return {};
    *data = t.data;
    return made;
  }

  // The same of what a training step makes, whose large tensors lie in kept memory. `like` says the same once more.
  py::object make_kept(PyObject* beside, const Tensor& like, const py::handle& size, const py::handle& strides, void** data) const {
    if (like.bytes() < kKeptFrom) return make(beside, size, strides, data);
    return kept_tensor(api_, like.shape, like.strides, like.code, like.bits, data);
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
  const DLPackExchangeAPI* api_;
};

// Whether the core succeeded; otherwise its exception is set.
inline bool succeeded(interfuse_status status) {
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
                                             } catch (py::error_already_set& error) {
                                               error.restore();
                                               return nullptr;
                                             }
                                           }))),
                            METH_FASTCALL, Call::kDoc};
  const py::capsule owner(call.get(), [](void* made) { delete static_cast<Call*>(made); });
  call.release();
  return py::reinterpret_steal<py::object>(PyCFunction_New(&run, owner.ptr()));
}

// Each op's classes and functions, added to the module.
void attention(py::module_& m);
void conv_pool(py::module_& m);
void linear(py::module_& m);
void losses(py::module_& m);
void memory(py::module_& m);
void rnn(py::module_& m);

}  // namespace bind
}  // namespace interfuse
