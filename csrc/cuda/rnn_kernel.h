// The recurrence of rnn, forward and backward through time, one layer of it at a launch. Written for nvcc and, with
// csrc/tests/emulate.h, for the host; numbered as the Triton kernels' (kernels/rnn_kernels.py): a token is one
// time of one sequence, and every tensor is numbered by token, then direction.
#pragma once

#include "cuda/rnn_exchange.h"
#include "cuda/rnn_launches.h"
#include "cuda/rnn_product.h"
#include "interfuse.h"

namespace interfuse {
namespace cuda {

template <class T>
struct Cells {
  INTERFUSE_DEVICE static float logistic(float x) { return quotient(1.f, 1.f + exponential(-x)); }
  // Good to 1e-7 absolutely, which the 16-bit types cannot tell from exact.
  INTERFUSE_DEVICE static float tanh(float x) {
    return 1.f - quotient(2.f, 1.f + exponential(2.f * (x > 40.f ? 40.f : x)));
  }
};
template <>
struct Cells<float> {
  INTERFUSE_DEVICE static float logistic(float x) { return 1.f / (1.f + expf(-x)); }
  INTERFUSE_DEVICE static float tanh(float x) { return hyperbolic_tangent(x); }
};

// Where a lane's results lie: its column pair of each tile, and units g and g + 8 of its group.
template <class Kind, int kRowTiles, int kColumnTiles>
struct Lane {
  static constexpr int kPairs = 2 * kColumnTiles;  // (column, two units) that a lane may own
  using T = typename Kind::Element;

  RnnWalk walk;
  RnnTeam team;
  char* shared;
  int lane, group, slice;
  int64_t direction, first_sequence, longest;
  int unit;  // of the hidden units: this and the one 8 further
  int64_t length[kPairs];  // in this part of the steps

  INTERFUSE_DEVICE void begin(const RnnWalk& w, const RnnTeam& t, char* shared_, int rank) {
    walk = w;
    team = t;
    shared = shared_;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    group = warp / t.slices;
    slice = warp % t.slices;
    unit = (rank * t.groups + group) * kGroup + lane / 4;
  }

  INTERFUSE_DEVICE void take_job(int64_t job, const int64_t* lengths) {
    direction = job % walk.directions;
    first_sequence = job / walk.directions * 8 * kColumnTiles;
    longest = 0;
    for (int64_t b = first_sequence; b < first_sequence + 8 * kColumnTiles; ++b) {
      const int64_t n = length_of(b, lengths);
      longest = n > longest ? n : longest;
    }
    INTERFUSE_UNROLL
    for (int p = 0; p < kPairs; ++p) length[p] = length_of(sequence(p), lengths);
  }

  INTERFUSE_DEVICE int column(int p) const { return p / 2 * 8 + lane % 4 * 2 + p % 2; }
  INTERFUSE_DEVICE int64_t sequence(int p) const { return first_sequence + column(p); }
  INTERFUSE_DEVICE bool owns(int p) const { return p % team.slices == slice; }
  INTERFUSE_DEVICE bool real(int k) const { return unit + 8 * k < walk.hidden; }
  INTERFUSE_DEVICE bool inside(int p, int k) const { return sequence(p) < walk.batch && real(k); }

  // The number of a token and direction; step s of the second direction is counted from the sequence's end.
  INTERFUSE_DEVICE int64_t place_of(int p, int64_t s) const {
    const int64_t time = direction == 0 ? walk.begin + s : length[p] - 1 - s;
    return (time * walk.token_t + sequence(p) * walk.token_b) * walk.directions + direction;
  }
  INTERFUSE_DEVICE int64_t state_at(int p, int k) const {
    return (direction * walk.batch + sequence(p)) * walk.hidden + unit + 8 * k;
  }
  INTERFUSE_DEVICE float state(const void* states, int p, int k) const {
    return states && inside(p, k) ? to_float(static_cast<const T*>(states)[state_at(p, k)]) : 0.f;
  }
  // The same from what another part of the steps left, if one came before.
  INTERFUSE_DEVICE float state(const void* states, const float* carried, int p, int k) const {
    if (!carried) return state(states, p, k);
    return inside(p, k) ? carried[state_at(p, k)] : 0.f;
  }

  // Adds up the slices' parts of the product in a fixed order: sum(m, p, k) afterwards.
  INTERFUSE_DEVICE void share(const float (&acc)[kRowTiles][kColumnTiles][4]) const {
    if (team.slices == 1) return;
    float* mine = partial(slice);
    INTERFUSE_UNROLL
    for (int m = 0; m < kRowTiles; ++m)
      INTERFUSE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n)
        INTERFUSE_UNROLL
        for (int i = 0; i < 4; ++i) mine[((m * kColumnTiles + n) * 4 + i) * 32 + lane] = acc[m][n][i];
    __syncthreads();
  }
  INTERFUSE_DEVICE float sum(const float (&acc)[kRowTiles][kColumnTiles][4], int m, int p, int k) const {
    const int n = p / 2, i = p % 2 + 2 * k;
    if (team.slices == 1) return acc[m][n][i];
    float total = 0;
    for (int from = 0; from < team.slices; ++from)
      total += partial(from)[((m * kColumnTiles + n) * 4 + i) * 32 + lane];
    return total;
  }

  // Puts units g and g + 8 of a pair into the operand of the next product; `slot` of `slots` of each group.
  INTERFUSE_DEVICE void place(char* own, int slot, int slots, int p, const float (&value)[2]) const {
    const int stride = kColumnTiles * kOperandTile;
    char* tile = own + (group * slots + slot) * Kind::kTilesOfGroup * stride + p / 2 * kOperandTile;
    Kind::place(tile, stride, lane / 4, lane % 4 * 2 + p % 2, value[0], value[1]);
  }

 private:
  INTERFUSE_DEVICE int64_t length_of(int64_t b, const int64_t* lengths) const {
    if (b >= walk.batch) return 0;
    int64_t n = lengths ? lengths[b] : walk.end;
    n = (n < walk.end ? n : walk.end) - walk.begin;
    return n < 0 ? 0 : n;
  }
  INTERFUSE_DEVICE float* partial(int of_slice) const {
    return reinterpret_cast<float*>(shared + team.partial_at()) +
           (group * team.slices + of_slice) * kRowTiles * kColumnTiles * (kFragment / 4);
  }
};

// Runs before either of them.
template <class Kind>
INTERFUSE_KERNEL(32 * kWarps)
rnn_pack(const RnnWalk walk, const RnnTeam team, const bool backward, const void* w_hh, char* workspace) {
  pack_weights<Kind>(walk, team, backward, static_cast<const typename Kind::Element*>(w_hh), workspace);
}

template <class Kind, int kGates, int kColumnTiles>
INTERFUSE_KERNEL(32 * kWarps)
rnn_forward(const RnnWalk walk, const RnnTeam team, const RnnForwardArrays a, char* workspace) {
  using T = typename Kind::Element;
  using Cell = Cells<T>;
  INTERFUSE_DYNAMIC_SHARED(shared);
  Lane<Kind, kGates, kColumnTiles> me;
  constexpr int kPairs = decltype(me)::kPairs;
  Weights<Kind, kGates, kColumnTiles> weights;
  Exchange exchange;
  const int64_t number = blockIdx.x / static_cast<unsigned>(team.blocks());
  exchange.begin(team, shared, workspace + team.flags_at(walk.directions), number);
  me.begin(walk, team, shared, exchange.rank);
  weights.begin(shared, team);
  const int64_t hidden = walk.hidden;
  int64_t loaded = -1;
  for (int64_t job = number; job < team.jobs; job += team.teams) {
    me.take_job(job, a.lengths);
    if (me.direction != loaded) {
      weights.load(workspace, team, me.direction, exchange.rank);
      loaded = me.direction;
    }
    const bool later = walk.begin > 0;
    const void *h0 = later ? a.hn : a.h0, *c0 = later ? a.cn : a.c0;
    const float *h_carry = later && kGates != 4 ? a.carry : nullptr, *c_carry = later && kGates == 4 ? a.carry : nullptr;
    float h[kPairs][2], c[kPairs][2], shift[2] = {};
    INTERFUSE_UNROLL
    for (int k = 0; k < 2; ++k)
      if (kGates == 3 && a.b_hn && me.real(k))
        shift[k] = to_float(static_cast<const T*>(a.b_hn)[me.direction * hidden + me.unit + 8 * k]);
    INTERFUSE_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      INTERFUSE_UNROLL
      for (int k = 0; k < 2; ++k) h[p][k] = c[p][k] = 0.f;
      if (!me.owns(p)) continue;
      INTERFUSE_UNROLL
      for (int k = 0; k < 2; ++k) {
        h[p][k] = me.state(h0, h_carry, p, k);
        if (kGates == 4) c[p][k] = me.state(c0, c_carry, p, k);
      }
      me.place(exchange.own(), 0, 1, p, h[p]);
    }
    if (me.longest > 0) exchange.publish();
    for (int64_t s = 0; s < me.longest; ++s) {
      // Under way while the others' values are waited for.
      float in[kPairs][2][kGates];
      INTERFUSE_UNROLL
      for (int p = 0; p < kPairs; ++p)
        INTERFUSE_UNROLL
        for (int k = 0; k < 2; ++k) {
          const bool live = me.owns(p) && s < me.length[p] && me.real(k);
          const float* from = a.pre + me.place_of(p, s) * kGates * hidden + me.unit + 8 * k;
          INTERFUSE_UNROLL
          for (int q = 0; q < kGates; ++q) in[p][k][q] = live ? from[q * hidden] : 0.f;
        }
      exchange.receive();
      float acc[kGates][kColumnTiles][4];
      weights.product(exchange.operand(), acc);
      me.share(acc);
      exchange.advance();
      INTERFUSE_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        if (!me.owns(p)) continue;
        INTERFUSE_UNROLL
        for (int k = 0; k < 2; ++k) {
          float g[4] = {};
          INTERFUSE_UNROLL
          for (int q = 0; q < kGates; ++q) g[q] = me.sum(acc, q, p, k);
          if (s >= me.length[p] || !me.real(k)) continue;
          const int64_t here = me.place_of(p, s) * hidden + me.unit + 8 * k;
          T* kept = static_cast<T*>(a.gates) + (me.place_of(p, s) * 4 * hidden + me.unit + 8 * k);
          if (kGates == 4) {
            const float i = Cell::logistic(in[p][k][0] + g[0]), f = Cell::logistic(in[p][k][1] + g[1]);
            const float n = Cell::tanh(in[p][k][2 % kGates] + g[2]), o = Cell::logistic(in[p][k][3 % kGates] + g[3]);
            c[p][k] = f * c[p][k] + i * n;
            h[p][k] = o * Cell::tanh(c[p][k]);
            if (a.gates) {
              put(kept, i), put(kept + hidden, f), put(kept + 2 * hidden, n), put(kept + 3 * hidden, o);
              a.state[here] = c[p][k];
            }
          } else if (kGates == 3) {
            const float r = Cell::logistic(in[p][k][0] + g[0]), z = Cell::logistic(in[p][k][1 % kGates] + g[1]);
            const float recurrent = g[2] + shift[k], n = Cell::tanh(in[p][k][2 % kGates] + r * recurrent);
            h[p][k] = n + z * (h[p][k] - n);
            if (a.gates) put(kept, r), put(kept + hidden, z), put(kept + 2 * hidden, n), put(kept + 3 * hidden, recurrent);
          } else {
            const float total = in[p][k][0] + g[0];
            h[p][k] = walk.cell == INTERFUSE_RNN_TANH ? Cell::tanh(total) : total > 0.f || total != total ? total : 0.f;
          }
          put(static_cast<T*>(a.y) + here, h[p][k]);
        }
        me.place(exchange.own(), 0, 1, p, h[p]);
      }
      if (s + 1 < me.longest) exchange.publish();
    }
    INTERFUSE_UNROLL
    for (int p = 0; p < kPairs; ++p)
      INTERFUSE_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (!me.owns(p) || !me.inside(p, k)) continue;
        put(static_cast<T*>(a.hn) + me.state_at(p, k), h[p][k]);
        if (kGates == 4) put(static_cast<T*>(a.cn) + me.state_at(p, k), c[p][k]);
        if (walk.end < walk.steps) a.carry[me.state_at(p, k)] = kGates == 4 ? c[p][k] : h[p][k];
      }
  }
  exchange.end();
}

// The gradient of the outputs that comes back through the recurrent weights, if anything was sent there.
template <class Lane, class Weights, int kColumnTiles>
INTERFUSE_DEVICE void through_weights(const Lane& me, const Weights& weights, Exchange& exchange, bool sent,
                                      float (&acc)[1][kColumnTiles][4]) {
  if (!sent) return;
  exchange.receive();
  weights.product(exchange.operand(), acc);
  me.share(acc);
  exchange.advance();
}

template <class Kind, int kGates, int kColumnTiles>
INTERFUSE_KERNEL(32 * kWarps)
rnn_backward(const RnnWalk walk, const RnnTeam team, const RnnBackwardArrays a, char* workspace) {
  using T = typename Kind::Element;
  constexpr int kSlots = kGates == 1 ? 1 : 4;
  INTERFUSE_DYNAMIC_SHARED(shared);
  Lane<Kind, 1, kColumnTiles> me;
  constexpr int kPairs = decltype(me)::kPairs;
  Weights<Kind, 1, kColumnTiles> weights;
  Exchange exchange;
  const int64_t number = blockIdx.x / static_cast<unsigned>(team.blocks());
  exchange.begin(team, shared, workspace + team.flags_at(walk.directions), number);
  me.begin(walk, team, shared, exchange.rank);
  weights.begin(shared, team);
  const int64_t hidden = walk.hidden;
  int64_t loaded = -1;
  for (int64_t job = number; job < team.jobs; job += team.teams) {
    me.take_job(job, a.lengths);
    if (me.direction != loaded) {
      weights.load(workspace, team, me.direction, exchange.rank);
      loaded = me.direction;
    }
    // What the part after this one left for this, and where this leaves it for the part before.
    const float* carried = walk.end < walk.steps ? a.carry : nullptr;
    const float* carried_c = carried && kGates > 1 ? carried + walk.batch * hidden : nullptr;
    float* left = walk.begin > 0 ? a.carry : nullptr;
    // Past the gates: an LSTM's gradient of c, a GRU's of h.
    float carry[kPairs][2];
    INTERFUSE_UNROLL
    for (int p = 0; p < kPairs; ++p)
      INTERFUSE_UNROLL
      for (int k = 0; k < 2; ++k)
        carry[p][k] = kGates == 1 ? 0.f : me.state(kGates == 4 ? a.grad_cn : nullptr, carried_c, p, k);
    bool sent = false;
    float acc[1][kColumnTiles][4];
    for (int64_t s = me.longest - 1; s >= 0; --s) {
      float dy[kPairs][2], v[kPairs][2][4], now[kPairs][2], before[kPairs][2];
      INTERFUSE_UNROLL
      for (int p = 0; p < kPairs; ++p)
        INTERFUSE_UNROLL
        for (int k = 0; k < 2; ++k) {
          const bool live = me.owns(p) && s < me.length[p] && me.real(k);
          const int64_t u = me.unit + 8 * k, here = me.place_of(p, s), earlier = me.place_of(p, s - 1);
          dy[p][k] = live && a.grad_y ? to_float(static_cast<const T*>(a.grad_y)[here * hidden + u]) : 0.f;
          if (kGates > 1) {
            INTERFUSE_UNROLL
            for (int q = 0; q < 4; ++q)
              v[p][k][q] = live ? to_float(static_cast<const T*>(a.gates)[(here * 4 + q) * hidden + u]) : 0.f;
          }
          const bool inner = live && (s > 0 || left), start = live && s == 0 && !left;
          if (kGates == 4) {
            now[p][k] = live ? a.state[here * hidden + u] : 0.f;
            before[p][k] = inner ? a.state[earlier * hidden + u] : start ? me.state(a.c0, p, k) : 0.f;
          } else if (kGates == 3) {
            before[p][k] = inner   ? to_float(static_cast<const T*>(a.y)[earlier * hidden + u])
                           : start ? me.state(a.h0, p, k)
                                   : 0.f;
          } else {
            now[p][k] = live ? to_float(static_cast<const T*>(a.y)[here * hidden + u]) : 0.f;
          }
        }
      through_weights(me, weights, exchange, sent, acc);
      INTERFUSE_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        if (!me.owns(p)) continue;
        float d[kGates][2];
        INTERFUSE_UNROLL
        for (int k = 0; k < 2; ++k) {
          INTERFUSE_UNROLL
          for (int q = 0; q < kGates; ++q) d[q][k] = 0.f;
          float dh = dy[p][k] + (sent ? me.sum(acc, 0, p, k) : 0.f);
          if (s >= me.length[p] || !me.real(k)) continue;
          if (s + 1 == me.length[p]) dh += me.state(a.grad_hn, carried, p, k);
          T* to = static_cast<T*>(a.grads) + (me.place_of(p, s) * kSlots * hidden + me.unit + 8 * k);
          if (kGates == 4) {
            const float i = v[p][k][0], f = v[p][k][1], g = v[p][k][2], o = v[p][k][3];
            const float t = Cells<T>::tanh(now[p][k]), dc = carry[p][k] + dh * o * (1.f - t * t);
            d[0][k] = dc * g * i * (1.f - i);
            d[1 % kGates][k] = dc * before[p][k] * f * (1.f - f);
            d[2 % kGates][k] = dc * i * (1.f - g * g);
            d[3 % kGates][k] = dh * t * o * (1.f - o);
            carry[p][k] = dc * f;
            INTERFUSE_UNROLL
            for (int q = 0; q < kGates; ++q) put(to + q * hidden, d[q][k]);
          } else if (kGates == 3) {
            const float r = v[p][k][0], z = v[p][k][1], n = v[p][k][2], recurrent = v[p][k][3];
            dh += carry[p][k];
            const float dn = dh * (1.f - z) * (1.f - n * n);
            d[0][k] = dn * recurrent * r * (1.f - r);
            d[1 % kGates][k] = dh * (before[p][k] - n) * z * (1.f - z);
            d[2 % kGates][k] = dn * r;
            carry[p][k] = dh * z;
            put(to, dn);
            INTERFUSE_UNROLL
            for (int q = 0; q < kGates; ++q) put(to + (q + 1) * hidden, d[q][k]);
          } else {
            const float y = now[p][k];
            d[0][k] = walk.cell == INTERFUSE_RNN_TANH ? dh * (1.f - y * y) : y > 0.f ? dh : 0.f;
            put(to, d[0][k]);
          }
        }
        INTERFUSE_UNROLL
        for (int q = 0; q < kGates; ++q) me.place(exchange.own(), q, kGates, p, d[q]);
      }
      sent = s > 0 || a.grad_h0 || left;
      if (sent) exchange.publish();
    }
    // One more step back; a sequence without steps passes the gradients of its final states through.
    if (a.grad_h0 || left) through_weights(me, weights, exchange, sent, acc);
    INTERFUSE_UNROLL
    for (int p = 0; p < kPairs; ++p)
      INTERFUSE_UNROLL
      for (int k = 0; k < 2; ++k) {
        if (!me.owns(p) || !me.inside(p, k)) continue;
        const int64_t at = me.state_at(p, k);
        if (a.grad_h0 || left) {
          float dh = me.length[p] == 0 ? me.state(a.grad_hn, carried, p, k) : sent ? me.sum(acc, 0, p, k) : 0.f;
          if (left)
            left[at] = dh;
          else
            put(static_cast<T*>(a.grad_h0) + at, kGates == 3 ? dh + carry[p][k] : dh);
        }
        if (kGates > 1 && left)
          left[walk.batch * hidden + at] = carry[p][k];
        else if (kGates == 4 && a.grad_c0)
          put(static_cast<T*>(a.grad_c0) + at, carry[p][k]);
      }
  }
  exchange.end();
}

}  // namespace cuda
}  // namespace interfuse
