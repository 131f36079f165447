#include "common/scratch.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace interfuse {
namespace {

constexpr size_t kCap = size_t(64) << 20;

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block blocks[static_cast<int>(Slot::count)];

// Kernels that write to a hundred places in turn (one per point of a Winograd tile) need a hundred pages at once, more
// than the first-level TLB holds; with huge pages they need two or three.
constexpr size_t kHugePage = size_t(2) << 20;

}  // namespace

void* allocate_pages(size_t bytes) {
  const bool huge = bytes >= kHugePage / 4;
  const size_t unit = huge ? kHugePage : 4096, rounded = (bytes + unit - 1) / unit * unit;
  void* data = std::aligned_alloc(unit, rounded);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (data && huge) madvise(data, rounded, MADV_HUGEPAGE);  // where the system does not grant it, nothing changes
#endif
  return data;
}

void* scratch(Slot slot, size_t bytes) {
  Block& block = blocks[static_cast<int>(slot)];
  if (bytes > block.size || (block.size > kCap && bytes <= kCap)) {
    std::free(block.data);
    block.data = nullptr;
    block.size = 0;
    size_t rounded = (bytes + 4095) / 4096 * 4096;
    if (rounded < bytes) throw std::bad_alloc();
    block.data = allocate_pages(rounded ? rounded : 4096);
    if (!block.data) throw std::bad_alloc();
    block.size = rounded;
  }
  return block.data;
}

}  // namespace interfuse
