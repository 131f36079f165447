// How long a turn of the exchange between a team's blocks takes, nothing else done: it decides how many blocks should
// share the weights (docs/gpu-notes.md). Prints JSON. `make gpu` builds and runs it.
#include <cstdio>

#include "common/error.h"
#include "cuda/rnn_launch.h"

namespace {

using namespace interfuse;
using namespace interfuse::cuda;

struct Turns {
  int count;
  uint32_t* seen;  // one for each block: what arrived must be used
};

INTERFUSE_KERNEL(32 * kWarps)
exchange_turns(const RnnWalk walk, const RnnTeam team, const Turns turns, char* workspace) {
  INTERFUSE_DYNAMIC_SHARED(shared);
  Exchange exchange;
  exchange.begin(team, shared, workspace + team.flags_at(walk.directions), blockIdx.x / static_cast<unsigned>(team.blocks()));
  const int thread = static_cast<int>(threadIdx.x), words = team.own_bytes() / 4;
  uint32_t sum = 0;
  for (int turn = 0; turn < turns.count; ++turn) {
    if (thread < words) reinterpret_cast<uint32_t*>(exchange.own())[thread] = static_cast<uint32_t>(turn + exchange.rank);
    exchange.publish();
    exchange.receive();
    for (int from = 0; from < team.blocks(); ++from)
      sum += reinterpret_cast<const uint32_t*>(exchange.operand() + from * team.own_bytes())[thread % words];
    exchange.advance();
  }
  exchange.end();
  if (thread == 0) turns.seen[blockIdx.x] = sum;
}

struct Events {
  cudaEvent_t begin, end;
  Events() {
    succeed(cudaEventCreate(&begin), "making an event");
    succeed(cudaEventCreate(&end), "making an event");
  }
};

// Nanoseconds of a turn: of many less those of few, which takes the launch out.
double nanoseconds(int cluster, int clusters, int teams) {
  constexpr int kGroups = 2, kFew = 1000, kMany = 11000;
  RnnTeam team = {};
  team.cluster = cluster;
  team.clusters = clusters;
  team.groups = kGroups;
  team.slices = kWarps / kGroups;
  team.row_tiles = 4;
  team.column_tiles = 1;
  team.depth = team.blocks() * kGroups;
  team.each = team.held = team.depth / team.slices + 1;
  team.teams = team.jobs = teams;
  RnnWalk walk = {};
  walk.directions = 1;
  char* workspace = nullptr;
  Turns turns = {0, nullptr};
  const auto blocks = static_cast<size_t>(teams * team.blocks());
  succeed(cudaMalloc(reinterpret_cast<void**>(&workspace), static_cast<size_t>(team.workspace_bytes(1))), "taking memory");
  succeed(cudaMalloc(reinterpret_cast<void**>(&turns.seen), blocks * sizeof(uint32_t)), "taking memory");
  const Events events;
  float milliseconds[2] = {};
  for (int round = 0; round < 3; ++round)  // the first warms up, the last counts
    for (int many = 0; many < 2; ++many) {
      turns.count = many ? kMany : kFew;
      succeed(cudaEventRecord(events.begin), "recording an event");
      launch_kernel(exchange_turns, {walk, team, workspace, nullptr}, turns);
      succeed(cudaEventRecord(events.end), "recording an event");
      succeed(cudaEventSynchronize(events.end), "waiting for the kernel");
      succeed(cudaEventElapsedTime(&milliseconds[many], events.begin, events.end), "reading the time");
    }
  succeed(cudaFree(turns.seen), "giving memory back");
  succeed(cudaFree(workspace), "giving memory back");
  return static_cast<double>(milliseconds[1] - milliseconds[0]) * 1e6 / (kMany - kFew);
}

}  // namespace

int main() {
  struct Shape {
    int cluster, clusters, teams;
  };
  const Shape shapes[] = {{1, 1, 1}, {2, 1, 1}, {4, 1, 1}, {8, 1, 1},  {16, 1, 1}, {4, 1, 16},
                          {8, 1, 8}, {16, 1, 4}, {16, 2, 1}, {16, 4, 1}, {1, 8, 1},  {1, 32, 1}};
  std::printf("[");
  const char* before = "\n";
  for (const Shape& s : shapes) {
    std::printf("%s  {\"cluster\": %d, \"clusters\": %d, \"teams\": %d, ", before, s.cluster, s.clusters, s.teams);
    try {
      std::printf("\"nanoseconds\": %.1f}", nanoseconds(s.cluster, s.clusters, s.teams));
    } catch (const Invalid& refusal) {
      std::printf("\"refused\": \"%s\"}", refusal.what());
      cudaGetLastError();
    }
    std::fflush(stdout);
    before = ",\n";
  }
  std::printf("\n]\n");
}
