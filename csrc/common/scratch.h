// Working space that a thread keeps between calls: fresh mappings cost a page fault per 4 KiB, which at these sizes
// is more than the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

namespace interfuse {

// At least `bytes` bytes, aligned to 64, uninitialised, owned by the calling thread until it ends. One block per
// slot: the same slot's next call may move it. Blocks above the cap (64 MiB) shrink back at the next smaller call.
// Throws std::bad_alloc.
enum class Slot { tiles, products, rows, gradient, weight, pack, flags, between, other, count };
void* scratch(Slot slot, size_t bytes);

// Fresh memory for free(), aligned to 4 KiB at least, in huge pages where it is large and the system grants them; null where
// there is none.
void* allocate_pages(size_t bytes);

inline float* scratch_floats(Slot slot, int64_t count) {
  return static_cast<float*>(scratch(slot, static_cast<size_t>(count) * sizeof(float)));
}

}  // namespace interfuse
