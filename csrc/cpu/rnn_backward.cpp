// Backward through time on the CPU. The steps run in turn, as forward's did: the product with the transposed recurrent
// weight gives the gradient of h, the cell's pointwise part makes the gates' gradient of it; then the gradients of the
// weights and of the input are products over all tokens at once. Compiled once per ISA.
#include "common/scratch.h"
#include "cpu/rnn_cells.h"
#include "cpu/rnn_outer.h"
#include "cpu/rnn_pack.h"
#include "cpu/rnn_products.h"
#include "cpu/rnn_shapes.h"
#include "cpu/rnn_team.h"

namespace interfuse {
namespace INTERFUSE_ISA {
namespace {

// Tokens whose gates' gradients stay in L2 while the input's gradient is made of them.
constexpr int64_t kTokens = 96;
constexpr Packing kPlain{1, false};

template <class Cell>
class Backward {
 public:
  Backward(const Rnn& p, const RnnParts& parts, const RnnBackward& a)
      : p_(p), parts_(parts), a_(a), units_(padded(p.hidden)), outputs_(padded(p.output())), blocks_(units_ / kLanes),
        gate_row_(units_ * Cell::kGates),
        threads_(parts.count > 1 ? a.threads : rnn_threads<Cell>(p, parts.part[0], a.threads)), flags_(threads_) {}

  void run() {
    allocate();
    parallel(threads_, [&](int thread, int threads) {
      RnnTeam team(p_, flags_, thread, threads);
      pack_weights(thread, threads);
      team.meet_all();
      for (int64_t layer = p_.layers - 1; layer >= 0; --layer) {
        if (parts_.count == 1) {
          run_layer(team, parts_.part[0], part_at(0), layer);
        } else {
          for (int64_t i = thread; i < parts_.count; i += threads) {
            RnnTeam one(p_, flags_, 0, 1);  // who meets nobody
            run_layer(one, parts_.part[i], part_at(i), layer);
          }
        }
        team.meet_all();
        weight_gradients(layer, thread, threads);
        team.meet_all();
      }
    });
  }

 private:
  // Buffers of one part in one direction.
  struct Direction {
    float *incoming, *carry, *h_start, *c_start;  // [row]
    float *dh, *dhidden;                          // one step's [row]; the second below a projection
    float *dx, *dsum;                             // the gates' gradients [token], equal but for the GRU
    float *doutput;                               // with a projection [token]
    float *input;                                 // the layer's input in step order [token]
    float *grad_input;                            // [token]
  };
  struct Part {
    Direction direction[2];
    float* grad_below;  // with two directions: [token][direction][output]
    const float* kept;  // of the reserve
  };
  struct Packed {
    float *w_hh, *w_ih, *w_hr;
  };

  int64_t layer_room(int64_t layer) const { return padded(p_.layer_input(layer)); }
  int64_t widest() const { return p_.layers > 1 && layer_room(1) > layer_room(0) ? layer_room(1) : layer_room(0); }
  bool needs_input_gradient(int64_t layer) const { return layer > 0 || a_.grad_x; }

  int64_t part_floats(const RnnOrder& order) const {
    const int64_t projected = p_.projection ? 1 : 0;
    const int64_t each = order.rows * (3 * outputs_ + (2 + projected) * units_) +
                         order.tokens * (gate_row_ * (Cell::kTwoSums ? 2 : 1) + projected * outputs_ + 2 * widest()) + 11 * 16;
    return p_.directions * (each + (p_.directions == 2 ? order.tokens * p_.output() : 0)) + 16;
  }

  Part part_at(int64_t i) const {
    const RnnOrder& order = parts_.part[i];
    float* base = memory_;
    for (int64_t before = 0; before < i; ++before) base += part_floats(parts_.part[before]);
    RnnMemory memory{base};
    Part part{};
    for (int d = 0; d < p_.directions; ++d) {
      Direction& x = part.direction[d];
      x.incoming = memory.take(order.rows * outputs_);
      x.h_start = memory.take(order.rows * outputs_);
      x.dh = memory.take(order.rows * outputs_);
      x.carry = memory.take(order.rows * units_);
      x.c_start = memory.take(order.rows * units_);
      x.dhidden = p_.projection ? memory.take(order.rows * units_) : nullptr;
      x.dx = memory.take(order.tokens * gate_row_);
      x.dsum = Cell::kTwoSums ? memory.take(order.tokens * gate_row_) : x.dx;
      x.doutput = p_.projection ? memory.take(order.tokens * outputs_) : nullptr;
      x.input = memory.take(order.tokens * widest());
      x.grad_input = memory.take(order.tokens * widest());
    }
    if (p_.directions == 2) part.grad_below = memory.take(2 * order.tokens * p_.output());
    part.kept = a_.reserve + order.before * p_.layers * p_.directions * RnnLayout<Cell>(p_, 1).total;
    return part;
  }

  int64_t packed_floats(int64_t layer) const {
    return gate_row_ * (outputs_ + layer_room(layer)) + (p_.projection ? outputs_ * units_ : 0);
  }
  Packed packed(int64_t layer, int d) const {
    float* one = packs_ + (layer ? p_.directions * (packed_floats(0) + (layer - 1) * packed_floats(1)) + d * packed_floats(1)
                                 : d * packed_floats(0));
    return {one, one + gate_row_ * outputs_, one + gate_row_ * (outputs_ + layer_room(layer))};
  }

  void allocate() {
    int64_t floats = 0;
    for (int64_t i = 0; i < parts_.count; ++i) floats += part_floats(parts_.part[i]);
    memory_ = scratch_floats(Slot::other, floats);
    packs_ = scratch_floats(Slot::pack, p_.directions * (packed_floats(0) + (p_.layers > 1 ? (p_.layers - 1) * packed_floats(1) : 0)));
  }

  void pack_weights(int thread, int threads) const {
    for (int64_t layer = 0; layer < p_.layers; ++layer)
      for (int d = 0; d < p_.directions; ++d) {
        const interfuse_rnn_weights& w = a_.weights[layer * p_.directions + d];
        const Packed to = packed(layer, d);
        const auto pack = [&](const float* from, int64_t gates, int64_t units, int64_t columns, float* place) {
          pack_gates_transposed(from, gates, units, columns, share(padded(columns) / kLanes, thread, threads), place);
        };
        pack(w.w_hh, Cell::kGates, p_.hidden, p_.output(), to.w_hh);
        if (needs_input_gradient(layer)) pack(w.w_ih, Cell::kGates, p_.hidden, p_.layer_input(layer), to.w_ih);
        if (p_.projection) pack(w.w_hr, 1, p_.projection, p_.hidden, to.w_hr);
      }
  }

  // What forward kept of a part.
  struct Kept {
    const float *gates, *cell, *hidden, *output;
    int64_t gate_row;
  };
  Kept kept(const RnnOrder& order, const Part& part, int64_t layer, int d) const {
    const RnnLayout<Cell> keep(p_, order.tokens);
    const float* base = part.kept + (layer * p_.directions + d) * keep.total;
    return {base + keep.gates, base + keep.cell, base + keep.hidden, base + keep.output, keep.gate_row};
  }

  // One layer's steps, and the gradient that the layer below or the input gets.
  void run_layer(RnnTeam& team, const RnnOrder& order, const Part& part, int64_t layer) const {
    for (int d = 0; d < p_.directions; ++d)
      if (team.takes(d)) run_direction(team, order, part, layer, d);
    if (!needs_input_gradient(layer) || (layer > 0 && p_.directions == 1)) return;
    team.meet_all();
    merge_input_gradient(team.share_of_all(order.rows), order, part, layer);
  }

  void run_direction(RnnTeam& team, const RnnOrder& order, const Part& part, int64_t layer, int d) const {
    const Direction& x = part.direction[d];
    prepare(team, order, part, layer, d);
    team.arrive(d);
    for (int64_t s = order.steps - 1; s >= 0; --s) step(team, order, part, layer, d, s);
    team.wait(d);
    start_gradient(team, order, layer, d, x);
    if (!needs_input_gradient(layer)) return;
    const int64_t room = layer_room(layer);
    const Range mine = team.share(d, order.tokens);
    for (int64_t first = mine.begin; first < mine.end; first += kTokens) {
      Product q{};
      q.depth = gate_row_, q.a = x.dx + first * gate_row_, q.a_row = gate_row_, q.w = packed(layer, d).w_ih;
      q.c = x.grad_input + first * room, q.c_row = room;
      packed_product(kPlain, gate_row_, 0, q, mine.end - first < kTokens ? mine.end - first : kTokens, 0, room / kLanes);
    }
  }

  void prepare(const RnnTeam& team, const RnnOrder& order, const Part& part, int64_t layer, int d) const {
    const Direction& x = part.direction[d];
    const int64_t at = layer * p_.directions + d, size = p_.output();
    Range mine = team.share(d, order.rows);
    for (int64_t j = mine.begin; j < mine.end; ++j) {
      fetch(a_.grad_hn, at, size, order.row[j], x.incoming + j * outputs_, outputs_);
      fetch(a_.in->h0, at, size, order.row[j], x.h_start + j * outputs_, outputs_);
      fetch(a_.grad_cn, at, p_.hidden, order.row[j], x.carry + j * units_, units_);
      fetch(a_.in->c0, at, p_.hidden, order.row[j], x.c_start + j * units_, units_);
    }
    if (!a_.grad_weights[at].w_ih || direct_input(layer)) return;
    const RnnInput input{p_, order, a_.in, {layer ? kept(order, part, layer - 1, 0).output : nullptr,
                         layer && p_.directions == 2 ? kept(order, part, layer - 1, 1).output : nullptr}, outputs_};
    const int64_t depth = p_.layer_input(layer), room = layer_room(layer);
    for (int64_t s = 0; s < order.steps; ++s) {
      mine = team.share(d, order.active[s]);
      for (int64_t j = mine.begin; j < mine.end; ++j) {
        float* to = x.input + (order.first[s] + j) * room;
        input.copy(d, s, j, to);
        memset(to + depth, 0, static_cast<size_t>(room - depth) * 4);
      }
    }
  }
  bool direct_input(int64_t layer) const { return layer > 0 && p_.directions == 1; }

  void fetch(const float* from, int64_t at, int64_t size, int64_t row, float* to, int64_t room) const {
    memset(to, 0, static_cast<size_t>(room) * 4);
    if (from) memcpy(to, from + (at * p_.batch + row) * size, static_cast<size_t>(size) * 4);
  }

  // The gradient that reaches a token's output from above, or null; its floats beyond the output's size are none of ours.
  INTERFUSE_INLINE const float* from_above(const RnnOrder& order, const Part& part, int64_t layer, int d, int64_t s, int64_t j) const {
    const int64_t size = p_.output(), token = order.first[s] + j;
    if (layer + 1 < p_.layers)
      return p_.directions == 1 ? part.direction[0].grad_input + token * layer_room(layer + 1)
                                : part.grad_below + (token * 2 + d) * size;
    if (!a_.grad_y) return nullptr;
    const int64_t t = order.time_of(d, s, j), b = order.row[j];
    return a_.grad_y + ((p_.batch_first ? b * p_.steps + t : t * p_.batch + b) * p_.directions + d) * size;
  }
  // One vector of the gradient of an output of step s: from above, and from the step after or the caller.
  INTERFUSE_INLINE Vec output_gradient(const Direction& x, const float* above, int64_t j, int64_t column, bool continues) const {
    const Vec dh = load((continues ? x.dh : x.incoming) + j * outputs_ + column);
    if (!above) return dh;
    const int64_t left = p_.output() - column;
    return dh + (left >= kLanes ? load(above + column) : load_first(above + column, static_cast<int>(left)));
  }

  // dh of the first `rows` rows, unit blocks `mine`: the gates' gradients of step s, of those units `from` to `to`, times
  // the recurrent weight.
  INTERFUSE_INLINE void recurrent_product(const RnnOrder& order, const Direction& x, const float* w, int64_t s, int64_t rows,
                                          Range mine, int64_t from, int64_t to, bool add) const {
    if (rows == 0 || from >= to || mine.begin >= mine.end) return;
    Product q{};
    q.depth = (to - from) * Cell::kGates, q.a = x.dsum + order.first[s] * gate_row_ + from * Cell::kGates, q.a_row = gate_row_;
    q.w = w, q.c = x.dh, q.c_row = outputs_;
    if (add) q.start = q.c, q.start_row = q.c_row;
    packed_product(kPlain, gate_row_, from * Cell::kGates, q, rows, mine.begin, mine.end - mine.begin);
  }

  static Range whole_panels(const RnnTeam& team, int d, int64_t blocks) {
    const Range panels = team.share(d, (blocks + 3) / 4);
    return {panels.begin * 4, panels.end * 4 < blocks ? panels.end * 4 : blocks};
  }

  void step(RnnTeam& team, const RnnOrder& order, const Part& part, int64_t layer, int d, int64_t s) const {
    const Direction& x = part.direction[d];
    const float* w = packed(layer, d).w_hh;
    const int64_t going = order.active[s + 1];
    const Range mine = whole_panels(team, d, blocks_), out = whole_panels(team, d, outputs_ / kLanes);
    if (p_.projection) {
      team.wait(d);
      recurrent_product(order, x, w, s + 1, going, out, 0, units_, false);
      output_step(order, part, layer, d, s, out);
      team.meet(d);
      unproject(order, x, packed(layer, d).w_hr, s, mine);
    } else if (team.members(d) > 1) {
      // This thread's own units first: the others' arrive meanwhile.
      recurrent_product(order, x, w, s + 1, going, mine, mine.begin * kLanes, mine.end * kLanes, false);
      team.wait(d);
      recurrent_product(order, x, w, s + 1, going, mine, 0, mine.begin * kLanes, true);
      recurrent_product(order, x, w, s + 1, going, mine, mine.end * kLanes, units_, true);
    } else {
      recurrent_product(order, x, w, s + 1, going, mine, 0, units_, false);
    }
    pointwise(order, part, layer, d, s, mine);
    team.arrive(d);
  }

  // With a projection: the gradient of its result, for this step and for the weight's gradient.
  void output_step(const RnnOrder& order, const Part& part, int64_t layer, int d, int64_t s, Range mine) const {
    const Direction& x = part.direction[d];
    for (int64_t j = 0; j < order.active[s]; ++j) {
      const float* above = from_above(order, part, layer, d, s, j);
      for (int64_t block = mine.begin; block < mine.end; ++block) {
        const Vec dh = output_gradient(x, above, j, block * kLanes, j < order.active[s + 1]);
        store(x.doutput + (order.first[s] + j) * outputs_ + block * kLanes, dh);
      }
    }
  }

  // dhidden = doutput * w_hr.
  void unproject(const RnnOrder& order, const Direction& x, const float* w, int64_t s, Range mine) const {
    if (mine.begin >= mine.end) return;
    Product q{};
    q.depth = outputs_, q.a = x.doutput + order.first[s] * outputs_, q.a_row = outputs_, q.w = w;
    q.c = x.dhidden, q.c_row = units_;
    packed_product(kPlain, outputs_, 0, q, order.active[s], mine.begin, mine.end - mine.begin);
  }

  void pointwise(const RnnOrder& order, const Part& part, int64_t layer, int d, int64_t s, Range mine) const {
    const Direction& x = part.direction[d];
    const Kept saved = kept(order, part, layer, d);
    for (int64_t j = 0; j < order.active[s]; ++j) {
      const bool continues = j < order.active[s + 1];
      const int64_t token = order.first[s] + j, before = s ? order.first[s - 1] + j : 0;
      const float* above = p_.projection ? nullptr : from_above(order, part, layer, d, s, j);
      const float* c_row = saved.cell + token * units_;
      const float* c_before_row = s ? saved.cell + before * units_ : x.c_start + j * units_;
      const float* h_before_row = s ? saved.output + before * outputs_ : x.h_start + j * outputs_;
      for (int64_t block = mine.begin; block < mine.end; ++block) {
        const int64_t column = block * kLanes;
        float* carried = x.carry + j * units_ + column;
        Vec dh = p_.projection ? load(x.dhidden + j * units_ + column) : output_gradient(x, above, j, column, continues);
        Vec carry = Cell::kCarry ? load(carried) : zero();
        // A carry beside h belongs to h: it is part of its gradient. (The LSTM's belongs to c.)
        if (Cell::kCarry && !Cell::kCell && continues) dh += carry;
        const Vec c = Cell::kCell ? load(c_row + column) : zero(), c_before = Cell::kCell ? load(c_before_row + column) : zero();
        const Vec h_before = Cell::kTwoSums ? load(h_before_row + column) : zero();
        Vec dx[Cell::kGates], dsum[Cell::kGates];
        Cell::backward(dh, carry, c, c_before, h_before, saved.gates + token * saved.gate_row + column * Cell::kSlots, dx, dsum);
        if (Cell::kCarry) store(carried, carry);
        const int64_t to = token * gate_row_ + column * Cell::kGates;
        for (int g = 0; g < Cell::kGates; ++g) {
          store(x.dx + to + g * kLanes, dx[g]);
          if (Cell::kTwoSums) store(x.dsum + to + g * kLanes, dsum[g]);
        }
      }
    }
  }

  // Of h0 and c0: what a step before the first would have received.
  void start_gradient(RnnTeam& team, const RnnOrder& order, int64_t layer, int d, const Direction& x) const {
    const int64_t at = layer * p_.directions + d, size = p_.output(), started = order.steps ? order.active[0] : 0;
    const Range mine = team.share(d, order.rows);
    for (int64_t j = mine.begin; j < mine.end && a_.grad_c0 && Cell::kCell; ++j)
      memcpy(a_.grad_c0 + (at * p_.batch + order.row[j]) * p_.hidden, x.carry + j * units_, static_cast<size_t>(p_.hidden) * 4);
    if (!a_.grad_h0) return;
    const Range out = whole_panels(team, d, outputs_ / kLanes);
    recurrent_product(order, x, packed(layer, d).w_hh, 0, started, out, 0, units_, false);
    for (int64_t j = 0; j < order.rows; ++j)
      for (int64_t column = out.begin * kLanes; column < out.end * kLanes; column += kLanes) {
        Vec dh = load((j < started ? x.dh : x.incoming) + j * outputs_ + column);
        if (Cell::kCarry && !Cell::kCell && j < started) dh += load(x.carry + j * units_ + column);
        const int64_t left = size - column;
        store_first(a_.grad_h0 + (at * p_.batch + order.row[j]) * size + column, dh, left < kLanes ? static_cast<int>(left) : kLanes);
      }
  }

  // What the directions give to the layer's input, added up: for the layer below in its directions' step order, for the
  // first layer in the caller's order.
  void merge_input_gradient(Range mine, const RnnOrder& order, const Part& part, int64_t layer) const {
    const int64_t depth = p_.layer_input(layer), room = layer_room(layer), size = p_.output();
    for (int64_t j = mine.begin; j < mine.end; ++j)
      for (int64_t t = 0; t < p_.steps; ++t) {
        const int64_t end = order.length[j] - 1, row = order.row[j];
        float* x_row = layer ? nullptr : a_.grad_x + (p_.batch_first ? row * p_.steps + t : t * p_.batch + row) * depth;
        if (t > end) {
          if (x_row) memset(x_row, 0, static_cast<size_t>(depth) * 4);
          continue;
        }
        const float* one = part.direction[0].grad_input + (order.first[t] + j) * room;
        if (p_.directions == 1) {
          memcpy(x_row, one, static_cast<size_t>(depth) * 4);
          continue;
        }
        const float* two = part.direction[1].grad_input + (order.first[end - t] + j) * room;
        for (int d = 0; d < (layer ? 2 : 1); ++d) {
          float* to = x_row ? x_row : part.grad_below + ((order.first[d == 0 ? t : end - t] + j) * 2 + d) * size;
          const int64_t from = d * size, count = x_row ? depth : size;
          for (int64_t i = 0; i < count; ++i) to[i] = one[from + i] + two[from + i];
        }
      }
  }

  // This thread's share of the gradients of one layer's weights.
  void weight_gradients(int64_t layer, int thread, int threads) const {
    for (int d = 0; d < p_.directions; ++d) {
      const interfuse_rnn_weights& grad = a_.grad_weights[layer * p_.directions + d];
      const bool same = !Cell::kTwoSums;  // one sum serves both biases
      const OuterTarget w_ih{Cell::kGates, p_.hidden, p_.layer_input(layer), gate_row_, grad.w_ih, grad.b_ih, same ? grad.b_hh : nullptr};
      const OuterTarget w_hh{Cell::kGates, p_.hidden, p_.output(), gate_row_, grad.w_hh, same ? nullptr : grad.b_hh, nullptr};
      const OuterTarget w_hr{1, p_.projection, p_.hidden, outputs_, grad.w_hr, nullptr, nullptr};
      const Range mine = share(blocks_, thread, threads);
      outer(w_ih, layer, d, Factor::input, mine);
      outer(w_hh, layer, d, Factor::before, mine);
      outer(w_hr, layer, d, Factor::hidden, share(outputs_ / kLanes, thread, threads));
    }
  }

  enum class Factor { input, before, hidden };  // what the gradients are multiplied by: x, the h before, the projected h

  void outer(const OuterTarget& to, int64_t layer, int d, Factor factor, Range mine) const {
    if ((!to.weight && !to.bias && !to.other_bias) || mine.begin >= mine.end) return;
    const float* columns[kOuterTokens];
    bool first = true;
    for (int64_t i = 0; i < parts_.count; ++i) {
      const RnnOrder& order = parts_.part[i];
      const Part part = part_at(i);
      const Direction& x = part.direction[d];
      const Kept saved = kept(order, part, layer, d);
      const float* input = direct_input(layer) ? kept(order, part, layer - 1, 0).output : x.input;
      const float* grads = factor == Factor::input ? x.dx : factor == Factor::before ? x.dsum : x.doutput;
      int64_t s = 0;
      for (int64_t begin = 0; begin < order.tokens; begin += kOuterTokens) {
        const int64_t count = order.tokens - begin < kOuterTokens ? order.tokens - begin : kOuterTokens;
        for (int64_t n = 0; n < count; ++n) {
          const int64_t token = begin + n;
          while (order.first[s + 1] <= token) ++s;
          const int64_t j = token - order.first[s];
          columns[n] = factor == Factor::input    ? input + token * layer_room(layer)
                       : factor == Factor::hidden ? saved.hidden + token * units_
                       : s                        ? saved.output + (order.first[s - 1] + j) * outputs_
                                                  : x.h_start + j * outputs_;
        }
        outer_product(to, {grads + begin * to.grads_row, count, columns}, mine, first);
        first = false;
      }
    }
    if (first) outer_product(to, {memory_, 0, columns}, mine, true);  // no token: zeros
  }

  const Rnn& p_;
  const RnnParts& parts_;
  const RnnBackward& a_;
  const int64_t units_, outputs_, blocks_, gate_row_;
  const int threads_;
  float *memory_ = nullptr, *packs_ = nullptr;
  RnnFlags flags_;
};

struct BackwardOf {
  const Rnn& p;
  const RnnParts& parts;
  const RnnBackward& a;
  template <class Cell>
  void run() {
    Backward<Cell>(p, parts, a).run();
  }
};

}  // namespace

void rnn_backward(const Rnn& p, const RnnParts& parts, const RnnBackward& a) {
  BackwardOf body{p, parts, a};
  for_cell(p.cell, body);
}

}  // namespace INTERFUSE_ISA
}  // namespace interfuse
