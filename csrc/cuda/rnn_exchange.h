// What a team's blocks write at a step, brought to all of them.
//
// The operand of a product lies in shared memory twice: one copy is read while the next is filled. That needs no word
// of thanks: a block sends turn n + 1 only once it has all of turn n, so whoever received turn n + 1 from everyone knows
// that everyone has finished reading turn n - 1, and that its own copies of turn n have all arrived.
#pragma once

#include "cuda/device.h"
#include "cuda/rnn_team.h"

namespace interfuse {
namespace cuda {

struct Exchange {
  const RnnTeam* team;
  char* shared;
  char* global;      // the team's two operands, where it has several clusters
  uint32_t* flag;
  int rank;          // of the block in the team
  int turn;          // counts what was sent since the kernel began

  INTERFUSE_DEVICE void begin(const RnnTeam& t, char* shared_, char* flags, int64_t number) {
    team = &t;
    shared = shared_;
    turn = 0;
    rank = static_cast<int>(blockIdx.x % static_cast<unsigned>(t.blocks()));
    global = flags + t.flags_bytes() + number * 2 * t.operand_bytes();
    flag = reinterpret_cast<uint32_t*>(flags + number * 128);
    if (t.cluster > 1) {
      if (threadIdx.x == 0) open_mailbox(mailbox(0)), open_mailbox(mailbox(1));
      __syncthreads();
      cluster_barrier();
    }
  }

  // Nobody leaves while a peer may still copy from or to it.
  INTERFUSE_DEVICE void end() {
    if (team->cluster > 1) cluster_barrier();
  }

  INTERFUSE_DEVICE char* operand() const { return shared + team->operands_at() + (turn & 1) * team->operand_bytes(); }
  INTERFUSE_DEVICE char* own() const { return operand() + rank * team->own_bytes(); }

  // All threads of the block, after each has placed its values in own().
  INTERFUSE_DEVICE void publish() {
    const RnnTeam& t = *team;
    if (t.cluster > 1) before_sending();
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x);
    if (t.cluster > 1) {
      const uint32_t bytes = static_cast<uint32_t>(t.own_bytes());
      if (thread == 0) expect(mailbox(turn & 1), bytes * static_cast<uint32_t>(t.cluster - 1));
      if (thread < t.cluster && thread != rank % t.cluster) send(own(), bytes, mailbox(turn & 1), thread);
    }
    if (t.clusters > 1) {
      Words* to = reinterpret_cast<Words*>(there() + rank * t.own_bytes());
      copy(to, reinterpret_cast<const Words*>(own()), t.own_bytes(), [](const Words* p) { return *p; });
      __syncthreads();
      if (thread == 0) raise_flag(flag);
    }
  }

  // Waits until operand() is whole. The next turn begins with advance().
  INTERFUSE_DEVICE void receive() {
    const RnnTeam& t = *team;
    if (t.cluster > 1) wait_mailbox(mailbox(turn & 1), static_cast<uint32_t>(turn >> 1 & 1));
    if (t.clusters > 1) {
      if (threadIdx.x == 0) wait_flag(flag, static_cast<uint32_t>(t.blocks()) * static_cast<uint32_t>(turn + 1));
      __syncthreads();
      const int home = rank / t.cluster, bytes = t.cluster * t.own_bytes();
      for (int from = 0; from < t.clusters; ++from)
        if (from != home)
          copy(reinterpret_cast<Words*>(operand() + from * bytes),
               reinterpret_cast<const Words*>(there() + from * bytes), bytes,
               [](const Words* p) { return read_fresh(p); });
      __syncthreads();
    }
  }

  INTERFUSE_DEVICE void advance() { ++turn; }

 private:
  INTERFUSE_DEVICE uint64_t* mailbox(int i) const {
    return reinterpret_cast<uint64_t*>(shared + team->mailboxes_at()) + i;
  }
  INTERFUSE_DEVICE char* there() const { return global + (turn & 1) * team->operand_bytes(); }

  template <class Read>
  INTERFUSE_DEVICE void copy(Words* to, const Words* from, int bytes, const Read& read) const {
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += 32 * team->warps()) to[i] = read(from + i);
  }
};

}  // namespace cuda
}  // namespace interfuse
