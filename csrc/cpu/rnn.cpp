// Recurrent layers forward on the CPU: one team of threads for the whole stack. For a stretch of steps the input's
// share of the gates is one matrix product; then the steps run, each thread on its own unit blocks, whose recurrent
// weights stay in its caches; the gates of a unit block are finished in registers. Compiled once per ISA.
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/rnn_cells.h"
#include "cpu/rnn_pack.h"
#include "cpu/rnn_products.h"
#include "cpu/rnn_shapes.h"
#include "cpu/rnn_team.h"

namespace interfuse {
namespace INTERFUSE_ISA {

void rnn_backward(const Rnn&, const RnnOrder&, const RnnBackward&);

namespace {

// Rows of x that are gathered at a time: a block and one weight panel fit into L1 and L2.
constexpr int64_t kGather = 48;
// Floats of gates that a stretch of steps may fill: the steps should find them in L2.
constexpr int64_t kStretch = 96 << 10;

template <class Cell>
class Forward {
 public:
  Forward(const Rnn& p, const RnnOrder& order, const RnnForward& a)
      : p_(p), order_(order), a_(a), keep_(p, order.tokens), units_(keep_.units), outputs_(keep_.outputs),
        blocks_(units_ / kLanes), gate_row_(keep_.gate_row) {
    stretch_ = kStretch / gate_row_;
    if (stretch_ < p_.batch) stretch_ = p_.batch;
    if (stretch_ > order_.tokens) stretch_ = order_.tokens;
  }

  void run() {
    allocate();
    parallel(rnn_threads<Cell>(p_, order_, a_.threads), [&](int thread, int threads) {
      const RnnTeam team(p_, barriers_, thread, threads);
      for (int64_t layer = 0; layer < p_.layers; ++layer) {
        for (int d = 0; d < p_.directions; ++d)
          if (team.takes(d)) run_direction(team, layer, d);
        team.meet_all();  // the next layer reads both directions
      }
    });
  }

 private:
  // Buffers of one direction; while saving, the first three lie in the reserve.
  struct Direction {
    float *gates, *cell, *hidden, *output;  // histories, or for gates a stretch, for cell and hidden one state
    float *h_start, *c_start, *w_ih, *bias, *sum_bias, *w_hr;
    void* w_hh;  // float, or bfloat16 where the plan asks for it
  };

  int64_t output_floats() const { return order_.tokens * outputs_; }

  void allocate() {
    const int64_t widest = p_.layers > 1 && p_.layer_input(1) > p_.input ? p_.layer_input(1) : p_.input;
    const int64_t depth = padded(p_.output());
    int64_t each = (p_.batch * (outputs_ + 3 * units_)) + units_ * Cell::kGates * (widest + depth + 1) + units_ +
                   padded(p_.projection) * units_ + 12 * 16;
    if (!p_.save) each += stretch_ * gate_row_ + 2 * output_floats() + 3 * 16;
    RnnMemory memory{scratch_floats(Slot::other, each * p_.directions)};
    for (int d = 0; d < p_.directions; ++d) {
      Direction& x = direction_[d];
      x.h_start = memory.take(p_.batch * outputs_);
      x.c_start = memory.take(p_.batch * units_);
      x.w_ih = memory.take(units_ * Cell::kGates * widest);
      x.w_hh = memory.take(units_ * Cell::kGates * depth);
      x.bias = memory.take(units_ * Cell::kGates);
      x.sum_bias = memory.take(units_);
      x.w_hr = memory.take(padded(p_.projection) * units_);
      if (p_.save) continue;
      x.gates = memory.take(stretch_ * gate_row_);
      x.cell = memory.take(p_.batch * units_);
      x.hidden = memory.take(p_.batch * units_);
      outputs_of_[0][d] = memory.take(output_floats());
      outputs_of_[1][d] = memory.take(output_floats());
    }
  }

  float* reserved(int64_t layer, int d) const { return a_.reserve + (layer * p_.directions + d) * keep_.total; }
  float* output_of(int64_t layer, int d) const {
    return p_.save ? reserved(layer, d) + keep_.output : outputs_of_[layer & 1][d];
  }

  void run_direction(const RnnTeam& team, int64_t layer, int d) {
    Direction x = direction_[d];
    x.output = output_of(layer, d);
    if (p_.save) {
      x.gates = reserved(layer, d) + keep_.gates;
      x.cell = reserved(layer, d) + keep_.cell;
      x.hidden = reserved(layer, d) + keep_.hidden;
    }
    prepare(team, layer, d, x);
    team.meet(d);
    const RnnInput input{p_, order_, a_.in, {layer ? output_of(layer - 1, 0) : nullptr, layer && p_.directions == 2 ? output_of(layer - 1, 1) : nullptr}, outputs_};
    for (int64_t s = 0; s < order_.steps;) {
      int64_t end = s + 1;
      while (end < order_.steps && order_.first[end + 1] - order_.first[s] <= stretch_) ++end;
      input_product(team, layer, d, x, input, order_.first[s], order_.first[end], s);
      team.meet(d);
      const int64_t base = p_.save ? 0 : order_.first[s];
      for (; s < end; ++s) {
        step(team, d, x, s, base);
        team.meet(d);
        if (!p_.projection) continue;
        project(team, d, x, s);
        team.meet(d);
      }
    }
    finish(team, layer, d, x);
  }

  void prepare(const RnnTeam& team, int64_t layer, int d, const Direction& x) {
    const int64_t at = layer * p_.directions + d, depth = p_.layer_input(layer);
    const interfuse_rnn_weights& w = a_.weights[at];
    Range mine = team.share(d, blocks_);
    pack_gates(w.w_ih, Cell::kGates, p_.hidden, depth, mine.begin, mine.end, x.w_ih);
    if (p_.half_weights)
      pack_gates(w.w_hh, Cell::kGates, p_.hidden, p_.output(), mine.begin, mine.end, static_cast<uint16_t*>(x.w_hh));
    else
      pack_gates(w.w_hh, Cell::kGates, p_.hidden, p_.output(), mine.begin, mine.end, static_cast<float*>(x.w_hh));
    if (p_.projection) {
      mine = team.share(d, outputs_ / kLanes);
      pack_gates(w.w_hr, 1, p_.projection, p_.hidden, mine.begin, mine.end, x.w_hr);
    }
    if (team.first_of(d)) pack_bias<Cell>(p_, w, x.bias, x.sum_bias);
    mine = team.share(d, p_.batch);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      start_state(a_.in->h0, at, p_.output(), j, x.h_start + j * outputs_, outputs_);
      if (Cell::kCell) start_state(a_.in->c0, at, p_.hidden, j, x.c_start + j * units_, units_);
    }
  }

  void start_state(const float* from, int64_t at, int64_t size, int64_t j, float* to, int64_t room) const {
    memset(to, 0, static_cast<size_t>(room) * 4);
    if (from) memcpy(to, from + (at * p_.batch + order_.row[j]) * size, static_cast<size_t>(size) * 4);
  }

  // The input's share of the gates of tokens begin..end, which start at step s.
  void input_product(const RnnTeam& team, int64_t layer, int d, const Direction& x, const RnnInput& input, int64_t begin,
                     int64_t end, int64_t s) {
    const int64_t depth = p_.layer_input(layer), groups = (end - begin + kGather - 1) / kGather;
    const Range mine = team.share(d, groups * blocks_);
    float* rows = scratch_floats(Slot::rows, kGather * depth);
    const int64_t base = p_.save ? 0 : begin;
    for (int64_t task = mine.begin; task < mine.end;) {
      const int64_t group = task / blocks_, first = begin + group * kGather;
      const int64_t count = end - first < kGather ? end - first : kGather;
      const int64_t from = task % blocks_, most = (group + 1) * blocks_, to = (mine.end < most ? mine.end - 1 : most - 1) % blocks_ + 1;
      for (int64_t i = 0; i < count; ++i) {
        while (order_.first[s + 1] <= first + i) ++s;
        input.copy(d, s, first + i - order_.first[s], rows + i * depth);
      }
      packed_product<Cell::kGates>(count, depth, rows, depth, 1, x.w_ih, Cell::kGates * kLanes,
                                   depth * Cell::kGates * kLanes, from, to, x.gates + (first - base) * gate_row_, gate_row_,
                                   Cell::kSlots * kLanes, false, [&](int64_t block, int v) __attribute__((always_inline)) {
                                     return load(x.bias + (block * Cell::kGates + v) * kLanes);
                                   });
      task += to - from;
    }
  }

  void step(const RnnTeam& team, int d, const Direction& x, int64_t s, int64_t base) {
    constexpr int kRows = step_rows(Cell::kGates);
    const int64_t active = order_.active[s], tiles = (active + kRows - 1) / kRows;
    const Range mine = team.share(d, blocks_ * tiles);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const int64_t block = task / tiles, end = task % tiles * kRows + kRows < active ? task % tiles * kRows + kRows : active;
      for (int64_t j = task % tiles * kRows; j < end;)
        j += one_tile<kRows>(end - j, [&](auto count) __attribute__((always_inline)) {
          if (p_.half_weights)
            tile<decltype(count)::value>(x, static_cast<const uint16_t*>(x.w_hh), s, base, block, j);
          else
            tile<decltype(count)::value>(x, static_cast<const float*>(x.w_hh), s, base, block, j);
        });
    }
  }

  template <int Rows, class W>
  INTERFUSE_INLINE void tile(const Direction& x, const W* w_hh, int64_t s, int64_t base, int64_t block, int64_t j) {
    const int64_t token = order_.first[s] + j, before = s ? order_.first[s - 1] + j : 0;
    const float* h_before = s ? x.output + before * outputs_ : x.h_start + j * outputs_;
    float* gates = x.gates + (token - base) * gate_row_ + block * Cell::kSlots * kLanes;
    Vec sum[Rows][Cell::kGates];
    unrolled<Rows>([&](int r) __attribute__((always_inline)) {
      unrolled<Cell::kGates>([&](int g) __attribute__((always_inline)) {
        sum[r][g] = Cell::start(g, gates + r * gate_row_, x.sum_bias + block * kLanes);
      });
    });
    step_product<Rows, Cell::kGates, step_split(Rows * Cell::kGates)>(
        p_.output(), h_before, outputs_, w_hh + block * p_.output() * Cell::kGates * kLanes, sum);
    const float* c_before = s == 0 ? x.c_start + j * units_ : p_.save ? x.cell + before * units_ : x.cell + j * units_;
    float* c_after = x.cell + (p_.save ? token : j) * units_;
    float* h_after = p_.projection ? x.hidden + (p_.save ? token : j) * units_ : x.output + token * outputs_;
    unrolled<Rows>([&](int r) __attribute__((always_inline)) {
      const int64_t at = r * units_ + block * kLanes;
      Vec c = Cell::kCell ? load(c_before + at) : zero();
      const Vec h_old = Cell::kCell ? zero() : load(h_before + r * outputs_ + block * kLanes);
      float* row = gates + r * gate_row_;
      const Vec h = Cell::forward(sum[r], row, h_old, c, p_.save ? row : nullptr);
      if (Cell::kCell) store(c_after + at, c);
      store(h_after + r * (p_.projection ? units_ : outputs_) + block * kLanes, h);
    });
  }

  // output = w_hr * hidden, for the rows of step s.
  void project(const RnnTeam& team, int d, const Direction& x, int64_t s) {
    const Range mine = team.share(d, outputs_ / kLanes);
    const float* hidden = x.hidden + (p_.save ? order_.first[s] * units_ : 0);
    packed_product<1>(order_.active[s], p_.hidden, hidden, units_, 1, x.w_hr, kLanes, p_.hidden * kLanes, mine.begin, mine.end,
                      x.output + order_.first[s] * outputs_, outputs_, kLanes, false,
                      [](int64_t, int) __attribute__((always_inline)) { return zero(); });
  }

  // y, hn and cn in the caller's order.
  void finish(const RnnTeam& team, int64_t layer, int d, const Direction& x) {
    const int64_t at = layer * p_.directions + d, size = p_.output();
    const Range mine = team.share(d, p_.batch);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      const int64_t last = order_.length[j] - 1, row = order_.row[j];
      const int64_t token = last >= 0 ? order_.first[last] + j : 0;
      memcpy(a_.hn + (at * p_.batch + row) * size, last >= 0 ? x.output + token * outputs_ : x.h_start + j * outputs_,
             static_cast<size_t>(size) * 4);
      if (Cell::kCell) {
        const float* c = last < 0 ? x.c_start + j * units_ : x.cell + (p_.save ? token : j) * units_;
        memcpy(a_.cn + (at * p_.batch + row) * p_.hidden, c, static_cast<size_t>(p_.hidden) * 4);
      }
      if (layer + 1 < p_.layers) continue;
      for (int64_t t = 0; t < p_.steps; ++t) {
        float* y = a_.y + ((p_.batch_first ? row * p_.steps + t : t * p_.batch + row) * p_.directions + d) * size;
        const int64_t s = d == 0 ? t : last - t;
        if (t <= last)
          memcpy(y, x.output + (order_.first[s] + j) * outputs_, static_cast<size_t>(size) * 4);
        else
          memset(y, 0, static_cast<size_t>(size) * 4);
      }
    }
  }

  const Rnn& p_;
  const RnnOrder& order_;
  const RnnForward& a_;
  const RnnLayout<Cell> keep_;
  const int64_t units_, outputs_, blocks_, gate_row_;
  int64_t stretch_;
  Direction direction_[2] = {};
  float* outputs_of_[2][2] = {};
  RnnBarriers barriers_;
};

struct ReserveOf {
  const Rnn& p;
  int64_t tokens, floats = 0;
  template <class Cell>
  void run() {
    floats = RnnLayout<Cell>(p, tokens).total * p.layers * p.directions;
  }
};

int64_t reserve(const Rnn& p, int64_t tokens) {
  ReserveOf body{p, tokens};
  for_cell(p.cell, body);
  return body.floats;
}

struct ForwardOf {
  const Rnn& p;
  const RnnOrder& order;
  const RnnForward& a;
  template <class Cell>
  void run() {
    Forward<Cell>(p, order, a).run();
  }
};

void forward(const Rnn& p, const RnnOrder& order, const RnnForward& a) {
  ForwardOf body{p, order, a};
  for_cell(p.cell, body);
}

}  // namespace

extern const RnnKernels rnn_kernels;
const RnnKernels rnn_kernels = {reserve, forward, rnn_backward};

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
