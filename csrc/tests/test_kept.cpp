// Memory kept between steps: a block comes back, no two owners share one, and what is kept stays within its bounds.
#include "common/kept.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "tests/test.h"

using namespace interfuse;
using namespace interfuse_test;

namespace {

constexpr size_t kMega = size_t(1) << 20;

// Nothing idle at first; the limit is put back.
struct Fresh {
  const size_t limit = kept_state().limit;
  Fresh() { release_kept(); }
  ~Fresh() {
    set_kept_limit(limit);
    release_kept();
  }
};

bool keeps() {
#if defined(__SANITIZE_ADDRESS__)
  skip("under the address sanitizer nothing is kept");
  return false;
#else
  return true;
#endif
}

}  // namespace

TEST(kept_a_block_comes_back) {
  const Fresh fresh;
  if (!keeps()) return;
  const KeptState before = kept_state();
  const KeptBlock first = take_kept(3 * kMega + 5);
  CHECK(first.bytes >= 3 * kMega + 5);
  CHECK_EQUAL(reinterpret_cast<uintptr_t>(first.data) % 4096, uintptr_t(0));
  std::memset(first.data, 1, first.bytes);
  CHECK_EQUAL(kept_state().live, before.live + first.bytes);
  give_kept(first);
  CHECK_EQUAL(kept_state().live, before.live);
  CHECK_EQUAL(kept_state().idle, first.bytes);
  const KeptBlock second = take_kept(3 * kMega);  // a little smaller
  CHECK_EQUAL(second.data, first.data);
  CHECK_EQUAL(kept_state().again, before.again + 1);
  const KeptBlock third = take_kept(3 * kMega);  // the first one is in use
  CHECK(third.data != first.data);
  CHECK_EQUAL(kept_state().fresh, before.fresh + 2);
  give_kept(second);
  give_kept(third);
}

TEST(kept_a_block_much_too_large_is_left_for_others) {
  const Fresh fresh;
  const KeptBlock large = take_kept(16 * kMega);
  give_kept(large);
  const KeptBlock small = take_kept(8 * kMega);
  CHECK(small.bytes < 9 * kMega);
  give_kept(small);
}

TEST(kept_live_and_idle_stay_within_what_was_live_at_once) {
  const Fresh fresh;
  size_t most = kept_state().live + kKeptSlack;
  // Address space: no page is touched. Sizes that differ by more than an eighth, so that none serves another.
  for (size_t size = 10; size < 1000; size = size * 5 / 4) {
    const KeptBlock first = take_kept(size * kMega), second = take_kept(size * kMega);
    most = std::max(most, kept_state().live + kKeptSlack);
    CHECK(kept_state().live + kept_state().idle <= most);
    give_kept(first);
    give_kept(second);
    CHECK(kept_state().live + kept_state().idle <= most);
  }
}

TEST(kept_the_limit_holds) {
  const Fresh fresh;
  if (!keeps()) return;
  set_kept_limit(10 * kMega);
  const KeptBlock first = take_kept(6 * kMega), second = take_kept(6 * kMega);
  give_kept(first);
  give_kept(second);  // both would be 12 MiB
  CHECK_EQUAL(kept_state().idle, first.bytes);
  set_kept_limit(0);
  CHECK_EQUAL(kept_state().idle, size_t(0));
  give_kept(take_kept(kMega));
  CHECK_EQUAL(kept_state().idle, size_t(0));
}

TEST(kept_what_is_idle_for_long_goes_back) {
  const Fresh fresh;
  if (!keeps()) return;
  give_kept(take_kept(5 * kMega));
  age_kept();
  CHECK(kept_state().idle > 0);
  std::this_thread::sleep_for(std::chrono::duration<double>(kKeptSeconds * 1.05));
  age_kept();
  CHECK_EQUAL(kept_state().idle, size_t(0));
}

TEST(kept_what_the_system_refuses_is_an_exception_and_empties_the_idle_blocks) {
  const Fresh fresh;
  if (!keeps()) return;
  give_kept(take_kept(5 * kMega));
  const size_t live = kept_state().live;
  bool refused = false;
  try {
    give_kept(take_kept(size_t(1) << 62));
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  CHECK(refused);
  CHECK_EQUAL(kept_state().idle, size_t(0));
  CHECK_EQUAL(kept_state().live, live);
  refused = false;
  try {
    give_kept(take_kept(~size_t(0)));
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  CHECK(refused);
}

TEST(kept_no_two_owners_share_a_block) {
  const Fresh fresh;
  std::atomic<KeptBlock*> passed[4] = {};
  std::atomic<int> wrong{0};
  const auto work = [&](int mine) {
    const char mark = static_cast<char>(mine + 1);
    for (int round = 0; round < 200; ++round) {
      KeptBlock* const block = new KeptBlock(take_kept((1 + round % 3) * kMega));
      char* const data = static_cast<char*>(block->data);
      data[0] = data[block->bytes - 1] = mark;
      std::this_thread::yield();
      if (data[0] != mark || data[block->bytes - 1] != mark) ++wrong;
      if (KeptBlock* const older = passed[(mine + round) % 4].exchange(block)) {  // another thread's, most often
        give_kept(*older);
        delete older;
      }
    }
  };
  const size_t live = kept_state().live;
  std::vector<std::thread> threads;
  for (int mine = 0; mine < 4; ++mine) threads.emplace_back(work, mine);
  for (std::thread& thread : threads) thread.join();
  for (auto& slot : passed)
    if (KeptBlock* const block = slot.load()) {
      give_kept(*block);
      delete block;
    }
  CHECK_EQUAL(wrong.load(), 0);
  CHECK_EQUAL(kept_state().live, live);
}

TEST(kept_a_forked_child_takes_and_gives) {
  const Fresh fresh;
  const KeptBlock block = take_kept(2 * kMega);
  std::memset(block.data, 7, block.bytes);
  give_kept(take_kept(2 * kMega));
  const pid_t child = fork();
  if (child == 0) {
    give_kept(take_kept(2 * kMega));
    const bool same = static_cast<char*>(block.data)[0] == 7;
    give_kept(block);
    _exit(same ? 0 : 1);
  }
  int status = -1;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(status, 0);
  CHECK_EQUAL(static_cast<int>(static_cast<char*>(block.data)[0]), 7);
  give_kept(block);
}
