#include "common/kept.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace interfuse {
namespace {

using Clock = std::chrono::steady_clock;

constexpr Clock::duration kTime = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(kKeptSeconds));

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

// Mappings of our own: what is given back is given back, whatever malloc's settings.
void* map(size_t bytes) {
#if defined(__linux__)
  if (kKeeps) {
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }
#endif
  return std::aligned_alloc(4096, bytes);
}

void unmap(const KeptBlock& block) {
#if defined(__linux__)
  if (kKeeps) {
    munmap(block.data, block.bytes);
    return;
  }
#endif
  std::free(block.data);
}

size_t usual_limit() {
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  const size_t most = size_t(2) << 30;
  return pages > 0 && page > 0 ? std::min(most, static_cast<size_t>(pages) / 8 * static_cast<size_t>(page)) : most;
}

struct Idle {
  KeptBlock block;
  Clock::time_point since;
};

struct Kept {
  std::mutex guard;
  std::vector<Idle> idle;  // the longest idle first; a model has hundreds of them, so the search is short
  size_t live = 0, idle_bytes = 0, limit = usual_limit();
  // The most that was live at once, in this window of kKeptSeconds and in the one before.
  size_t most = 0, most_before = 0;
  Clock::time_point window = Clock::now();
  uint64_t fresh = 0, again = 0;

  void drop_oldest() {
    idle_bytes -= idle.front().block.bytes;
    unmap(idle.front().block);
    idle.erase(idle.begin());
  }

  void age(Clock::time_point now) {
    if (now - window >= kTime) {
      most_before = now - window >= 2 * kTime ? live : most;
      most = live;
      window = now;
    }
    while (!idle.empty() && now - idle.front().since >= kTime) drop_oldest();
  }

  // The smallest idle block that is large enough and no more than an eighth too large; of equals the last one used.
  KeptBlock find(size_t bytes) {
    auto best = idle.end();
    for (auto at = idle.begin(); at != idle.end(); ++at)
      if (at->block.bytes >= bytes && at->block.bytes - bytes <= bytes / 8 &&
          (best == idle.end() || at->block.bytes <= best->block.bytes))
        best = at;
    if (best == idle.end()) return {};
    const KeptBlock found = best->block;
    idle.erase(best);
    idle_bytes -= found.bytes;
    return found;
  }
};

// When the longest idle block has been so for too long, in the clock's ticks; the maximum where none is idle.
constexpr Clock::rep kNever = Clock::duration::max().count();
std::atomic<Clock::rep> due{kNever};

// Never destroyed: tensors outlive this library's destructors. A fork waits until no thread is inside, so that the child
// does not inherit a lock that nobody will open.
Kept& kept() {
  static Kept* const instance = [] {
    pthread_atfork([] { kept().guard.lock(); }, [] { kept().guard.unlock(); }, [] { kept().guard.unlock(); });
    return new Kept;
  }();
  return *instance;
}

void set_due(const Kept& all) {
  due.store(all.idle.empty() ? kNever : (all.idle.front().since + kTime).time_since_epoch().count(), std::memory_order_relaxed);
}

}  // namespace

KeptBlock take_kept(size_t bytes) {
  const size_t rounded = (std::max<size_t>(bytes, 1) + 4095) / 4096 * 4096;
  if (rounded < bytes) throw std::bad_alloc();
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.guard);
  all.age(Clock::now());
  KeptBlock block = all.find(rounded);
  if (block.data) {
    ++all.again;
  } else {
    const size_t bound = std::max({all.most, all.most_before, all.live + rounded}) + kKeptSlack;
    while (!all.idle.empty() && all.live + all.idle_bytes + rounded > bound) all.drop_oldest();
    block = {map(rounded), rounded};
    while (!block.data && !all.idle.empty()) {
      all.drop_oldest();
      block.data = map(rounded);
    }
    if (!block.data) throw std::bad_alloc();
    ++all.fresh;
  }
  all.live += block.bytes;
  all.most = std::max(all.most, all.live);
  set_due(all);
  return block;
}

void give_kept(KeptBlock block) noexcept {
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.guard);
  const auto now = Clock::now();
  all.age(now);
  all.live -= block.bytes;
  bool keeps = kKeeps && all.idle_bytes + block.bytes <= all.limit;
  try {
    if (keeps) all.idle.push_back({block, now});
  } catch (const std::bad_alloc&) {
    keeps = false;
  }
  if (keeps)
    all.idle_bytes += block.bytes;
  else
    unmap(block);
  set_due(all);
}

KeptState kept_state() {
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.guard);
  return {all.live, all.idle_bytes, all.limit, all.fresh, all.again};
}

size_t release_kept() noexcept {
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.guard);
  const size_t bytes = all.idle_bytes;
  while (!all.idle.empty()) all.drop_oldest();
  set_due(all);
  return bytes;
}

void set_kept_limit(size_t bytes) noexcept {
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.guard);
  all.limit = bytes;
  while (all.idle_bytes > bytes) all.drop_oldest();
  set_due(all);
}

void age_kept() noexcept {
  if (due.load(std::memory_order_relaxed) == kNever) return;
  const auto now = Clock::now();
  if (now.time_since_epoch().count() < due.load(std::memory_order_relaxed)) return;
  Kept& all = kept();
  std::lock_guard<std::mutex> lock(all.guard);
  all.age(now);
  set_due(all);
}

}  // namespace interfuse
