// Memory of large tensors, kept between the steps of a training loop. malloc gives blocks above some size back to the system
// at every free, and a fresh page costs a fault, which for the gradient of a large weight is more than its arithmetic.
//
// What is kept (live and idle together) never exceeds what was live at once in the last seconds, plus kKeptSlack; idle
// blocks never exceed the limit (at first 2 GiB, or an eighth of the machine's memory if that is less); and a block that was idle for kKeptSeconds goes back to the system at the next call that
// comes by here. Under the address sanitizer nothing is kept, so that it sees every use after a free.
#pragma once

#include <cstddef>
#include <cstdint>

namespace interfuse {

// Smaller ones are malloc's business: it keeps them itself, and costs less than a tensor of another library's memory.
constexpr size_t kKeptFrom = size_t(1) << 20;
constexpr size_t kKeptSlack = size_t(64) << 20;
constexpr double kKeptSeconds = 2;

struct KeptBlock {
  void* data;
  size_t bytes;
};

// Uninitialised, aligned to 4 KiB at least; any thread may give it back. Where the system has no memory, the idle blocks go
// back to it first. Throws std::bad_alloc.
KeptBlock take_kept(size_t bytes);
void give_kept(KeptBlock block) noexcept;

struct KeptState {
  size_t live, idle, limit;  // bytes
  uint64_t fresh, again;     // blocks that came from the system, and that were idle before
};
KeptState kept_state();

// The idle blocks go back to the system; returns their bytes.
size_t release_kept() noexcept;
// Of idle bytes; what is above it goes back at once.
void set_kept_limit(size_t bytes) noexcept;
// What was idle for too long goes back. Cheap where nothing is.
void age_kept() noexcept;

}  // namespace interfuse
