// Executes a CUDA kernel's source on the CPU, block after block: every CUDA thread is a fibre, __syncthreads() is a
// real barrier, and the fibres run in an order that the test chooses, so that an access that only the order happens to
// protect gives a different result. Shared memory starts out as NaN. Slow, for tiny grids.
//
// Include this, then the kernel's header.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <vector>

#define INTERFUSE_KERNEL(threads) void
#define INTERFUSE_DEVICE inline
#define INTERFUSE_UNROLL
#define INTERFUSE_ROLLED
#define INTERFUSE_SHARED(type, name) type& name = *static_cast<type*>(::emulate::shared(sizeof(type)))
#define __syncthreads() ::emulate::barrier()

namespace emulate {

struct Index {
  unsigned x, y, z;
};
enum class Order { forward, backward, shuffled };

struct Machine {
  ucontext_t scheduler;
  std::vector<ucontext_t> fibres;
  std::vector<std::vector<char>> stacks;
  std::vector<int> arrivals;  // barriers that each thread has passed
  std::vector<bool> done;
  std::vector<double> shared;  // one block's shared memory
  size_t current = 0;
  std::function<void()> kernel;
};
inline Machine machine;
inline Index thread_index, block_index;

inline void barrier() {
  ++machine.arrivals[machine.current];
  swapcontext(&machine.fibres[machine.current], &machine.scheduler);
}

// One variable a kernel is enough so far; every thread of the block must see the same place.
inline void* shared(size_t bytes) {
  if (bytes > machine.shared.size() * sizeof(double))
    throw std::runtime_error("the kernel uses more shared memory than the emulation has");
  return machine.shared.data();
}

inline void enter() {
  machine.kernel();
  machine.done[machine.current] = true;
  swapcontext(&machine.fibres[machine.current], &machine.scheduler);
}

inline void run_block(unsigned threads, Order order, std::mt19937& random) {
  Machine& m = machine;
  m.fibres.assign(threads, {});
  m.stacks.assign(threads, std::vector<char>(64 << 10));
  m.arrivals.assign(threads, 0);
  m.done.assign(threads, false);
  m.shared.assign((228 << 10) / sizeof(double), 0);
  std::memset(m.shared.data(), 0xff, m.shared.size() * sizeof(double));  // NaN in every float format
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&m.fibres[i]);
    m.fibres[i].uc_stack.ss_sp = m.stacks[i].data();
    m.fibres[i].uc_stack.ss_size = m.stacks[i].size();
    makecontext(&m.fibres[i], enter, 0);
  }
  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; ++i) turn[i] = order == Order::backward ? threads - 1 - i : i;
  for (bool running = true; running;) {
    if (order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), random);
    for (unsigned i : turn) {
      m.current = i;
      thread_index = {i, 0, 0};
      swapcontext(&m.scheduler, &m.fibres[i]);
    }
    unsigned finished = 0;
    for (unsigned i = 0; i < threads; ++i) {
      finished += m.done[i];
      if (m.arrivals[i] != m.arrivals[0] || m.done[i] != m.done[0])
        throw std::runtime_error("some threads of a block reached a barrier that others did not");
    }
    running = finished == 0;
  }
}

// kernel<<<grid, threads>>>() in the given order of threads.
inline void launch(Index grid, unsigned threads, Order order, std::function<void()> kernel) {
  std::mt19937 random(1);
  machine.kernel = std::move(kernel);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        run_block(threads, order, random);
      }
}

}  // namespace emulate

#define threadIdx ::emulate::thread_index
#define blockIdx ::emulate::block_index

namespace interfuse {
namespace cuda {
struct BFloat16 {
  uint16_t bits;
};
inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}
inline void put(float* p, float value) { *p = value; }
inline void put(BFloat16* p, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  p->bits = static_cast<uint16_t>(value != value ? (wide >> 16) | 0x40 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}
}  // namespace cuda
}  // namespace interfuse
