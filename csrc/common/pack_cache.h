// Weights in a kernel's own arrangement, kept between calls. A pack is found by the weight's address and what was
// made of it, and used only if the hash of the weight's present content is the one that it was made from: whatever
// wrote to the weight (an optimizer, `.data`, NumPy), a stale pack is never used.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace interfuse {

struct PackKey {
  const void* weight;
  uint64_t kind;     // the kernel, its instruction set and everything that the arrangement depends on
  uint64_t content;  // the hash of the weight
};

constexpr size_t kPackCacheBytes = size_t(256) << 20;  // packs beyond this leave, the longest unused first

// Shared ownership of one pack, for as long as this object lives: a pack that leaves the cache meanwhile stays valid.
class Pack {
 public:
  // Finds the pack, or allocates `bytes` (aligned to 64) and has fill(context, data) write all of them. Two threads
  // that miss at the same time both fill one of their own. Throws std::bad_alloc.
  Pack(const PackKey& key, size_t bytes, void (*fill)(void* context, void* data), void* context);
  ~Pack();
  Pack(const Pack&) = delete;
  Pack& operator=(const Pack&) = delete;
  const void* data() const;

  struct Block;

 private:
  Block* block_;
};

// What the cache holds now; clearing leaves the packs in use to their users.
struct PackCacheState {
  size_t packs, bytes, hits, misses;
};
PackCacheState pack_cache_state();
void clear_pack_cache();

}  // namespace interfuse
