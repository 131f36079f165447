#include "common/machine_peak.h"

#include <chrono>
#include <memory>

#include "common/parallel.h"

namespace interfuse {
namespace {

constexpr int kRuns = 5;  // the best counts: whatever else the machine does can only slow a run

template <class Work>
double best_seconds(Work&& work) {
  double best = 1e30;
  for (int run = 0; run < kRuns; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (seconds < best) best = seconds;
  }
  return best;
}

}  // namespace

MachinePeak measure_machine_peak(int threads) {
  const PeakKernels& kernels = *INTERFUSE_PICK(peak_kernels);
  const int team = usable_threads(threads);
  struct alignas(64) Result {
    float sink;
    int64_t operations;
  };
  const std::unique_ptr<Result[]> results(new Result[team]());

  const double computing = best_seconds([&] {
    parallel(team, [&](int thread, int) {
      results[thread].operations = kernels.multiply_add(1000000, &results[thread].sink);
    });
  });
  int64_t operations = 0;
  for (int thread = 0; thread < team; ++thread) operations += results[thread].operations;

  const int64_t count = int64_t{64} << 20;
  const std::unique_ptr<float[]> memory(new float[count]);
  // Each thread writes first what it reads later: the pages then exist, on the thread's own node.
  parallel(team, [&](int thread, int members) {
    const Range range = share(count, thread, members);
    for (int64_t at = range.begin; at < range.end; ++at) memory[at] = 1.0f;
  });
  const double reading = best_seconds([&] {
    parallel(team, [&](int thread, int members) {
      const Range range = share(count, thread, members);
      kernels.read(memory.get() + range.begin, range.end - range.begin, &results[thread].sink);
    });
  });
  return {operations / computing, count * sizeof(float) / reading};
}

}  // namespace interfuse
