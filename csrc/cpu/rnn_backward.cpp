// Backward through time on the CPU. The steps run in turn, as forward's did: the product with the transposed recurrent
// weight gives the gradient of h, the cell's pointwise part makes the gates' gradient of it; then the gradients of the
// weights and of the input are products over all tokens at once. Compiled once per ISA.
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/rnn_cells.h"
#include "cpu/rnn_pack.h"
#include "cpu/rnn_products.h"
#include "cpu/rnn_shapes.h"
#include "cpu/rnn_team.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// Tokens whose gates' gradients and inputs stay in L2 while a weight's gradient takes them in.
constexpr int64_t kTokens = 192;
// Vectors of columns that a step's tile spans, and that the products over all tokens do.
constexpr int kPanel = 2, kWide = 4;

template <class Cell>
class Backward {
 public:
  Backward(const Rnn& p, const RnnOrder& order, const RnnBackward& a)
      : p_(p), order_(order), a_(a), keep_(p, order.tokens), units_(keep_.units), outputs_(keep_.outputs),
        blocks_(units_ / kLanes), gate_row_(units_ * Cell::kGates) {}

  void run() {
    allocate();
    parallel(rnn_threads<Cell>(p_, order_, a_.threads), [&](int thread, int threads) {
      const RnnTeam team(p_, barriers_, thread, threads);
      for (int64_t layer = p_.layers - 1; layer >= 0; --layer) {
        for (int d = 0; d < p_.directions; ++d)
          if (team.takes(d)) run_direction(team, layer, d);
        team.meet_all();
        input_gradient(team, layer, thread, threads);
        team.meet_all();
      }
    });
  }

 private:
  struct Direction {
    float *incoming, *carry, *h_start, *c_start;     // [batch]
    float *dx, *dsum;                                // the gates' gradients [token], equal but for the GRU
    float *dh, *doutput;                             // with a projection: one step's [batch], all tokens'
    float *w_hh, *w_ih, *input;                      // packed weights; the layer's input in step order
    float *grad_input;                               // [token]
  };

  int64_t layer_room(int64_t layer) const { return padded(p_.layer_input(layer)); }

  void allocate() {
    const int64_t widest = p_.layers > 1 && layer_room(1) > layer_room(0) ? layer_room(1) : layer_room(0);
    const int64_t tokens = order_.tokens, projected = p_.projection ? 1 : 0;
    const int64_t each = p_.batch * (2 * outputs_ + 2 * units_ + projected * outputs_) +
                         tokens * (gate_row_ * (Cell::kTwoSums ? 2 : 1) + projected * outputs_ + 2 * widest) +
                         gate_row_ * (outputs_ + widest) + 12 * 16;
    RnnMemory memory{scratch_floats(Slot::other, each * p_.directions + tokens * p_.directions * p_.output() + 16)};
    for (int d = 0; d < p_.directions; ++d) {
      Direction& x = direction_[d];
      x.incoming = memory.take(p_.batch * outputs_);
      x.h_start = memory.take(p_.batch * outputs_);
      x.carry = memory.take(p_.batch * units_);
      x.c_start = memory.take(p_.batch * units_);
      x.dx = memory.take(tokens * gate_row_);
      x.dsum = Cell::kTwoSums ? memory.take(tokens * gate_row_) : x.dx;
      x.dh = memory.take(projected * p_.batch * outputs_);
      x.doutput = memory.take(projected * tokens * outputs_);
      x.w_hh = memory.take(gate_row_ * outputs_);
      x.w_ih = memory.take(gate_row_ * widest);
      x.input = memory.take(tokens * widest);
      x.grad_input = memory.take(tokens * widest);
    }
    grad_below_ = memory.take(tokens * p_.directions * p_.output());
  }

  const float* reserved(int64_t layer, int d) const { return a_.reserve + (layer * p_.directions + d) * keep_.total; }

  void run_direction(const RnnTeam& team, int64_t layer, int d) {
    const Direction& x = direction_[d];
    prepare(team, layer, d, x);
    team.meet(d);
    for (int64_t s = order_.steps - 1; s >= 0; --s) {
      if (p_.projection) {
        output_step(team, layer, d, x, s);
        team.meet(d);
      }
      step(team, layer, d, x, s);
      team.meet(d);
    }
    start_gradient(team, layer, d, x);
    weight_gradients(team, layer, d, x);
    if (needs_input_gradient(layer)) {
      const int64_t room = layer_room(layer);
      const Range mine = team.share(d, (order_.tokens + kTokens - 1) / kTokens);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t first = i * kTokens, count = order_.tokens - first < kTokens ? order_.tokens - first : kTokens;
        wide_product(count, gate_row_, x.dx + first * gate_row_, gate_row_, 1, x.w_ih, 0, gate_row_, room / kLanes,
                     x.grad_input + first * room, room, false);
      }
    }
  }

  bool needs_input_gradient(int64_t layer) const { return layer > 0 || a_.grad_x; }

  void prepare(const RnnTeam& team, int64_t layer, int d, const Direction& x) {
    const int64_t at = layer * p_.directions + d, size = p_.output();
    const interfuse_rnn_weights& w = a_.weights[at];
    Range mine = team.share(d, outputs_ / kLanes);
    pack_gates_transposed<kPanel>(w.w_hh, Cell::kGates, p_.hidden, size, mine.begin, mine.end, x.w_hh);
    if (needs_input_gradient(layer)) {
      mine = team.share(d, layer_room(layer) / kLanes);
      pack_gates_transposed<kWide>(w.w_ih, Cell::kGates, p_.hidden, p_.layer_input(layer), mine.begin, mine.end, x.w_ih);
    }
    mine = team.share(d, p_.batch);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      fetch(a_.grad_hn, at, size, j, x.incoming + j * outputs_, outputs_);
      fetch(a_.in->h0, at, size, j, x.h_start + j * outputs_, outputs_);
      fetch(a_.grad_cn, at, p_.hidden, j, x.carry + j * units_, units_);
      fetch(a_.in->c0, at, p_.hidden, j, x.c_start + j * units_, units_);
    }
    const RnnInput input{p_, order_, a_.in, {layer ? reserved(layer - 1, 0) + keep_.output : nullptr,
                         layer && p_.directions == 2 ? reserved(layer - 1, 1) + keep_.output : nullptr}, outputs_};
    const int64_t depth = p_.layer_input(layer), room = layer_room(layer);
    for (int64_t s = 0; s < order_.steps; ++s) {
      mine = team.share(d, order_.active[s]);
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        float* to = x.input + (order_.first[s] + j) * room;
        input.copy(d, s, j, to);
        memset(to + depth, 0, static_cast<size_t>(room - depth) * 4);
      }
    }
  }

  void fetch(const float* from, int64_t at, int64_t size, int64_t j, float* to, int64_t room) const {
    memset(to, 0, static_cast<size_t>(room) * 4);
    if (from) memcpy(to, from + (at * p_.batch + order_.row[j]) * size, static_cast<size_t>(size) * 4);
  }

  // The gradient that reaches one vector of a token's output from above.
  INTERFUSE_INLINE Vec from_above(int64_t layer, int d, int64_t s, int64_t j, int64_t column) const {
    const int64_t size = p_.output(), left = size - column;
    const float* row;
    if (layer + 1 < p_.layers) {
      row = grad_below_ + ((order_.first[s] + j) * p_.directions + d) * size;
    } else {
      if (!a_.grad_y) return zero();
      const int64_t t = order_.time_of(d, s, j), b = order_.row[j];
      row = a_.grad_y + ((p_.batch_first ? b * p_.steps + t : t * p_.batch + b) * p_.directions + d) * size;
    }
    return left >= kLanes ? load(row + column) : load_first(row + column, static_cast<int>(left));
  }

  // The gradient of the output of rows j.. of step s, one block of it: from above and from the step after.
  template <int Rows, int Vectors>
  INTERFUSE_INLINE void output_gradient(int64_t layer, int d, const Direction& x, int64_t s, int64_t block, int64_t j,
                                        bool continues, Vec (&dh)[Rows][Vectors]) const {
    unrolled<Rows>([&](int r) __attribute__((always_inline)) {
      unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
        dh[r][v] = from_above(layer, d, s, j + r, (block + v) * kLanes);
        if (!continues) dh[r][v] += load(x.incoming + (j + r) * outputs_ + (block + v) * kLanes);
      });
    });
    if (continues)
      step_product<Rows, Vectors, step_split(Rows * Vectors)>(gate_row_, x.dsum + (order_.first[s + 1] + j) * gate_row_,
                                                              gate_row_, x.w_hh + block * gate_row_ * kLanes, dh);
  }

  // Calls body(Count<rows>, Count<vectors>, block, first row, continues) for this thread's part of step s, over panels
  // of up to two vectors: the rows that go on to the step after, and those that end here.
  template <class Body>
  INTERFUSE_INLINE void for_tiles(const RnnTeam& team, int d, int64_t s, int64_t blocks, Body&& body) const {
    constexpr int kRows = step_rows(kPanel);
    const int64_t active = order_.active[s], going = order_.active[s + 1];
    const int64_t tiles = (active + kRows - 1) / kRows, panels = (blocks + kPanel - 1) / kPanel;
    const Range mine = team.share(d, panels * tiles);
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      const int64_t block = task / tiles * kPanel, begin = task % tiles * kRows;
      const int64_t end = begin + kRows < active ? begin + kRows : active;
      for (int64_t j = begin; j < end;) {
        const bool continues = j < going;
        const int64_t most = continues && going < end ? going : end;
        j += one_tile<kRows>(most - j, [&](auto rows) __attribute__((always_inline)) {
          if (block + kPanel <= blocks)
            body(rows, Count<kPanel>{}, block, j, continues);
          else
            body(rows, Count<1>{}, block, j, continues);
        });
      }
    }
  }

  void step(const RnnTeam& team, int64_t layer, int d, const Direction& x, int64_t s) {
    for_tiles(team, d, s, blocks_, [&](auto rows, auto vectors, int64_t block, int64_t j, bool continues) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value, kVectors = decltype(vectors)::value;
      Vec dh[kRows][kVectors];
      if (p_.projection)
        unproject(layer, d, x, block, j, dh);
      else
        output_gradient(layer, d, x, s, block, j, continues, dh);
      unrolled<kVectors>([&](int v) __attribute__((always_inline)) {
        unrolled<kRows>([&](int r) __attribute__((always_inline)) {
          pointwise(layer, d, x, s, block + v, j + r, continues, dh[r][v]);
        });
      });
    });
  }

  // dh = dy * w_hr, whose rows are the projection's outputs: torch's own layout serves, but for its tail.
  template <int Rows, int Vectors>
  INTERFUSE_INLINE void unproject(int64_t layer, int d, const Direction& x, int64_t block, int64_t j,
                                  Vec (&dh)[Rows][Vectors]) const {
    const float* w = a_.weights[layer * p_.directions + d].w_hr;
    unrolled<Rows>([&](int r) __attribute__((always_inline)) {
      unrolled<Vectors>([&](int v) __attribute__((always_inline)) { dh[r][v] = zero(); });
    });
    for (int64_t k = 0; k < p_.projection; ++k)
      unrolled<Vectors>([&](int v) __attribute__((always_inline)) {
        const int64_t column = (block + v) * kLanes, left = p_.hidden - column;
        const float* row = w + k * p_.hidden + column;
        const Vec weights = left >= kLanes ? load(row) : load_first(row, static_cast<int>(left));
        unrolled<Rows>([&](int r) __attribute__((always_inline)) {
          dh[r][v] = multiply_add(splat(x.dh[(j + r) * outputs_ + k]), weights, dh[r][v]);
        });
      });
  }

  // With a projection: the gradient of its result, for this step and for the weight's gradient.
  void output_step(const RnnTeam& team, int64_t layer, int d, const Direction& x, int64_t s) {
    for_tiles(team, d, s, outputs_ / kLanes, [&](auto rows, auto vectors, int64_t block, int64_t j, bool continues) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value, kVectors = decltype(vectors)::value;
      Vec dh[kRows][kVectors];
      output_gradient(layer, d, x, s, block, j, continues, dh);
      unrolled<kRows>([&](int r) __attribute__((always_inline)) {
        unrolled<kVectors>([&](int v) __attribute__((always_inline)) {
          store(x.dh + (j + r) * outputs_ + (block + v) * kLanes, dh[r][v]);
          store(x.doutput + (order_.first[s] + j + r) * outputs_ + (block + v) * kLanes, dh[r][v]);
        });
      });
    });
  }

  INTERFUSE_INLINE void pointwise(int64_t layer, int d, const Direction& x, int64_t s, int64_t block, int64_t j,
                                  bool continues, Vec dh) const {
    const float* kept = reserved(layer, d);
    const int64_t token = order_.first[s] + j, before = s ? order_.first[s - 1] + j : 0, column = block * kLanes;
    float* carried = x.carry + j * units_ + column;
    Vec carry = Cell::kCarry ? load(carried) : zero(), c = zero(), c_before = zero(), h_before = zero();
    // A carry beside h belongs to h: it is part of its gradient. (The LSTM's belongs to c.)
    if (Cell::kCarry && !Cell::kCell && continues) dh += carry;
    if (Cell::kCell) {
      c = load(kept + keep_.cell + token * units_ + column);
      c_before = load((s ? kept + keep_.cell + before * units_ : x.c_start + j * units_) + column);
    }
    if (Cell::kTwoSums) h_before = load((s ? kept + keep_.output + before * outputs_ : x.h_start + j * outputs_) + column);
    Vec dx[Cell::kGates], dsum[Cell::kGates];
    Cell::backward(dh, carry, c, c_before, h_before,
                   kept + keep_.gates + token * keep_.gate_row + column * Cell::kSlots, dx, dsum);
    if (Cell::kCarry) store(carried, carry);
    const int64_t to = token * gate_row_ + column * Cell::kGates;
    unrolled<Cell::kGates>([&](int g) __attribute__((always_inline)) {
      store(x.dx + to + g * kLanes, dx[g]);
      if (Cell::kTwoSums) store(x.dsum + to + g * kLanes, dsum[g]);
    });
  }

  // Of h0 and c0: what a step before the first would have received.
  void start_gradient(const RnnTeam& team, int64_t layer, int d, const Direction& x) {
    const int64_t at = layer * p_.directions + d, size = p_.output();
    const int64_t started = order_.steps ? order_.active[0] : 0;
    const Range mine = team.share(d, p_.batch);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      const int64_t row = at * p_.batch + order_.row[j];
      if (a_.grad_c0 && Cell::kCell)
        memcpy(a_.grad_c0 + row * p_.hidden, x.carry + j * units_, static_cast<size_t>(p_.hidden) * 4);
      if (!a_.grad_h0) continue;
      for (int64_t block = 0; block < outputs_ / kLanes; ++block) {
        Vec dh = zero();
        if (j >= started) {
          dh = load(x.incoming + j * outputs_ + block * kLanes);
        } else {
          if (Cell::kCarry && !Cell::kCell) dh = load(x.carry + j * units_ + block * kLanes);
          // A block inside a panel of two: its vectors stand two apart.
          const int64_t panel = block / kPanel * kPanel;
          const int64_t vectors = outputs_ / kLanes - panel < kPanel ? outputs_ / kLanes - panel : kPanel;
          const float* w = x.w_hh + panel * gate_row_ * kLanes + (block - panel) * kLanes;
          for (int64_t k = 0; k < gate_row_; ++k)
            dh = multiply_add(splat(x.dsum[j * gate_row_ + k]), load(w + k * vectors * kLanes), dh);
        }
        const int64_t left = size - block * kLanes;
        store_first(a_.grad_h0 + row * size + block * kLanes, dh, left < kLanes ? static_cast<int>(left) : kLanes);
      }
    }
  }

  // grad (gates * units, columns) = sum over tokens of d(token, gate unit) * from(token, column), for this thread's
  // unit blocks. `from` is one token behind where shifted: the first step's rows then are `first_rows`.
  void outer_product(const RnnTeam& team, int d, int64_t gates, int64_t units, const float* grads, int64_t grads_row,
                     int64_t columns, const float* from, int64_t from_row, bool shifted, const float* first_rows, float* to) {
    const Range mine = team.share(d, padded(units) / kLanes);
    const int64_t width = padded(columns);
    float* sums = scratch_floats(Slot::weight, kLanes * gates * width);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      memset(sums, 0, static_cast<size_t>(kLanes * gates * width) * 4);
      const auto add = [&](int64_t first, int64_t count, const float* rows) {
        wide_product(gates * kLanes, count, grads + first * grads_row + block * gates * kLanes, 1, grads_row, rows, from_row, 1,
                     width / kLanes, sums, width, true);
      };
      for (int64_t s = 0; s < order_.steps;) {
        if (shifted && s == 0) {
          add(0, order_.active[0], first_rows);
          ++s;
          continue;
        }
        // Steps whose row counts agree lie at one distance from the rows they multiply.
        int64_t end = s + 1;
        while (end < order_.steps && order_.first[end + 1] - order_.first[s] <= kTokens &&
               (!shifted || order_.active[end - 1] == order_.active[s - 1]))
          ++end;
        add(order_.first[s], order_.first[end] - order_.first[s], from + (shifted ? order_.first[s - 1] : order_.first[s]) * from_row);
        s = end;
      }
      for (int64_t gate = 0; gate < gates; ++gate)
        for (int lane = 0; lane < kLanes && block * kLanes + lane < units; ++lane)
          memcpy(to + (gate * units + block * kLanes + lane) * columns, sums + (gate * kLanes + lane) * width,
                 static_cast<size_t>(columns) * 4);
    }
  }

  void bias_gradient(const RnnTeam& team, int d, const float* grads, float* to) {
    const Range mine = team.share(d, blocks_);
    for (int64_t block = mine.begin; block < mine.end; ++block)
      for (int64_t gate = 0; gate < Cell::kGates; ++gate) {
        Vec sum = zero();
        const float* column = grads + (block * Cell::kGates + gate) * kLanes;
        for (int64_t token = 0; token < order_.tokens; ++token) sum += load(column + token * gate_row_);
        const int64_t left = p_.hidden - block * kLanes;
        store_first(to + gate * p_.hidden + block * kLanes, sum, left < kLanes ? static_cast<int>(left) : kLanes);
      }
  }

  void weight_gradients(const RnnTeam& team, int64_t layer, int d, const Direction& x) {
    const interfuse_rnn_weights& grad = a_.grad_weights[layer * p_.directions + d];
    const float* kept = reserved(layer, d);
    if (grad.w_ih)
      outer_product(team, d, Cell::kGates, p_.hidden, x.dx, gate_row_, p_.layer_input(layer), x.input, layer_room(layer), false,
                    nullptr, grad.w_ih);
    if (grad.w_hh)
      outer_product(team, d, Cell::kGates, p_.hidden, x.dsum, gate_row_, p_.output(), kept + keep_.output, outputs_, true,
                    x.h_start, grad.w_hh);
    if (grad.w_hr)
      outer_product(team, d, 1, p_.projection, x.doutput, outputs_, p_.hidden, kept + keep_.hidden, units_, false, nullptr,
                    grad.w_hr);
    if (grad.b_ih) bias_gradient(team, d, x.dx, grad.b_ih);
    if (grad.b_hh) bias_gradient(team, d, x.dsum, grad.b_hh);
  }

  // What the directions give to the layer's input, added up: for the layer below in its directions' step order, for the
  // first layer in the caller's order.
  void input_gradient(const RnnTeam&, int64_t layer, int thread, int threads) {
    if (!needs_input_gradient(layer)) return;
    const int64_t depth = p_.layer_input(layer), room = layer_room(layer);
    const Range mine = share(p_.batch, thread, threads);
    for (int64_t j = mine.begin; j < mine.end; ++j)
      for (int64_t t = 0; t < p_.steps; ++t) {
        const int64_t last = order_.length[j] - 1, row = order_.row[j];
        const bool real = t <= last;
        const float* parts[2] = {};
        if (real)
          for (int d = 0; d < p_.directions; ++d)
            parts[d] = direction_[d].grad_input + (order_.first[d == 0 ? t : last - t] + j) * room;
        if (layer == 0) {
          float* to = a_.grad_x + (p_.batch_first ? row * p_.steps + t : t * p_.batch + row) * depth;
          for (int64_t i = 0; i < depth; ++i) to[i] = real ? parts[0][i] + (parts[1] ? parts[1][i] : 0.f) : 0.f;
          continue;
        }
        if (!real) continue;
        for (int d = 0; d < p_.directions; ++d) {
          const int64_t step = d == 0 ? t : last - t;
          float* to = grad_below_ + ((order_.first[step] + j) * p_.directions + d) * p_.output();
          for (int64_t i = 0; i < p_.output(); ++i) {
            const int64_t column = d * p_.output() + i;
            to[i] = parts[0][column] + (parts[1] ? parts[1][column] : 0.f);
          }
        }
      }
  }

  const Rnn& p_;
  const RnnOrder& order_;
  const RnnBackward& a_;
  const RnnLayout<Cell> keep_;
  const int64_t units_, outputs_, blocks_, gate_row_;
  Direction direction_[2] = {};
  float* grad_below_ = nullptr;
  RnnBarriers barriers_;
};

struct BackwardOf {
  const Rnn& p;
  const RnnOrder& order;
  const RnnBackward& a;
  template <class Cell>
  void run() {
    Backward<Cell>(p, order, a).run();
  }
};

}  // namespace

void rnn_backward(const Rnn& p, const RnnOrder& order, const RnnBackward& a) {
  BackwardOf body{p, order, a};
  for_cell(p.cell, body);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
