#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace interfuse {
namespace {

constexpr size_t kCap = size_t(64) << 20;

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block blocks[static_cast<int>(Slot::count)];

}  // namespace

void* scratch(Slot slot, size_t bytes) {
  Block& block = blocks[static_cast<int>(slot)];
  if (bytes > block.size || (block.size > kCap && bytes <= kCap)) {
    std::free(block.data);
    block.data = nullptr;
    block.size = 0;
    size_t rounded = (bytes + 4095) / 4096 * 4096;
    if (rounded < bytes) throw std::bad_alloc();
    block.data = std::aligned_alloc(64, rounded ? rounded : 4096);
    if (!block.data) throw std::bad_alloc();
    block.size = rounded;
  }
  return block.data;
}

}  // namespace interfuse
