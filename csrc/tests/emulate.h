// Executes a CUDA kernel's source on the CPU: every CUDA thread is a fibre, and barriers, clusters, mailboxes, flags
// and the matrix unit are given a meaning here. Fibres run in an order that the test chooses, and copies between blocks
// arrive as early or as late as that order likes, so that an access that only luck protects gives a different result.
// Shared memory starts out as NaN. A kernel that waits for what nobody does is an error, not a hang. Slow, for tiny
// grids.
//
// Include this, then the kernel's header.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

#define INTERFUSE_KERNEL(threads) void
#define INTERFUSE_DEVICE inline
#define INTERFUSE_UNROLL
#define INTERFUSE_ROLLED
#define INTERFUSE_SHARED(type, name) type& name = *static_cast<type*>(::emulate::shared(sizeof(type)))
#define INTERFUSE_DYNAMIC_SHARED(name) char* const name = static_cast<char*>(::emulate::shared(0))
#define __syncthreads() ::emulate::barrier()

namespace emulate {

constexpr size_t kShared = 228 << 10;

struct Index {
  unsigned x, y, z;
};
enum class Order { forward, backward, shuffled };

// Threads that wait for each other: those of a block, a cluster or a warp.
struct Meeting {
  unsigned members = 0, arrived = 0, generation = 0;
};

struct Mailbox {
  int64_t arrivals = 1, bytes = 0;  // still to come before the phase ends
  unsigned phase = 0;
};

// What the 32 lanes of a warp hand to the matrix unit; two of them, because a lane may already be at the next product.
struct Operands {
  uint32_t a[32][4], b[32][2];
};

struct Warp {
  Meeting meeting;
  Operands operands[2];
};

struct Block {
  Index index;
  unsigned cluster;
  std::vector<double> shared;
  Meeting meeting;
  std::vector<Warp> warps;
};

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  unsigned block, thread;
  bool done = false;
  std::function<bool()> ready;  // empty: not waiting
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Block> blocks;
  std::vector<Meeting> clusters;
  std::deque<Fibre> fibres;
  Fibre* current = nullptr;
  std::map<const void*, Mailbox> mailboxes;
  std::vector<std::function<void()>> on_their_way;  // copies between blocks
  std::function<void()> kernel;
};
inline Machine machine;
inline Index thread_index, block_index;

inline Block& block() { return machine.blocks[machine.current->block]; }
inline unsigned lane() { return machine.current->thread % 32; }

// Gives way to the others; comes back when `ready` says so.
inline void wait_until(std::function<bool()> ready) {
  machine.current->ready = std::move(ready);
  swapcontext(&machine.current->context, &machine.scheduler);
}

inline void meet(Meeting& meeting) {
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == meeting.members) meeting.arrived = 0, ++meeting.generation;
  wait_until([&meeting, generation] { return meeting.generation != generation; });
}

inline void barrier() { meet(block().meeting); }

// One variable a kernel is enough so far; every thread of the block must see the same place.
inline void* shared(size_t bytes) {
  if (bytes > kShared) throw std::runtime_error("the kernel uses more shared memory than the emulation has");
  return block().shared.data();
}

inline void enter() {
  machine.kernel();
  machine.current->done = true;
  swapcontext(&machine.current->context, &machine.scheduler);
}

inline void run_fibre(Fibre& fibre) {
  machine.current = &fibre;
  thread_index = {fibre.thread, 0, 0};
  block_index = block().index;
  fibre.ready = nullptr;
  swapcontext(&machine.scheduler, &fibre.context);
}

// Runs what copies the order lets arrive now; `idle`: no thread can go on without one.
inline bool deliver(Order order, bool idle, std::mt19937& random) {
  auto& waiting = machine.on_their_way;
  if (waiting.empty() || (order == Order::backward && !idle)) return false;
  size_t count = order == Order::forward ? waiting.size() : 1;
  if (order == Order::shuffled) {
    std::shuffle(waiting.begin(), waiting.end(), random);
    if (!idle && random() % 4 > 0) return false;
  }
  for (; count > 0; --count) {
    const std::function<void()> copy = std::move(waiting.back());
    waiting.pop_back();
    copy();
  }
  return true;
}

inline void run_together(const std::vector<Index>& indices, unsigned threads, unsigned cluster, Order order,
                         std::mt19937& random) {
  Machine& m = machine;
  m.blocks.assign(indices.size(), {});
  m.clusters.assign(indices.size() / cluster, {cluster * threads});
  m.fibres.clear();
  m.mailboxes.clear();
  m.on_their_way.clear();
  for (unsigned i = 0; i < indices.size(); ++i) {
    Block& b = m.blocks[i];
    b.index = indices[i], b.cluster = i / cluster;
    b.shared.resize(kShared / sizeof(double));
    std::memset(b.shared.data(), 0xff, kShared);  // NaN in every float format
    b.meeting.members = threads;
    b.warps.assign((threads + 31) / 32, {});
    for (Warp& warp : b.warps) warp.meeting.members = 32;
    for (unsigned t = 0; t < threads; ++t) {
      m.fibres.emplace_back();
      Fibre& f = m.fibres.back();
      f.block = i, f.thread = t;
      f.stack.resize(64 << 10);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      makecontext(&f.context, enter, 0);
    }
  }
  std::vector<Fibre*> turn;
  for (Fibre& f : m.fibres) turn.push_back(&f);
  if (order == Order::backward) std::reverse(turn.begin(), turn.end());
  for (size_t finished = 0; finished < turn.size();) {
    if (order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), random);
    bool moved = deliver(order, false, random);
    for (Fibre* f : turn) {
      if (f->done || (f->ready && !f->ready())) continue;
      run_fibre(*f);
      finished += f->done;
      moved = true;
    }
    if (!moved && !deliver(order, true, random))
      throw std::runtime_error("threads wait at a barrier, mailbox or flag that the others never reach");
  }
  if (!m.on_their_way.empty()) throw std::runtime_error("a block ended while copies to it were on their way");
}

// kernel<<<grid, threads>>>() in the given order of threads, block after block.
inline void launch(Index grid, unsigned threads, Order order, std::function<void()> kernel) {
  std::mt19937 random(1);
  machine.kernel = std::move(kernel);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_together({{x, y, z}}, threads, 1, order, random);
}

// The same with `blocks` in a row that all run at once, `cluster` of them sharing a cluster.
inline void launch_together(unsigned blocks, unsigned threads, unsigned cluster, Order order,
                            std::function<void()> kernel) {
  std::mt19937 random(1);
  machine.kernel = std::move(kernel);
  std::vector<Index> indices;
  for (unsigned x = 0; x < blocks; ++x) indices.push_back({x, 0, 0});
  run_together(indices, threads, cluster, order, random);
}

}  // namespace emulate

#define threadIdx ::emulate::thread_index
#define blockIdx ::emulate::block_index

namespace interfuse {
namespace cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}
inline float to_float(Float16 value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return value.bits & 0x8000 ? -size : size;
}
inline void put(float* p, float value) { *p = value; }
inline void put(BFloat16* p, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  p->bits = static_cast<uint16_t>(value != value ? (wide >> 16) | 0x40 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
inline void put(Float16* p, float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (size != size) {
    p->bits = 0x7e00;
  } else if (size == 0) {
    p->bits = sign;
  } else if (size >= 65520) {
    p->bits = sign | 0x7c00;
  } else {
    int exponent = 0;
    std::frexp(size, &exponent);                                     // size < 2^exponent
    const int unit = std::max(exponent - 11, -24);                    // of the last place
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, -unit)));  // to even
    p->bits = static_cast<uint16_t>(sign | (steps + ((unit + 24) << 10)));
  }
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
// Ten bits of fraction, ties away from zero, as cvt.rna does.
inline uint32_t tf32_bits(float value) {
  return value != value ? 0x7fffe000u : (bits_of(value) + 0x1000) & ~0x1fffu;
}
inline float exponential(float value) { return std::exp(value); }
inline float quotient(float a, float b) { return a / b; }
inline float hyperbolic_tangent(float value) { return std::tanh(value); }

// Clusters, mailboxes and flags: see csrc/cuda/device.h.
inline void cluster_barrier() { emulate::meet(emulate::machine.clusters[emulate::block().cluster]); }
inline void open_mailbox(uint64_t* mailbox) { emulate::machine.mailboxes[mailbox] = {}; }
inline void settle(emulate::Mailbox& box) {
  if (box.arrivals == 0 && box.bytes == 0) ++box.phase, box.arrivals = 1;
}
inline void expect(uint64_t* mailbox, uint32_t bytes) {
  emulate::Mailbox& box = emulate::machine.mailboxes.at(mailbox);
  if (--box.arrivals < 0) throw std::runtime_error("a mailbox was told twice in one phase what to expect");
  box.bytes += bytes;
  settle(box);
}
inline void wait_mailbox(uint64_t* mailbox, uint32_t parity) {
  const emulate::Mailbox& box = emulate::machine.mailboxes.at(mailbox);
  emulate::wait_until([&box, parity] { return (box.phase & 1) != parity; });
}
inline void before_sending() {}
inline void send(const void* at, uint32_t bytes, uint64_t* mailbox, int rank) {
  emulate::Block& own = emulate::block();
  emulate::Block& peer = emulate::machine.blocks[own.cluster * (emulate::machine.clusters[0].members / own.meeting.members) +
                                                 static_cast<unsigned>(rank)];
  const auto offset = [&own](const void* p) {
    return static_cast<const char*>(p) - reinterpret_cast<char*>(own.shared.data());
  };
  if (bytes % 16 || offset(at) % 16) throw std::runtime_error("a copy between blocks must be of whole 16 bytes");
  char* const there = reinterpret_cast<char*>(peer.shared.data());
  emulate::Mailbox& box = emulate::machine.mailboxes.at(there + offset(mailbox));
  emulate::machine.on_their_way.push_back([at, there = there + offset(at), bytes, &box] {
    std::memcpy(there, at, bytes);
    box.bytes -= bytes;
    settle(box);
  });
}
inline void raise_flag(uint32_t* flag) { ++*flag; }
inline void wait_flag(const uint32_t* flag, uint32_t value) {
  emulate::wait_until([flag, value] { return *flag >= value; });
}
struct Words {
  uint32_t x, y, z, w;
};
inline Words read_fresh(const Words* p) { return *p; }

// The matrix unit. Lane l holds rows l / 4 and l / 4 + 8 of A and of the result, and column l / 4 of B.
template <int kDepth, class Value>
inline void multiply(float* acc, const uint32_t* a, const uint32_t* b, Value value) {
  emulate::Warp& warp = emulate::block().warps[emulate::machine.current->thread / 32];
  emulate::Operands& all = warp.operands[warp.meeting.generation & 1];
  const unsigned lane = emulate::lane(), g = lane / 4, c = lane % 4;
  std::copy(a, a + 4, all.a[lane]);
  std::copy(b, b + 2, all.b[lane]);
  emulate::meet(warp.meeting);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned upper = i / 2, column = 2 * c + i % 2;
    for (unsigned k = 0; k < kDepth; ++k) {
      constexpr unsigned kEach = kDepth / 8;  // elements of a word
      const unsigned pair = k / kEach, holder = pair % 4, high = pair / 4;
      acc[i] += value(all.a[4 * g + holder][upper + 2 * high], k % kEach) *
                value(all.b[4 * column + holder][high], k % kEach);
    }
  }
}
inline void multiply(BFloat16, float* acc, const uint32_t* a, const uint32_t* b) {
  multiply<16>(acc, a, b, [](uint32_t word, unsigned i) {
    return to_float(BFloat16{static_cast<uint16_t>(word >> 16 * i)});
  });
}
inline void multiply(Float16, float* acc, const uint32_t* a, const uint32_t* b) {
  multiply<16>(acc, a, b, [](uint32_t word, unsigned i) {
    return to_float(Float16{static_cast<uint16_t>(word >> 16 * i)});
  });
}
inline void multiply(float, float* acc, const uint32_t* a, const uint32_t* b) {
  multiply<8>(acc, a, b, [](uint32_t word, unsigned) { return float_of(word); });
}

}  // namespace cuda
}  // namespace interfuse
