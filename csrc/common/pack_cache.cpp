#include "common/pack_cache.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#include "common/scratch.h"

namespace interfuse {

struct Pack::Block {
  PackKey key;
  size_t bytes;
  void* data;
  std::atomic<int> users;
};

namespace {

void release(Pack::Block* block) {
  if (block->users.fetch_sub(1) > 1) return;
  std::free(block->data);
  delete block;
}

struct Cache {
  std::mutex guard;
  std::list<Pack::Block*> packs;  // the latest used first; a network has tens of them, so the search is short
  size_t bytes = 0, hits = 0, misses = 0;

  void remove(std::list<Pack::Block*>::iterator at) {
    bytes -= (*at)->bytes;
    release(*at);
    packs.erase(at);
  }
};

// Never destroyed: other threads may still be computing when the process ends. A fork waits until no thread is inside,
// so that the child does not inherit a lock that nobody will open.
Cache& cache() {
  static Cache* const instance = [] {
    pthread_atfork([] { cache().guard.lock(); }, [] { cache().guard.unlock(); }, [] { cache().guard.unlock(); });
    return new Cache;
  }();
  return *instance;
}

Pack::Block* find(const PackKey& key) {
  Cache& all = cache();
  std::lock_guard<std::mutex> lock(all.guard);
  for (auto at = all.packs.begin(); at != all.packs.end(); ++at) {
    const PackKey& found = (*at)->key;
    if (found.weight != key.weight || found.kind != key.kind) continue;
    if (found.content != key.content) {  // the weight was written to, or another one lives there now
      all.remove(at);
      break;
    }
    all.packs.splice(all.packs.begin(), all.packs, at);
    ++all.hits;
    ++(*at)->users;
    return *at;
  }
  ++all.misses;
  return nullptr;
}

void keep(Pack::Block* block) {
  if (block->bytes > kPackCacheBytes) return;
  Cache& all = cache();
  std::lock_guard<std::mutex> lock(all.guard);
  for (auto at = all.packs.begin(); at != all.packs.end(); ++at)
    if ((*at)->key.weight == block->key.weight && (*at)->key.kind == block->key.kind) {
      all.remove(at);  // another thread missed at the same time
      break;
    }
  all.packs.push_front(block);
  ++block->users;
  all.bytes += block->bytes;
  while (all.bytes > kPackCacheBytes) all.remove(std::prev(all.packs.end()));
}

}  // namespace

Pack::Pack(const PackKey& key, size_t bytes, void (*fill)(void*, void*), void* context) : block_(find(key)) {
  if (block_) return;
  const size_t rounded = (bytes + 4095) / 4096 * 4096;
  // Weights of megabytes are streamed from end to end: huge pages spare a look-up for every 4 KiB.
  void* data = bytes >= (size_t(4) << 20) ? allocate_pages(rounded) : std::aligned_alloc(4096, rounded ? rounded : 4096);
  if (!data) throw std::bad_alloc();
  try {
    fill(context, data);
    block_ = new Block{key, rounded, data, {1}};
  } catch (...) {
    std::free(data);
    throw;
  }
  try {
    keep(block_);
  } catch (...) {
    release(block_);
    throw;
  }
}

Pack::~Pack() { release(block_); }

const void* Pack::data() const { return block_->data; }

PackCacheState pack_cache_state() {
  Cache& all = cache();
  std::lock_guard<std::mutex> lock(all.guard);
  return {all.packs.size(), all.bytes, all.hits, all.misses};
}

void clear_pack_cache() {
  Cache& all = cache();
  std::lock_guard<std::mutex> lock(all.guard);
  while (!all.packs.empty()) all.remove(all.packs.begin());
}

}  // namespace interfuse
