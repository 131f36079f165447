#include "common/pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace interfuse {

void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // glibc keeps what it was given back for the next allocation up to this size.
  constexpr size_t kAlwaysMapped = size_t(32) << 20;
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  if (bytes < kAlwaysMapped) return;
  // Whole pages only: what lies beside the tensor is not ours to give advice about.
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // where the system does not grant it, nothing changes
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace interfuse
