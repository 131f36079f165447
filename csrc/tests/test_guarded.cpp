// The guard itself: a test tool that never fires would prove nothing.
#include <csetjmp>
#include <csignal>

#include "tests/guarded.h"

namespace {

sigjmp_buf landing;

void land(int) { siglongjmp(landing, 1); }

// True if reading this byte is stopped by the guard page.
bool faults(const volatile uint8_t* address) {
  struct sigaction action = {}, segv, bus;
  action.sa_handler = land;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  volatile bool faulted = true;
  if (sigsetjmp(landing, 1) == 0) {
    (void)*address;
    faulted = false;
  }
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  return faulted;
}

}  // namespace

using interfuse_test::Flush;
using interfuse_test::Guarded;

TEST(guard_pages_stop_reads_on_the_flush_side) {
  Guarded<float> back(100), front(100, Flush::front);
  const uint8_t* past = reinterpret_cast<const uint8_t*>(back.data() + 100);
  CHECK(faults(past));
  CHECK(!faults(past - 1));
  const uint8_t* first = reinterpret_cast<const uint8_t*>(front.data());
  CHECK(faults(first - 1));
  CHECK(!faults(first));
}

TEST(sentinels_notice_a_write_on_the_other_side) {
  Guarded<float> buffer(100);
  CHECK(buffer.intact());
  for (int i = 0; i < 100; ++i) buffer[i] = 1.0f;
  CHECK(buffer.intact());
  buffer[-1] = 1.0f;
  CHECK(!buffer.intact());
}

TEST(offsets_give_misaligned_pointers) {
  Guarded<float> buffer(64, Flush::back, 1);
  CHECK_EQUAL(reinterpret_cast<uintptr_t>(buffer.data()) % 64, 60u);
}
