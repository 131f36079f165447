// The part of DLPack 1.x that the binding needs: how a tensor of another library lies in memory, without a copy and
// without owning it, and how memory of ours becomes one. The names are DLPack's own; its ABI is stable within major
// version 1.
#pragma once

#include <stdint.h>

namespace interfuse {

constexpr int32_t kDLCPU = 1;
constexpr uint32_t kDLPackMajor = 1;

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

// A tensor that its owner gets back by `deleter`, which any thread may call.
struct DLManagedTensorVersioned {
  struct {
    uint32_t major, minor;
  } version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
};

struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* older;
  void *allocate, *managed_from_object;
  // A new object that owns `tensor` if it succeeds: 0, or -1 with a Python exception set.
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** object);
  // Fills `out`, whose shape and strides stay the object's; 0, or -1 with a Python exception set.
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  void* current_work_stream;
};

}  // namespace interfuse
