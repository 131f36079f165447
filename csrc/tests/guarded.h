// Buffers that notice an access next to them. One end touches a page without access, so that a read or write
// past it stops the program; the rest of the pages holds a sentinel that check() looks through for stray
// writes.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "tests/test.h"

namespace interfuse_test {

enum class Flush { front, back };  // which end touches the guard page

// `count` elements of T, `offset` elements away from the guard page that `flush` names: 0 finds every overrun
// at that end, others give the pointer alignments that no allocator returns.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, Flush flush = Flush::back, int64_t offset = 0) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(count) * sizeof(T),
                 gap = static_cast<size_t>(offset) * sizeof(T);
    inner_ = (bytes + gap + page - 1) / page * page;
    if (inner_ == 0) inner_ = page;
    mapped_ = inner_ + 2 * page;
    base_ = static_cast<uint8_t*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(base_ + page, inner_, PROT_READ | PROT_WRITE) != 0) {
      munmap(base_, mapped_);
      throw std::bad_alloc();
    }
    pages_ = base_ + page;
    std::memset(pages_, kSentinel,
                inner_);  // as a float, a large negative number: unwritten output is noticed too
    begin_ = flush == Flush::back ? pages_ + inner_ - gap - bytes : pages_ + gap;
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(begin_); }
  const T* data() const { return reinterpret_cast<const T*>(begin_); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

  bool intact() const {
    const uint8_t* end = begin_ + static_cast<size_t>(count_) * sizeof(T);
    for (const uint8_t* at = pages_; at != pages_ + inner_; ++at)
      if ((at < begin_ || at >= end) && *at != kSentinel) return false;
    return true;
  }

 private:
  static constexpr uint8_t kSentinel = 0xE7;
  int64_t count_;
  size_t inner_, mapped_;
  uint8_t *base_, *pages_, *begin_;
};

}  // namespace interfuse_test
