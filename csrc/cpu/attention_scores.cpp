#include "cpu/attention_scores.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

void apply_boolean(const uint8_t* mask, float* s, int64_t count) {
  // Written so that the compiler makes vectors of it.
  for (int64_t i = 0; i < count; ++i) s[i] = mask[i] ? s[i] : -infinity();
}

template <class T>
void apply_additive(const T* mask, float* s, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(s + i, multiply_add(load(mask + i), splat(kLog2E), load(s + i)));
  for (; i < count; ++i) s[i] += to_float(mask[i]) * kLog2E;
}

}  // namespace

void apply_mask(const MaskRow& mask, float* s, int64_t limit, int64_t padded) {
  if (mask.kind == INTERFUSE_MASK_BOOLEAN)
    apply_boolean(static_cast<const uint8_t*>(mask.data), s, limit);
  else if (mask.kind == INTERFUSE_MASK_ADDITIVE && mask.half)
    apply_additive(static_cast<const uint16_t*>(mask.data), s, limit);
  else if (mask.kind == INTERFUSE_MASK_ADDITIVE)
    apply_additive(static_cast<const float*>(mask.data), s, limit);
  for (int64_t i = limit; i < padded; ++i) s[i] = -infinity();
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
