// Chooses a team: the fewest blocks that hold the weights in registers, else in registers and shared memory.
#include "cuda/rnn_team.h"

#include "common/error.h"

namespace interfuse {
namespace cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A team of so many blocks, or groups = 0 where a block would own more than its warps can.
RnnTeam sized(const RnnWalk& walk, bool backward, const RnnMachine& machine, int64_t blocks, int column_tiles) {
  RnnTeam t = {};
  const int64_t groups = ceil_div(ceil_div(walk.hidden, kGroup), blocks);
  if (groups > kWarps) return t;
  t.cluster = static_cast<int>(blocks < machine.most_in_cluster ? blocks : machine.most_in_cluster);
  t.clusters = static_cast<int>(blocks / t.cluster);
  t.groups = static_cast<int>(groups);
  t.slices = kWarps / t.groups;
  t.row_tiles = backward ? 1 : walk.gates;
  t.column_tiles = column_tiles;
  t.depth = static_cast<int>(blocks) * t.groups * walk.tiles_of_group() * (backward ? walk.gates : 1);
  if (t.slices > t.depth) t.slices = t.depth;
  t.each = static_cast<int>(ceil_div(t.depth, t.slices));
  t.held = walk.arithmetic == Arithmetic::float32 ? 0 : held_fragments(column_tiles) / t.row_tiles;
  t.jobs = ceil_div(walk.batch, 8 * column_tiles) * walk.directions;
  t.teams = t.jobs;
  if (t.clusters > 1) {
    // Blocks that wait for each other through global memory must all be running.
    const int64_t room = machine.multiprocessors / blocks;
    t.teams = t.jobs < room ? t.jobs : room;
  }
  return t;
}

bool fits(const RnnTeam& t, const RnnMachine& machine) {
  return t.groups > 0 && t.teams > 0 && t.shared_bytes() <= machine.shared_bytes;
}

// How many blocks follow `blocks` in the order of trying: powers of two that make a cluster, then whole clusters.
int64_t next(int64_t blocks, const RnnMachine& machine) {
  return blocks < machine.most_in_cluster ? 2 * blocks : blocks + machine.most_in_cluster;
}

RnnTeam narrowest(const RnnWalk& walk, bool backward, const RnnMachine& machine) {
  for (int64_t blocks = 1; blocks <= machine.most_in_cluster; blocks = next(blocks, machine)) {
    const RnnTeam t = sized(walk, backward, machine, blocks, 1);
    if (fits(t, machine) && t.held >= t.each) return t;
  }
  for (int64_t blocks = 1; blocks <= machine.multiprocessors; blocks = next(blocks, machine)) {
    const RnnTeam t = sized(walk, backward, machine, blocks, 1);
    if (fits(t, machine)) return t;
  }
  return {};
}

}  // namespace

RnnTeam rnn_team(const RnnWalk& walk, bool backward, const RnnMachine& machine) {
  const RnnTeam narrow = narrowest(walk, backward, machine);
  if (narrow.groups == 0)
    invalid(
        "rnn: the recurrent weights of a hidden size of %lld do not fit on this device: %d multiprocessors with %lld "
        "bytes of shared memory each hold what they can in their registers too. Use the Triton kernels, which read the "
        "weights at every step, or 16-bit tensors.",
        (long long)walk.hidden, machine.multiprocessors, (long long)machine.shared_bytes);
  // Wider teams take more sequences at a step, which pays once the narrow ones would have to queue.
  if (narrow.jobs * narrow.blocks() <= machine.multiprocessors) return narrow;
  const RnnTeam wide = sized(walk, backward, machine, narrow.blocks(), kMostColumnTiles);
  return fits(wide, machine) ? wide : narrow;
}

}  // namespace cuda
}  // namespace interfuse
