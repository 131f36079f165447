// How the blocks of a recurrent kernel share the work: plain numbers, known before anything is launched.
//
// A team walks through time with some sequences and one direction. Each of its blocks owns some hidden units in groups
// of 16, and keeps the recurrent weights of those on the chip. At every step each block multiplies its weights by what
// all blocks wrote in the step before, passes its own units through the cell, and hands them to the others: to those of
// its cluster straight into their shared memory, to those of other clusters through global memory.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define INTERFUSE_BOTH __host__ __device__
#else
#define INTERFUSE_BOTH
#endif

namespace interfuse {
namespace cuda {

enum class Arithmetic { bfloat16, float16, tf32, float32 };

constexpr int kGroup = 16;             // units whose rows one matrix instruction takes
constexpr int kWarps = 8;              // of a block, at most
constexpr int kFragment = 512;         // bytes of 16 rows of weights, as deep as one instruction
constexpr int kOperandTile = 256;      // bytes of 8 columns, as deep as one instruction
constexpr int kMostColumnTiles = 2;    // of 8 sequences, of a team

// Of the weights, in a warp's registers; sums of more columns leave less room.
INTERFUSE_BOTH constexpr int held_fragments(int column_tiles) { return column_tiles == 1 ? 32 : 16; }

struct RnnWalk {
  int cell, gates, directions;
  Arithmetic arithmetic;
  int64_t batch, steps, hidden, token_t, token_b;
  int64_t begin, end;  // of the steps, those to walk through; all, where there are two directions

  // Instructions' depths that a group of units fills.
  INTERFUSE_BOTH int tiles_of_group() const {
    return arithmetic == Arithmetic::bfloat16 || arithmetic == Arithmetic::float16 ? 1 : 2;
  }
};

struct RnnTeam {
  int cluster;     // blocks of a cluster
  int clusters;    // of the team
  int groups;      // of 16 units, of a block
  int slices;      // warps that share a group, each with a part of the product's depth
  int row_tiles;   // of 16 rows, of a group: its gates forwards, one backwards
  int column_tiles;
  int depth;       // instructions deep is a whole product
  int each;        // and a slice's part of it
  int held;        // instructions' depths of the weights that stay in registers; the others lie in shared memory
  int64_t teams;   // that run at a time; each takes every teams-th of the jobs
  int64_t jobs;

  INTERFUSE_BOTH int blocks() const { return cluster * clusters; }
  INTERFUSE_BOTH int warps() const { return groups * slices; }
  INTERFUSE_BOTH int operand_bytes() const { return depth * column_tiles * kOperandTile; }
  INTERFUSE_BOTH int own_bytes() const { return operand_bytes() / blocks(); }
  // Shared memory, in this order.
  INTERFUSE_BOTH int mailboxes_at() const { return 0; }
  INTERFUSE_BOTH int operands_at() const { return 128; }
  INTERFUSE_BOTH int partial_at() const { return operands_at() + 2 * operand_bytes(); }
  INTERFUSE_BOTH int weights_at() const {
    return partial_at() + (slices > 1 ? warps() * row_tiles * column_tiles * kFragment : 0);
  }
  INTERFUSE_BOTH int64_t shared_bytes() const {
    return weights_at() + int64_t(warps()) * row_tiles * (each > held ? each - held : 0) * kFragment;
  }
  // Global memory: the weights in the order in which they are read; then, where a team has several clusters, for each
  // team a flag on a line of its own, and two copies of the operand.
  INTERFUSE_BOTH int64_t fragments() const { return int64_t(blocks()) * warps() * each * row_tiles; }  // of a direction
  INTERFUSE_BOTH int64_t flags_at(int directions) const { return directions * fragments() * kFragment; }
  INTERFUSE_BOTH int64_t flags_bytes() const { return clusters > 1 ? teams * 128 : 0; }
  INTERFUSE_BOTH int64_t workspace_bytes(int directions) const {
    return flags_at(directions) + flags_bytes() + (clusters > 1 ? teams * 2 * operand_bytes() : 0);
  }
};

struct RnnMachine {
  int most_in_cluster;   // 1: there are no clusters
  int64_t shared_bytes;  // that a block may have
  int multiprocessors;
};

// Throws Invalid where no team of the machine can hold the weights.
RnnTeam rnn_team(const RnnWalk& walk, bool backward, const RnnMachine& machine);

}  // namespace cuda
}  // namespace interfuse
